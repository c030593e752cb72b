"""Where things lie: slots with offsets, permanent ones first; and what brings permanent weights there before the first pass."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from klotski_compiler.ops import Load, Op, Pages, Slot, Tensor, align_up
from klotski_compiler.passes.slots import Pool, staged
from klotski_compiler.program import Evict, staging_slots
from klotski_compiler.tensors import TensorTable

LOAD_BYTES = 32 << 20  # a load aims at this many bytes: below, latency and per-op cost show


def most_pages(nbytes: int) -> int:
    """Pages that a weight may be cut into: none of them is smaller than what a load aims at."""
    return max(1, nbytes // LOAD_BYTES)


@dataclass(slots=True)
class Arena:
    """Slots with offsets: permanent ones first; the phases then share the room after them, one phase at a time.

    permanent: where that room begins in each tier. most: where what any phase needs ends.
    """

    slots: list[Slot]
    permanent: Counter[str]
    most: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self.most = Counter(self.permanent)

    def phase(
        self,
        staging: Sequence[int],
        exchanged: Sequence[tuple[str, Tensor]],
        pools: Sequence[Pool],
        states: Sequence[Tensor],
        tier: str,
    ) -> list[tuple[int, int]]:
        """Lay out what one phase needs after the permanent slots: host slots that many tensors pass through, exchanges by tier, pools,
        states. Returns (tensor, slot) of what keeps its place."""
        end, found = Counter(self.permanent), []
        for nbytes in staging:
            self._add("host", end, nbytes)
        for where, tensor in exchanged:
            found.append((tensor.id, len(self.slots)))
            self._add(where, end, align_up(tensor.nbytes))
        for pool in pools:
            for member in pool.members:
                assert member == len(self.slots)
                self._add(pool.tier, end, align_up(pool.nbytes))
        for state in states:
            found.append((state.id, len(self.slots)))
            self._add(tier, end, align_up(state.nbytes))
        self.most |= end
        return found

    def _add(self, tier: str, end: Counter[str], nbytes: int) -> None:
        self.slots.append(Slot(len(self.slots), tier, end[tier], nbytes))
        end[tier] += nbytes


def permanent_slots(table: TensorTable, compute_tier: str) -> tuple[dict[tuple[str, int], int], Arena]:
    """Slots that are never reused: residents in the compute tier, and everything else in host memory where that is its home, or that
    of all its pages but the last."""
    fixed: dict[tuple[str, int], int] = {}
    slots_: list[Slot] = []
    end = Counter[str]()
    resident = set(table.resident)
    for tensor in table.all:
        tier, near = compute_tier if tensor.id in resident else tensor.home, None
        if tier == "disk" and (near := table.near(tensor)):
            tier = "host"
        if tensor.kind == "pick" or (tier != compute_tier and tier != "host"):
            continue
        room = tensor.room(near)
        fixed[tier, tensor.id] = len(slots_)
        slots_.append(Slot(len(slots_), tier, end[tier], room))
        end[tier] += room
    return fixed, Arena(slots_, end)


def residents(table: TensorTable, fixed: dict[tuple[str, int], int], staging: int) -> list[Op | Evict]:
    """Read every permanent weight from the checkpoint, small ones together; towards a GPU through ``staging`` slots in host memory."""
    entries: list[Op | Evict] = []
    there: deque[Evict] = deque()
    for tier, group in _together(table, fixed):
        for pages in _cut(table, tier, group):
            entries.append(Load("disk>host", "disk>host", group, pages=pages))
            if tier == "gpu":
                entries.append(Load("host>gpu", "host>gpu", group, pages=pages))
                there.append(Evict("host", group, pages))
            if len(there) >= staging:
                entries.append(there.popleft())
    return [*entries, *there]


def _cut(table: TensorTable, tier: str, group: tuple[int, ...]) -> list[Pages | None]:
    """The pages in which what is permanent is loaded: on its way to a GPU none larger than others that pass, so that all take turns in the
    same small staging slots; in host memory what of an expert on disk lives there."""
    first = table.all[group[0]]
    if tier == "host":
        return [table.near(first)]
    if tier != "gpu" or first.nbytes <= LOAD_BYTES:
        return [None]
    most = table.passing_bytes if table.decision.far else max(LOAD_BYTES, table.passing_bytes)
    count = -(-first.slot_bytes // most)
    return [Pages(i, i + 1, count) for i in range(count)] if count > 1 else [None]


def staging_places(table: TensorTable, first: int) -> tuple[dict[tuple[str, int], int], list[int]]:
    """Host slots, numbered from ``first``, through which the large residents of a GPU are loaded in turn, whatever their kind: place
    of each of them, and sizes. Small ones travel in groups, whose places are found as those of streamed weights are."""
    on_gpu = table.compute_tier == "gpu"
    large = (
        [t for t in table.resident if table.all[t].nbytes > LOAD_BYTES and table.all[t].kind != "kv"] if on_gpu else []
    )
    moved = [(t, pages) for t in large for pages in _cut(table, "gpu", (t,))]
    room = max((table.all[t].room(pages) for t, pages in moved), default=0)
    count = min(len(moved), staging_slots(table.decision))
    return {(staged("host", pages), t): first + i % count for i, (t, pages) in enumerate(moved)}, [room] * count


def _together(table: TensorTable, fixed: dict[tuple[str, int], int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What is permanent in groups of one tier, kind and home of at most ``LOAD_BYTES``, a larger tensor alone."""
    weights = [(tier, table.all[number]) for tier, number in fixed if table.all[number].kind != "kv"]
    weights.sort(key=lambda entry: entry[0] == "host" and table.near(entry[1]) is not None)
    for (tier, *_), run in groupby(weights, key=lambda entry: (entry[0], entry[1].kind, entry[1].home)):
        group, nbytes = list[int](), 0
        for _, tensor in run:
            if group and nbytes + tensor.nbytes > LOAD_BYTES:
                yield tier, tuple(group)
                group, nbytes = [], 0
            group.append(tensor.id)
            nbytes += tensor.nbytes
        yield tier, tuple(group)
