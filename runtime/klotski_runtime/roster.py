"""Who takes part in a pass: which of a run's batches each batch of the plan is, how old it is, and where its KV lies.

With phases apart a run is one batch group. In rolling order it is all the prompts there are: in every round a cohort of batches joins,
and the places of the oldest become the newcomers'.
"""

from __future__ import annotations

from typing import NamedTuple

from klotski_compiler.plan import Phase, Plan


class Seat(NamedTuple):
    """A batch of the run in one pass. passes: how many it has behind it, the first of which was its prefill. place: the batch of the
    plan in whose permanent slot, or region on disk, its KV is."""

    batch: int
    passes: int
    place: int


class Roster:
    """The seats of one run of ``batches`` batches."""

    def __init__(self, plan: Plan, batches: int) -> None:
        """Pure: looks at the plan's decision and envelope only."""
        self.decision, self.batches, self.gen_len = plan.decision, batches, plan.envelope.gen_len
        self.stride = self.decision.stride(self.gen_len)
        self.cohorts = -(-batches // self.decision.part_batches)

    @property
    def rounds(self) -> int:
        """How often prefill and decode follow one another until the last batch is done."""
        return self.cohorts + self.decision.prefill_groups - 1 if self.decision.rolling else 1

    @property
    def back_to_back(self) -> bool:
        """Whether rounds are passes of one phase, because nobody decodes between them."""
        return self.decision.rolling and self.stride == 1

    def seat(self, phase: Phase, number: int, round_: int, at: int) -> Seat | None:
        """Who batch ``number`` of a phase is in its pass ``at``; None where the run is too short to have it, or it is done."""
        joins = phase.name == "prefill"
        if not self.decision.rolling:
            batch = number + at * phase.batches if joins else number
            return Seat(batch, 0 if joins else at + 1, batch) if batch < self.batches else None
        now = round_ + at if self.back_to_back else round_
        age, beside = divmod(number, self.decision.part_batches)
        batch = (now - age) * self.decision.part_batches + beside
        passes = age * self.stride + (0 if joins else at + 1)
        if now < age or batch >= self.batches or passes >= self.gen_len:
            return None
        return Seat(batch, passes, self.decision.place(number, now))
