"""From a decision to proved phases: build -> slots -> depend -> waits -> schedule, for the load of residents, prefill and decode."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, Workload
from klotski_compiler.ops import (
    ALL,
    Bind,
    Compute,
    Load,
    Op,
    Pages,
    Slot,
    Step,
    Store,
    Tensor,
    align_up,
    op_text,
    step_text,
)
from klotski_compiler.passes.critical import critical_us
from klotski_compiler.passes.depend import cells_of, depend
from klotski_compiler.passes.slots import Placed, Pool, slots, staged
from klotski_compiler.passes.waits import waits
from klotski_compiler.plan import Phase
from klotski_compiler.policies import policy
from klotski_compiler.program import Evict, Program, staging_slots
from klotski_compiler.shape import Shape, shapes
from klotski_compiler.simulate import PhaseTimes, Rounds, rolled, simulate
from klotski_compiler.tensors import TensorTable
from klotski_compiler.workspace import workspace

LOAD_BYTES = 32 << 20  # a load aims at this many bytes: below, latency and per-op cost show
PASSES = ("build", "slots", "depend", "waits", "schedule")


def most_pages(nbytes: int) -> int:
    """Pages that a weight may be cut into: none of them is smaller than what a load aims at."""
    return max(1, nbytes // LOAD_BYTES)


@dataclass(slots=True)
class LoweredPhase:
    """One phase after all passes. ``placed``: tensors that keep one slot during it. ``critical_us``: of all its passes."""

    shape: Shape
    steps: list[Step]
    times: PhaseTimes
    placed: list[tuple[int, int]]
    critical_us: float
    link_bytes: Counter[str]


@dataclass(slots=True)
class Lowered:
    """A whole schedule: what a plan holds, before it is written down. peak_bytes: per tier, workspace included."""

    tensors: list[Tensor]
    slots: list[Slot]
    placed: list[tuple[int, int]]
    phases: dict[str, LoweredPhase]
    workspace: dict[str, dict[str, int]]
    peak_bytes: dict[str, int]
    groups: int
    dumps: dict[str, list[str]] = field(default_factory=dict)

    @property
    def group_us(self) -> float:
        """Prefill and decode of one full group."""
        return sum(phase.times.total_us for name, phase in self.phases.items() if name != "load")

    @property
    def busiest_us(self) -> float:
        """What prefill and decode of one full group take at least: each its busiest stream, or its longest chain of ops."""
        work = (phase for name, phase in self.phases.items() if name != "load")
        return sum(max(phase.critical_us, *phase.times.busy_us.values()) for phase in work)

    @property
    def slowest_us(self) -> float:
        """The longest pass in which sequences decode."""
        phases = [p for p in self.phases.values() if p.shape.batches and p.shape.decodes(p.shape.batches - 1)]
        return max((p.times.slowest_us for p in phases), default=0.0)

    @property
    def load_us(self) -> float:
        """Loading what is resident."""
        return self.phases["load"].times.total_us


def lower(
    cost: Cost,
    policy_name: str,
    decision: Decision,
    workload: Workload,
    dump_after: str = "",
    quick: bool = False,
    timed: bool = True,
) -> Lowered:
    """Run all passes. Raises PlanError where the policy's program is not sound.

    quick: time three positions only; leave out the times of ops, the critical path, link bytes, and the load of residents but for its time.
    timed: else nothing is: only what has which slot is found out. dump_after: the pass after which to keep the program's text.
    """
    compute_tier = cost.hardware.compute_tier
    table = TensorTable(cost.spec, decision, workload, cost.dtype, compute_tier)
    fixed, arena = _permanent(table, compute_tier)
    placed = [(tensor, slot) for (_, tensor), slot in fixed.items()]
    out = Lowered(table.all, [], placed, {}, workspace(cost, decision, workload), {}, 0)

    load_shape = Shape(
        name="load", passes=1, batches=0, batch_size=0, tokens=0, first_context=0, last_context=0, attention_batch=1
    )
    loads = _residents(table, fixed, staging_slots(decision))
    if quick:
        out.phases["load"] = _rough_load(cost, table, load_shape, loads)
    else:
        out.phases["load"] = _phase(cost, table, load_shape, loads, fixed, arena, out, timed=timed)
    rounds = Rounds(decision.cohorts(workload.num_sequences), decision.prefill_groups) if decision.rolling else None
    for shape in shapes(decision, workload):
        if shape.passes == 0:
            continue
        program = Program(cost, table, shape)
        policy(policy_name).build(program)
        out.phases[shape.name] = _phase(
            cost, table, shape, program.finish(), fixed, arena, out, program.late, dump_after, quick, timed, rounds
        )
    out.slots = arena.slots
    out.groups = 1 if decision.rolling else decision.rounds(workload.num_sequences)
    for tier in sorted(arena.most.keys() | out.workspace.keys()):
        out.peak_bytes[tier] = arena.most[tier] + sum(out.workspace.get(tier, {}).values())
    return out


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


def _permanent(table: TensorTable, compute_tier: str) -> tuple[dict[tuple[str, int], int], Arena]:
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


def _residents(table: TensorTable, fixed: dict[tuple[str, int], int], staging: int) -> list[Op | Evict]:
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


def _staged(table: TensorTable, first: int) -> tuple[dict[tuple[str, int], int], list[int]]:
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


def _rough_load(cost: Cost, table: TensorTable, shape: Shape, loads: Sequence[Op | Evict]) -> LoweredPhase:
    """The load of residents as the work of its busiest link, or of both where they take turns."""
    busy = defaultdict[str, float](float)
    for op in loads:
        if isinstance(op, Load):
            busy[op.stream] += cost.op_us(op, table.all, shape, 0, {})
    most = sum if staging_slots(table.decision) == 1 else max
    total = float(most(busy.values()) if busy else 0)
    return LoweredPhase(shape, [], PhaseTimes(total, total, []), [], total, Counter())


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


def _phase(
    cost: Cost,
    table: TensorTable,
    shape: Shape,
    entries: list[Op | Evict],
    fixed: dict[tuple[str, int], int],
    arena: Arena,
    out: Lowered,
    late: dict[int, list[int]] | None = None,
    dump_after: str = "",
    quick: bool = False,
    timed: bool = True,
    rounds: Rounds | None = None,
) -> LoweredPhase:
    states = [table.add_state(shape.name, shape.scope_tokens(ALL))] if shape.tokens else []
    exchanged = _exchanged(table, shape)
    passing, staging = _staged(table, len(arena.slots)) if shape.name == "load" else ({}, [])
    first = len(arena.slots) + len(staging)
    kept = fixed | passing | {(tier, tensor.id): first + i for i, (tier, tensor) in enumerate(exchanged)}
    processors = {name: processor.tier for name, processor in cost.hardware.processors.items()}
    ops, pools = slots(entries, table.all, kept, processors, first + len(exchanged))
    renumbered = _renumber(ops, pools, first + len(exchanged))
    placed = arena.phase(staging, exchanged, pools, states, cost.hardware.compute_tier)
    if not timed:
        steps = [Step(op, into, sources, (), 0, 0) for op, into, sources in renumbered]
        return LoweredPhase(shape, steps, PhaseTimes(0, 0, []), placed, 0, Counter())
    # With no pass between the rounds these follow one another as passes of one phase, in which KV changes hands.
    place = table.decision.place if rounds and shape.stride == 1 else None
    replays = rounds.count if rounds and place else shape.passes
    homes = {slot: table.all[tensor] for (_, tensor), slot in fixed.items() if table.all[tensor].kind == "kv"}
    cells = [cells_of(p, table.all, shape.batches, homes) for p in renumbered]
    after = waits(renumbered, depend(renumbered, cells, replays, place))
    steps = [Step(p.op, p.slots, p.sources, w, 0, 0) for p, w in zip(renumbered, after, strict=True)]
    prices = _Prices(cost, table.all, shape, steps, late or {}, rounds)
    times = prices.timed(quick)
    if slower := cost.sharing(
        {stream: busy / times.total_us for stream, busy in times.busy_us.items() if times.total_us}
    ):
        prices.slower = slower
        times = prices.timed(quick)
    if not quick:
        steps = [s._replace(start_us=round(a), end_us=round(b)) for s, (a, b) in zip(steps, times.steps, strict=True)]
    if dump_after:
        out.dumps[shape.name] = _dump(dump_after, entries, steps, [t.name for t in table.all])
    chain = 0.0 if quick else critical_us(cells, prices.middle())
    repeats = shape.passes if shape.name == "decode" else 1  # sub-groups of prefill do not depend on one another
    moved = Counter[str]() if quick else prices.moved_bytes()
    return LoweredPhase(replace(shape, passes=replays), steps, times, placed, chain * repeats, moved)


class _Prices:
    """Times of a phase's ops, by the position or, in rolling order, by the round of the workload. slower: how many times as long
    ops take on each stream."""

    def __init__(
        self,
        cost: Cost,
        tensors: list[Tensor],
        shape: Shape,
        steps: Sequence[Step],
        late: dict[int, list[int]],
        rounds: Rounds | None,
    ) -> None:
        self.cost, self.tensors, self.shape, self.steps, self.late = cost, tensors, shape, steps, late
        self.rounds = rounds
        self.slower: dict[str, float] = {}
        self._rounds: dict[int, list[float]] = {}
        self._context = shape.middle_context
        if rounds:
            return
        self._first = self._priced(shape, shape.first_context)
        grows = shape.last_context > shape.first_context
        growing = [n for n, s in enumerate(steps) if grows and _grows(s.op, tensors)]
        self._growth = {n: self._op_us(steps[n].op, shape, shape.last_context) - self._first[n] for n in growing}

    def timed(self, quick: bool) -> PhaseTimes:
        """All passes of the phase: of one group or, in rolling order, of the workload."""
        processor = self.cost.processor_name
        if self.rounds:
            passes = 0 if self.shape.stride == 1 else self.shape.passes
            return rolled(self.steps, self.rounds, passes, processor, self.in_round, quick)
        return simulate(self.steps, self.shape.passes, processor, self.at, quick)

    def at(self, position: float) -> list[float]:
        """Op times that far on the way from the first to the last pass."""
        now = list(self._first)
        for n, more in self._growth.items():
            now[n] += position * more
        return self._slowed(now)

    def in_round(self, k: int) -> list[float]:
        """Op times in the middle of round k."""
        assert self.rounds
        if k not in self._rounds:
            self._rounds[k] = self._priced(self.shape.with_ages(self.rounds.there(k)), self._context)
        return self._slowed(self._rounds[k])

    def middle(self) -> list[float]:
        """Op times that stand for all."""
        return self.in_round(self.rounds.full) if self.rounds else self.at(0.5)

    def moved_bytes(self) -> Counter[str]:
        """What crosses each link in all passes."""
        seen = [(self.shape, float(self.shape.passes))]
        if rounds := self.rounds:
            weights = rounds.weights(rounds.samples())
            seen = [(self.shape.with_ages(rounds.there(k)), n * self.shape.passes) for k, n in weights.items()]
        moved = Counter[str]()
        for step in self.steps:
            if isinstance(op := step.op, Load | Store):
                each = (n * self.cost.moved_bytes(op, self.tensors, s, self._context, self.late) for s, n in seen)
                moved[op.link] += round(sum(each))
        return moved

    def _slowed(self, times: list[float]) -> list[float]:
        if not self.slower:
            return times
        return [us * self.slower.get(step.op.stream, 1.0) for us, step in zip(times, self.steps, strict=True)]

    def _priced(self, shape: Shape, context: float) -> list[float]:
        return [self._op_us(step.op, shape, context) for step in self.steps]

    def _op_us(self, op: Op, shape: Shape, context: float) -> float:
        return self.cost.op_us(op, self.tensors, shape, context, self.late)


def _exchanged(table: TensorTable, shape: Shape) -> list[tuple[str, Tensor]]:
    """What GPU and CPU exchange in this phase, by tier."""
    if not shape.decodes(shape.batches - 1):
        return []
    kinds = ("query", "rows", "sums") if shape.decoding else ("query",)
    chosen = [(tier, table.all[number]) for tier, number in sorted(table.exchanged)]
    return [(tier, tensor) for tier, tensor in chosen if tensor.kind in kinds]


def _grows(op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether an op's time depends on the position: attention, and KV on its way."""
    if isinstance(op, Compute):
        return op.fn in ("attention", "attend")
    return not isinstance(op, Bind) and tensors[op.tensors[0]].kind == "kv"


