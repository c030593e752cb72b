"""How fast a candidate is: what its distinct layer periods take in the simulator or, near the end of the search, all of it."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import count

from klotski_compiler.candidates import Request
from klotski_compiler.decision import Decision
from klotski_compiler.errors import Infeasible
from klotski_compiler.fill import SAMPLED, Fill, Fills
from klotski_compiler.milp.problem import EXACT_EXPERTS
from klotski_compiler.pipeline import Lowered, lower
from klotski_compiler.policies import policy
from klotski_compiler.rough import busiest_us, load_us
from klotski_compiler.shortlist import Rated

WORK_ERROR = 0.005  # how far the work of the busiest streams may be off
WHOLE_STEPS = 2500  # a pass of so few ops, about, is timed whole at once
RETIMED_STEPS = 6000  # of an estimate that is timed whole before the best are lowered


class TooSlow(Infeasible):
    """What fits has passes longer than --max-latency."""


class Estimates(Fills):
    """Candidates with their speeds, in tokens per second, until the time is over."""

    def __init__(self, request: Request) -> None:
        """The clock of --time-limit starts."""
        super().__init__(request)
        self.deadline = time.monotonic() + request.time_limit_s

    def out_of_time(self) -> bool:
        """Whether --time-limit ends the search here, which the plan then says."""
        over = time.monotonic() > self.deadline
        self.truncated |= over
        return over

    def estimate(self, name: str, decision: Decision) -> float:
        """Tokens per second, timed on distinct layer periods: what L layers take from what 2 and 4 of them take, or 4 and 8 where one
        expert more or less makes layers differ."""
        moe, sampled = self.request.spec.moe_layers, SAMPLED if self.finest > EXACT_EXPERTS else 2 * SAMPLED
        if self.is_short(decision) or len(moe) <= 2 * sampled:
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

    def retimed(self, rated: list[Rated]) -> list[Rated]:
        """The fastest of many estimates is the one that errs most: where that takes little, they are timed whole."""
        found = list[Rated]()
        for one in rated:
            if not self.is_short(one.decision) and self.steps(one.decision) <= RETIMED_STEPS and not self.out_of_time():
                lowered = lower(self.cost, one.policy, one.decision, self.request.workload, quick=True)
                one = replace(one, tokens_per_s=self.rate(lowered))
            found.append(one)
        return sorted((r for r in found if r.tokens_per_s > 0), key=lambda r: -r.tokens_per_s)

    def steps(self, decision: Decision) -> float:
        """About how many ops a pass has."""
        return self.num_experts / decision.unit + 4 * decision.num_batches * len(self.request.spec.layers)

    def is_short(self, decision: Decision) -> bool:
        """Whether a pass has so few ops that it is timed whole at once."""
        return self.steps(decision) <= WHOLE_STEPS

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

    def over(self, lowered: Lowered) -> dict[str, int]:
        """By how much a schedule exceeds each budget that it does."""
        budgets = self.request.budgets.items()
        return {
            tier: lowered.peak_bytes[tier] - budget
            for tier, budget in budgets
            if lowered.peak_bytes.get(tier, 0) > budget
        }

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
