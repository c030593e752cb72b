"""From a good decision to a better one near it: sizes fitted by their scores, then whatever simulated time says of their neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, cycle

from klotski_compiler.candidates import FITTED, fitted_sizes, resized, shape_of, with_last_batches
from klotski_compiler.decision import Decision
from klotski_compiler.errors import Infeasible
from klotski_compiler.estimates import Estimates
from klotski_compiler.fill import ALIKE, ANY, Fill
from klotski_compiler.milp.problem import EXACT_EXPERTS
from klotski_compiler.milp.solve import attended_share, relaxed_us
from klotski_compiler.policies import OURS, policy
from klotski_compiler.rough import rough_us
from klotski_compiler.shortlist import Rated

FINE_PLACES = 4  # places in each part of prefill, so many of which a layer may keep the KV of
KEPT_FINER = 2  # sizes that are tried with so many
WORTH = 0.0005  # what another decision must save of simulated time
WORTH_SCORED = 0.0002  # what another micro-batch must save by its score, which is exact: several small steps add up
ALONE = 0.05  # about what it costs that no unit travels while another computes: the relaxed problem does not see it
IMPROVEMENTS = 10  # decisions near the best one that are tried
MORE_IMPROVEMENTS = 16  # the same where what is near is not alike
ANEW = (ANY, ALIKE)  # how what has prefill in other parts is filled: what was best may not be any longer
LAST_SHARES = (1.0, 2 / 3, 1 / 3)  # of the sequences that the CPU would attend to, how many its own batch may have
LAST_STEPS = (0.8, 1.25)  # from one size of it to the next


class Climbs(Estimates):
    """Candidates and those that differ from them in one or two sizes."""

    @property
    def is_rugged(self) -> bool:
        """Of many small experts, or where they live on three tiers, several sizes are about as good, and what is near them is not."""
        return not self.is_large and (self.most_pages > 1 or self.finest > EXACT_EXPERTS)

    def fitted(self, name: str, scored: list[tuple[float, Decision]]) -> list[tuple[float, Decision]]:
        """The same sizes with the micro-batches of each module as large, and prefill in as few parts, as pays: what their buffers take,
        weights and KV do not."""
        found: list[tuple[float, Decision]] = []
        for us, base in scored:
            best, known, idle = (us, base), {fitted_sizes(base)}, 0
            for size in cycle(FITTED):
                idle = 0 if (better := self._resized(name, best, size, known)) is not best else idle + 1
                if idle == len(FITTED):
                    break
                best = better
            if best[1] not in [base for _, base in found]:
                found.append(best)
        return sorted(found, key=lambda entry: entry[0])

    def score(self, name: str, base: Decision) -> float:
        """About how many microseconds the workload takes with the best residency, by which the sizes of one policy compare. Raises
        Infeasible where not even streaming everything fits."""
        if policy(name).solved:
            alone = ALONE if base.lead < 2 * base.unit else 0.0
            return (1 + alone) * relaxed_us(self.cost, self.request.workload, base, self.capacity(name, base, {}))
        return rough_us(self.cost, policy(name), self.fill(name, base), self.request.workload)

    def _resized(
        self, name: str, best: tuple[float, Decision], size: str, known: set[tuple[int, ...]]
    ) -> tuple[float, Decision]:
        """The best of a decision and those that differ in one size; ``known`` ones are not looked at again."""
        climbing = True
        while climbing:
            climbing = False
            for other in resized(best[1], size, self.least_rows, self.most_pages):
                if (sizes := fitted_sizes(other)) in known or other.attention_batch > self.most_attention:
                    continue
                known.add(sizes)
                with suppress(Infeasible):
                    if (tried := self.score(name, other)) < best[0] * (1 - WORTH_SCORED):
                        best, climbing = (tried, other), True
                        break
        return best

    def with_last(self, name: str, d: Decision) -> Iterator[Decision]:
        """The same number of sequences with some of them in a batch of the CPU's own: as many as it would attend to if batches could be
        divided, or fewer; or about as many as there are in it."""
        if not self.sizes_are_free or not self.cost.cpu_attends:
            return
        base = self.bare(name, d, d.num_batches)
        part, count = base.sequences // base.prefill_groups, base.part_batches
        if base.last_batch:
            lasts = sorted({round(base.last_batch * step) for step in LAST_STEPS} - {base.last_batch})
            count -= 1
        else:
            share = attended_share(self.cost, self.request.workload, base, self.capacity(name, base, {}))
            lasts = sorted({round(share * part * less) for less in LAST_SHARES}, reverse=True)
            count = max(1, round((1 - share) * count))
        for last in lasts:
            if 0 < last < part:
                found = with_last_batches(base, base.prefill_groups, count, last)
                if not base.rolling or found.cohorts(self.request.workload.num_sequences) >= found.prefill_groups:
                    yield found

    def _near(self, best: Rated) -> Iterator[tuple[Decision, Fill]]:
        """Decisions near one, and how to fill them: also as if loads took longer than they do, since the link, unlike in the residency
        problem, cannot be busy all the time."""
        name, here = best.policy, best.decision
        if not best.way.everything and best.way != best.way.stretched:
            yield self.bare(name, here, here.num_batches), best.way.stretched
        for base in chain(self.neighbours(name, here), self.with_last(name, here)):
            yield base, best.way

    def improved(self, best: Rated) -> Rated:
        """The best of a decision and what is near it, by hill climbing on simulated time: how far ahead, in which units and in how many
        batches pays is a matter of bubbles, which the residency problem does not see."""
        tried, start = {(shape_of(best.decision), best.way)}, None
        most = MORE_IMPROVEMENTS if self.is_rugged else IMPROVEMENTS
        while best is not start:
            start = best
            for base, way in self._near(best):
                if len(tried) > most or self.out_of_time():
                    break
                if (shape_of(base), way) in tried:
                    continue
                tried.add((shape_of(base), way))
                if (best := self._better(best, base, way)) is not start:
                    break
        for base, way in chain(self._in_other_parts(best), self._either_way(best)):
            if self.out_of_time():
                break
            best = self._better(best, base, way)
        return best

    def _better(self, best: Rated, base: Decision, way: Fill) -> Rated:
        """What sizes may be filled with, if that is better."""
        with suppress(Infeasible):
            if decision := self.filled(best.policy, base, way):
                rate = self.estimate(best.policy, decision)
                if rate > best.tokens_per_s * (1 + WORTH):
                    return replace(best, tokens_per_s=rate, decision=decision, way=way)
        return best

    def _in_other_parts(self, best: Rated) -> Iterator[tuple[Decision, Fill]]:
        """About the same sizes with prefill in twice or half as many parts, each with the same share in the CPU's own batch: what a part's
        states take, weights and KV do not."""
        d = best.decision
        if d.rolling or not (self.is_rugged and self.sizes_are_free) or best.way.everything:
            return
        base, large = self.bare(best.policy, d, d.num_batches), d.part_batches - bool(d.last_batch)
        for parts in (2 * d.prefill_groups, d.prefill_groups // 2):
            if not 0 < parts <= d.num_batches:
                continue
            other = base.model_copy(update={"prefill_groups": parts})
            if d.last_batch:
                count, last = (max(1, round(n * d.prefill_groups / parts)) for n in (large, d.last_batch))
                if last >= d.sequences // parts:  # of so few, none is left to the GPU
                    continue
                other = with_last_batches(base, parts, count, last)
            yield from ((other, way) for way in ANEW)

    def _either_way(self, best: Rated) -> Iterator[tuple[Decision, Fill]]:
        """A decision with what surrounds attention the other way: where a GPU waits for the CPU, calls cost it nothing, and what is done
        batch by batch can be done earlier."""
        d = best.decision
        if d.num_batches > 1 and not d.by_batch and self.cost.cpu_attends:
            yield self.bare(best.policy, d, d.num_batches).model_copy(update={"together": not d.together}), best.way

    def finer(self, decisions: Sequence[Decision]) -> list[Decision]:
        """Where KV is spilled, the first few sizes with prefill in fewer parts: all parts keep a batch's KV where its place says, so that
        as many parts as batches move a layer's KV whole or not at all, which the relaxed score does not see."""
        found = dict[tuple[int, ...], Decision]()
        for d in decisions:
            parts = max(1, d.num_batches // FINE_PLACES)
            if not d.rolling and parts < d.prefill_groups and any(layer.kv != self.tier for layer in d.layers):
                base = self.bare(OURS, d, d.num_batches).model_copy(update={"prefill_groups": parts})
                found.setdefault(shape_of(base), base)
        return list(found.values())[:KEPT_FINER]
