"""The search: for every policy the best (n, batch size) that fits.

Sizes are enumerated outside (``candidates``), residency is solved inside (``fill``); each candidate is timed by the same simulator on
its distinct layer periods (``estimates``), the best are bettered step by step (``climb``), and whatever may still win is lowered whole.
Nobody is handicapped: all policies see the same grid, the same readers, the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import inf, isinf

from klotski_compiler.bounds.apart import Relaxation
from klotski_compiler.bounds.certificate import bound_tokens_per_s, relaxations
from klotski_compiler.candidates import MANY_EXPERTS, MOST_AGES, Request, lean, shape_of
from klotski_compiler.climb import Climbs
from klotski_compiler.decision import Decision
from klotski_compiler.errors import Infeasible, PlanError
from klotski_compiler.estimates import TooSlow
from klotski_compiler.fill import ANY, EVERYTHING
from klotski_compiler.pipeline import Lowered, lower
from klotski_compiler.policies import OURS, policy
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

BUBBLES = 0.005  # of the time of any schedule, at least, that scores leave out: another size that gains less is not worth trying
WORTH_ROLLING = 0.005  # what rolling order must gain: phases apart are simpler, and their groups end one by one
KEPT_FITTED = 4  # decisions per size whose micro-batches are fitted to the memory that they leave
FITTING_GAIN = 0.1  # how much that may gain
KEPT_SCORED = 2  # sizes per policy that are timed on short models
SMALLER = 2 / 3  # groups, where none of the others has passes within --max-latency
FAR_BEHIND = 0.07  # of an order that is given up
BORROWED = 2  # decisions of other policies that are tried in our order
MOST_WHOLE = {2000: 2, MANY_EXPERTS: 1}  # schedules that are lowered whole of a model of more than so many experts
TIE = 0.003  # speeds that differ by less are equal
SHORT = 0.015  # of an estimate: where a whole schedule falls so far short of it, others of which less was estimated may be better


@dataclass(slots=True)
class Best:
    """A policy's best schedule so far. order: what is known of the order of its experts, in words."""

    policy: str
    decision: Decision
    tokens_per_s: float
    lowered: Lowered
    order: str = ""


class Search(Climbs):
    """One request under search."""

    def __init__(self, request: Request) -> None:
        """Nothing tried yet."""
        super().__init__(request)
        self._least: dict[tuple[int, bool], float] = {}
        self.ceilings: dict[bool, float] = {}

    def timed(self, name: str) -> list[Rated]:
        """A policy's best candidates by estimated speed. Raises Infeasible."""
        rated, starts = self.begun(name)
        return self.chosen(name, rated + [self.improved(start) for start in starts])

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
            if self.is_short(rated.decision) and rated.tokens_per_s < bar:
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
