"""What no schedule can beat (design 7.2): the certificate of a class of schedules, and of sizes within it."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from math import floor, isinf, log

from klotski_compiler.bounds.apart import Relaxation
from klotski_compiler.bounds.mixed import Mixed
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Workload

ALIKE = 2e-3  # bounds that differ by less are about as good
REFINED = 1 << 30  # more splits than any interval takes


def relaxations(
    cost: Cost, workload: Workload, budgets: dict[str, int], rolling: bool, coarse: bool = False
) -> list[Relaxation]:
    """One for phases apart; in rolling order one for each interval of strides, see ``intervals``."""
    if not rolling:
        return [Relaxation(cost, workload, budgets)]
    return [Mixed(cost, workload, budgets, strides) for strides in intervals(workload.gen_len, coarse)]


def intervals(gen_len: int, coarse: bool = False) -> list[tuple[int, int]]:
    """In rolling order, passes from one cohort's joining to the next one's, as far as two cohorts are there at once: 1, 2, 3 and 4,
    5 to 8, ...; coarse: 1, and all others."""
    most, found = (gen_len + 1) // 2, [(1, 1)]
    while (least := found[-1][1] + 1) <= most:
        found.append((least, most if coarse else min(2 * (least - 1), most)))
    return found


def bound_tokens_per_s(cost: Cost, workload: Workload, budgets: dict[str, int], rolling: bool = False) -> float:
    """No schedule of its class generates tokens faster: phases apart, or mixed in rolling order.

    All that matters is the number of groups k, since each has at least ceil(N / k) sequences; in rolling order the number of sequences
    that are there at once, and the stride. Intervals of these are bounded (``Relaxation.least_us``), best first, and the most promising
    one is split, where it is wider, until it is a single number of each; of those that differ by less than ``ALIKE``, which may be
    what the answer is too high by, the one that has been split most. 0 if nothing fits.
    """
    queue: list[tuple[int, int, int, float, Relaxation, int, int]] = []
    order, known = count(), dict[tuple[int, int], Mixed]()

    def push(one: Relaxation, first: int, last: int, splits: int, time_us: float) -> None:
        if not isinf(time_us):
            about = floor(log(max(time_us, 1.0)) / log(1 + ALIKE))
            heappush(queue, (about, -splits, next(order), time_us, one, first, last))

    for one in relaxations(cost, workload, budgets, rolling):
        push(one, *one.sizes, 0, 0.0)
    while queue:
        _, minus, _, time_us, one, first, last = heappop(queue)
        if minus == -REFINED:
            least_us = min([time_us, *(entry[3] for entry in queue)])
            return 1e6 * workload.num_sequences * workload.gen_len / least_us
        if one.strides[0] < one.strides[1] and one.strides[1] / one.strides[0] >= last / first:
            for half in halves(*one.strides):
                part = known[half] = known.get(half) or Mixed(cost, workload, budgets, half)
                push(part, first, last, 1 - minus, part.least_us(first, last))
        elif first < last:
            for low, high in halves(first, last):
                push(one, low, high, 1 - minus, one.least_us(low, high))
        else:
            push(one, first, last, REFINED, one.refined_us(first))
    return 0.0


def halves(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Of an interval of more than one number."""
    middle = (first + last) // 2
    yield from ((first, middle), (middle + 1, last))
