"""verify: what makes a plan legal, as a table of named checks. Run after every compilation, before every run, and in tests.

Nothing here looks at how a plan was made: the passes that place slots and compute waits are judged by what the executor core would
do with their result. Two checks drive that very core (``execute``): one with a backend that remembers what each slot holds, one
whose streams are vector clocks. Three passes stand for all: what opens a phase, a settled pass, and the last, which opens nothing.
Each check is a loop over the ops, so that a plan of 60,000 takes a second or two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from klotski_compiler import errors
from klotski_compiler.errors import PlanError
from klotski_compiler.execute import execute
from klotski_compiler.garbage import uncollected
from klotski_compiler.plan import (
    ALL,
    FUNCTIONS,
    NOWHERE,
    OVERWRITE,
    RULES,
    Bind,
    Compute,
    Load,
    Phase,
    Plan,
    Step,
    Store,
    Tensor,
    writes,
)

LOAD = "load"
UNROLLED = 3


class Fault(Exception):
    """What is wrong, and at which op of which phase (-1: at none in particular)."""

    def __init__(self, why: str, phase: str = "", op: int = -1) -> None:
        super().__init__(why)
        self.why, self.phase, self.op = why, phase, op


@uncollected()
def verify(plan: Plan) -> None:
    """Raises PlanError, with the name of the check that failed and the plan lines around the fault."""
    for name, check in CHECKS:
        try:
            check(plan)
        except Fault as fault:
            lines = plan.phase(fault.phase).lines if fault.op >= 0 else ()
            shown = (
                errors.window([f"{fault.phase} {n} {line}" for n, line in enumerate(lines)], fault.op) if lines else ""
            )
            raise PlanError(name, fault.why, shown) from None


# ---------------------------------------------------------------------------------------------------------------- text


def ids(plan: Plan) -> None:
    """Every line parses, and every id that it or a table names exists."""
    tensors, slots = len(plan.tensors), len(plan.slots)
    for what, found in (("tensor", [t.id for t in plan.tensors]), ("slot", [s.id for s in plan.slots])):
        if found != list(range(len(found))):
            raise Fault(f"a {what} id is not its position")
    if len(set(plan.names)) != tensors:
        raise Fault("two tensors have one name")
    if len({phase.name for phase in plan.phases}) != len(plan.phases):
        raise Fault("two phases have one name")
    for owner, placed in (("the plan", plan.placed), *((phase.name, phase.placed) for phase in plan.phases)):
        for tensor, slot in placed:
            if not (0 <= tensor < tensors and 0 <= slot < slots):
                raise Fault(
                    f"{owner} places tensor {tensor} in slot {slot}: there are {tensors} tensors and {slots} slots"
                )
    for phase, steps in _phases(plan):
        for number, step in enumerate(steps):
            if why := _out_of_range(plan, phase, step):
                raise Fault(why, phase.name, number)


def parts(plan: Plan) -> None:
    """What prefill's sub-groups all run, with batches of their own, is the same for all of them: where a batch's KV lives. In rolling
    order they are equally large."""
    decision = plan.decision
    if decision.rolling and (decision.prefill_groups < 2 or decision.num_batches % decision.prefill_groups):
        raise Fault(f"{decision.num_batches} batches cannot roll in {decision.prefill_groups} sub-groups of equal size")
    homes: dict[tuple[int, int], str] = {}
    for tensor in plan.tensors:
        if tensor.kind == "kv":
            place = tensor.layer, tensor.index % plan.decision.part_batches
            if homes.setdefault(place, tensor.home) != tensor.home:
                raise Fault(f"{plan.names[tensor.id]} lives in {tensor.home}, a batch in its place in {homes[place]}")


def _out_of_range(plan: Plan, phase: Phase, step: Step) -> str:
    op = step.op
    if op.stream not in plan.streams:
        return f"stream {op.stream} is not among {', '.join(plan.streams)}"
    if any(not 0 <= slot < len(plan.slots) for slot in (*step.slots, *step.sources) if slot != NOWHERE):
        return f"names a slot beyond the {len(plan.slots)} of the plan"
    if NOWHERE in step.slots and any(
        slot == NOWHERE and plan.tensors[t].kind != "pick"
        for t, slot in zip(op.tensors, step.slots, strict=False)  # type: ignore[union-attr]
    ):
        return "has a tensor without a slot that is no pick"
    wanted = 0 if isinstance(op, Bind) else len(op.tensors)
    slots, sources = ({0, wanted} if isinstance(op, Store) else {wanted}), {0, wanted}
    if len(step.slots) not in slots or len(step.sources) not in sources:
        return f"has {len(step.slots)} slots and {len(step.sources)} source slots for {wanted} tensors"
    if isinstance(op, Load | Store):
        return "" if op.link.count(">") == 1 else f"link {op.link} is not of the form tier>tier"
    if op.stream not in plan.processors:
        return f"computes on {op.stream}, which is no processor"
    if not (-1 <= op.layer < len(plan.decision.layers) and (op.batch == ALL or 0 <= op.batch < phase.batches)):
        return f"layer {op.layer} or batch {op.batch} does not exist"
    if isinstance(op, Bind):
        return "" if op.rule in RULES and op.count > 0 else f"binds {op.count} picks by {op.rule}"
    return "" if op.fn in FUNCTIONS else f"there is no function {op.fn}"


def streams(plan: Plan) -> None:
    """Every wait points backwards, so FIFO streams cannot deadlock; kernels and binds share one stream, so that hidden states
    and routing are read and written in the order of the lines: another processor has only what it is sent."""
    for phase, steps in _phases(plan):
        compute = {step.op.stream for step in steps if isinstance(step.op, Compute | Bind) and not _sent(plan, step.op)}
        if len(compute) > 1:
            raise Fault(
                f"phase {phase.name} computes on {' and '.join(sorted(compute))}: hidden states would have no order"
            )
        for number, step in enumerate(steps):
            for wait in step.waits:
                if not 0 <= wait.op < len(steps) or wait.back not in (0, 1):
                    raise Fault(
                        f"waits for op {wait.op}, {wait.back} passes back, which does not exist", phase.name, number
                    )
                if wait.back == 0 and wait.op >= number:
                    raise Fault(f"waits for op {wait.op}, which does not come before it", phase.name, number)


def _sent(plan: Plan, op: Compute | Bind) -> bool:
    """Whether an op works on what was sent to it, not on hidden states."""
    return isinstance(op, Compute) and (
        op.fn == "attend" or (op.fn == "experts" and any(plan.tensors[t].kind == "sums" for t in op.tensors))
    )


# -------------------------------------------------------------------------------------------------------------- memory


def arena(plan: Plan) -> None:
    """Slots that exist at the same time, the permanent ones and those of one phase, share no byte."""
    permanent = {slot for _, slot in plan.placed}
    for phase, steps in _phases(plan):
        used = permanent | {slot for _, slot in phase.placed}
        for step in steps:
            used.update(step.slots, step.sources)
        used.discard(NOWHERE)
        ordered = sorted((plan.slots[slot] for slot in used), key=lambda s: (s.tier, s.offset))
        for low, high in pairwise(ordered):
            if low.tier == high.tier and low.offset + low.nbytes > high.offset:
                end = low.offset + low.nbytes
                raise Fault(
                    f"slots {low.id} and {high.id} of phase {phase.name} share the bytes {high.offset}..{end} of {low.tier}"
                )
        if ordered and min(slot.offset for slot in ordered) < 0:
            raise Fault(f"a slot of phase {phase.name} starts before its arena")


def budget(plan: Plan) -> None:
    """Arena and workspace stay within the forecast peak, and that within the budget, in every tier."""
    ends = dict.fromkeys((*plan.workspace, *(slot.tier for slot in plan.slots)), 0)
    for slot in plan.slots:
        ends[slot.tier] = max(ends[slot.tier], slot.offset + slot.nbytes)
    for tier, end in ends.items():
        need, peak = end + sum(plan.workspace.get(tier, {}).values()), plan.forecast.peak_bytes.get(tier, 0)
        if need > peak:
            raise Fault(f"{tier} needs {need:,} bytes (arena {end:,}), its forecast peak is {peak:,}")
    for tier, peak in plan.forecast.peak_bytes.items():
        if peak > plan.budgets.get(tier, 0):
            raise Fault(f"{tier} peaks at {peak:,} bytes, its budget is {plan.budgets.get(tier, 0):,}")


def residents(plan: Plan) -> None:
    """A permanent slot holds one tensor that fits it; the experts in those of the compute tier are the resident ones."""
    if len({slot for _, slot in plan.placed}) != len(plan.placed):
        raise Fault("two tensors share a permanent slot")
    for tensor, slot in (*plan.placed, *(pair for phase in plan.phases for pair in phase.placed)):
        if why := _misfit(plan, tensor, slot):
            raise Fault(why)
    found = {
        (plan.tensors[t].layer, plan.tensors[t].index)
        for t, slot in plan.placed
        if plan.tensors[t].kind == "expert" and plan.slots[slot].tier == plan.compute_tier
    }
    decided = {(number, e) for number, layer in enumerate(plan.decision.layers) for e in layer.resident_experts}
    for layer, expert in sorted(found ^ decided):
        where = "has a permanent slot but is not" if (layer, expert) in found else "has no permanent slot but is"
        raise Fault(f"L{layer}.E{expert} {where} decided to be resident")


def _misfit(plan: Plan, tensor: int, slot: int) -> str:
    held, room = plan.tensors[tensor], plan.slots[slot].nbytes
    # Hidden states never come from a file, so that they need no room for the pages around a segment.
    need = held.nbytes if held.kind == "state" else held.slot_bytes
    return f"{held.name} needs {need:,} bytes, slot {slot} has {room:,}" if need > room else ""


def residency(plan: Plan) -> None:
    """Every tensor is in its slot whenever an op reads it, in every pass; nothing is written over a resident."""
    for phase, steps in _phases(plan):
        memory = _Memory(plan, phase)
        execute(steps, min(phase.passes, UNROLLED), memory)
        for tensor, slot in plan.placed if phase.name == LOAD else ():
            if memory.content.get(slot) != tensor:
                raise Fault(f"{plan.names[tensor]} is never loaded into its permanent slot {slot}")


class _Memory:
    """A backend that remembers which tensor each slot holds. It is its own only stream: what a slot holds depends on the order
    of the lines alone once ``race`` has proved that conflicting ops keep it."""

    def __init__(self, plan: Plan, phase: Phase) -> None:
        self.plan, self.phase = plan, phase
        self.permanent = {slot: tensor for tensor, slot in plan.placed}
        # Before the load phase no weight is anywhere but at home; a KV cache needs only its place, as what is exchanged does.
        self.content = {
            slot: tensor
            for slot, tensor in self.permanent.items()
            if phase.name != LOAD or plan.tensors[tensor].kind == "kv"
        } | {slot: tensor for tensor, slot in phase.placed}
        self.ends = {
            link: tuple(link.split(">"))
            for link in {s.op.link for s in plan.steps[phase.name] if isinstance(s.op, Load | Store)}
        }

    def stream(self, name: str) -> _Memory:
        return self

    def begin(self, at: int) -> bool:
        # A pick means another expert in every pass: what is left of it is of no use.
        self.content = {slot: t for slot, t in self.content.items() if self.plan.tensors[t].kind != "pick"}
        return True

    def wait(self, event: None) -> None:
        pass

    def record(self) -> None:
        pass

    def run(self, number: int, step: Step, at: int) -> None:
        match step.op:
            case Compute(tensors=tensors):
                why = self._read(tensors, step.slots, self.plan.processors[step.op.stream])
            case Load():
                why = self._load(step.op, step)
            case Store():
                why = self._store(step.op, step)
            case Bind():
                return
        if why:
            raise Fault(why, self.phase.name, number)

    def _read(self, tensors: Sequence[int], slots: Sequence[int], tier: str) -> str:
        for tensor, slot in zip(tensors, slots, strict=True):
            if slot == NOWHERE:
                if self.plan.tensors[tensor].home != tier:
                    return f"reads {self.plan.names[tensor]} where it lives, which is not {tier}"
                continue
            if self.content.get(slot) != tensor:
                held = self.content.get(slot)
                name = "nothing" if held is None else self.plan.names[held]
                return f"reads {self.plan.names[tensor]} in slot {slot}, which holds {name}"
            if self.plan.slots[slot].tier != tier:
                return f"reads slot {slot} in {tier}, but it is in {self.plan.slots[slot].tier}"
        return ""

    def _load(self, op: Load, step: Step) -> str:
        source, target = self.ends[op.link]
        if step.sources and (why := self._read(op.tensors, step.sources, source)):
            return why
        for number, slot in zip(op.tensors, step.slots, strict=True):
            tensor = self.plan.tensors[number]
            home = "disk" if self.phase.name == LOAD else tensor.home  # at first there is only the checkpoint
            if not step.sources and home != source:
                return f"brings {tensor.name} from {source}, but it lives in {home}"
            # Only the binding knows the source of a pick; every other tensor that memory holds has a slot there.
            if not step.sources and source != "disk" and tensor.kind != "pick":
                return f"brings {tensor.name} from {source} without naming its slot there"
            if self.plan.slots[slot].tier != target:
                return f"brings {tensor.name} to {target}, but slot {slot} is in {self.plan.slots[slot].tier}"
            if slot in self.permanent and (self.phase.name != LOAD or self.permanent[slot] != number):
                return f"writes {tensor.name} over {self.plan.names[self.permanent[slot]]}, which is resident in slot {slot}"
            if op.wraps and tensor.kind in ("pick", "kv"):
                return f"brings {tensor.name} for the next pass, before its expert or contents are known"
            if why := _misfit(self.plan, number, slot):
                return why
            self.content[slot] = number
        return ""

    def _store(self, op: Store, step: Step) -> str:
        source, target = self.ends[op.link]
        for number in op.tensors:
            tensor = self.plan.tensors[number]
            if tensor.home not in (target, "none"):
                return f"writes {tensor.name} to {target}, but it lives in {tensor.home}"
            if not step.sources and tensor.kind != "rows":
                return f"writes {tensor.name} without naming where it is"
            if not step.slots and target != "disk":
                return f"writes {tensor.name} to {target} without naming its slot there"
        if why := self._read(op.tensors, step.sources, source) if step.sources else "":
            return why
        return self._read(op.tensors, step.slots, target) if step.slots else ""


# --------------------------------------------------------------------------------------------------------------- order


def race(plan: Plan) -> None:
    """Of any two ops that touch the same memory, one of them writing, FIFO streams and waits order the two."""
    found = _by_layer(plan)
    for phase, steps in _phases(plan):
        touched = [_touched(plan, found, step) for step in steps]
        execute(steps, min(phase.passes, UNROLLED), _Clocks(plan, phase, touched, _turning(plan, found, phase)))


def _touched(
    plan: Plan, found: dict[tuple[str, int], list[Tensor]], step: Step
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cells that an op reads and writes. A cell is a slot or, numbered after them, what a tensor has outside of any slot:
    the assignment of a pick, a KV cache on disk; one more is the experts' input."""
    op, beyond, tensors = step.op, len(plan.slots), plan.tensors
    inputs = beyond + len(tensors)
    if isinstance(op, Bind):
        bound = range(op.first, op.first + op.count)
        return (), tuple([beyond + t.id for t in found["pick", op.layer] if t.index in bound])
    kinds = [tensors[t].kind for t in op.tensors]
    reads = tuple([beyond + t for t, kind in zip(op.tensors, kinds, strict=True) if kind == "pick"])
    if isinstance(op, Load):
        at_home = [beyond + t for t, kind in zip(op.tensors, kinds, strict=True) if kind == "kv"]
        return (*reads, *(step.sources or at_home)), step.slots
    if isinstance(op, Store):
        return step.sources or (inputs,), step.slots or tuple([beyond + t for t in op.tensors])
    both = [(slot, writes(op.fn, kind)) for slot, kind in zip(step.slots, kinds, strict=True) if slot != NOWHERE]
    cells = tuple([slot for slot, written in both if written])
    reads = (*reads, *(slot for slot, written in both if not written))
    return reads, (*cells, inputs) if op.fn in OVERWRITE else cells


