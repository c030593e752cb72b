"""The search: for every policy the best (n, batch size) that fits.

Sizes are enumerated outside (``candidates``), residency is solved inside (``fill``); each candidate is timed by the same simulator on
its distinct layer periods, and whatever may still win is lowered whole. Nobody is handicapped: all policies see the same grid, the same
readers, the same memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, cycle
from math import inf, isinf

from klotski_compiler.bounds.apart import Relaxation
from klotski_compiler.bounds.certificate import bound_tokens_per_s, relaxations
from klotski_compiler.candidates import (
    FITTED,
    MANY_EXPERTS,
    MOST_AGES,
    Request,
    fitted_sizes,
    lean,
    resized,
    shape_of,
    with_last_batches,
)
from klotski_compiler.decision import Decision
from klotski_compiler.errors import Infeasible, PlanError
from klotski_compiler.fill import ALIKE, ANY, EVERYTHING, SAMPLED, Fill, Fills
from klotski_compiler.milp.problem import EXACT_EXPERTS
from klotski_compiler.milp.solve import attended_share, relaxed_us
from klotski_compiler.pipeline import Lowered, lower
from klotski_compiler.policies import OURS, policy
from klotski_compiler.rough import busiest_us, load_us, rough_us
from klotski_compiler.shortlist import (
    ESTIMATE_ERROR,
    KEPT_WHOLE,
    ORDER_ERROR,
    Rated,
    best_of_orders,
    by_order,
    in_both_orders,
    least,
    one_each,
    second_of,
)

__all__ = ["Best", "Rated", "Request", "Search"]

FINE_PLACES = 4  # places in each part of prefill, so many of which a layer may keep the KV of
KEPT_FINER = 2  # sizes that are tried with so many
WORTH = 0.0005  # what another decision must save of simulated time
BUBBLES = 0.005  # of the time of any schedule, at least, that scores leave out: another size that gains less is not worth trying
WORTH_SCORED = 0.0002  # what another micro-batch must save by its score, which is exact: several small steps add up
WORTH_ROLLING = 0.005  # what rolling order must gain: phases apart are simpler, and their groups end one by one
ALONE = 0.05  # about what it costs that no unit travels while another computes: the relaxed problem does not see it
KEPT_FITTED = 4  # decisions per size whose micro-batches are fitted to the memory that they leave
FITTING_GAIN = 0.1  # how much that may gain
IMPROVEMENTS = 10  # decisions near the best one that are tried
MORE_IMPROVEMENTS = 16  # the same where what is near is not alike
ANEW = (ANY, ALIKE)  # how what has prefill in other parts is filled: what was best may not be any longer
LAST_SHARES = (1.0, 2 / 3, 1 / 3)  # of the sequences that the CPU would attend to, how many its own batch may have
LAST_STEPS = (0.8, 1.25)  # from one size of it to the next
KEPT_SCORED = 2  # sizes per policy that are timed on short models
SMALLER = 2 / 3  # groups, where none of the others has passes within --max-latency
FAR_BEHIND = 0.07  # of an order that is given up
BORROWED = 2  # decisions of other policies that are tried in our order
MOST_WHOLE = {2000: 2, MANY_EXPERTS: 1}  # schedules that are lowered whole of a model of more than so many experts
TIE = 0.003  # speeds that differ by less are equal
WORK_ERROR = 0.005  # how far the work of the busiest streams may be off
SHORT = 0.015  # of an estimate: where a whole schedule falls so far short of it, others of which less was estimated may be better
WHOLE_STEPS = 2500  # a pass of so few ops, about, is timed whole at once
RETIMED_STEPS = 6000  # of an estimate that is timed whole before the best are lowered


class TooSlow(Infeasible):
    """What fits has passes longer than --max-latency."""


@dataclass(slots=True)
class Best:
    """A policy's best schedule so far. order: what is known of the order of its experts, in words."""

    policy: str
    decision: Decision
    tokens_per_s: float
    lowered: Lowered
    order: str = ""


