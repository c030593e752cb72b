"""The numbers of one residency problem: layer groups, expert classes, work and bytes. No variables, no solver.

Layers with equal modules and equal (sorted) popularity form a group; experts of similar popularity within a layer form
a class. What is interchangeable is counted, not named: symmetry would keep any solver busy for ever (design 7.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from klotski_compiler.cost import ATTEND_OPS, Cost
from klotski_compiler.decision import Decision, Workload
from klotski_compiler.model import Layer, Module
from klotski_compiler.ops import ALL, CPU, align_up, onward, slot_bytes, span
from klotski_compiler.program import HEAD_SLOTS, staging_slots
from klotski_compiler.shape import Shape, shapes
from klotski_compiler.tensors import MODULES, kv_bytes, query_bytes, rows_bytes, state_bytes, sums_bytes
from klotski_compiler.workspace import workspace

WORTH_WAITING = 0.995  # an expert that is touched with a higher probability is never bound late
EXACT_EXPERTS = 16  # up to so many experts, a class holds equally popular ones only
MAX_CLASSES = 8
SPANS, GROWN = 3, 1.5  # decode whose context grows by more than that factor is priced in so many spans
LAST_SLOTS = 2  # of what only the CPU attends to, while prefill writes it back
MODULE_SLOTS = 2  # of each kind of module that streams: in use, and on its way to the next layer


@dataclass(frozen=True, slots=True)
class Item:
    """A weight that is resident or streamed. slot_bytes: room it takes. load_us: its time on the link into the compute
    tier. disk_us: its time on ``disk>host``."""

    slot_bytes: int
    load_us: float
    disk_us: float


@dataclass(frozen=True, slots=True)
class ClassWork:
    """One expert of a class in one pass: its compute, its link time where it is bound after the router (expected), and its
    compute on the CPU. Of one that begins with prompts while the CPU attends: what that takes more, and what of its compute is then done.
    """

    compute_us: float
    late_us: float
    cpu_us: float = 0.0
    more_us: float = 0.0
    begun_us: float = 0.0


@dataclass(frozen=True, slots=True)
class RowWork:
    """One row of batches (see Problem) whose KV lives elsewhere, in one layer and pass: what it takes the links, what attending to it
    takes the CPU and spares the GPU."""

    kv_load_us: float = 0.0
    kv_store_us: float = 0.0
    cpu_attend_us: float = 0.0
    spared_us: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer in one pass: all batches through attention, then together through router (or dense MLP); classes; rows of batches, and
    the last one where that is the CPU's.

    bind_us: binding what is late, if anything is. around_us: what the GPU does before and after all that the CPU attends to:
    the first batch's projections, the last one's output and router. exchange_us: what any expert on the CPU takes beside its
    work: its input's way there, its output's back. shared_us: of router_us, the shared expert, for which nobody waits."""

    attention_us: float
    router_us: float
    bind_us: float
    classes: tuple[ClassWork, ...]
    row: RowWork
    last: RowWork
    kv_ahead: float
    around_us: float = 0.0
    exchange_us: float = 0.0
    shared_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """Identical layers. sizes: experts per class and layer. late: whether a class may be bound after the router.
    page: what of an expert on disk lives there, all of it unless experts are cut into pages.
    kv_slot_bytes: the KV of one layer and row of batches; last_kv_bytes: of the last one, where that is the CPU's."""

    name: str
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    late: tuple[bool, ...]
    modules: dict[str, Item]
    expert: Item
    page: Item
    kv_slot_bytes: int
    last_kv_bytes: int
    work: dict[str, LayerWork]

    @property
    def count(self) -> int:
        """Layers in the group."""
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class EndWork:
    """What a pass does outside the layers. gather_us: what a streamed embedding adds to it. page_us: one page of the
    head."""

    compute_us: float
    gather_us: float
    page_us: float


