"""From a decision to proved phases: build -> slots -> depend -> waits -> schedule, for the load of residents, prefill and decode."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from klotski_compiler.cost import Cost, Shape
from klotski_compiler.passes.critical import critical_us
from klotski_compiler.passes.depend import cells_of, depend
from klotski_compiler.passes.slots import Placed, Pool, slots
from klotski_compiler.passes.waits import waits
from klotski_compiler.plan import (
    Bind,
    Compute,
    Decision,
    Load,
    Op,
    Phase,
    Slot,
    Step,
    Store,
    Tensor,
    Workload,
    align_up,
    op_text,
    step_text,
)
from klotski_compiler.policies import policy
from klotski_compiler.program import Evict, Program, staging_slots
from klotski_compiler.simulate import PhaseTimes, simulate
from klotski_compiler.tensors import TensorTable
from klotski_compiler.workspace import workspace

LOAD_BYTES = 32 << 20  # a load aims at this many bytes: below, latency and per-op cost show
PASSES = ("build", "slots", "depend", "waits", "schedule")


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
    def load_us(self) -> float:
        """Loading what is resident."""
        return self.phases["load"].times.total_us


def shapes(decision: Decision, workload: Workload) -> tuple[Shape, Shape]:
    """Prefill (one pass per sub-group) and decode (one pass per further token; prefill yields the first)."""
    prompt, batch = workload.prompt_len, decision.batch_size
    last = prompt + workload.gen_len - 1
    parts = decision.prefill_groups
    prefill = Shape(
        "prefill", parts, -(-decision.num_batches // parts), batch, prompt, prompt, prompt, decision.attention_batch
    )
    decode = Shape(
        "decode", workload.gen_len - 1, decision.num_batches, batch, 1, prompt + 1, last, decision.decode_batch
    )
    return prefill, decode


def lower(
    cost: Cost, policy_name: str, decision: Decision, workload: Workload, dump_after: str = "", quick: bool = False
) -> Lowered:
    """Run all passes. Raises PlanError where the policy's program is not sound.

    quick: time three positions only; leave out the critical path, and the load of residents but for its time. dump_after: the pass
    after which to keep the program's text.
    """
    compute_tier = cost.hardware.compute_tier
    table = TensorTable(cost.spec, decision, workload, cost.dtype, compute_tier)
    fixed, fixed_slots = _permanent(table, compute_tier)
    placed = [(tensor, slot) for (_, tensor), slot in fixed.items()]
    out = Lowered(table.all, [], placed, {}, workspace(cost, decision, workload), {}, 0)
    arena = Arena(fixed_slots)

    load_shape = Shape("load", 1, 0, 0, 0, 0, 0, 1)
    loads = _residents(table, fixed, staging_slots(decision))
    if quick:
        out.phases["load"] = _rough_load(cost, table, load_shape, loads)
    else:
        out.phases["load"] = _phase(cost, table, load_shape, loads, fixed, arena, out)
    for shape in shapes(decision, workload):
        if shape.passes == 0:
            continue
        program = Program(cost, table, shape)
        policy(policy_name).build(program)
        out.phases[shape.name] = _phase(
            cost, table, shape, program.finish(), fixed, arena, out, program.late, dump_after, quick
        )
    out.slots = arena.slots
    out.groups = -(-workload.num_sequences // decision.sequences)
    for tier in sorted({slot.tier for slot in arena.slots} | set(out.workspace)):
        end = max((s.offset + s.nbytes for s in arena.slots if s.tier == tier), default=0)
        out.peak_bytes[tier] = end + sum(out.workspace.get(tier, {}).values())
    return out


@dataclass(slots=True)
class Arena:
    """Slots with offsets: permanent ones first; the phases then share the room after them, one phase at a time."""

    slots: list[Slot]

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
        end = Counter[str]()
        for slot in self.slots:
            if slot.id < self.permanent:
                end[slot.tier] = max(end[slot.tier], slot.offset + slot.nbytes)
        found = []
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
        return found

    permanent: int = field(init=False)

    def __post_init__(self) -> None:
        self.permanent = len(self.slots)

    def _add(self, tier: str, end: Counter[str], nbytes: int) -> None:
        self.slots.append(Slot(len(self.slots), tier, end[tier], nbytes))
        end[tier] += nbytes


def _permanent(table: TensorTable, compute_tier: str) -> tuple[dict[tuple[str, int], int], list[Slot]]:
    """Slots that are never reused: residents in the compute tier, and everything else in host memory where that is its home."""
    fixed: dict[tuple[str, int], int] = {}
    slots_: list[Slot] = []
    end = Counter[str]()
    resident = set(table.resident)
    for tensor in table.all:
        tier = compute_tier if tensor.id in resident else tensor.home
        if tensor.kind == "pick" or (tier != compute_tier and tier != "host"):
            continue
        fixed[tier, tensor.id] = len(slots_)
        slots_.append(Slot(len(slots_), tier, end[tier], tensor.slot_bytes))
        end[tier] += tensor.slot_bytes
    return fixed, slots_


def _residents(table: TensorTable, fixed: dict[tuple[str, int], int], staging: int) -> list[Op | Evict]:
    """Read every permanent weight from the checkpoint, small ones together; towards a GPU through ``staging`` slots in host memory."""
    entries: list[Op | Evict] = []
    staged: deque[tuple[int, ...]] = deque()
    for tier, group in _together(table, fixed):
        entries.append(Load("disk>host", "disk>host", group))
        if tier == "gpu":
            entries.append(Load("host>gpu", "host>gpu", group))
            staged.append(group)
        if len(staged) >= staging:
            entries.append(Evict("host", staged.popleft()))
    return [*entries, *(Evict("host", group) for group in staged)]


def _staged(table: TensorTable, first: int) -> tuple[dict[tuple[str, int], int], list[int]]:
    """Host slots, numbered from ``first``, through which the large residents of a GPU are loaded in turn, whatever their kind: place
    of each of them, and sizes. Small ones travel in groups, whose places are found as those of streamed weights are."""
    on_gpu = table.compute_tier == "gpu"
    large = (
        [t for t in table.resident if table.all[t].nbytes > LOAD_BYTES and table.all[t].kind != "kv"] if on_gpu else []
    )
    room = max((table.all[t].slot_bytes for t in large), default=0)
    count = min(len(large), staging_slots(table.decision))
    return {("host", t): first + i % count for i, t in enumerate(large)}, [room] * count


def _rough_load(cost: Cost, table: TensorTable, shape: Shape, loads: Sequence[Op | Evict]) -> LoweredPhase:
    """The load of residents as the work of its busiest link, or of both where they take turns."""
    busy = Counter[str]()
    for op in loads:
        if isinstance(op, Load):
            busy[op.stream] += cost.op_us(op, table.all, shape, 0, {})  # type: ignore[assignment]
    most = sum if staging_slots(table.decision) == 1 else max
    total = float(most(busy.values()) if busy else 0)
    return LoweredPhase(shape, [], PhaseTimes(total, total, []), [], total, Counter())


def _together(table: TensorTable, fixed: dict[tuple[str, int], int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What is permanent in groups of one tier and kind of at most ``LOAD_BYTES``, a larger tensor alone."""
    weights = [(tier, table.all[number]) for tier, number in fixed if table.all[number].kind != "kv"]
    for (tier, _), run in groupby(weights, key=lambda entry: (entry[0], entry[1].kind)):
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
) -> LoweredPhase:
    states = [table.state(shape.name, shape.sequences * shape.tokens)] if shape.tokens else []
    exchanged = _exchanged(table, shape)
    staged, staging = _staged(table, len(arena.slots)) if shape.name == "load" else ({}, [])
    place = len(arena.slots) + len(staging)
    kept = fixed | staged | {(tier, tensor.id): place + i for i, (tier, tensor) in enumerate(exchanged)}
    processors = {name: processor.tier for name, processor in cost.hardware.processors.items()}
    ops, pools = slots(entries, table.all, kept, processors, place + len(exchanged))
    renumbered = _renumber(ops, pools, place + len(exchanged))
    placed = arena.phase(staging, exchanged, pools, states, cost.hardware.compute_tier)
    cells = [cells_of(p, table.all, shape.batches) for p in renumbered]
    after = waits(renumbered, depend(renumbered, cells, shape.passes))
    steps = [Step(p.op, p.slots, p.sources, w, 0, 0) for p, w in zip(renumbered, after, strict=True)]
    first = [cost.op_us(s.op, table.all, shape, shape.first_context, late or {}) for s in steps]
    growth = {
        n: cost.op_us(s.op, table.all, shape, shape.last_context, late or {}) - first[n]
        for n, s in enumerate(steps)
        if shape.last_context > shape.first_context and _grows(s.op, table.all)
    }

    def durations(at: float) -> list[float]:
        now = list(first)
        for n, more in growth.items():
            now[n] += at * more
        return now

    times = simulate(steps, shape.passes, cost.processor_name, durations, quick)
    if slower := cost.sharing(
        {stream: busy / times.total_us for stream, busy in times.busy_us.items() if times.total_us}
    ):
        scale = [slower.get(s.op.stream, 1.0) for s in steps]
        first = [us * by for us, by in zip(first, scale, strict=True)]
        growth = {n: more * scale[n] for n, more in growth.items()}
        times = simulate(steps, shape.passes, cost.processor_name, durations, quick)
    steps = [s._replace(start_us=round(a), end_us=round(b)) for s, (a, b) in zip(steps, times.steps, strict=True)]
    moved = Counter[str]()
    middle = (shape.first_context + shape.last_context) / 2
    for step in steps:
        if isinstance(step.op, Load | Store):
            nbytes = cost.moved_bytes(step.op, table.all, shape, middle, late or {})
            moved[step.op.link] += round(nbytes * shape.passes)
    if dump_after:
        out.dumps[shape.name] = _dump(dump_after, entries, steps, [t.name for t in table.all])
    chain = 0.0 if quick else critical_us(cells, durations(0.5))
    repeats = shape.passes if shape.name == "decode" else 1  # sub-groups of prefill do not depend on one another
    return LoweredPhase(shape, steps, times, placed, chain * repeats, moved)


