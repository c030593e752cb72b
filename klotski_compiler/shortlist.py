"""Which candidates go on: scores and estimates compare decisions of one order better than those of different orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from klotski_compiler.decision import Decision
from klotski_compiler.fill import Fill

KEPT_SOLVED, KEPT_OTHER = 6, 3  # sizes that are timed where residency is solved: of the best one's order, of the other
ORDER_ERROR = 0.3  # how much less well a score may judge one order than the other
KEPT_WHOLE = 3  # decisions of each order that may be lowered whole
ESTIMATE_ERROR = 0.05  # how far a short model's time may be off


@dataclass(frozen=True, slots=True)
class Rated:
    """A decision with its estimated speed. way: in which it is filled."""

    tokens_per_s: float
    policy: str
    decision: Decision
    way: Fill


def least(scored: Sequence[tuple[float, Decision]]) -> float:
    """The best score."""
    return min((us for us, _ in scored), default=inf)


def one_each(scored: Sequence[tuple[float, Decision]]) -> list[tuple[float, Decision]]:
    """Of scored decisions, best first, the best of each order, number and size of batches: what a score cannot tell is how finely work is
    divided."""
    found = {(base.rolling, base.num_batches, base.batch_size): (us, base) for us, base in reversed(scored)}
    return sorted(found.values(), key=lambda entry: entry[0])


def in_both_orders(scored: Sequence[tuple[float, Decision]]) -> list[tuple[float, Decision]]:
    """Of scored decisions, best first, the first few, and fewer of those in the other order than the best one's: bubbles, which differ more
    between orders than within one, are not seen by the score."""
    best_us, first = scored[0][0], scored[0][1].rolling
    same = [entry for entry in scored if entry[1].rolling == first][:KEPT_SOLVED]
    other = [(us, base) for us, base in scored if base.rolling != first and us <= best_us * (1 + ORDER_ERROR)]
    return same + other[:KEPT_OTHER]


def by_order(rated: Sequence[Rated]) -> list[Rated]:
    """The first few different ones of each order."""
    distinct = list({repr(r.decision): r for r in reversed(rated)}.values())[::-1]
    return [r for rolling in (False, True) for r in [r for r in distinct if r.decision.rolling == rolling][:KEPT_WHOLE]]


def best_of_orders(rated: Sequence[Rated]) -> list[Rated]:
    """The fastest, and the fastest in the other order where that is about as fast."""
    best = max(rated, key=lambda r: r.tokens_per_s, default=None)
    if best is None:
        return []
    others = [r for r in rated if r.decision.rolling != best.decision.rolling]
    other = max(others, key=lambda r: r.tokens_per_s, default=best)
    near = other is not best and other.tokens_per_s > best.tokens_per_s * (1 - ESTIMATE_ERROR)
    return [best, other] if near else [best]


def second_of(rated: Sequence[Rated]) -> list[Rated]:
    """The fastest that has other batches than the fastest of all, in the same order; everything resident leaves nothing to improve."""
    best = max(rated, key=lambda r: r.tokens_per_s, default=None)
    if best is None:
        return []
    batches = best.decision.num_batches, best.decision.batch_size
    others = [r for r in rated if (r.decision.num_batches, r.decision.batch_size) != batches]
    others = [r for r in others if r.decision.rolling == best.decision.rolling and not r.way.everything]
    return sorted(others, key=lambda r: -r.tokens_per_s)[:1]