@dataclass(frozen=True, slots=True)
class Problem:
    """All numbers of one residency problem. passes: how often each phase's pass runs in the whole workload.

    batches: rows of batches of a group, n: the batches at one place in each of prefill's sub-groups, whose KV lives in one tier. Beside
    them there may be a last row, of another size, to which the CPU attends in every layer: last, 0 or 1.
    attends: whether the CPU may compute attention; query_bytes: what that takes in either tier, per row, and for the last one;
    together: what all rows take in the compute tier, whoever attends.
    spill_bytes: what KV that is not kept adds to what a phase takes of the compute tier at most; last_spill_bytes: what that of the
    last row takes.
    head: all its pages, head_pages of them (0: it must be resident). head_slots: bytes beside it, of its pages' slots if it streams,
    of the logits of all words at once if it does not. may_spill: the machine can write KV back.
    leads: expert slots in a pass of each phase. staging: see ``program.staging_slots``.
    home_tier: where the rest of the weights lives, if that is a memory with a capacity (host, on a machine with a GPU).
    cpu: whether a CPU may compute beside a GPU. uniform: whether KV and the CPU's shares are the same in all
    layers. drag: of (stream, other), see ``Cost.drag``: the processor that reads host memory
    and the link that does.
    """

    groups: tuple[Group, ...]
    batches: int
    passes: dict[str, int]
    end: dict[str, EndWork]
    head: Item
    head_pages: int
    head_slots: tuple[int, int]
    embedding: Item
    norm_bytes: int
    spill_bytes: int
    last_spill_bytes: int
    may_spill: bool
    compute_tier: str
    home_tier: str
    capacity: dict[str, int]
    leads: dict[str, int]
    unit: int
    staging: int = 2
    cpu: bool = False
    attends: bool = False
    last: int = 0
    together: bool = False
    query_bytes: int = 0
    last_query_bytes: int = 0
    uniform: bool = False
    drag: tuple[float, float] = (0.0, 0.0)

    @property
    def module_slots(self) -> dict[str, int]:
        """Bytes of the slots that modules of each kind take if any of them streams."""
        kinds = sorted({kind for group in self.groups for kind in group.modules})
        items = {kind: [g.modules[kind].slot_bytes for g in self.groups if kind in g.modules] for kind in kinds}
        return {kind: MODULE_SLOTS * max(sizes) for kind, sizes in items.items()}