def _exchanged(table: TensorTable, shape: Shape) -> list[tuple[str, Tensor]]:
    """What GPU and CPU exchange in this phase, by tier: the hidden states themselves are what is sent as rows."""
    if not shape.decoding:
        return []
    chosen = [table.all[number] for number in table.exchanged]
    return [(tier, t) for tier in ("gpu", "host") for t in chosen if tier == "host" or t.kind != "rows"]


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
    return [
        Placed(p.op, tuple(order.get(s, s) for s in p.slots), tuple(order.get(s, s) for s in p.sources)) for p in ops
    ]


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
            f"evict {e.tier} {' '.join(names[t] for t in e.tensors)}" if isinstance(e, Evict) else op_text(e, names)
            for e in entries
        ]
    kept = [
        s._replace(waits=s.waits if after in ("waits", "schedule") else (), start_us=s.start_us, end_us=s.end_us)
        for s in steps
    ]
    return [f"{n} {step_text(s, names)}" for n, s in enumerate(kept)]


def phase_record(phase: LoweredPhase, names: list[str]) -> Phase:
    """The phase as ``plan.json`` holds it."""
    return Phase(
        name=phase.shape.name,
        passes=phase.shape.passes,
        batches=phase.shape.batches,
        placed=tuple(phase.placed),
        lines=tuple(step_text(s, names) for s in phase.steps),
    )