def _turning(plan: Plan, found: dict[tuple[str, int], list[Tensor]], phase: Phase) -> list[dict[int, int]]:
    """For each of the unrolled passes, the cells that are others than the ops name: in rolling order KV changes hands."""
    if not plan.decision.rolling or phase.passes == 1 or plan.decision.stride(plan.envelope.gen_len) > 1:
        return []
    slots, beyond, turns = dict(plan.placed), len(plan.slots), []
    for at in range(UNROLLED):
        cells: dict[int, int] = {}
        for layer in range(len(plan.decision.layers)):
            caches = {t.index: t.id for t in found["kv", layer]}
            for batch, tensor in caches.items():
                there = caches[plan.decision.place(batch, at)]
                cells[beyond + tensor] = beyond + there
                if tensor in slots:
                    cells[slots[tensor]] = slots[there]
        turns.append(cells)
    return turns


class _Clocks:
    """A backend whose streams know, of every stream, how many ops have surely ended."""

    def __init__(
        self,
        plan: Plan,
        phase: Phase,
        touched: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        turning: Sequence[dict[int, int]],
    ) -> None:
        self.plan, self.phase, self.touched, self.turning = plan, phase, touched, turning
        self.lanes = {name: _Lane(self, place, len(plan.streams)) for place, name in enumerate(plan.streams)}
        self.writer: dict[int, tuple[int, int, int]] = {}  # cell -> stream, how many ops it had issued then, op
        self.readers: dict[int, dict[int, tuple[int, int]]] = {}  # cell -> stream -> the same, since the last write

    def stream(self, name: str) -> _Lane:
        return self.lanes[name]

    def begin(self, at: int) -> bool:
        return True


