"""Attention that two processors share, batch by batch: what it takes at least between ops on all batches (design 7.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from klotski_compiler.bounds.least import DECODE, SCALE_US, Cores, Least, Weight
from klotski_compiler.milp.linear import Terms, plus
from klotski_compiler.ops import CPU
from klotski_compiler.tensors import query_bytes

MOST_BATCHES = 8  # of a group: so many numbers of batches are bounded one by one
RUNS = 3  # layers without a barrier between them: so many are bounded apart, the last number with all that are more


class Division(NamedTuple):
    """What is known of how a group is divided. parts, most_parts: of prefill, at least and (0: any number) at most. batches: their number,
    any above ``MOST_BATCHES`` standing for all that are more (0: any number). shares: of decode, that each of its spans takes at least.
    """

    parts: int = 1
    most_parts: int = 0
    batches: int = 0
    shares: Sequence[float] = ()


UNKNOWN = Division()


class Runs(Least):
    """Rows for a known number of batches."""

    @property
    def runs(self) -> list[tuple[int, list[int]]]:
        """What is between barriers, as (length, kinds of attention): a run of one layer attends in one way, others in any."""
        kinds = list(range(len(self.attentions)))
        return [*((1, [kind]) for kind in kinds), *((length, kinds) for length in range(2, RUNS + 1))]

    def attention(
        self,
        phase: str,
        first: int,
        low: int,
        batches: int,
        cores_us: Cores,
        ends_us: float,
        weights: list[Weight],
        part: float = 1.0,
    ) -> Iterator[tuple[str, list[Terms]]]:
        """Decode by layers, of n batches: an op of attention works on one, an op of router or experts on one or on all of them.

        Batches that are not full are priced as if they were; where sizes differ (``last_batch``), ops of experts are on all batches,
        and those of attention take least if sizes were equal. An op of experts on all is a *barrier*: attention and router of its layer
        come before it, those of the next layer after it. So are the ends of a pass. Between two barriers lies a *run* of r layers; in
        all of them but the last, the GPU computes all experts batch by batch. With a share x of the sequences of its layers on the CPU,
        in batches of whatever size, a run takes at least

            A(x) = max(what the GPU does; for x > 0: first part of a block, the CPU's attention, last part of one and its router),

        since the CPU begins after a first part, and a last part needs what it did last. With one batch x is 0 or 1 (and no run is
        longer than a layer): what layers take on average lies on the line between the two. With more, A is convex but for x = 0, where
        what is around the CPU's attention must count no more than what the GPU does. Layers that attend in different ways have shares of
        their own, and are in runs of any length as many as they like.

        Barriers, runs and ends do not overlap, so T >= runs + ends + what barriers take. Of a layer's, let G be the GPU's experts on
        all, C the CPU's, of which there are c, and w their exchange; E the GPU's if it computed all of them, F those by batches. Then
        max(G, C + w (c > 0)) is no less than

            G
            C + min(w, E) (1 - F / E)                 for c = 0, G = E - F
            G + C + sum on the CPU of (E_i - E + w)   for w <= E: C + w + (c - 1) (w - E), or less, for c > 0
        """
        split_us = min(self._layer_sums([weight.split_us for weight in weights[1:]]), default=0.0)
        both: Terms = {"": ends_us / SCALE_US}
        for number, (run, kinds) in enumerate(self.runs):
            lines = (
                self._attention_us(first, low, batches, run, kind, cores_us[kind], split_us, part) for kind in kinds
            )
            both[time := f"attention[{phase}.{number}]"] = 1.0
            rows = list[Terms]()
            for row in zip(*lines, strict=True):
                of_kinds = list(zip(kinds, row, strict=True))
                rows.append({f"run[{run}.{kind}]": at_0 for kind, (_, at_0) in of_kinds})
                rows[-1] |= {f"cpu[run.{run}.{kind}]": slope for kind, (slope, _) in of_kinds}
            yield time, rows
        here = [weight.compute_us[DECODE] * part / SCALE_US for weight in weights[1:]]
        layers = self._layer_sums(here)
        least, greatest = min(layers, default=0.0), max(layers, default=0.0)
        exchange = first * self.passes * part * self._exchange_us(low) / SCALE_US
        waits = min(exchange, least)
        gpu, cpu, either = dict(both), plus(both, {"": waits * len(layers)}), dict(both)
        for i, us in enumerate(here, 1):
            alone, count = weights[i].alone_us * part / SCALE_US, self.experts[i - 1][2]
            gpu[f"most[{i}]"] = us
            cpu |= {f"cpu[{i}]": alone, f"split[{i}]": -waits * us / least}
            either |= {f"most[{i}]": us, f"cpu[{i}]": us + alone + (min(exchange, greatest) - greatest) * count}
        yield phase, [gpu, cpu, either]

    def _attention_us(
        self,
        first: int,
        low: int,
        batches: int,
        run: int,
        kind: int,
        core_us: tuple[float, float],
        split_us: float,
        part: float,
    ) -> list[tuple[float, float]]:
        """Lines (slope, value at 0) below what attention of a kind would take, were all its layers in runs of a length (the last one
        standing for all that are longer), as a function of the CPU's share. split_us: of a layer's experts, batch by batch."""
        cost, size, own = self.cost, low / batches, self.attentions[kind]
        layers = own.count
        times = first * self.passes * part * layers / SCALE_US
        layer_us = min(self._batches_us(layer, low, batches) + cost.choice_us(layer, low) for layer, _ in own.layers)
        all_route = len(self.routed) == len(self.cost.spec.layers)
        inside = (1 - 1 / run) * split_us * part * layers / SCALE_US if all_route else 0.0
        core_here, core_cpu = core_us[0] / SCALE_US, core_us[1] / SCALE_US
        here = times * layer_us + core_here + inside
        if run == RUNS:
            return [(-core_here, here), (core_cpu, 0.0)]
        there = max(1, int(size)) if batches == 1 else 1
        mixed_bytes = there * min(one.mixed_bytes / one.count for one in (self.attentions if run > 1 else [own]))
        around_us = cost.transfer_us(cost.links[1], query_bytes(cost.spec, there, cost.dtype))
        around_us += cost.transfer_us(cost.links[0], mixed_bytes) + cost.hardware.processors[CPU].op_us
        if run == 1 or len(self.layers) == 1:  # first and last part of layers that differ may take less
            around_us += min(self._projected_us(layer, there) + cost.choice_us(layer, there) for layer, _ in own.layers)
        around = times / run * around_us
        if batches == 1 and run == 1:
            return [(max(here - core_here, around + core_cpu) - here, here)]
        return [(-core_here, here), (core_cpu, min(around, here))]

    def barriers(self, weights: list[Weight]) -> Terms:
        """Of a run of r layers, r - 1 or more are no barriers: layers that do not route, or whose experts are all computed batch by batch.
        For an expert, that takes a known time more than at once; layers are as many as what is spent in all of them pays for."""
        layers, more = len(self.cost.spec.layers), [w.split_us - w.compute_us[DECODE] for w in weights[1:]]
        least = min(self._layer_sums(more), default=0.0)
        if least <= 0:
            return {}
        terms: Terms = {
            f"run[{run}.{kind}]": -(1 - 1 / run) * self.attentions[kind].count
            for run, kinds in self.runs
            for kind in kinds
        }
        terms |= {f"split[{i}]": us / least for i, us in enumerate(more, 1)}
        return terms | {"": float(layers - len(self.routed))}

    def _layer_sums(self, totals: list[float]) -> list[float]:
        """Of each layer that routes, its part of what ``experts`` take in all layers."""
        each = [total / count for total, (_, _, count) in zip(totals, self.experts, strict=True)]
        return [sum(n * each[number] for number, n in members.items()) for members in self.routed]
