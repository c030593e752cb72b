"""Which rows of experts each worker takes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from klotski_compiler.kernel_facts import FIXED_ROWS
from klotski_runtime.assignment import rows_worth, shares


@given(st.lists(st.integers(0, 500), max_size=12), st.integers(1, 5))
def test_workers_share_experts_rows_evenly(sizes: list[int], count: int) -> None:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    runs = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    found = shares(runs, count)
    assert len(found) <= count
    taken = [part for share in found for part in share]
    assert [row for number, rows in taken for row in range(rows.start, rows.stop)] == list(range(sum(sizes)))
    for number, rows in taken:
        assert runs[number].start <= rows.start < rows.stop <= runs[number].stop
    for (before, _), (after, rows) in pairwise(taken):
        assert before < after or rows.stop - rows.start > FIXED_ROWS, "what is cut is worth it"
    costs = [sum(FIXED_ROWS + rows.stop - rows.start for _, rows in share) for share in found]
    assert max(costs, default=0) <= rows_worth(runs) / count + (count + 2) * FIXED_ROWS


def test_one_large_expert_does_not_keep_the_others_waiting() -> None:
    found = shares([slice(0, 3), slice(3, 203), slice(203, 208)], 2)
    assert [[(number, rows.stop - rows.start) for number, rows in share] for share in found] == [
        [(0, 3), (1, 96)],
        [(1, 104), (2, 5)],
    ]