class _Lane:
    """One stream as a vector clock."""

    def __init__(self, clocks: _Clocks, place: int, width: int) -> None:
        self.clocks, self.place, self.known = clocks, place, [0] * width

    def wait(self, event: list[int]) -> None:
        self.known = list(map(max, self.known, event))

    def record(self) -> list[int]:
        return list(self.known)

    def run(self, number: int, step: Step, at: int) -> None:
        known, writer, readers = self.known, self.clocks.writer, self.clocks.readers
        issued = known[self.place] + 1
        reads, writes = self.clocks.touched[number]
        if self.clocks.turning:
            cells = self.clocks.turning[at]
            reads, writes = (tuple([cells.get(cell, cell) for cell in side]) for side in (reads, writes))
        for cell in reads:
            if cell in writer and known[writer[cell][0]] < writer[cell][1]:
                self._fault(number, cell, writer[cell][2], "reads", "written")
            readers.setdefault(cell, {})[self.place] = (issued, number)
        for cell in writes:
            if cell in writer and known[writer[cell][0]] < writer[cell][1]:
                self._fault(number, cell, writer[cell][2], "writes", "written")
            for place, (count, reader) in readers.pop(cell, {}).items():
                if place != self.place and known[place] < count:
                    self._fault(number, cell, reader, "writes", "read")
            writer[cell] = (self.place, issued, number)
        known[self.place] = issued

    def _fault(self, number: int, cell: int, other: int, does: str, done: str) -> None:
        plan, phase = self.clocks.plan, self.clocks.phase
        beyond = ["the contents of " + name for name in plan.names] + ["the experts' input"]
        what = f"slot {cell}" if cell < len(plan.slots) else beyond[cell - len(plan.slots)]
        raise Fault(f"{does} {what} without waiting until op {other} has {done} it", phase.name, number)


