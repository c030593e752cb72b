"""The builder that policies write to: ops of one phase in one total order.

A policy calls ``load / store / compute / evict`` (through the named verbs below) in loop nests. It never states a dependency, a
wait or an address. Loading or evicting what is resident, and moving KV that is, is a no-op, so that a loop nest need not ask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby, pairwise
from typing import NamedTuple

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision
from klotski_compiler.leaving import Leaving, Scope
from klotski_compiler.ops import ALL, CPU, Bind, Compute, Load, Op, Pages, Store, batches_of
from klotski_compiler.shape import Shape
from klotski_compiler.tensors import TensorTable

SURE = 0.98  # an expert touched with a higher probability has surely been asked for
URGENT = "urgent"  # a stream of small copies that must not queue behind whole experts on the same link
HEAD_SLOTS = 2  # pages of a streamed head: one computes while the next arrives


def staging_slots(decision: Decision) -> int:
    """Transfer units in host memory at once on their way from disk to a GPU: the link behind fills one while the link ahead empties
    the other; one where the GPU has room for no more either, which trades link time for memory. Pages are small: always two."""
    return 2 if decision.pages > 1 else min(2, max(1, decision.lead // decision.unit))


class Evict(NamedTuple):
    """These tensors, or these pages of them, need their slot in ``tier`` no longer. Consumed by the slots pass."""

    tier: str
    tensors: tuple[int, ...]
    pages: Pages | None = None


class Program:
    """One phase under construction."""

    def __init__(self, cost: Cost, table: TensorTable, shape: Shape) -> None:
        self.cost, self.table, self.shape = cost, table, shape
        self.spec, self.decision = cost.spec, table.decision
        self.compute_tier, self.processor = cost.hardware.compute_tier, cost.processor_name
        # Prefill is the GPU's alone: prompts keep it busy, and the CPU has nothing to read yet.
        self._helped = shape.decoding and cost.cpu_helps
        self._cpu_attends = cost.cpu_helps and shape.decodes(shape.batches - 1)
        self._together = shape.together
        self.entries: list[Op | Evict] = []
        self.late = {number: list(chosen.late) for number, chosen in enumerate(self.decision.layers)}
        self._resident = frozenset(table.resident)
        self.returning = "host>gpu"  # the stream on which what the CPU computed comes back
        self._attended = (
            [frozenset(self.decision.attended(layer)) for layer in self.layers] if self._cpu_attends else []
        )
        self._staged: deque[Evict] = deque()
        self._fetched: set[tuple[int, ...]] = set()
        self._given_up: set[int] = set()
        self._sent: set[tuple[int, int]] = set()
        self._sent_batches: dict[int, list[int]] = {}
        self._postponed: list[tuple[tuple[int, ...], Pages | None]] = []

    # ------------------------------------------------------------------------------------------- what a policy asks

    @property
    def layers(self) -> range:
        """Layer numbers."""
        return range(len(self.spec.layers))

    @property
    def lead(self) -> int:
        """Expert slots."""
        return self.decision.lead_of(self.shape.decoding)

    @property
    def batches(self) -> range:
        """Batches of one pass."""
        return range(self.shape.batches)

    def after(self, layer: int) -> int:
        """The layer that follows, in the next pass after the last."""
        return (layer + 1) % len(self.spec.layers)

    def is_last(self, layer: int) -> bool:
        """Whether the next layer belongs to the next pass."""
        return layer == len(self.spec.layers) - 1

    def attention_weights(self, layer: int) -> list[int]:
        """Attention of a layer."""
        return self._present(("attention", layer, 0))

    def router_weights(self, layer: int) -> list[int]:
        """What the MLP part needs before its experts: router and shared expert, or the dense MLP."""
        return self._present(("router", layer, 0), ("shared", layer, 0), ("dense", layer, 0))

    def shared_weights(self, layer: int) -> list[int]:
        """The shared expert."""
        return self._present(("shared", layer, 0))

    def resident_experts(self, layer: int) -> list[int]:
        """Experts that never move."""
        return self._present(*(("expert", layer, e) for e in self.decision.layers[layer].resident_experts))

    def static_experts(self, layer: int) -> list[int]:
        """Streamed experts that are loaded by name, in compute order; where the CPU does not help, its experts before
        the others, the last ones first: as a rule they compute fastest, and free slots soonest for what could not travel
        during attention."""
        chosen = self.decision.layers[layer]
        named = chosen.static if self._helped else (*reversed(chosen.cpu), *chosen.static)
        return self._present(*(("expert", layer, e) for e in named))

    def picks(self, layer: int) -> list[int]:
        """Late-bound experts that are loaded, in pick order."""
        return self._picks(layer)[: self._loaded_picks(layer)]

    def cpu_experts(self, layer: int) -> list[int]:
        """What the CPU computes where it lives: experts by name, then the last picks."""
        named = self.decision.layers[layer].cpu if self._helped else ()
        return [
            *self._present(*(("expert", layer, e) for e in named)),
            *self._picks(layer)[self._loaded_picks(layer) :],
        ]

    def _picks(self, layer: int) -> list[int]:
        return self._present(*(("pick", layer, r) for r in range(len(self.decision.layers[layer].late))))

    def _loaded_picks(self, layer: int) -> int:
        chosen = self.decision.layers[layer]
        return len(chosen.late) - (chosen.cpu_picks if self._helped else 0)

    def on_cpu(self, layer: int, batch: int) -> bool:
        """Whether the CPU attends to this batch: when it decodes, where its KV lives in host memory."""
        return self._cpu_attends and self.shape.decodes(batch) and batch in self._attended[layer]

    def sent_batches(self, layer: int) -> list[int]:
        """Batches that decode, and whose keys and values the link brings: they live elsewhere, and the CPU does not attend to them."""
        if layer not in self._sent_batches:
            decode = filter(self.shape.decodes, self.batches)
            moving = [batch for batch in decode if self._kv(layer, batch) and not self.on_cpu(layer, batch)]
            self._sent_batches[layer] = moving
        return self._sent_batches[layer]

    def is_moe(self, layer: int) -> bool:
        """Whether the layer routes."""
        return self.spec.layers[layer].num_experts > 0

    def expected_arrivals(self, layer: int, batches: int) -> int:
        """How many late experts the first ``batches`` batches touch, nearly surely (paper: each request is sent at once)."""
        tokens = sum(self.shape.fed_tokens(batch, self.spec.layers[layer]) for batch in range(batches))
        touched = self.cost.experts(layer, tokens)
        return sum(touched[e][1] > SURE for e in self.late[layer])

    def expected_us(self, op: Op) -> float:
        """What an op takes in the middle pass, by the cost model."""
        context = self.shape.middle_context
        return self.cost.op_us(op, self.table.all, self.shape, context, self.late)

    def leaving(self, layer: int, may_choose: bool = True) -> Leaving:
        """Which batches leave a layer's attention together."""
        late = [batch for batch in self.batches if self.on_cpu(layer, batch)]
        sent = list(filter(self.shape.has, self.sent_batches(layer)))
        return Leaving(self.cost, self.shape, self.spec.layers[layer], late, sent[self.decision.kv_ahead :], may_choose)

    def until_bound_us(self, layer: int, batches: int) -> float:
        """What the compute tier's processor takes until a layer's late experts are known, with so many batches still to attend to."""
        context = self.shape.middle_context
        spec = self.spec.layers[layer]
        attention = self.cost.attentions_us(spec, self.shape, context) * batches / len(self.batches)
        return attention + self.cost.choice_us(spec, self.shape.fed_tokens(ALL, spec)) + self.cost.bind_us

    def _present(self, *keys: tuple[str, int, int]) -> list[int]:
        ids = self.table.ids
        return [ids[key] for key in keys if key in ids]

    # --------------------------------------------------------------------------------------------------------- verbs

    def load(self, *tensors: int, next_pass: bool = False, sync: bool = False, pages: Pages | None = None) -> None:
        """Bring weights to the compute tier, ``unit`` experts of one home per op.

        next_pass: for the next pass; written as soon as this pass has given the tensors up. sync: as a copy that blocks the
        compute stream. pages: these only, the first ones first; what comes from disk comes whole with them.
        """
        for group in self._transfers([t for t in tensors if t not in self._resident]):
            part = pages if pages and not self.is_far(group[0]) else None
            if pages and not part and pages.first:
                continue
            if next_pass and not self._given_up.issuperset(group):
                self._postponed.append((group, part))
            else:
                self._transfer(group, next_pass, sync, part)

    def evict(self, *tensors: int) -> None:
        """Give up the slots of weights."""
        if moving := tuple(t for t in tensors if t not in self._resident):
            self.entries.append(Evict(self.compute_tier, moving))
            self._given_up.update(moving)
            for group, pages in [p for p in self._postponed if self._given_up.issuperset(p[0])]:
                self._postponed.remove((group, pages))
                self._transfer(group, True, False, pages)

    def _transfers(self, moving: list[int]) -> Iterator[tuple[int, ...]]:
        """What goes together: each module alone, ``unit`` experts that come from the same tier."""
        for expert, run in groupby(moving, key=lambda t: self.table.all[t].kind in ("expert", "pick")):
            homes: dict[str, list[int]] = {}
            for tensor in run:
                homes.setdefault(self.table.all[tensor].home, []).append(tensor)
            for alike in homes.values():
                size = self.decision.unit if expert else 1
                yield from (tuple(alike[i : i + size]) for i in range(0, len(alike), size))

    def _transfer(self, group: tuple[int, ...], next_pass: bool, sync: bool, only: Pages | None = None) -> None:
        hops = self._hops(self.table.all[group[0]].home)
        far = self.decision.far if len(hops) > 1 else None
        parts = [(link, far or only) for link in (hops[1:] if group in self._fetched else hops)]
        if far:  # what is in host memory goes first: the rest may still be on its way there
            parts.insert(-1, (hops[-1], self.decision.near))
        for link, pages in parts:
            self.entries.append(Load(self.processor if sync else link, link, group, next_pass, pages))
        if group in self._fetched:
            self._fetched.discard(group)
            self.entries.append(Evict("host", group, far))
        elif len(hops) > 1:
            self._stage(Evict("host", group, far))

    def is_far(self, tensor: int) -> bool:
        """Whether it, or its last page, passes through host memory on its way to a GPU."""
        return len(self._hops(self.table.all[tensor].home)) > 1

    def fetch(self, *tensors: int) -> None:
        """Brings what is far as near as host memory, where it takes a staging slot until it is loaded, all of it together."""
        link = self._hops(self.table.all[tensors[0]].home)[0]
        self.entries.append(Load(link, link, tensors, pages=self.decision.far))
        self._fetched.add(tensors)

    def embed(self) -> None:
        """Hidden states of all batches from their token ids; rows of an embedding that is not resident come from disk."""
        found = self._present(("embedding", -1, 0))
        self.compute("embed", -1, ALL, *(number for number in found if number in self.table.resident))

    def attend(self, layer: int, sync: bool = False, batches: Sequence[int] | None = None) -> Iterator[int]:
        """Attention batch by batch (all, or those given), the KV of the next batch in flight, new KV written back; yields after
        each batch. What the CPU attends to is waited for.

        ``sync``: KV is copied when it is needed, by copies that block the compute stream.
        """
        chosen = list(self.batches if batches is None else batches)
        ahead = 0 if sync else 1
        for number, batch in enumerate(chosen):
            for coming in chosen[: 1 + ahead] if number == 0 else chosen[number + ahead : number + ahead + 1]:
                if (layer, coming) not in self._sent:
                    self.load_kv(layer, coming, sync)
            if self.on_cpu(layer, batch):
                self.project(layer, batch)
                self.attend_on_cpu(layer, batch)
                self.fetch_mixed(batch)
                self.output(layer, batch)
            else:
                self._attend_here(layer, batch)
                self._store_kv(layer, batch, sync)
            yield batch

    def _attend_here(self, layer: int, batch: int) -> None:
        kv = self._kv(layer, batch)
        if self._together and self.shape.decodes(batch):
            self.compute("attend", layer, batch, *kv, *self._queries(batch))
        else:
            self.compute("attention", layer, batch, *self.attention_weights(layer), *kv)

    def attend_and_route(self, layer: int) -> None:
        """All batches through attention, then all through the router, whose weights are given up after them."""
        for _ in self.attend(layer):
            pass
        self.evict(*self.attention_weights(layer))
        for batch in self.batches:
            self.route(layer, batch)
        self.evict(*self.router_weights(layer))

    def attend_one(self, layer: int, batch: int) -> None:
        """Attention of one batch, with nothing ahead."""
        for _ in self.attend(layer, batches=[batch]):
            pass

    def attend_with_cpu(self, layer: int, leaving: Leaving | None = None) -> Iterator[int]:
        """Attention of all batches, the CPU's share of them while the GPU does the others; yields after each batch. Where a GPU does what
        surrounds it for several at once, a scope has left attention when its last batch is yielded."""
        leaving = leaving or self.leaving(layer, may_choose=False)
        for scope in leaving.in_turn if self._together else ():
            self._surround("project", layer, scope)
            for batch in scope.late:
                self._send_query(batch)
                self.attend_on_cpu(layer, batch)
        for batch in () if self._together else leaving.late:
            self.project(layer, batch)
            self.attend_on_cpu(layer, batch)
        for batch in chain(self.attend(layer, batches=leaving.here), self._fetch_all(leaving.late)):
            if not self._together and batch in leaving.late:
                self.output(layer, batch)
            elif self._together and batch in leaving.by_last:
                self._surround("output", layer, leaving.by_last[batch])
            yield batch

    def _fetch_all(self, batches: Iterable[int]) -> Iterator[int]:
        for batch in batches:
            self.fetch_mixed(batch)
            yield batch

    def _surround(self, part: str, layer: int, scope: Scope) -> None:
        """What comes before or after attention, for those of a scope that decode."""
        first = max(scope.first, self.shape.first_decoding)
        if first < scope.end:
            decoding = replace(scope, first=first).number
            self.compute(part, layer, decoding, *self.attention_weights(layer), *self._queries(decoding))

    def project(self, layer: int, batch: int) -> None:
        """Queries, keys and values of a batch, and their way to the host."""
        self.compute("project", layer, batch, *self.attention_weights(layer), *self._queries(batch))
        self._send_query(batch)

    def _send_query(self, batch: int) -> None:
        self.entries.append(Store("gpu>host", "gpu>host", tuple(self._queries(batch))))

    def _queries(self, batch: int) -> list[int]:
        return self._present(*(("query", -1, number) for number in batches_of(batch, len(self.batches))))

    def attend_on_cpu(self, layer: int, batch: int) -> None:
        """Attention over keys and values where they live."""
        self.compute("attend", layer, batch, *self._present(("kv", layer, batch), ("query", -1, batch)), on=CPU)

    def fetch_mixed(self, batch: int) -> None:
        """The mixed values' way back."""
        self.entries.append(Load(self.returning, "host>gpu", tuple(self._queries(batch))))

    def output(self, layer: int, batch: int) -> None:
        """The output projection of what came back."""
        self.compute("output", layer, batch, *self.attention_weights(layer), *self._queries(batch))

    def route(self, layer: int, batch: int = ALL, shared: bool = True) -> None:
        """Router and shared expert (or without that), or the dense MLP, of one batch or of the whole group."""
        apart = () if shared else self.shared_weights(layer)
        weights = [tensor for tensor in self.router_weights(layer) if tensor not in apart]
        self.compute("router" if self.is_moe(layer) else "dense", layer, batch, *weights)

    def bind(self, layer: int, rule: str, first: int, count: int, batch: int = ALL) -> None:
        """Give picks their experts from what is routed so far."""
        if count:
            self.entries.append(Bind(self.processor, layer, batch, rule, first, count))

    def experts(self, layer: int, tensors: Iterable[int], batch: int = ALL) -> None:
        """Expert FFNs over the tokens of one batch or of the whole group: one op per transfer unit."""
        chosen, unit = list(tensors), self.decision.unit if batch == ALL else 1 << 30
        for i in range(0, len(chosen), unit):
            self.compute("experts", layer, batch, *chosen[i : i + unit])

    def worth_splitting(self, layer: int, experts: Iterable[int], first: int, idle_us: float) -> list[int]:
        """Of experts that are there, those to compute over the batches before ``first`` now, while the processor has nothing else to do for
        so long, and over the others later: where that saves more than it takes to read their weights twice."""
        chosen, left_us = list[int](), idle_us - 2 * self.cost.experts_op_us(self.spec.layers[layer])
        for tensor in experts:
            early, later, whole = self.cost.expert_parts_us(layer, self.table.all[tensor].index, self.shape, first)
            if left_us > 0 and whole - later > max(0.0, early - left_us):
                chosen.append(tensor)
                left_us -= early
        return chosen

    def stream(
        self, layer: int, tensors: Sequence[int], ready: Sequence[int] = (), then: Callable[[], None] = lambda: None
    ) -> None:
        """Experts through ``lead`` slots, each computed once and evicted, those that are ``ready`` first. ``then`` is called as
        soon as no further load of these has to be written."""
        ahead, size = max(self.lead, self.decision.unit), self.decision.unit
        self.load(*tensors[:ahead])
        if len(tensors) <= ahead:
            then()
        self.experts(layer, ready)
        self.evict(*ready)
        for first in range(0, len(tensors), size):
            self.experts(layer, tensors[first : first + size])
            self.evict(*tensors[first : first + size])
            self.load(*tensors[first + ahead : first + ahead + size])
            if first < len(tensors) - ahead <= first + size:
                then()

    def experts_on_cpu(self, layer: int) -> None:
        """The CPU's experts, one op, once their input has come; ``add_sums`` brings back what they add."""
        if chosen := self.cpu_experts(layer):
            rows, sums = self._present(("rows", -1, 0), ("sums", -1, 0))
            self.entries.append(Store("gpu>host", "gpu>host", (rows,)))
            self.compute("experts", layer, ALL, *chosen, rows, sums, on=CPU)

    def add_sums(self, layer: int) -> None:
        """Adds what the CPU's experts computed."""
        if self.cpu_experts(layer):
            sums = self._present(("sums", -1, 0))
            self.entries.append(Load(self.returning, "host>gpu", tuple(sums)))
            self.compute("add", layer, ALL, *sums)

    def head_pages(self) -> list[int]:
        """The head in the order of its pages."""
        return self._present(*(("head", -1, page) for page in range(self.decision.head_parts)))

    def logits(self, next_page: Callable[[], None] | None = None, sync: bool = False) -> None:
        """Final norm, the head page by page, the next tokens.

        next_page: writes the load of the next page whenever a slot for one is free; without it pages are loaded one ahead.
        sync: pages are loaded when they are needed, by copies that block the compute stream.
        """
        self.compute("norm", -1, ALL, *self._present(("norm", -1, 0)))
        pages, ahead = self.head_pages(), 1 if sync else HEAD_SLOTS
        if next_page is None:
            self.load(*pages[:ahead], sync=sync)
        for number, page in enumerate(pages):
            self.compute("head", -1, ALL, page)
            self.evict(page)
            if next_page is None:
                self.load(*pages[number + ahead : number + ahead + 1], sync=sync)
            else:
                next_page()
        self.compute("sample", -1, ALL)

    def compute(self, fn: str, layer: int, batch: int, *tensors: int, on: str = "") -> None:
        """One op on the compute stream, or on that of another processor."""
        self.entries.append(Compute(on or self.processor, fn, layer, batch, tensors))

    # ------------------------------------------------------------------------------------------------------------ KV

    def _stage(self, eviction: Evict) -> None:
        """Takes a staging slot in host memory, and gives up the oldest where these are all (``staging_slots``)."""
        self._staged.append(eviction)
        if len(self._staged) >= staging_slots(self.decision):
            self.entries.append(self._staged.popleft())

    def finish(self) -> list[Op | Evict]:
        """The whole phase, once its policy has written it."""
        self.entries += self._staged
        self._staged.clear()
        return self.entries

    def _kv(self, layer: int, batch: int) -> list[int]:
        return [t for t in self._present(("kv", layer, batch)) if t not in self._resident]

    def load_kv(self, layer: int, batch: int, sync: bool = False) -> None:
        """Keys and values of a batch, unless they are resident or the CPU's; ``attend`` does it one batch ahead where it was not done
        before. A batch that brings its prompt has none: it only takes its place, and need not queue for that behind weights."""
        self._sent.add((layer, batch))
        fresh = not self.shape.decodes(batch)
        for tensor in () if self.on_cpu(layer, batch) else self._kv(layer, batch):
            hops = self._hops(self.table.all[tensor].home)
            for link in hops:
                self.entries.append(Load(self.processor if sync else URGENT if fresh else link, link, (tensor,)))
            if len(hops) > 1:
                self._stage(Evict("host", (tensor,)))

    def _store_kv(self, layer: int, batch: int, sync: bool) -> None:
        for tensor in self._kv(layer, batch):
            for hop in reversed(self._hops(self.table.all[tensor].home)):
                link = ">".join(reversed(hop.split(">")))
                self.entries.append(Store(self.processor if sync else link, link, (tensor,)))
            self.entries.append(Evict(self.compute_tier, (tensor,)))

    def _hops(self, home: str) -> tuple[str, ...]:
        return hops(home, self.compute_tier)


@lru_cache
def hops(home: str, compute_tier: str) -> tuple[str, ...]:
    """Links from a tensor's home to the compute tier."""
    path = ["disk", "host", "gpu"]
    stops = path[path.index(home) : path.index(compute_tier) + 1]
    return tuple(f"{a}>{b}" for a, b in pairwise(stops))
