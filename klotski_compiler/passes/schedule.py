"""schedule: when each op begins and ends, by the prices of a phase's ops in every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from klotski_compiler.cost import Cost
from klotski_compiler.ops import Bind, Compute, Load, Op, Step, Store, Tensor
from klotski_compiler.shape import Shape
from klotski_compiler.simulate import PhaseTimes, Rounds, rolled, simulate


class Prices:
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


def _grows(op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether an op's time depends on the position: attention, and KV on its way."""
    if isinstance(op, Compute):
        return op.fn in ("attention", "attend")
    return not isinstance(op, Bind) and tensors[op.tensors[0]].kind == "kv"
