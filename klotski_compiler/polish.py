"""The winner's shares, bettered by changes in layers that are decided alike, each timed on the whole schedule.

The residency problem counts all layers of a kind together: spread over them, one expert more here and there keeps such a layer waiting,
and some memory is left over. Nor does it see that streams wait for one another. So some experts are computed elsewhere, known earlier or
later, or kept; a batch is attended to elsewhere or its KV kept: first what has gained most in other layers, as long as it pays.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from math import inf
from typing import NamedTuple

from klotski_compiler.decision import Decision, LayerDecision
from klotski_compiler.model import Layer
from klotski_compiler.pipeline import lower
from klotski_compiler.policies import OURS
from klotski_compiler.search import Best, Search

WAITING = 0.02  # of the time, in which a schedule's busiest streams wait: of less, little can be gained
WORTH = 0.0001  # of the time, that a change must save
HOPELESS = 0.01  # of the time, that a change would cost if it did what it did elsewhere: it is not tried
FINE = 64  # parts of a layer's experts, one of which goes elsewhere at once
MOST_STEPS = 100_000  # ops of a pass that are timed, in all tries together
IDLE_STEPS = 45_000  # the same, in tries that gain nothing since one did
Kind = Hashable  # what alike layers share
State = tuple[int, Kind]  # of one layer
HOMES = ("resident_experts", "static", "late", "cpu")  # of experts; further on, one that is often picked costs more


def polished(search: Search, best: Best) -> Best:
    """The schedule with some layers changed, where that is faster; itself where its streams hardly wait."""
    if best.policy != OURS or best.decision.by_batch:
        return best
    if best.lowered.busiest_us > (1 - WAITING) * best.lowered.group_us:
        return best
    d, seen, gains = best.decision, set[State](), dict[Change, float]()
    (now, free_bytes), idle = _timed(search, d), 0.0
    if not now:  # timed quickly, its passes may seem a little longer than --max-latency
        return best
    for _ in range(int(MOST_STEPS / search.steps(d))):
        near = list(_near(search, d, free_bytes, seen))
        hopes = [gains.get(one.change, 0.0) * len(one.states) for one in near]
        if max(hopes, default=-inf) < -HOPELESS or idle > IDLE_STEPS or search.out_of_time():
            break
        one, idle = near[hopes.index(max(hopes))], idle + search.steps(d)
        rate, left_bytes = _timed(search, one.decision)
        if left_bytes < 0 and one.each_bytes and len(one.states) > 1:
            free_bytes += left_bytes  # other slots are needed in other numbers, too: in fewer layers it may fit
            continue
        seen |= one.states
        gains[one.change] = (rate / now - 1) / len(one.states)
        if rate > now * (1 + WORTH):
            d, now, free_bytes, idle = one.decision, rate, left_bytes, 0.0
    if d is best.decision:
        return best
    lowered = lower(search.cost, OURS, d, search.request.workload)
    if search.over(lowered) or (rate := search.rate(lowered)) <= best.tokens_per_s:
        return best
    return replace(best, decision=d, lowered=lowered, tokens_per_s=rate)


def _timed(search: Search, decision: Decision) -> tuple[float, int]:
    """Tokens per second, 0 of what does not fit, and bytes that the compute tier has left."""
    lowered = lower(search.cost, OURS, decision, search.request.workload, quick=True)
    left_bytes = search.request.budgets[search.tier] - lowered.peak_bytes[search.tier]
    return 0.0 if search.over(lowered) else search.rate(lowered), left_bytes


def _near(search: Search, d: Decision, free_bytes: int, seen: set[State]) -> Iterator[Changed]:
    """Decisions with one change in all layers that are decided alike, or in as many as memory allows; none in which each of them is what
    it was in another (``seen``)."""
    for alike in _kinds(search, d):
        for change in _changes(search):
            each_bytes = change.takes_bytes(search, d, alike[0])
            layers = list(d.layers)
            for number in alike[: max(0, free_bytes) // each_bytes] if each_bytes else alike:
                layers[number] = change.of(search, d, number)
            states = {(n, _kind(layer)) for n, layer in enumerate(layers) if layer is not d.layers[n]}
            if not states <= seen:
                own = [d.cpu_batches if layer.cpu_batches is None else layer.cpu_batches for layer in layers]
                if (batches := max(own)) != d.cpu_batches:  # which layers without a number of their own would follow
                    layers = [one.model_copy(update={"cpu_batches": n}) for one, n in zip(layers, own, strict=True)]
                changed = d.model_copy(update={"layers": tuple(layers), "cpu_batches": batches})
                yield Changed(changed, change, each_bytes, states)


def _kinds(search: Search, d: Decision) -> list[list[int]]:
    """The MoE layers that are alike and decided alike, the rarest first, which are likely to be what counts could not be spread evenly."""
    kinds: dict[tuple[Layer, Kind], list[int]] = {}
    for number, layer in enumerate(search.request.spec.layers):
        if layer.expert:
            kinds.setdefault((layer, _kind(d.layers[number])), []).append(number)
    return sorted(kinds.values(), key=len)


def _kind(layer: LayerDecision) -> Kind:
    """How many experts are where, not which."""
    counts = (len(getattr(layer, home)) for home in HOMES)
    rest = layer.cpu_picks, len(layer.on_disk), layer.kv, layer.kv_batches, layer.cpu_batches
    return layer.resident, *counts, *rest


def _changes(search: Search) -> Iterator[Change]:
    homes = HOMES[1:] if search.cost.cpu_helps else HOMES[1:-1]
    yield from (Move(source, target) for source, target in permutations(homes, 2))
    yield from (Move(source, HOMES[0]) for source in homes)
    yield Keep()
    if search.cost.cpu_attends:
        yield from (Attend(more) for more in (1, -1))


@dataclass(frozen=True, slots=True)
class Move:
    """An expert, or a ``FINE``th of all, goes from a home to another: the least popular to where such cost less, else the most popular."""

    source: str
    target: str

    def takes_bytes(self, search: Search, d: Decision, number: int) -> int:
        """Of the compute tier, in one layer."""
        expert = search.request.spec.layers[number].expert
        if expert is None or self.target != HOMES[0]:
            return 0
        return _step(search.cost.popular(number)) * expert.slot_bytes

    def of(self, search: Search, d: Decision, number: int) -> LayerDecision:
        """A layer with the change; itself where that is not possible."""
        layer, popular = d.layers[number], search.cost.popular(number)
        here = [e for e in popular if e in getattr(layer, self.source) and e not in layer.on_disk]
        count = _step(popular)
        if len(here) < count:
            return layer
        going = here[-count:] if HOMES.index(self.target) > HOMES.index(self.source) else here[:count]
        left = tuple(e for e in getattr(layer, self.source) if e not in going)
        there = (*getattr(layer, self.target), *going)
        if self.target in ("late", "cpu"):
            there = tuple(e for e in popular if e in there)
        changed = layer.model_copy(update={self.source: left, self.target: there})
        return changed.model_copy(update={"cpu_picks": min(changed.cpu_picks, len(changed.late))})


def _step(experts: Sequence[int]) -> int:
    """Experts that go elsewhere at once."""
    return max(1, len(experts) // FINE)


@dataclass(frozen=True, slots=True)
class Attend:
    """The CPU attends to so many batches more, in rolling order of each age."""

    more: int

    def takes_bytes(self, search: Search, d: Decision, number: int) -> int:
        """None of the compute tier."""
        return 0

    def of(self, search: Search, d: Decision, number: int) -> LayerDecision:
        """A layer with the change; itself where that is not possible."""
        layer, now = d.layers[number], len(d.attended(number))
        then = now + self.more * (d.prefill_groups if d.rolling else 1)
        if layer.kv != "host" or not 0 <= then <= len(d.away(number)) or d.last_batch:
            return layer
        return layer.model_copy(update={"cpu_batches": then})


@dataclass(frozen=True, slots=True)
class Keep:
    """The KV of one batch more of each of prefill's sub-groups stays in the compute tier."""

    def takes_bytes(self, search: Search, d: Decision, number: int) -> int:
        """Of the compute tier, in one layer."""
        return search.kv_bytes_of(d)[number] * d.batch_size * d.prefill_groups // d.sequences

    def of(self, search: Search, d: Decision, number: int) -> LayerDecision:
        """A layer with the change; itself where that is not possible."""
        layer = d.layers[number]
        if layer.kv == search.tier or layer.kv_batches + 1 >= d.part_batches:
            return layer
        return layer.model_copy(update={"kv_batches": layer.kv_batches + 1})


Change = Move | Attend | Keep


class Changed(NamedTuple):
    """A decision with a change in some layers. each_bytes: that it takes in each of them. states: what they are now."""

    decision: Decision
    change: Change
    each_bytes: int
    states: set[State]
