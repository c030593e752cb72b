"""What the checks share: a fault, and ways to walk through a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from klotski_compiler.ops import CPU, Bind, Compute, Step, Tensor, batches_of
from klotski_compiler.plan import Phase, Plan

LOAD = "load"
UNROLLED = 3  # passes that stand for all: what opens a phase, a settled one, and the last, which opens nothing


class Fault(Exception):
    """What is wrong, and at which op of which phase (-1: at none in particular)."""

    def __init__(self, why: str, phase: str = "", op: int = -1) -> None:
        super().__init__(why)
        self.why, self.phase, self.op = why, phase, op


def phases_of(plan: Plan) -> Iterator[tuple[Phase, tuple[Step, ...]]]:
    """Every phase with its steps."""
    for phase in plan.phases:
        yield phase, plan.steps[phase.name]


def computing(plan: Plan) -> Iterator[tuple[Phase, tuple[Step, ...]]]:
    """Those that compute."""
    return ((phase, steps) for phase, steps in phases_of(plan) if phase.name != LOAD)


def scope_of(batch: int, phase: Phase) -> Sequence[int]:
    """The batches that an op works on."""
    return batches_of(batch, phase.batches)


def by_layer(plan: Plan) -> dict[tuple[str, int], list[Tensor]]:
    """Tensors by kind and layer; a list for whatever is asked."""
    found = defaultdict[tuple[str, int], list[Tensor]](list)
    for tensor in plan.tensors:
        found[tensor.kind, tensor.layer].append(tensor)
    return found


def is_sent(plan: Plan, op: Compute | Bind) -> bool:
    """Whether an op works on what was sent to it, not on hidden states."""
    if not isinstance(op, Compute):
        return False
    sums = op.fn == "experts" and any(plan.tensors[t].kind == "sums" for t in op.tensors)
    return sums or (op.fn == "attend" and op.stream == CPU)