def _renumber(ops: list[Placed], pools: Sequence[Pool], first: int) -> list[Placed]:
    """Slots in pool order, so that a pool is one range of the arena."""
    order = {old: first + new for new, old in enumerate(m for pool in pools for m in pool.members)}
    for new, pool in zip(_ranges(pools, first), pools, strict=True):
        pool.members = new
    now = order.get
    return [Placed(op, tuple([now(s, s) for s in to]), tuple([now(s, s) for s in source])) for op, to, source in ops]


def _ranges(pools: Sequence[Pool], first: int) -> list[list[int]]:
    out = []
    for pool in pools:
        out.append(list(range(first, first + len(pool.members))))
        first += len(pool.members)
    return out


def _dump(after: str, entries: Sequence[Op | Evict], steps: Sequence[Step], names: list[str]) -> list[str]:
    """The program as text after a pass: ``build`` shows evictions, ``slots`` slots, ``waits`` waits, ``schedule`` times."""
    if after == "build":
        return [
            f"evict {staged(e.tier, e.pages)} {' '.join(names[t] for t in e.tensors)}"
            if isinstance(e, Evict)
            else op_text(e, names)
            for e in entries
        ]
    kept = [s if after in ("waits", "schedule") else s._replace(waits=()) for s in steps]
    lines = [f"{n} {step_text(s, names)}" for n, s in enumerate(kept)]
    return lines if after == "schedule" else [line.rpartition(" @")[0] for line in lines]


def phase_record(phase: LoweredPhase, names: list[str]) -> Phase:
    """The phase as ``plan.json`` holds it."""
    return Phase(
        name=phase.shape.name,
        passes=phase.shape.passes,
        batches=phase.shape.batches,
        placed=tuple(phase.placed),
        lines=tuple(step_text(s, names) for s in phase.steps),
    )
