"""joint: ours; what is resident, named, late-bound, in which order and how far ahead is solved for, and the link never rests.

One queue of loads runs through the whole pass and into the next. An expert that is touched nearly always travels before the router
speaks; the rest is bound to ranks and travels after it, or is the CPU's, while the named experts of the next layer fill the gap.
Each expert computes once over the whole group: streamed ones by Johnson's rule (design 7.4) as they arrive, residents in between.

    link    | named l ... | attn, named l+1 .. | late l, by rank | named l+1 ... | late l+1
    compute | attn l | router l | named, resident l ...... late l | attn l+1 | router l+1 | ...

A load is written into the program when a slot becomes free: ``lead`` expert slots in all, two layers of attention and router. What
the CPU computes beside a GPU, attention of some batches and some experts, comes back on a stream of its own. Where the CPU attends to
all batches and takes longest, experts may be computed batch by batch (``by_batch``), so that it need not wait for them: as CGOPipe does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from klotski_compiler.leaving import Leaving
from klotski_compiler.ops import ALL, CPU, Bind, Load, onward, span
from klotski_compiler.policies import Policy, moe_lightning
from klotski_compiler.program import HEAD_SLOTS, URGENT, Evict, Program, staging_slots


def build(p: Program) -> None:
    """Compute in order; before each op, write every load that has a slot and whose expert is known."""
    if p.decision.by_batch and p.shape.decoding:
        moe_lightning.build(p)
        return
    queue = Queue(p)
    p.returning = URGENT
    p.embed()
    for layer in p.layers:
        queue.advance(layer)
        leaving, begun = p.leaving(layer), list[int]()
        shared = shared_apart(p, layer)
        for batch in p.attend_with_cpu(layer, leaving):
            if batch in leaving.by_last:
                scope = leaving.by_last[batch]
                p.route(layer, scope.number, shared=not shared or scope is not leaving.final)
            queue.attended(layer, batch)
            if leaving.here[-1:] == [batch] and p.is_moe(layer):
                begun = begin_experts(p, queue, layer, leaving)
        queue.release(*p.attention_weights(layer), *(t for t in p.router_weights(layer) if t not in shared))
        if p.is_moe(layer):
            p.bind(layer, "rank", 0, len(p.late[layer]))
            queue.bound = layer
            p.experts_on_cpu(layer)
            queue.advance(layer)
            if shared:
                p.compute("shared", layer, leaving.final.number, *shared)
                queue.release(*shared)
            experts(p, queue, layer, begun, leaving.together)
            p.add_sums(layer)
    queue.advance(len(p.layers))
    p.logits(queue.next_page)


def shared_apart(p: Program, layer: int) -> list[int]:
    """A shared expert that the last batches to leave attention go through only when the router has spoken of them: where somebody waits
    for its word."""
    return p.shared_weights(layer) if p.picks(layer) or p.cpu_experts(layer) else []


def begin_experts(p: Program, queue: Queue, layer: int, leaving: Leaving) -> list[int]:
    """While the GPU would wait for the CPU's attention, residents compute over the prompts that have left it before, as many as pays; one
    token each of others would hardly pay for reading weights twice. Returns them."""
    late, together = leaving.late, leaving.together
    if p.shape.decoding or not late or not 0 < together <= late[0]:
        return []
    begun = p.worth_splitting(layer, p.resident_experts(layer), together, queue.clock.cpu_ahead_us())
    if begun:
        p.compute("experts", layer, span(0, together), *begun)
    return begun


def experts(p: Program, queue: Queue, layer: int, begun: Sequence[int], together: int) -> None:
    """List scheduling: a streamed unit as soon as it has arrived, which frees its slots for the link; residents while none has, those that
    have begun over the other batches only."""
    kinds = [*p.static_experts(layer)], [*p.picks(layer)]
    far = [expert for expert in kinds[0] if p.is_far(expert)]
    near = [expert for expert in kinds[0] if expert not in far]
    coming = [units(experts, p.decision.unit) for experts in (near, far, kinds[1])]
    residents = p.resident_experts(layer)
    gaps = sum(map(len, coming)) + 1
    size = max(p.decision.unit, -(-len(residents) // gaps))  # in as many ops as there are gaps
    whole = [expert for expert in residents if expert not in begun]
    here = deque(
        (scope, unit) for scope, kind in ((ALL, whole), (onward(together), begun)) for unit in units(kind, size)
    )
    while here or any(coming):
        loaded = [kind for kind in coming if kind and queue.loaded.issuperset(kind[0])]
        first = min(loaded, key=lambda kind: queue.clock.arrival(kind[0]), default=None)
        if first and (not here or queue.clock.has(first[0])):
            unit = first.popleft()
            p.experts(layer, unit)
            queue.release(*unit, slots=len(unit))
        elif here:
            scope, unit = here.popleft()
            p.compute("experts", layer, scope, *unit)
        else:
            queue.advance(layer, waiting=True)


def units(experts: Sequence[int], size: int) -> deque[list[int]]:
    """Experts, so many at a time."""
    return deque(list(experts[first : first + size]) for first in range(0, len(experts), size))


class Clock:
    """When what has been written so far would be done, by the ops' expected times: what list scheduling goes by. Streams in order,
    every op after its tensors, loads after the ops before them (those gave up their slots), fetches after staging slots are free."""

    def __init__(self, p: Program) -> None:
        self.p, self.read, self.now = p, 0, dict.fromkeys((p.processor, CPU, p.cost.links[0]), 0.0)
        self.ready: dict[int, float] = {}
        self.staging = deque([0.0] * staging_slots(p.decision))  # from when each staging slot is free

    def has(self, tensors: Sequence[int]) -> bool:
        """Whether these have arrived when the processor is free."""
        return self.arrival(tensors) <= self.now[self.p.processor]

    def fetched(self, tensors: Sequence[int]) -> bool:
        """Whether these are in host memory when the link into the compute tier is free, or the processor."""
        return self.arrival(tensors) <= max(self.now[self.p.cost.links[0]], self.now[self.p.processor])

    def arrival(self, tensors: Sequence[int]) -> float:
        """When these have come as far as they have been sent."""
        self._catch_up()
        return max([self.ready.get(t, 0.0) for t in tensors])

    def cpu_ahead_us(self) -> float:
        """How much longer the CPU has to do than the processor."""
        self._catch_up()
        return self.now[CPU] - self.now[self.p.processor]

    def _catch_up(self) -> None:
        ready, now, entries = self.ready, self.now, self.p.entries
        for number in range(self.read, len(entries)):
            entry = entries[number]
            if isinstance(entry, Evict):
                if entry.tier != self.p.compute_tier:
                    self.staging.append(max([ready.get(t, 0.0) for t in entry.tensors]))
                continue
            begin = now.get(entry.stream, 0.0)
            if isinstance(entry, Load):
                if entry.wraps:
                    continue
                if entry.link == self.p.cost.links[0]:
                    begin = max(begin, now[self.p.processor])
                elif self.staging:
                    begin = max(begin, self.staging.popleft())
            used = () if isinstance(entry, Bind) else entry.tensors
            end = max([begin, *[ready.get(t, 0.0) for t in used]]) + self.p.expected_us(entry)
            now[entry.stream] = end
            for tensor in used:
                ready[tensor] = end
        self.read = len(entries)


class Queue:
    """Loads of one pass in order of need, followed by those that open the next pass, written as soon as they can travel.

    Modules travel one layer ahead; named experts while slots last; late ones once their router has spoken; keys and values
    ``kv_ahead`` batches ahead. Experts from disk are fetched while staging slots last, and let others pass until they have come so far.
    Each kind keeps its order, and what cannot travel yet lets the other kinds pass.
    """

    def __init__(self, p: Program) -> None:
        self.p, self.clock, self.bound, self.layer, self.todo = p, Clock(p), -1, 0, len(p.batches)
        self.free, self.free_kv, self.free_pages = p.lead, p.decision.kv_ahead, HEAD_SLOTS
        self.opening: deque[Unit] = deque()  # of the next pass: what fits before its first release
        self.queues: dict[str, deque[Unit]] = {kind: deque() for kind in ("module", "kv", "named", "far", "late")}
        self.fetched: deque[Unit] = deque()
        self.staging = staging_slots(p.decision)
        self.loaded: set[int] = set()  # experts that are in the compute tier or on their way there
        self.heads = deque(p.head_pages())
        self.unsent = {layer: len(p.sent_batches(layer)) for layer in p.layers}
        for number, unit in enumerate(unit for layer in p.layers for unit in self._units(layer)):
            opens = unit.layer == 0 and unit.kind in ("module", "named", "far") and unit.slots <= self.free
            if opens and not self.queues["named"] and not self.queues["far"]:
                self.opening.append(unit)
                self.loaded.update(unit.tensors)
                self.free -= unit.slots
            else:
                self.queues[unit.kind].append(unit._replace(order=number))
        self._turn_opening()

    def _turn_opening(self) -> None:
        """Transfer units take turns in their slots. Where their number is no multiple of the slots', the slot that is free first at the
        end of a pass is not the one in which the next pass begins. So its loads are written in the order in which their slots become
        free: else units would need one slot more."""
        opening = deque(unit for unit in self.opening if unit.slots)
        streamed = len(opening) + sum(unit.slots > 0 for queue in self.queues.values() for unit in queue)
        if len(opening) * self.p.decision.unit == self.p.lead:
            opening.rotate(-(streamed % len(opening)))
            self.opening = deque([unit for unit in self.opening if not unit.slots]) + opening

    def _units(self, layer: int) -> Iterator[Unit]:
        """What a layer loads: attention, KV, router and shared expert, experts by name, experts by rank."""
        p = self.p
        yield from (Unit(layer, "module", (tensor,)) for tensor in p.attention_weights(layer))
        yield from (Unit(layer, "kv", (batch,)) for batch in p.sent_batches(layer))
        yield from (Unit(layer, "module", (tensor,)) for tensor in p.router_weights(layer))
        named = p.static_experts(layer)
        place = {expert: number for number, expert in enumerate(named)}
        near, far = ([e for e in named if p.is_far(e) == there] for there in (False, True))
        streamed = [Unit(layer, "named", tuple(unit), len(unit)) for unit in units(near, p.decision.unit)]
        streamed += [Unit(layer, "far", tuple(unit), len(unit)) for unit in units(far, p.decision.unit)]
        yield from sorted(streamed, key=lambda unit: place[unit.tensors[0]])
        yield from (Unit(layer, "late", tuple(unit), len(unit)) for unit in units(p.picks(layer), p.decision.unit))

    def advance(self, layer: int, waiting: bool = False) -> None:
        """Write what can travel now, first what is needed first; if the processor is ``waiting``, also what is still to be fetched."""
        if layer != self.layer:
            self.layer, self.todo = layer, len(self.p.batches)
        self._fetch()
        while ready := [queue[0] for queue in self._sendable(waiting) if queue and self._may_go(queue[0])]:
            unit = min(ready, key=lambda unit: unit.order)
            (self.fetched if unit.kind == "far" else self.queues[unit.kind]).popleft()
            self._write(unit)
            self._fetch()
        if any(self.queues.values()) or self.fetched:
            return
        while self.heads and self.free_pages:
            self.p.load(self.heads.popleft())
            self.free_pages -= 1
        while self.opening and not self.heads and self._may_open(self.opening[0]):
            self._write(self.opening.popleft(), next_pass=True)

    def _sendable(self, waiting: bool) -> Iterator[deque[Unit]]:
        """Queues by kind; while late experts are still to come, what is fetched only once it has come, since they would wait for it."""
        yield from (queue for kind, queue in self.queues.items() if kind != "far")
        late = self.queues["late"]
        if self.fetched and (
            waiting
            or not (late and late[0].layer <= self.fetched[0].layer)
            or self.clock.fetched(self.fetched[0].tensors)
        ):
            yield self.fetched

    def _fetch(self) -> None:
        """Experts from disk, however far ahead, while there are staging slots: the disk should never wait."""
        while self.queues["far"] and len(self.fetched) < self.staging:
            self.fetched.append(self.queues["far"].popleft())
            self.p.fetch(*self.fetched[-1].tensors)

    def _may_open(self, unit: Unit) -> bool:
        """Modules for the next pass travel one layer ahead, too: earlier, they would take a third slot."""
        return unit.slots <= self.free and (unit.kind != "module" or self.layer >= len(self.p.layers) - 1)

    def _may_go(self, unit: Unit) -> bool:
        if unit.layer > self.layer + 1:
            return False
        if unit.kind == "kv":
            return self.free_kv > 0
        if unit.kind == "late":
            return unit.layer <= self.bound and unit.slots <= self.free
        if unit.kind == "module":
            return True
        spare = self.free - unit.slots
        return spare >= 0 and spare >= self._kept(unit.layer) and not self._delays(unit)

    def _delays(self, unit: Unit) -> bool:
        """Whether a load for the next layer would keep the link from the late experts of this one longer than it would rest until those
        are known."""
        late = self.queues["late"]
        if unit.layer <= self.layer or not late or late[0].layer != self.layer or self.bound >= self.layer:
            return False
        link = self.p.cost.links[0]
        begin = max(self.clock.arrival(unit.tensors), self.clock.now[link])
        known = self.clock.now[self.p.processor] + self.p.until_bound_us(self.layer, self.todo)
        return begin + self.p.expected_us(Load(link, link, unit.tensors)) - known > max(0.0, known - begin)

    def _kept(self, layer: int) -> int:
        """Slots that named experts of a layer must leave free: one unit for what an earlier one still waits for, which would else have
        none, and a share while the layer's KV, which is needed first, is still to be sent."""
        waiting = [queue[0] for queue in (*self.queues.values(), self.fetched) if queue]
        kept = max((unit.slots for unit in waiting if unit.layer < layer), default=0)
        sent = len(self.p.sent_batches(layer))
        return kept + (round(self.p.lead * self.unsent[layer] / sent) if sent else 0)

    def _write(self, unit: Unit, next_pass: bool = False) -> None:
        if unit.kind == "kv":
            self.p.load_kv(unit.layer, unit.tensors[0])
            self.free_kv -= 1
            self.unsent[unit.layer] -= 1
        else:
            self.p.load(*unit.tensors, next_pass=next_pass)
            self.loaded.update(unit.tensors)
            self.free -= unit.slots

    def attended(self, layer: int, batch: int) -> None:
        """Attention to a batch has been written: if its KV was sent, the next may be."""
        self.free_kv += batch in self.p.sent_batches(layer)
        self.todo -= 1
        self.advance(layer)

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
    """What one load brings. tensors: or the batch, of KV. slots: expert slots that it takes. order: of need."""

    layer: int
    kind: str
    tensors: tuple[int, ...]
    slots: int = 0
    order: int = 0


POLICY = Policy(build=build, experts="solved", rolling=(False, True), cpu_experts=True)