# ---------------------------------------------------------------------------------------------------------------- work


def picks(plan: Plan) -> None:
    """Every expert is resident, static or late, picks range over the late ones, and each pick is bound once in a pass, after the
    routers that its rule reads and before its load."""
    found = _by_layer(plan)
    for layer, chosen in enumerate(plan.decision.layers):
        experts, tensors = found["expert", layer], found["pick", layer]
        kinds = (*chosen.resident_experts, *chosen.static, *chosen.late, *chosen.cpu)
        if sorted(kinds) != sorted(t.index for t in experts):
            raise Fault(f"L{layer}: not every expert is exactly one of resident, static, late and the CPU's")
        if sorted(t.index for t in tensors) != list(range(len(chosen.late))):
            raise Fault(f"L{layer} has {len(tensors)} picks for {len(chosen.late)} late experts")
        if odd := [t.name for t in experts if t.index in chosen.late and t.home != tensors[0].home]:
            raise Fault(f"{odd[0]} may be picked, but does not live in {tensors[0].home} as picks do")
    for phase, steps in _computing(plan):
        bound: set[tuple[int, int]] = set()
        routed: dict[int, set[int]] = {}
        for number, step in enumerate(steps):
            op = step.op
            if isinstance(op, Compute):
                if op.fn == "router":
                    routed.setdefault(op.layer, set()).update(_scope(op.batch, phase))
            elif isinstance(op, Bind):
                asked = range(phase.batches) if op.batch == ALL else range(op.batch + 1)
                if op.rule != "predicted" and not routed.get(op.layer, set()).issuperset(asked):
                    raise Fault("binds before the router has spoken", phase.name, number)
                new = {(op.layer, pick) for pick in range(op.first, op.first + op.count)}
                if bound & new:
                    raise Fault("binds a pick twice", phase.name, number)
                bound |= new
            if isinstance(op, Load | Compute):
                for tensor in (plan.tensors[t] for t in op.tensors):
                    if tensor.kind == "pick" and (tensor.layer, tensor.index) not in bound:
                        raise Fault(f"takes {tensor.name}, which is not bound yet", phase.name, number)
        for tensor in plan.tensors:
            if tensor.kind == "pick" and (tensor.layer, tensor.index) not in bound:
                raise Fault(f"phase {phase.name} never binds {tensor.name}")


