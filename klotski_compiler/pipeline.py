"""From a decision to proved phases: build -> slots -> depend -> waits -> schedule, for the load of residents, prefill and decode."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, Workload
from klotski_compiler.layout import Arena, permanent_slots, residents, staging_places
from klotski_compiler.ops import (
    ALL,
    Load,
    Op,
    Slot,
    Step,
    Tensor,
    op_text,
    step_text,
)
from klotski_compiler.passes.critical import critical_us
from klotski_compiler.passes.depend import cells_of, depend
from klotski_compiler.passes.schedule import Prices
from klotski_compiler.passes.slots import Placed, Pool, slots, staged
from klotski_compiler.passes.waits import waits
from klotski_compiler.plan import Phase
from klotski_compiler.policies import policy
from klotski_compiler.program import Evict, Program, staging_slots
from klotski_compiler.shape import Shape, shapes
from klotski_compiler.simulate import PhaseTimes, Rounds
from klotski_compiler.tensors import TensorTable
from klotski_compiler.workspace import workspace

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
    fixed, arena = permanent_slots(table, compute_tier)
    placed = [(tensor, slot) for (_, tensor), slot in fixed.items()]
    out = Lowered(table.all, [], placed, {}, workspace(cost, decision, workload), {}, 0)

    load_shape = Shape(
        name="load", passes=1, batches=0, batch_size=0, tokens=0, first_context=0, last_context=0, attention_batch=1
    )
    loads = residents(table, fixed, staging_slots(decision))
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


def _rough_load(cost: Cost, table: TensorTable, shape: Shape, loads: Sequence[Op | Evict]) -> LoweredPhase:
    """The load of residents as the work of its busiest link, or of both where they take turns."""
    busy = defaultdict[str, float](float)
    for op in loads:
        if isinstance(op, Load):
            busy[op.stream] += cost.op_us(op, table.all, shape, 0, {})
    most = sum if staging_slots(table.decision) == 1 else max
    total = float(most(busy.values()) if busy else 0)
    return LoweredPhase(shape, [], PhaseTimes(total, total, []), [], total, Counter())


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
    passing, staging = staging_places(table, len(arena.slots)) if shape.name == "load" else ({}, [])
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
    prices = Prices(cost, table.all, shape, steps, late or {}, rounds)
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


def _exchanged(table: TensorTable, shape: Shape) -> list[tuple[str, Tensor]]:
    """What GPU and CPU exchange in this phase, by tier."""
    if not shape.decodes(shape.batches - 1):
        return []
    kinds = ("query", "rows", "sums") if shape.decoding else ("query",)
    chosen = [(tier, table.all[number]) for tier, number in sorted(table.exchanged)]
    return [(tier, tensor) for tier, tensor in chosen if tensor.kind in kinds]


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
