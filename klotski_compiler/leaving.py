"""Which batches leave a layer's attention together, in one op: all at once takes least, but a processor that waits for another batch, which
the CPU attends to or whose keys and values are on their way, may do the others before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from klotski_compiler.cost import Cost
from klotski_compiler.model import Layer
from klotski_compiler.ops import CPU, onward, span
from klotski_compiler.shape import Shape


@dataclass(frozen=True, slots=True)
class Scope:
    """Batches ``first`` to ``end`` (exclusive) of so many. late: those of them to which the CPU attends."""

    first: int
    end: int
    batches: int
    late: tuple[int, ...]

    @property
    def number(self) -> int:
        """As an op names them."""
        return onward(self.first) if self.end == self.batches else span(self.first, self.end)

    @property
    def last(self) -> int:
        """The one that leaves attention last."""
        return self.late[-1] if self.late else self.end - 1


class Leaving:
    """One layer. here: batches that the processor attends to, in order; late: those of the CPU, which leave after them. together: the first
    of those that wait for the last one."""

    def __init__(
        self, cost: Cost, shape: Shape, layer: Layer, late: Sequence[int], sent: Sequence[int], may_choose: bool
    ) -> None:
        """sent: batches whose keys and values are waited for. may_choose: all leave together otherwise."""
        self.cost, self.shape, self.layer, self.late = cost, shape, layer, late
        self.here = [batch for batch in range(shape.batches) if batch not in late]
        self.together = 0
        self.scopes = list(self._cut(0, False))
        if may_choose:
            self._choose(sent)
        self.by_last = {scope.last: scope for scope in self.scopes}

    @property
    def final(self) -> Scope:
        """The scope that leaves last."""
        return self.by_last[(self.late or self.here)[-1]]

    @property
    def in_turn(self) -> list[Scope]:
        """Scopes in the order in which their attention should begin: what the CPU waits for comes first."""
        return sorted(self.scopes, key=lambda scope: scope.first < self.together)

    def _choose(self, sent: Sequence[int]) -> None:
        """The first batch that waits, and whether those that do leave in three scopes: so the CPU has the first one's queries sooner, and
        only the last one's way out is still to be gone once it is done."""
        shape = self.shape
        there = list(filter(shape.has, range(shape.batches)))
        late, coming = [b for b in self.late if shape.has(b)], [b for b in sent if shape.has(b)]
        if not late and not coming:  # nothing to wait for
            return
        position = self.layer.kv_elements * self.cost.compute_bytes
        busy = []  # at both ends of the phase and in its middle: of the processor, and of what it may wait for
        for context in (shape.first_context, shape.middle_context, shape.last_context):
            seen = {b: shape.size_of(b) * shape.context_of(b, context) for b in (*late, *coming)}
            cpu = sum(self.cost.attend_us(self.layer, 1, seen[b], self.cost.hardware.processors[CPU]) for b in late)
            link = sum(self.cost.kv_us(self.cost.links[0], position * seen[b]) for b in coming)
            busy.append((sum(self._attends_us(b, context) for b in there if b not in late), max(cpu, link)))

        def end_us(scopes: Iterable[Scope]) -> float:
            """What the processor does before the last batch has come, which it waits for, and after that."""
            *before, last = [self._leaves_us(scope) for scope in scopes]
            return sum(max(here + sum(before), other) + last for here, other in busy)

        choices = {shape.first_decoding, *late[:1], *coming[-1:]} | (set() if shape.together else {shape.batches})
        choices |= set() if late else {0}  # prompts have experts to go through while the CPU attends
        ways = [(together, cut) for together in sorted(choices) for cut in (False, True)]
        found = {way: scopes for way in ways if (scopes := list(self._cut(*way)))}
        best = min(found, key=lambda way: end_us(found[way]))
        self.together, self.scopes = best[0], found[best]

    def _cut(self, together: int, finely: bool) -> Iterator[Scope]:
        """All batches in scopes, the last one to leave at the end; none if there is nothing to be cut finely."""
        batches, first, late = self.shape.batches, self.shape.first_decoding, self.late
        alone = range(min(together, first if self.shape.together else together))
        ends = [*(batch + 1 for batch in alone), together]
        if finely:
            if not self.shape.together or len(late) < 2 or not together <= late[0]:
                return
            ends += [late[0] + 1, late[-1]]
        begin = 0
        for end in sorted({*ends, batches}):
            if begin < end:
                yield Scope(begin, end, batches, tuple(batch for batch in late if begin <= batch < end))
                begin = end

    def _leaves_us(self, scope: Scope) -> float:
        """What surrounds the attention of a scope, where that is not part of it, and what comes after."""
        around, first = 0.0, max(scope.first, self.shape.first_decoding)
        decoding = self.shape.together and first < scope.end
        if decoding and (tokens := self.shape.scope_tokens(replace(scope, first=first).number)):
            around = self.cost.project_us(self.layer, tokens) + self.cost.output_us(self.layer, tokens)
        fed = self.shape.fed_tokens(scope.number, self.layer)
        return around + (self.cost.mlp_us(self.layer, fed) if fed else 0.0)

    def _attends_us(self, batch: int, context: float) -> float:
        """What the processor takes for one batch's attention."""
        apart = not self.shape.together or not self.shape.decodes(batch)
        price = self.cost.attention_us if apart else self.cost.attended_us
        return price(self.layer, self.shape, context, batch)
