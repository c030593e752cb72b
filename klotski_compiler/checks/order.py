"""Whether ops that touch the same memory keep their order: streams as vector clocks."""

from __future__ import annotations

from collections.abc import Sequence

from klotski_compiler.checks.common import UNROLLED, Fault, by_layer, phases_of
from klotski_compiler.execute import execute
from klotski_compiler.ops import NOWHERE, OVERWRITE, Bind, Load, Step, Store, Tensor, writes
from klotski_compiler.plan import Phase, Plan


def race(plan: Plan) -> None:
    """Of any two ops that touch the same memory, one of them writing, FIFO streams and waits order the two."""
    found = by_layer(plan)
    for phase, steps in phases_of(plan):
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
