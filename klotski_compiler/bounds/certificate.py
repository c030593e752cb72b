"""What no schedule can beat (design 7.2): the certificate of a class of schedules, and of sizes within it."""

from __future__ import annotations

from heapq import heappop, heappush
from math import isinf

from klotski_compiler.bounds.apart import Relaxation
from klotski_compiler.bounds.mixed import Mixed
from klotski_compiler.cost import Cost
from klotski_compiler.plan import Workload


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
    one is split until it is a single number. 0 if nothing fits.
    """
    total, known = workload.num_sequences, relaxations(cost, workload, budgets, rolling)
    queue = [(0.0, number, *one.sizes, False) for number, one in enumerate(known)]
    while True:
        time_us, number, first, last, refined = heappop(queue)
        if isinf(time_us):
            return 0.0
        if refined:
            return 1e6 * total * workload.gen_len / time_us
        if first == last:
            heappush(queue, (known[number].refined_us(first), number, first, last, True))
            continue
        middle = (first + last) // 2
        for low, high in ((first, middle), (middle + 1, last)):
            heappush(queue, (known[number].least_us(low, high), number, low, high, False))