def work(plan: Plan) -> None:
    """Every batch passes every module once and in order, and every expert of a layer once, with the tensors that it needs."""
    course, found = [("embed", -1)], _by_layer(plan)
    for layer in range(len(plan.decision.layers)):
        routed = bool(found["expert", layer])
        course += [("attention", layer), *([("router", layer), ("experts", layer)] if routed else [("dense", layer)])]
    experts = {
        layer: frozenset(
            t.id
            for t in (*found["expert", layer], *found["pick", layer])
            if t.kind == "pick" or t.index not in chosen.late
        )
        for layer, chosen in enumerate(plan.decision.layers)
    }
    for phase, steps in _computing(plan):
        _Pass(plan, phase, course, experts).follow(steps)


class _Pass:
    """Where every batch stands in one pass, and which experts of each layer it has met."""

    def __init__(
        self, plan: Plan, phase: Phase, course: list[tuple[str, int]], experts: dict[int, frozenset[int]]
    ) -> None:
        self.plan, self.phase, self.course, self.experts = plan, phase, course, experts
        self.place = {stop: number for number, stop in enumerate(course)}
        self.needs = partial(_needs, plan, {(t.kind, t.layer, t.index): t.id for t in plan.tensors}, _in_place(plan))
        self.stands = [0] * phase.batches  # stops of the course that lie behind
        self.waiting = dict.fromkeys(
            range(len(plan.decision.layers)), 0
        )  # batches that the layer's router has sent to experts
        self.met: dict[tuple[int, int], set[int]] = {}  # (layer, batch or ALL) -> experts computed
        self.ending = ["norm", *["head"] * sum(t.kind == "head" for t in plan.tensors), "sample"]
        self.pages: set[int] = set()
        self.begun: dict[tuple[int, int], str] = {}  # (layer, batch) -> the last part of attention that is done
        self.owed: set[int] = set()  # layers whose sums are not added yet

    def follow(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps):
            if isinstance(step.op, Compute) and (why := self._compute(step.op)):
                raise Fault(why, self.phase.name, number)
        if self.ending:
            raise Fault(f"phase {self.phase.name} ends before its {self.ending[0]}")

    def _compute(self, op: Compute) -> str:
        if op.fn == "experts":
            return self._experts(op)
        if op.fn in ("norm", "head", "sample"):
            return self._end(op)
        if set(op.tensors) != (needs := self.needs(op)):
            return f"{op.fn} needs {', '.join(self.plan.names[t] for t in sorted(needs)) or 'no tensor'}"
        if op.fn == "add":
            self.owed.discard(op.layer)
            return ""
        for batch in _scope(op.batch, self.phase):
            if why := self._leave_experts(batch):
                return why
            fn = "attention" if op.fn in PARTS else op.fn
            if op.fn in PARTS:
                before = PARTS[PARTS.index(op.fn) - 1] if op.fn != PARTS[0] else ""
                if self.begun.get((op.layer, batch), "") != before:
                    return f"batch {batch} has {before or 'no part of attention'} of L{op.layer} before it"
                self.begun[op.layer, batch] = op.fn
            if self.place.get((fn, op.layer)) != self.stands[batch]:
                fn, layer = self.course[self.stands[batch]] if self.stands[batch] < len(self.course) else ("norm", -1)
                return f"batch {batch} has {fn} L{layer} before it"
            if op.fn in PARTS[:-1]:
                continue
            self.stands[batch] += 1
            if op.fn == "router":
                self.waiting[op.layer] += 1
        return ""

    def _experts(self, op: Compute) -> str:
        here = self.place.get(("experts", op.layer))
        ready = (
            self.waiting.get(op.layer, 0) == self.phase.batches if op.batch == ALL else self.stands[op.batch] == here
        )
        if here is None or not ready:
            return f"a batch is not yet routed in L{op.layer}, or has left it"
        # A set per scope, and one of all batches' sets together, so that no op asks every batch.
        others = (ALL, op.batch) if op.batch != ALL else (ALL, ALL - 1)
        if _sent(self.plan, op):
            self.owed.add(op.layer)
        for tensor in (t for t in op.tensors if self.plan.tensors[t].kind in ("expert", "pick")):
            if tensor not in self.experts[op.layer]:
                return f"{self.plan.names[tensor]} is no expert that L{op.layer} computes by that name"
            if any(tensor in self.met.get((op.layer, scope), ()) for scope in others):
                return f"{self.plan.names[tensor]} is computed twice"
            self.met.setdefault((op.layer, op.batch), set()).add(tensor)
            if op.batch != ALL:
                self.met.setdefault((op.layer, ALL - 1), set()).add(tensor)
        return ""

    def _leave_experts(self, batch: int) -> str:
        """Steps over a layer's experts, which must all have been met."""
        stop = self.stands[batch]
        if stop == len(self.course) or self.course[stop][0] != "experts":
            return ""
        layer = self.course[stop][1]
        met = self.met.get((layer, ALL), set()) | self.met.get((layer, batch), set())
        if missing := self.experts[layer] - met:
            return f"batch {batch} goes on without {self.plan.names[min(missing)]}"
        if layer in self.owed:
            return f"batch {batch} goes on without the sums of L{layer}"
        self.stands[batch] += 1
        return ""

    def _end(self, op: Compute) -> str:
        for batch in range(self.phase.batches) if op.fn == "norm" else ():
            if why := self._leave_experts(batch):
                return why
            if self.stands[batch] < len(self.course):
                return f"batch {batch} has not passed every layer"
        if not self.ending or op.fn != self.ending[0]:
            return f"{self.ending[0] if self.ending else 'nothing'} was to come here"
        if op.fn == "head":
            if any(t in self.pages or self.plan.tensors[t].kind != "head" for t in op.tensors) or len(op.tensors) != 1:
                return "needs one page of the head that was not computed yet"
            self.pages.update(op.tensors)
        elif set(op.tensors) != self.needs(op):
            return f"{op.fn} does not name its weights"
        self.ending.pop(0)
        return ""


