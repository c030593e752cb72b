"""joint: ours; what is resident, named, late-bound, in which order and how far ahead is solved for, and the link never rests.

One queue of loads runs through the whole pass and into the next. An expert that is touched nearly always travels before the router
speaks; the rest is bound to ranks and travels after it, while the named experts of the next layer fill the gap. Each expert
computes once over the whole group, residents first (they need no load), then by Johnson's rule (design 7.4).

    link    | named l ... | attn, named l+1 .. | late l, by rank | named l+1 ... | late l+1
    compute | attn l | router l | resident, named l ...... late l | attn l+1 | router l+1 | ...

A load is written into the program when a slot becomes free: ``lead`` expert slots in all, two layers of attention and router. What
the CPU computes beside a GPU, attention of some batches and some experts, comes back on a stream of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from klotski_compiler.program import HEAD_SLOTS, URGENT, Program

ONE_BATCH = False
EXPERTS = "solved"
CPU_ATTENTION = (0.0, 0.25, 0.5, 0.75, 1.0)


def build(p: Program) -> None:
    """Compute in order; before each op, write every load that has a slot and whose expert is known."""
    queue = Queue(p)
    p.returning = URGENT
    p.embed()
    for layer in p.layers:
        queue.advance(layer)
        for done, batch in enumerate(p.attend_with_cpu(layer), 1):
            p.route(layer, batch)
            queue.attended(layer, done)
        queue.release(*p.attention_weights(layer), *p.router_weights(layer))
        if p.is_moe(layer):
            p.bind(layer, "rank", 0, len(p.picks(layer)))
            queue.bound = layer
            p.experts_on_cpu(layer)
            queue.advance(layer)
            p.experts(layer, p.resident_experts(layer))
            for streamed in (p.static_experts(layer), p.picks(layer)):
                for number in range(0, len(streamed), p.decision.unit):
                    unit = streamed[number : number + p.decision.unit]
                    p.experts(layer, unit)
                    queue.release(*unit, slots=len(unit))
            p.add_sums(layer)
    queue.advance(len(p.layers))
    p.logits(queue.next_page)


class Queue:
    """Loads of one pass in order of need, followed by those that open the next pass, written as slots become free."""

    def __init__(self, p: Program) -> None:
        self.p, self.bound, self.layer = p, -1, 0
        self.open = -1  # the last layer to whose KV all loads are written
        self.share = 0.0  # of the slots that a layer's experts may take, while its KV is on the way
        self.waiting: deque[Unit] = deque()  # late experts that were passed by, because their router has not spoken yet
        self.pending = deque(unit for layer in p.layers for unit in self._units(layer))
        self.heads, self.free_pages = deque(p.head_pages()), HEAD_SLOTS
        # The next pass opens with what fits before its first release.
        self.opening: deque[Unit] = deque()
        self.free = p.decision.lead
        while (
            self.pending
            and self.pending[0].layer == 0
            and not self.pending[0].late
            and self.pending[0].slots <= self.free
        ):
            self.opening.append(self.pending.popleft())
            self.free -= self.opening[-1].slots

    def _units(self, layer: int) -> Iterator[Unit]:
        """What a layer loads: attention, router and shared expert, experts by name, experts by rank."""
        p, size = self.p, self.p.decision.unit
        for tensor in (*p.attention_weights(layer), *p.router_weights(layer)):
            yield Unit(layer, False, 0, (tensor,))
        for late, experts in ((False, p.static_experts(layer)), (True, p.picks(layer))):
            for first in range(0, len(experts), size):
                chosen = tuple(experts[first : first + size])
                yield Unit(layer, late, len(chosen), chosen)

    def advance(self, layer: int) -> None:
        """Write what can travel now: in order, late experts only once bound, one layer's weights ahead, while slots last.

        While late experts wait for their router, slots for one unit are kept for them: with every slot full of the next layer
        they would have none.
        """
        p = self.p
        if layer != self.layer:
            self.layer, self.share = layer, 0.0
        while self.waiting and self.waiting[0].layer <= self.bound and self.waiting[0].slots <= self.free:
            self._write(self.waiting.popleft())
        while self.pending and self.pending[0].layer <= layer + 1:
            unit = self.pending[0]
            if unit.late and unit.layer > self.bound:
                self.waiting.append(self.pending.popleft())
                continue
            kept = self.waiting[0].slots if self.waiting else 0
            if p.streams_kv(unit.layer) and unit.layer > self.open:
                kept += round((1 - self.share) * p.decision.lead) if unit.layer == layer else p.decision.lead
            if unit.slots and unit.slots + kept > self.free:
                break
            self._write(self.pending.popleft())
        if self.pending or self.waiting:
            return
        while self.heads and self.free_pages:
            p.load(self.heads.popleft())
            self.free_pages -= 1
        while self.opening and not self.heads and self.opening[0].slots <= self.free:
            self._write(self.opening.popleft(), next_pass=True)

    def attended(self, layer: int, batches: int) -> None:
        """Attention to so many batches of a layer has been written: experts, needed after the last, travel between their KV."""
        self.share = batches / len(self.p.batches)
        self.open = layer if self.share == 1 else self.open
        self.advance(layer)

    def _write(self, unit: Unit, next_pass: bool = False) -> None:
        self.p.load(*unit.tensors, next_pass=next_pass)
        self.free -= unit.slots

    def release(self, *tensors: int, slots: int = 0) -> None:
        """Evict, and let the freed slots load again."""
        self.p.evict(*tensors)
        self.free += slots
        self.advance(self.layer)

    def next_page(self) -> None:
        """A page of the head has been computed: its slot is free."""
        self.free_pages += 1
        self.advance(self.layer)


class Unit(NamedTuple):
    """What one load brings. slots: expert slots that it takes."""

    layer: int
    late: bool
    slots: int
    tensors: tuple[int, ...]
