"""The critical path of a program: what no schedule of the same decision can be shorter than (design 7.2)."""

from __future__ import annotations

from collections.abc import Sequence

from klotski_compiler.passes.depend import Cell, Cells


def critical_us(cells: Sequence[Cells], duration_us: Sequence[float]) -> float:
    """Longest path of one pass over read-after-write edges only, from the token ids on: no stream, no slot can make it
    shorter.

    cells: what each op reads and writes (``depend``). The next pass starts from the ids that this one ends with, so
    such paths add up over passes. Paths that start with a load would not: it may run while the pass before computes.
    Hidden states that an op updates in place count as read.
    """
    ready: dict[Cell, float] = {"tokens": 0.0}
    longest = 0.0
    for (reads, writes), took in zip(cells, duration_us, strict=True):
        updated = [cell for cell in writes if (isinstance(cell, tuple) and cell[0] == "hidden") or cell == "last"]
        starts = [ready[cell] for cell in (*reads, *updated) if cell in ready]
        for cell in writes:
            if starts:
                ready[cell] = max(starts) + took
            else:
                ready.pop(cell, None)
        if starts:
            longest = max(longest, max(starts) + took)
    return longest
