"""Lower bounds on time (design 7.2): the critical path of a decision's program, and a relaxation over all decisions."""

from __future__ import annotations

from collections.abc import Sequence

from klotski_compiler.passes.depend import Cell, cells_of
from klotski_compiler.passes.slots import Placed
from klotski_compiler.plan import Tensor


def critical_us(ops: Sequence[Placed], tensors: Sequence[Tensor], batches: int, duration_us: Sequence[float]) -> float:
    """Longest path of one pass over read-after-write edges only: no stream, no slot can make it shorter.

    Loads for the next pass lie outside this one; hidden states that an op updates in place count as read.
    """
    ready: dict[Cell, float] = {}
    longest = 0.0
    for placed, took in zip(ops, duration_us, strict=True):
        reads, writes = cells_of(placed, tensors, batches)
        updated = [cell for cell in writes if isinstance(cell, tuple) and cell[0] == "hidden" or cell == "last"]
        end = max((ready.get(cell, 0.0) for cell in (*reads, *updated)), default=0.0) + took
        for cell in writes:
            ready[cell] = end
        longest = max(longest, end)
    return longest