_READ_BY = {
    "embed": ("embedding",), "attention": ("attention", "kv"), "router": ("router", "shared"), "dense": ("dense",), "norm": ("norm",),
    "project": ("attention", "query"), "attend": ("kv", "query"), "output": ("attention", "query"), "add": ("sums",),
}  # fmt: skip
PARTS = ("project", "attend", "output")


def _needs(plan: Plan, ids: dict[tuple[str, int, int], int], in_place: set[int], op: Compute) -> set[int]:
    """The tensors that an op must name: its weights, and a KV cache that does not live in the compute tier."""
    keys = [
        (kind, -1 if kind in ("query", "sums") else op.layer, op.batch if kind in ("kv", "query") else 0)
        for kind in _READ_BY.get(op.fn, ())
    ]
    found = {ids[key] for key in keys if key in ids}
    return {t for t in found if plan.tensors[t].kind != "kv" or t not in in_place}


def _in_place(plan: Plan) -> set[int]:
    """What has a permanent slot in the compute tier."""
    return {tensor for tensor, slot in plan.placed if plan.slots[slot].tier == plan.compute_tier}


# ------------------------------------------------------------------------------------------------------------- helpers


def _phases(plan: Plan) -> Iterator[tuple[Phase, tuple[Step, ...]]]:
    for phase in plan.phases:
        yield phase, plan.steps[phase.name]


def _computing(plan: Plan) -> Iterator[tuple[Phase, tuple[Step, ...]]]:
    return ((phase, steps) for phase, steps in _phases(plan) if phase.name != LOAD)


def _scope(batch: int, phase: Phase) -> Sequence[int]:
    return range(phase.batches) if batch == ALL else (batch,)


def _by_layer(plan: Plan) -> dict[tuple[str, int], list[Tensor]]:
    """Tensors by kind and layer; a list for whatever is asked."""
    found = defaultdict[tuple[str, int], list[Tensor]](list)
    for tensor in plan.tensors:
        found[tensor.kind, tensor.layer].append(tensor)
    return found


CHECKS: tuple[tuple[str, Callable[[Plan], None]], ...] = (
    ("ids", ids),
    ("parts", parts),
    ("streams", streams),
    ("arena", arena),
    ("budget", budget),
    ("residents", residents),
    ("picks", picks),
    ("work", work),
    ("residency", residency),
    ("race", race),
)
