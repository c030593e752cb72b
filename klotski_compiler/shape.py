"""A phase of the workload in numbers: which batches there are, how old they are, how many tokens they bring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from klotski_compiler.decision import Decision, Workload
from klotski_compiler.model import Layer
from klotski_compiler.ops import batches_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One phase of the workload: ``passes`` sweeps, each over ``batches`` batches of ``batch_size`` sequences.

    tokens: new tokens per sequence and pass. first_context, last_context: positions that attention sees in the first and the
    last pass. attention_batch: sequences of one attention call.

    In rolling order batches differ in age: ``cohort`` of them are equally old (0: all), the next ones ``stride`` passes older.
    While the first cohort brings its prompts the others bring one token each, ``decode_batch`` sequences per attention call. At
    the beginning of a workload the oldest batches are missing, at its end the youngest: ``not_yet`` and ``no_more`` so many.

    last_batch: sequences of every ``part``-th batch, if not 0. together: as in the decision, of all batches that decode.
    """

    name: str
    passes: int
    batches: int
    batch_size: int
    tokens: int
    first_context: int
    last_context: int
    attention_batch: int
    cohort: int = 0
    stride: int = 0
    decode_batch: int = 0
    not_yet: int = 0
    no_more: int = 0
    last_batch: int = 0
    part: int = 1
    together: bool = False

    @property
    def decoding(self) -> bool:
        """Whether all batches decode: then a CPU may help a GPU with experts, too."""
        return self.name.startswith("decode")

    @property
    def fresh(self) -> int:
        """Batches, the first ones, that bring ``tokens`` tokens per sequence; the others bring one."""
        return self.cohort if self.cohort and not self.decoding else self.batches

    @property
    def ages(self) -> range:
        """One batch of each age that is there, youngest first; there are ``beside`` of each."""
        return range(self.no_more, self.batches - self.not_yet, self.beside or 1)

    @property
    def beside(self) -> int:
        """Batches of one age."""
        return self.cohort or self.batches

    @property
    def first_decoding(self) -> int:
        """The first batch that decodes; so do those after it."""
        return 0 if self.decoding else self.fresh

    def decodes(self, batch: int) -> bool:
        """Whether a batch decodes: reads what is cached of its sequences for one new token of each."""
        return self.decoding or batch >= self.fresh

    def most_attended(self, batch: int) -> int:
        """Sequences of one call of attention to a batch."""
        return self.attention_batch if batch < self.fresh else self.decode_batch

    def tokens_of(self, batch: int) -> int:
        """New tokens of each sequence of a batch."""
        return self.tokens if batch < self.fresh else 1

    def context_of(self, batch: int, context: float) -> float:
        """Positions that attention to a batch sees when the youngest sees ``context``."""
        return context + (batch // self.cohort * self.stride if self.cohort else 0)

    def with_ages(self, ages: range) -> Shape:
        """The phase when only some ages are there."""
        return replace(self, no_more=self.cohort * ages.start, not_yet=self.batches - self.cohort * ages.stop)

    def has(self, batch: int) -> bool:
        """Whether a batch is there."""
        return self.no_more <= batch < self.batches - self.not_yet

    @property
    def sequences(self) -> int:
        """Sequences of one pass."""
        return self._sequences(self.no_more, self.batches - self.not_yet)

    def size_of(self, batch: int) -> int:
        """Sequences of one batch."""
        return self.last_batch if self.last_batch and (batch + 1) % self.part == 0 else self.batch_size

    def _sequences(self, first: int, end: int) -> int:
        """Of batches ``first`` to ``end``, exclusive."""
        lasts = end // self.part - first // self.part if self.last_batch else 0
        return (end - first) * self.batch_size + lasts * (self.last_batch - self.batch_size)

    @property
    def middle_context(self) -> float:
        """The positions seen that stand for all passes."""
        return (self.first_context + self.last_context) / 2

    @property
    def alike(self) -> list[tuple[int, int]]:
        """A batch of each age and size that are there, and how many are like it: (count, batch)."""
        lasts = self.beside // self.part if self.last_batch else 0
        kinds = [(self.beside - lasts, 0), *([(lasts, self.part - 1)] if lasts else [])]
        return [(count, first + number) for first in self.ages for count, number in kinds]

    def scope_tokens(self, batch: int) -> int:
        """Tokens that one op works on: of one batch, or of those of several that are there."""
        return self._tokens(batch, self.tokens)

    def fed_tokens(self, batch: int, layer: Layer) -> int:
        """Of these, what goes on after the layer's attention."""
        return self._tokens(batch, 1 if layer.last else self.tokens)

    @lru_cache(maxsize=4096)  # noqa: B019 - shapes are few
    def _tokens(self, batch: int, each: int) -> int:
        """Tokens of a scope whose fresh sequences bring so many each."""
        if batch >= 0:
            return self.size_of(batch) * (each if batch < self.fresh else 1)
        scope = batches_of(batch, self.batches)
        first, end = max(scope.start, self.no_more), min(scope.stop, self.batches - self.not_yet)
        if end <= first:
            return 0
        fresh = max(first, min(end, self.fresh))
        return self._sequences(first, end) + (each - 1) * self._sequences(first, fresh)


def shapes(decision: Decision, workload: Workload) -> tuple[Shape, Shape]:
    """Prefill (one pass per sub-group) and decode (one pass per further token; prefill yields the first); in rolling order one pass
    in which a sub-group joins, and those until the next one does."""
    prompt, several = workload.prompt_len, decision.together and decision.num_batches > 1
    prefill = Shape(
        name="prefill",
        passes=decision.prefill_groups,
        batches=decision.part_batches,
        batch_size=decision.batch_size,
        tokens=prompt,
        first_context=prompt,
        last_context=prompt,
        attention_batch=decision.attention_batch,
        last_batch=decision.last_batch,
        part=decision.part_batches,
    )
    whole = replace(prefill, batches=decision.num_batches)
    decode = replace(
        whole,
        name="decode",
        tokens=1,
        first_context=prompt + 1,
        attention_batch=decision.decode_batch,
        together=several,
    )
    if not decision.rolling:
        return prefill, replace(decode, passes=workload.gen_len - 1, last_context=prompt + workload.gen_len - 1)
    stride, older = decision.stride(workload.gen_len), decision.num_batches - decision.part_batches
    joining, between = (
        replace(shape, cohort=decision.part_batches, stride=stride, decode_batch=decision.decode_batch)
        for shape in (whole, decode)
    )
    joining = replace(joining, passes=1, together=several and older > 1)
    return joining, replace(between, passes=stride - 1, last_context=prompt + stride - 1)