def build(
    cost: Cost,
    workload: Workload,
    decision: Decision,
    capacity: dict[str, int],
    may_spill: bool = True,
    uniform: bool = False,
    stretch: float = 1.0,
    spans: bool = False,
) -> Problem:
    """Price everything that the formulation needs. ``decision``, ``stretch``: see ``solve.residency``. spans: decode in several, see
    ``_spans``."""
    on_gpu = cost.hardware.compute_tier == "gpu"
    into, back = cost.links
    whole = [shape for shape in shapes(decision, workload) if shape.passes]
    phases = [span for shape in whole for span in _spans(shape)] if spans else whole
    rounds = dict.fromkeys((shape.name for shape in phases), decision.rounds(workload.num_sequences))
    if decision.rolling:
        rounds, phases = _ramps(decision, workload, whole)
    pages = decision.head_pages

    def page(module: Module) -> Item:
        """The last of its pages."""
        pages, whole = decision.pages, item(module, loads=1 / decision.unit)
        if pages == 1:
            return whole
        part = item(replace(module, nbytes=module.nbytes // pages), loads=1.0)
        return replace(part, slot_bytes=align_up(-(-whole.slot_bytes // pages)))

    def item(module: Module, share: int = 1, loads: float = 1.0) -> Item:
        slot = slot_bytes(module.nbytes // share, module.segments) * share
        times = [
            module.nbytes * 1e6 / cost.hardware.links[link].bandwidth_bytes_per_s + loads * cost.load_op_us(link)
            if link in cost.hardware.links
            else 0.0
            for link in (into, "disk>host")
        ]
        return Item(slot, *times)

    def stretched(expert: Item) -> Item:
        return replace(expert, load_us=stretch * expert.load_us)

    positions = workload.prompt_len + workload.gen_len
    kv, last_kv = (
        [align_up(kv_bytes(cost.spec, n, size, positions, cost.dtype)) for n in range(len(cost.spec.layers))]
        for size in (decision.batch_size, decision.last_batch)
    )
    groups, rows, last = [], -(-decision.num_batches // decision.part_batches), int(decision.last_batch > 0)
    queries, last_queries = (
        rows * align_up(query_bytes(cost.spec, size, cost.dtype)) for size in (decision.batch_size, decision.last_batch)
    )
    for number, members in enumerate(_identical(cost)):
        layer = cost.spec.layers[members[0]]
        classes = _classes(cost, members[0])
        decode_tokens = decision.sequences
        touched = cost.experts(members[0], decode_tokens)
        groups.append(
            Group(
                name=f"g{number}",
                layers=members,
                sizes=tuple(len(c) for c in classes),
                late=tuple(min(touched[e][1] for e in c) <= WORTH_WAITING for c in classes),
                modules={kind: item(m) for kind in MODULES if (m := getattr(layer, kind))},
                expert=stretched(item(layer.expert, loads=1 / decision.unit)) if layer.expert else Item(0, 0.0, 0.0),
                page=page(layer.expert) if layer.expert else Item(0, 0.0, 0.0),
                kv_slot_bytes=rows * kv[members[0]],
                last_kv_bytes=rows * last_kv[members[0]],
                work={s.name: _work(cost, members[0], classes, s, decision, (into, back)) for s in phases},
            )
        )
    return Problem(
        groups=tuple(groups),
        batches=decision.part_batches - last,
        passes={shape.name: rounds[shape.name] * shape.passes for shape in phases},
        end={shape.name: _end(cost, shape, max(1, pages)) for shape in phases},
        head=item(cost.spec.head, share=max(1, pages), loads=max(1, pages)),
        head_pages=pages,
        head_slots=_head_slots(cost, decision, workload, pages),
        embedding=item(cost.spec.embedding),
        norm_bytes=item(cost.spec.norm).slot_bytes,
        spill_bytes=_spill_bytes(cost, decision, whole, max(kv)),
        last_spill_bytes=LAST_SLOTS * max(last_kv),
        may_spill=may_spill and back in cost.hardware.links,
        compute_tier=cost.hardware.compute_tier,
        home_tier="host" if on_gpu else "",
        capacity=capacity,
        leads={shape.name: decision.lead_of(shape.decoding) for shape in phases},
        unit=decision.unit,
        staging=staging_slots(decision),
        cpu=cost.cpu_helps,
        uniform=uniform,
        attends=cost.cpu_attends and any(shape.decodes(shape.batches - 1) for shape in phases),
        last=last,
        together=any(shape.together for shape in phases),
        query_bytes=queries,
        last_query_bytes=last_queries,
        drag=(cost.drag(CPU, into), cost.drag(into, CPU)) if CPU in cost.hardware.processors else (0.0, 0.0),
    )


def _ramps(decision: Decision, workload: Workload, whole: list[Shape]) -> tuple[dict[str, int], list[Shape]]:
    """The phases of rolling order, and how often each comes: with all ages there, with the younger half while cohorts come, with the older
    half when no more do."""
    ages, cohorts = decision.prefill_groups, decision.cohorts(workload.num_sequences)
    rising = min(ages, cohorts) - 1
    half = max(1, min(ages, cohorts) // 2)
    kinds = {
        "": (range(ages), cohorts - rising),
        ".up": (range(half), rising),
        ".down": (range(ages - half, ages), ages - 1),
    }
    found = {
        replace(shape.with_ages(there), name=shape.name + kind): count
        for shape in whole
        for kind, (there, count) in kinds.items()
    }
    return {shape.name: count for shape, count in found.items()}, list(found)


def _head_slots(cost: Cost, decision: Decision, workload: Workload, pages: int) -> tuple[int, int]:
    """What the head takes beside its own bytes and the workspace of the decision as it is: streamed, and resident."""
    if not pages:
        return 0, 0
    page = slot_bytes(cost.spec.head.nbytes // pages, cost.spec.head.segments)
    paged, whole = (
        sum(sum(purposes.values()) for purposes in workspace(cost, d, workload).values())
        for d in (decision, decision.model_copy(update={"head_pages": 0}))
    )
    return page * min(HEAD_SLOTS, pages), max(0, whole - paged)


def _spans(shape: Shape) -> list[Shape]:
    """A phase as the problem prices it: decode in which attention grows much in spans of equal length, each at its middle. What binds
    early and what binds late are then both seen, where the middle of all might hide either."""
    grown = shape.last_context / max(1.0, shape.first_context)
    if not shape.decoding or grown < GROWN or shape.passes < SPANS:
        return [shape]
    first, total = shape.first_context, shape.last_context - shape.first_context
    cuts = [shape.passes * i // SPANS for i in range(SPANS + 1)]
    return [
        replace(
            shape,
            name=f"{shape.name}.{i}",
            passes=end - begin,
            first_context=first + total * begin // shape.passes,
            last_context=first + total * end // shape.passes,
        )
        for i, (begin, end) in enumerate(pairwise(cuts))
    ]


def _identical(cost: Cost) -> list[tuple[int, ...]]:
    """Layer numbers by what the problem tells apart, in order of first appearance. A last layer that is like others is taken for one of
    them: that less of a prompt passes through its experts is left to the simulator."""
    found: dict[tuple[Layer, tuple[float, ...]], list[int]] = {}
    for number, (layer, shares) in enumerate(zip(cost.spec.layers, cost.picked, strict=True)):
        found.setdefault((replace(layer, last=False), tuple(sorted(shares))), []).append(number)
    return [tuple(members) for members in found.values()]


def _classes(cost: Cost, layer: int) -> list[list[int]]:
    """Experts in classes, most popular first: equally popular ones, or bands of equal popularity mass where those are
    many."""
    popular, shares = cost.popular(layer), cost.picked[layer]
    equal = [list(members) for _, members in groupby(popular, key=lambda e: shares[e])]
    if len(popular) <= EXACT_EXPERTS or len(equal) <= MAX_CLASSES:
        return equal
    total, mass = sum(shares), 0.0
    bands: dict[int, list[int]] = {}
    for expert in popular:
        bands.setdefault(min(MAX_CLASSES - 1, int(MAX_CLASSES * mass / total)), []).append(expert)
        mass += shares[expert]
    return list(bands.values())


def class_members(cost: Cost, layer: int, sizes: tuple[int, ...]) -> list[list[int]]:
    """The experts of each class in a layer of the group, most popular first."""
    popular, first, out = list(cost.popular(layer)), 0, list[list[int]]()
    for size in sizes:
        out.append(popular[first : first + size])
        first += size
    return out


def _work(
    cost: Cost, number: int, classes: list[list[int]], shape: Shape, decision: Decision, links: tuple[str, str]
) -> LayerWork:
    layer, unit = cost.spec.layers[number], decision.unit
    helped = cost.cpu_helps and shape.decoding
    tokens = shape.fed_tokens(ALL, layer)
    first = shape.first_decoding if cost.cpu_attends else 0
    begins = 0 < first < shape.batches and shape.scope_tokens(span(0, first)) > 0
    router, shared = cost.mlp_us(layer, tokens), cost.shared_us(layer, tokens)
    work = []
    for members in classes:
        compute = sum(cost.expert_us(number, e, tokens) for e in members) / len(members)
        compute += cost.experts_op_us(layer) / unit
        touched = sum(cost.experts(number, tokens)[e][1] for e in members) / len(members)
        link = cost.hardware.links[links[0]]
        assert layer.expert is not None
        late = touched * layer.expert.nbytes * 1e6 / link.bandwidth_bytes_per_s + cost.load_op_us(links[0]) / unit
        elsewhere = sum(cost.expert_us(number, e, tokens, CPU) for e in members) / len(members) if helped else 0.0
        more = begun = 0.0
        if begins:
            each = [cost.expert_parts_us(number, e, shape, first) for e in members]
            more = sum(early + later - at_once for early, later, at_once in each) / len(members)
            begun = sum(at_once - later for _, later, at_once in each) / len(members)
        work.append(ClassWork(compute, late, elsewhere, more, begun))
    attention, around = cost.attentions_us(layer, shape, shape.middle_context), 0.0
    row, last = (_row(cost, layer, shape, decision, size, links) for size in (shape.batch_size, shape.last_batch))
    if row.cpu_attend_us:
        sequences = shape.last_batch or shape.batch_size
        whole = shape.scope_tokens(onward(shape.first_decoding)) if shape.together else sequences
        around = cost.project_us(layer, whole) + cost.output_us(layer, whole) + router - shared
        small = query_bytes(cost.spec, sequences, cost.dtype)
        around += cost.transfer_us(links[1], small) + cost.transfer_us(links[0], small)
    exchange = 0.0
    if helped and layer.expert:
        exchange = cost.transfer_us(links[1], rows_bytes(cost.spec, tokens, cost.dtype)) + cost.sums_us(tokens)
        exchange += cost.transfer_us(links[0], sums_bytes(cost.spec, tokens, cost.dtype))
    ahead = min(1.0, _spill_slots(decision) / shape.batches)
    return LayerWork(attention, router, cost.bind_us, tuple(work), row, last, ahead, around, exchange, shared)


def _spill_slots(decision: Decision) -> int:
    """KV blocks in flight once any layer spills: read ahead, and in use or written back."""
    return decision.kv_ahead + 1


def _spill_bytes(cost: Cost, decision: Decision, phases: Sequence[Shape], kv_bytes: int) -> int:
    """What these blocks add to what the phase that takes most has without them: hidden states, and slots of experts."""
    expert = max(layer.expert.slot_bytes for layer in cost.layers if layer.expert)
    without, spilling = list[int](), list[int]()
    for shape in phases:
        decodes = shape.decodes(shape.batches - 1)
        blocks = _spill_slots(decision) if decodes else min(_spill_slots(decision), shape.batches)
        states = align_up(state_bytes(cost.spec, shape.scope_tokens(ALL), cost.dtype))
        without.append(states + decision.lead_of(shape.decoding) * expert)
        spilling.append(without[-1] + blocks * kv_bytes)
    return max(spilling) - max(without)


def _row(cost: Cost, layer: Layer, shape: Shape, decision: Decision, size: int, links: tuple[str, str]) -> RowWork:
    """A row of batches of a size: how many, on average, of each age; those that decode, with the positions that attention sees."""
    position, row = size * layer.kv_elements * cost.compute_bytes, shape.beside / decision.part_batches
    seen = [shape.context_of(batch, shape.middle_context) for batch in shape.ages if shape.decodes(batch)]
    load = store = attend = spared = 0.0
    if links[1] in cost.hardware.links:
        load = row * sum(cost.kv_us(links[0], position * positions) for positions in seen)
        store = row * sum(cost.kv_us(links[1], position * shape.tokens_of(batch)) for batch in shape.ages)
    if size and seen and cost.cpu_attends:
        cpu = cost.hardware.processors[CPU]
        attend = row * sum(cpu.op_us + cost.attend_us(layer, size, positions, cpu) for positions in seen)
        spared = row * sum(cost.attend_us(layer, size, positions, cost.processor) for positions in seen)
        spared += row * len(seen) * ATTEND_OPS * cost.processor.op_us if shape.together else 0.0
    return RowWork(load, store, attend, spared)


def _end(cost: Cost, shape: Shape, pages: int) -> EndWork:
    op_us, tokens = cost.processor.op_us, shape.scope_tokens(ALL)
    head = cost.head_us(shape.sequences)
    embed = cost.embed_us(tokens, True)
    gather = cost.embed_us(tokens, False) - embed
    return EndWork((3 + pages) * op_us + embed + head, gather, op_us + head / pages)