class Search(Fills):
    """One request under search."""

    def __init__(self, request: Request) -> None:
        """The clock of --time-limit starts."""
        super().__init__(request)
        self.deadline = time.monotonic() + request.time_limit_s
        self._least: dict[tuple[int, bool], float] = {}
        self.ceilings: dict[bool, float] = {}

    @property
    def is_rugged(self) -> bool:
        """Of many small experts, or where they live on three tiers, several sizes are about as good, and what is near them is not."""
        return not self.is_large and (self.most_pages > 1 or self.finest > EXACT_EXPERTS)

    def timed(self, name: str) -> list[Rated]:
        """A policy's best candidates by estimated speed. Raises Infeasible."""
        rated, starts = self.begun(name)
        return self.chosen(name, rated + [self.improved(start) for start in starts])

    def out_of_time(self) -> bool:
        """Whether --time-limit ends the search here, which the plan then says."""
        over = time.monotonic() > self.deadline
        self.truncated |= over
        return over

    def begun(self, name: str) -> tuple[list[Rated], list[Rated]]:
        """A policy's candidates by what they score, and those of them near which there may be better ones: where no pass of those is within
        --max-latency, which scores do not see, the same of smaller groups. Raises Infeasible."""
        most = self.most_sequences
        try:
            while True:
                rated, starts = self._begun(name)
                if any(r.tokens_per_s for r in rated) or not self.request.max_latency_s:
                    return rated, starts
                if self.out_of_time() or not self._narrowed(rated, SMALLER):
                    if not rated:  # only shares of experts fit
                        return [], []
                    raise self._too_slow()
        finally:
            self.most_sequences = most

    def _narrowed(self, timed: Sequence[Rated], share: float = 1.0) -> bool:
        """Go on with smaller groups than these, of at most that share of their sequences; False where there are none."""
        tried = min([self.most_sequences, *(rated.decision.sequences for rated in timed)])
        self.most_sequences = min(tried - 1, round(share * tried))
        fixed = self.request.batch_size and self.request.num_batches
        return self.most_sequences >= (self.request.batch_size or 1) and not fixed

    def _begun(self, name: str) -> tuple[list[Rated], list[Rated]]:
        if policy(name).one_batch and (self.request.num_batches or 1) > 1:
            raise Infeasible(
                {}, f"{name} computes one batch at a time; leave out --num-batches, or choose another --policy"
            )
        solved = policy(name).solved
        scored, plain = self._scored(name)
        tried = in_both_orders(one_each(scored)) if solved else scored[:KEPT_SCORED]
        rated = list[Rated]()
        for us, base in tried:
            # A score leaves out bubbles: where it is no better than what is found of its order, its schedule is not either; and an order
            # that is found to be far behind stays so.
            here = max((r.tokens_per_s for r in rated if r.decision.rolling == base.rolling), default=0.0)
            behind = 0 < here < (1 - FAR_BEHIND) * max(r.tokens_per_s for r in rated)
            if not solved or (self._rate(us) > here * (1 + BUBBLES) and not behind):
                rated += self._rated(name, base)
        if solved and not self.is_large:
            for base in self.finer([r.decision for r in rated]):
                rated += self._rated(name, base)
        if solved and (kept := self.all_kept(plain)):  # with buffers as they come, everything may fit
            rated.append(Rated(self.estimate(name, kept), name, kept, EVERYTHING))
        starts = best_of_orders(rated) + (second_of(rated) if self.is_rugged else []) if solved else []
        return rated, starts

    def chosen(self, name: str, rated: Sequence[Rated]) -> list[Rated]:
        """Those of a policy's candidates that may be lowered whole, fastest first; where only shares of experts fitted, the leanest. Raises
        Infeasible."""
        if not rated:
            lean = self.lean(name)
            return [Rated(lean.tokens_per_s, name, lean.decision, ANY)]
        quick = sorted((r for r in rated if r.tokens_per_s > 0), key=lambda r: -r.tokens_per_s)
        kept_whole = self.retimed(by_order(quick)) if policy(name).solved else quick[:KEPT_WHOLE]
        if not kept_whole:
            raise self._too_slow()
        return kept_whole

    def _rated(self, name: str, base: Decision) -> list[Rated]:
        """What sizes may be filled with, with estimated speeds."""
        fills = self.fills(name, base)
        return [Rated(self.estimate(name, decision), name, decision, way) for way, decision in fills]

    def _scored(self, name: str) -> tuple[list[tuple[float, Decision]], Decision]:
        """Scores of a policy's candidates, best first, and the best of them before its micro-batches were fitted. Raises Infeasible
        where none fits."""
        scored, plain = list[tuple[float, Decision]](), list[tuple[float, Decision]]()
        refusals: list[Infeasible] = []
        for bound_us, size, rolling in self.sizes(name):
            # What cannot be faster than the best so far, in its own order or, since scores compare orders less well, in either.
            alike = [us for us, base in scored if base.rolling == rolling]
            most = min(min(alike, default=inf) * (1 + ESTIMATE_ERROR), least(scored) * (1 + ORDER_ERROR))
            if bound_us > most:
                continue
            if scored and self.out_of_time():
                break
            fitting: list[tuple[float, Decision]] = []
            for base in self.bases_of(name, [size], rolling):
                try:
                    fitting.append(self._fitting(name, base))
                except Infeasible as fault:
                    refusals.append(fault)
            fitting.sort(key=lambda entry: entry[0])
            plain += fitting[:1]
            if policy(name).solved:
                bases = self.bases_of(name, [size], rolling) if not fitting else (d for _, d in one_each(fitting))
                best_us = min([least(fitting), *alike])
                fitting = self.fitted(name, self._hopeful(name, fitting, list(bases)[:KEPT_FITTED], best_us))
            scored += fitting
        if not scored:
            nearest = min(refusals, key=lambda fault: sum(fault.shortfalls.values()), default=None)
            raise nearest or self._none_of_these_sizes(name)
        scored.sort(key=lambda entry: entry[0])
        return scored, min(plain or scored, key=lambda entry: entry[0])[1]

    def _fitting(self, name: str, base: Decision) -> tuple[float, Decision]:
        """A candidate with its score; where it does not fit, streamed in the smallest pieces, which ``fitted`` does of its own for ours.
        Raises Infeasible."""
        try:
            return self.score(name, base), base
        except Infeasible:
            if policy(name).solved or (small := self.smallest_pieces(name, base)) == base:
                raise
            return self.score(name, small), small

    def _hopeful(
        self, name: str, scored: Sequence[tuple[float, Decision]], bases: Sequence[Decision], best_us: float
    ) -> list[tuple[float, Decision]]:
        """Where to begin fitting, where that is near the best: decisions as they are or, where they are not, with the smallest buffers.
        What little memory holds may be worth more than how well it is used."""
        known, found = {shape_of(base): us for us, base in scored}, list[tuple[float, Decision]]()
        for base in bases:
            us, start = known.get(shape_of(base), inf), base
            if us > best_us * (1 + FITTING_GAIN) or isinf(us):
                start = lean(base, self.least_rows, self.most_pages)
                with suppress(Infeasible):
                    us = self.score(name, start)
            if us <= best_us * (1 + FITTING_GAIN) and us < inf:
                best_us = min(best_us, us)
                found.append((us, start))
        return found

    def borrowed(self, timed: list[Rated]) -> list[Rated]:
        """Where other policies are ahead of ours, what they decided, in our order, and the best of what is near that; where the CPU attends
        to all, also with experts computed batch by batch."""
        ours = max((r.tokens_per_s for r in timed if r.policy == OURS), default=0.0)
        ahead = sorted((r for r in timed if r.tokens_per_s > ours), key=lambda r: -r.tokens_per_s)
        found, by_batch = list[Rated](), list[Rated]()
        for other in ahead[:BORROWED] if ours else ():
            for d in self._variants(other.decision):
                with suppress(Infeasible, PlanError):
                    (by_batch if d.by_batch else found).append(Rated(self.estimate(OURS, d), OURS, d, ANY))
        return [*found, *by_batch, *(self.improved(start) for start in best_of_orders(found))]

    def whole_best(self, timed: list[Rated], refusals: dict[str, Infeasible]) -> list[Best]:
        """Candidates lowered whole, fastest first: all that may win given how far an estimate can be off; none where none fits, which
        ``refusals`` then has the reasons of."""
        whole, short, not_whole = list[Best](), False, list[str]()
        for rated in sorted(timed, key=lambda r: -r.tokens_per_s):
            enough = any(self.num_experts > size and len(whole) >= most for size, most in MOST_WHOLE.items())
            best = max((b.tokens_per_s for b in whole), default=0.0)
            if rated.tokens_per_s < best * (1 - ESTIMATE_ERROR):
                break
            bar = (
                max((b.tokens_per_s for b in whole if b.policy == OURS), default=0.0) if rated.policy == OURS else best
            )
            if self.steps(rated.decision) <= WHOLE_STEPS and rated.tokens_per_s < bar:
                continue  # it was timed whole: others cannot win, ours not be better than it is known to be
            behind = rated.policy == OURS and (bar < best * (1 - TIE) or (short and rated.tokens_per_s > bar))
            known = [b.policy for b in whole]
            if enough and not behind and (rated.policy in known or rated.tokens_per_s < best):
                continue  # ours is lowered as long as it is behind others, or what was estimated, and may win
            try:
                lowered, fitted = self.whole(rated)
                whole.append(Best(rated.policy, fitted, self.rate(lowered), lowered))
                short |= rated.policy == OURS and whole[-1].tokens_per_s < rated.tokens_per_s * (1 - SHORT)
            except Infeasible as refusal:
                refusals[rated.policy] = refusal
                not_whole.append(rated.policy)
        for name in dict.fromkeys(not_whole):
            if name not in [best.policy for best in whole] and (smaller := self.smaller(name, timed)):
                whole.append(smaller)
        if whole:
            whole += list(self._taken_over(whole))
        return sorted(whole, key=lambda best: -best.tokens_per_s * (1 - WORTH_ROLLING * best.decision.rolling))

    def _taken_over(self, whole: Sequence[Best]) -> Iterator[Best]:
        """Where another policy's whole schedule is ahead of ours, what it decided in our order, if that fits: where memory is short, that
        may be another decision than the one that was estimated."""
        ours = max((b.tokens_per_s for b in whole if b.policy == OURS), default=0.0)
        ahead = max(whole, key=lambda b: b.tokens_per_s)
        if self.request.policy != "auto" or ours >= ahead.tokens_per_s * (1 - TIE):
            return
        for d in self._variants(ahead.decision):
            with suppress(Infeasible, PlanError):
                lowered = lower(self.cost, OURS, d, self.request.workload)
                if not self.over(lowered) and (rate := self.rate(lowered)) > ours:
                    yield Best(OURS, d, rate, lowered)

    def _variants(self, decision: Decision) -> Iterator[Decision]:
        """What ours can make of another policy's decision: where the CPU attends to all, also with experts computed batch by batch."""
        yield decision
        if decision.cpu_batches == decision.num_batches and self.request.workload.gen_len > 1:
            yield decision.model_copy(update={"by_batch": True, "together": False})

    def smaller(self, name: str, timed: Sequence[Rated]) -> Best | None:
        """What fits of a policy whose candidates turned out not to when they were lowered whole: of smaller groups; None if nothing
        does."""
        most = self.most_sequences
        try:
            while self._narrowed([r for r in timed if r.policy == name]) and not self.out_of_time():
                timed = self.timed(name)
                for rated in timed:
                    with suppress(Infeasible):
                        lowered, fitted = self.whole(rated)
                        return Best(name, fitted, self.rate(lowered), lowered)
        except Infeasible:
            pass
        finally:
            self.most_sequences = most
        return None

    def leanest(self, names: Sequence[str], refusals: dict[str, Infeasible]) -> list[Best]:
        """The leanest schedules, fastest first. Raises Infeasible with what even those lack."""
        found: list[Best] = []
        for name in names:
            if name in refusals and not refusals[name].shortfalls:  # for another reason than memory
                continue
            try:
                found.append(self.lean(name))
            except Infeasible as refusal:
                refusals[name] = refusal
        if not found:
            # One that fits, if too slowly, says more than what others lack.
            raise min(refusals.values(), key=lambda r: (not isinstance(r, TooSlow), sum(r.shortfalls.values()) or inf))
        return sorted(found, key=lambda best: -best.tokens_per_s)

    def lean(self, name: str) -> Best:
        """One sequence at a time and nothing resident: about the least that a policy takes. Raises Infeasible with what it lacks."""
        if not (base := next(self.bases_of(name, [self.request.batch_size or 1]), None)):
            raise self._none_of_these_sizes(name)
        decision = self._stream_all(name, self.smallest_pieces(name, base))
        lowered = lower(self.cost, name, decision, self.request.workload)
        if over := self.over(lowered):
            raise self._shortfall(over)
        if not (rate := self.rate(lowered)):
            raise self._too_slow()
        return Best(name, decision, rate, lowered)

    @property
    def classes(self) -> tuple[bool, ...]:
        """Classes of schedules, by whether passes are mixed: without decode there is nothing to mix."""
        return (False, True) if self.request.workload.gen_len > 1 else (False,)

    def ceiling(self, rolling: bool) -> float:
        """What no schedule exceeds, in tokens per second, with phases apart or in rolling order."""
        if rolling not in self.ceilings:
            request = self.request
            self.ceilings[rolling] = bound_tokens_per_s(self.cost, request.workload, request.budgets, rolling)
        return self.ceilings[rolling]

    def over(self, lowered: Lowered) -> dict[str, int]:
        """By how much a schedule exceeds each budget that it does."""
        budgets = self.request.budgets.items()
        return {
            tier: lowered.peak_bytes[tier] - budget
            for tier, budget in budgets
            if lowered.peak_bytes.get(tier, 0) > budget
        }

    # ---------------------------------------------------------------------------------------------------------- sizes

    @cached_property
    def _bounds(self) -> dict[bool, list[Relaxation]]:
        request = self.request
        return {
            order: relaxations(self.cost, request.workload, request.budgets, order, coarse=True)
            for order in (False, True)
        }

    def sizes(self, name: str) -> list[tuple[float, int, bool]]:
        """Sequences per group and whether in rolling order, with the least time that any such schedule takes, most promising first."""
        total, found = self.request.workload.num_sequences, []
        for rolling, size in ((order, size) for order in self.orders(name) for size in self.group_sizes(order)):
            if (size, rolling) not in self._least:
                interval = (size, size + MOST_AGES) if rolling else (-(-total // size),) * 2
                self._least[size, rolling] = min(bound.least_us(*interval) for bound in self._bounds[rolling])
            found.append((self._least[size, rolling], size, rolling))
        return sorted(found, key=lambda entry: (entry[0], -entry[1], entry[2]))

    def score(self, name: str, base: Decision) -> float:
        """About how many microseconds the workload takes with the best residency, by which the sizes of one policy compare. Raises
        Infeasible where not even streaming everything fits."""
        if policy(name).solved:
            alone = ALONE if base.lead < 2 * base.unit else 0.0
            return (1 + alone) * relaxed_us(self.cost, self.request.workload, base, self.capacity(name, base, {}))
        return rough_us(self.cost, policy(name), self.fill(name, base), self.request.workload)

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

    # --------------------------------------------------------------------------------------------------------- timing

    def estimate(self, name: str, decision: Decision) -> float:
        """Tokens per second, timed on distinct layer periods: what L layers take from what 2 and 4 of them take, or 4 and 8 where one
        expert more or less makes layers differ."""
        moe, sampled = self.request.spec.moe_layers, SAMPLED if self.finest > EXACT_EXPERTS else 2 * SAMPLED
        if self.steps(decision) <= WHOLE_STEPS or len(moe) <= 2 * sampled:
            return self.rate(lower(self.cost, name, decision, self.request.workload, quick=True))
        runs = []
        for size in (sampled, 2 * sampled):
            cut, cost = self.short(decision, size)
            runs.append(lower(cost, name, cut, self.request.workload, quick=True))
        few, more = runs
        grown = {
            phase: more.phases[phase].times.total_us
            + (len(moe) - 2 * sampled)
            * (more.phases[phase].times.total_us - few.phases[phase].times.total_us)
            / sampled
            for phase in more.phases
            if phase != "load"
        }
        if self._late(few.slowest_us + (len(moe) / sampled - 1) * (more.slowest_us - few.slowest_us)):
            return 0.0
        extrapolated = load_us(self.cost, decision) + more.groups * sum(grown.values())
        # What is rare among the layers a sample may miss, but not the work that it is; that is rounded here and there, too.
        least = busiest_us(self.cost, decision, self.request.workload) * (1 - WORK_ERROR)
        return self._rate(max(extrapolated, least))

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

    def retimed(self, rated: list[Rated]) -> list[Rated]:
        """The fastest of many estimates is the one that errs most: where that takes little, they are timed whole."""
        found = list[Rated]()
        for one in rated:
            if WHOLE_STEPS < self.steps(one.decision) <= RETIMED_STEPS and not self.out_of_time():
                lowered = lower(self.cost, one.policy, one.decision, self.request.workload, quick=True)
                one = replace(one, tokens_per_s=self.rate(lowered))
            found.append(one)
        return sorted((r for r in found if r.tokens_per_s > 0), key=lambda r: -r.tokens_per_s)

    def steps(self, decision: Decision) -> float:
        """About how many ops a pass has."""
        return self.num_experts / decision.unit + 4 * decision.num_batches * len(self.request.spec.layers)

    def whole(self, rated: Rated) -> tuple[Lowered, Decision]:
        """The whole schedule; where it needs more slots than the short model showed and residents cannot make room, with pieces as small
        as they can be, then with nothing resident. Raises Infeasible."""
        name, base = rated.policy, self.bare(rated.policy, rated.decision, rated.decision.num_batches)
        try:
            return self._with_room(name, base, rated.decision, rated.way)
        except Infeasible as refusal:
            if policy(name).solved or not refusal.shortfalls:
                raise
            small = self.smallest_pieces(name, base)
            with suppress(Infeasible):
                return self._with_room(name, small, self.fill(name, small), rated.way)
            lean = self._stream_all(name, small)
            lowered = lower(self.cost, name, lean, self.request.workload)
            if self.over(lowered) or self._late(lowered.slowest_us):
                raise
            return lowered, lean

    def _with_room(self, name: str, base: Decision, decision: Decision, way: Fill) -> tuple[Lowered, Decision]:
        """A decision lowered whole; where that does not fit, residents make room, each time for some more than is missing, since what they
        are exchanged for may take as much. Raises Infeasible."""
        reserve = Counter[str]()
        more = max(layer.expert.slot_bytes for layer in self.request.spec.layers if layer.expert) // 4
        for tries in count():
            lowered = lower(self.cost, name, decision, self.request.workload)
            over = self.over(lowered)
            if not over:
                break
            reserve.update({tier: nbytes + tries * more for tier, nbytes in over.items()})
            decision = self.filled(name, base, way, reserve) or self.fill(name, base, reserve)
        if self._late(lowered.slowest_us):
            raise self._too_slow()
        return lowered, decision

    def rate(self, lowered: Lowered) -> float:
        """Generated tokens per second of a whole schedule, from the first weight byte on; 0 beyond the latency ceiling."""
        if self._late(lowered.slowest_us):
            return 0.0
        return self._rate(lowered.load_us + lowered.groups * lowered.group_us)

    def _rate(self, total_us: float) -> float:
        workload = self.request.workload
        return 1e6 * workload.num_sequences * workload.gen_len / total_us

    def _late(self, pass_us: float) -> bool:
        ceiling = self.request.max_latency_s
        return ceiling is not None and pass_us > 1e6 * ceiling

    def _none_of_these_sizes(self, name: str) -> Infeasible:
        narrowed = self.most_sequences < self.request.workload.num_sequences  # larger groups have some
        if self.request.max_latency_s and narrowed:
            return self._too_slow()
        workload = self.request.workload
        return Infeasible(
            {}, f"{name} has no schedule of these sizes for {workload.num_sequences} prompts; choose others"
        )

    def _too_slow(self) -> TooSlow:
        return TooSlow({}, f"no schedule has a decode pass within --max-latency {self.request.max_latency_s} s")
