"""Which experts the late-bound picks of a layer stand for: pure functions of what has been routed (design 5.3).

Every expert that is neither resident nor loaded by name gets exactly one pick by the layer's last bind, so a plan is right for any
routing: a wrong guess costs time, never a token.
"""

from __future__ import annotations

from collections.abc import Sequence


def rank(candidates: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Candidates by falling number of tokens; ties keep their order. ``tokens[e]``: tokens routed to expert e."""
    return sorted(candidates, key=lambda expert: -tokens[expert])


def arrival(candidates: Sequence[int], requests: Sequence[int]) -> list[int]:
    """Candidates in the order of their first request, then those that nobody has asked for yet."""
    waiting = set(candidates)
    asked = [expert for expert in requests if expert in waiting]
    return asked + [expert for expert in candidates if expert not in waiting.intersection(asked)]


def predicted(
    candidates: Sequence[int], tokens_before: Sequence[int], successors: Sequence[Sequence[tuple[int, int]]]
) -> list[int]:
    """Candidates by expected tokens, given those of the layer before (Klotski, section 6.2, path length 1).

    successors[e]: (expert of this layer, per mille of the tokens that chose e before). Without a table the order is kept.
    """
    score = dict.fromkeys(candidates, 0)
    for tokens, follows in zip(tokens_before, successors, strict=False):
        for expert, share in follows:
            if expert in score:
                score[expert] += tokens * share
    return sorted(candidates, key=lambda expert: -score[expert])
