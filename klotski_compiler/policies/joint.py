"""joint: ours; what is resident, named, late-bound, in which order and how far ahead is solved for, and the link never rests.

One queue of loads runs through the whole pass and into the next. An expert that is touched nearly always travels before the router
speaks; the rest is bound to ranks and travels after it, while the named experts of the next layer fill the gap. Each expert
computes once over the whole group, residents first (they need no load), then by Johnson's rule (design 7.4).

    link    | named l ... | attn, named l+1 .. | late l, by rank | named l+1 ... | late l+1
    compute | attn l | router l | resident, named l ...... late l | attn l+1 | router l+1 | ...

A load is written into the program when a slot becomes free: ``lead`` expert slots in all, two layers of attention and router.
"""

from __future__ import annotations

from klotski_compiler.program import Program

ONE_BATCH = False
EXPERTS = "solved"


def build(p: Program) -> None:
    """Compute in order; before each op, write every load that has a slot and whose expert is known."""
    queue = Queue(p)
    p.embed()
    for layer in p.layers:
        queue.advance(layer)
        for _ in p.attend(layer):
            pass
        queue.release(*p.attention_weights(layer))
        for batch in p.batches:
            p.route(layer, batch)
        queue.release(*p.router_weights(layer))
        if p.is_moe(layer):
            p.bind(layer, "rank", 0, len(p.picks(layer)))
            queue.bound = layer
            queue.advance(layer)
            p.experts(layer, p.resident_experts(layer))
            streamed = [*p.static_experts(layer), *p.picks(layer)]
            for number in range(0, len(streamed), p.decision.unit):
                unit = streamed[number : number + p.decision.unit]
                queue.require(unit)
                p.experts(layer, unit)
                queue.release(*unit)
    queue.close()
    p.logits()


class Queue:
    """Loads of one pass in order of need, followed by those that open the next pass, written as slots become free."""

    def __init__(self, p: Program) -> None:
        self.p, self.bound, self.free, self.layer = p, -1, p.decision.lead, 0
        self.pending: list[tuple[int, bool, list[int]]] = []
        for layer in p.layers:
            self.pending += [(layer, False, unit) for unit in self._units(layer, early=True)]
            self.pending += [(layer, True, unit) for unit in self._units(layer, early=False)]
        # The next pass opens with what fits before its first release: layer 0 up to the slots.
        self.opening: list[list[int]] = []
        room = p.decision.lead
        for unit in self._units(0, early=True):
            room -= self._slots(unit)
            if room < 0:
                break
            self.opening.append(unit)
        self.free -= sum(self._slots(unit) for unit in self.opening)
        self.pending = self.pending[len(self.opening) :]

    def _units(self, layer: int, early: bool) -> list[list[int]]:
        p, size = self.p, self.p.decision.unit
        experts = p.static_experts(layer) if early else p.picks(layer)
        units = [experts[i : i + size] for i in range(0, len(experts), size)]
        return [[t] for t in [*p.attention_weights(layer), *p.router_weights(layer)]] + units if early else units

    def _slots(self, unit: list[int]) -> int:
        return sum(self.p.table.all[t].kind in ("expert", "pick") for t in unit)

    def advance(self, layer: int) -> None:
        """Write what can travel now: in order, late experts only once bound, one layer's weights ahead, while slots last.

        While late experts still wait for their router, one unit of slots is kept for them: filling every slot with the next
        layer would leave them none.
        """
        self.layer = layer
        kept: list[tuple[int, bool, list[int]]] = []
        blocked = 0
        for number, (owner, late, unit) in enumerate(self.pending):
            need = self._slots(unit)
            if late and owner > self.bound:
                blocked = blocked or need
                kept.append((owner, late, unit))
                continue
            if owner > layer + 1 or need + (blocked if owner > layer else 0) > self.free:
                kept += self.pending[number:]
                break
            self.p.load(*unit)
            self.free -= need
        self.pending = kept

    def require(self, unit: list[int]) -> None:
        """Make sure that a unit's load is written before its compute."""
        self.advance(self.layer)

    def release(self, *tensors: int) -> None:
        """Evict, and let the freed slots load again."""
        self.p.evict(*tensors)
        self.free += self._slots(list(tensors))
        self.advance(self.layer)

    def close(self) -> None:
        """The opening of the next pass."""
        for unit in self.opening:
            self.p.load(*unit, next_pass=True)
