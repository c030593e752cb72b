"""moe_lightning: CGOPipe; the CPU attends two micro-batches ahead, weights travel in pages between hidden states.

MoE-Lightning (arXiv 2411.11217, section 4.1). KV lives in host memory and is attended to there. Of each layer the next one's
weights are cut into as many pages as there are micro-batches, and one follows the mixed values of every micro-batch, so that small
urgent copies never wait behind a whole layer. Prefill is layer by layer on the GPU.

    link    | mixed b0, page 0 | mixed b1, page 1 | mixed b2, page 2 | ...          (pages of layer l+1)
    gpu     | out moe b0, qkv b2 | out moe b1, qkv b3 | ...
    cpu     | attend b1 | attend b2 | attend b3 | ...

Approximations: a page is whole modules and experts or, where micro-batches are more than these, an equal part of an expert; none is
finer than an expert's matrices. The copy from pageable to pinned memory is left out, since all of host memory is pinned.
"""

from collections.abc import Iterator
from itertools import groupby, product

from klotski_compiler.ops import Pages
from klotski_compiler.policies import Policy, flexgen
from klotski_compiler.program import Program

AHEAD = 2  # micro-batches between a query and its use


def build(p: Program) -> None:
    """for layer: for batch: output, experts; query of the one two ahead; one page of the next layer."""
    if not any(p.on_cpu(layer, batch) for layer in p.layers for batch in p.batches):
        flexgen.build(p)
        return
    p.embed()
    course = list(product(p.layers, p.batches))
    ahead = min(AHEAD, len(p.batches))
    for layer, batch in course[:ahead]:
        query(p, layer, batch)
    for number, (layer, batch) in enumerate(course):
        if p.on_cpu(layer, batch):
            p.fetch_mixed(batch)
        for pages, tensors in page(p, p.after(layer), batch):
            p.load(*tensors, next_pass=p.is_last(layer), pages=pages)
        if p.on_cpu(layer, batch):
            p.output(layer, batch)
        else:
            p.attend_one(layer, batch)
        p.route(layer, batch)
        p.experts(layer, [*p.resident_experts(layer), *p.static_experts(layer)], batch)
        if batch == p.batches[-1]:
            p.evict(*flexgen.weights(p, layer))
        for coming in course[number + ahead : number + ahead + 1]:
            query(p, *coming)
    p.logits()


def query(p: Program, layer: int, batch: int) -> None:
    """Queries, keys and values to the host, and the CPU's attention."""
    if p.on_cpu(layer, batch):
        p.project(layer, batch)
        p.attend_on_cpu(layer, batch)


def page(p: Program, layer: int, number: int) -> Iterator[tuple[Pages | None, list[int]]]:
    """One of as many parts of a layer's weights as there are micro-batches; attention, which is needed first, comes first."""
    whole, experts, count = flexgen.weights(p, layer), p.static_experts(layer), len(p.batches)
    short = count - (len(whole) - len(experts))  # of the micro-batches, those that experts are for
    cut = max(1, min(p.table.all[experts[0]].segments, -(-short // len(experts)))) if experts else 1
    parts: list[tuple[Pages | None, int]] = [
        (Pages(i, i + 1, cut) if tensor in experts and cut > 1 else None, tensor)
        for tensor in whole
        for i in range(cut if tensor in experts else 1)
    ]
    mine = parts[-(-len(parts) * number // count) : -(-len(parts) * (number + 1) // count)]
    for pages, run in groupby(mine, key=lambda part: part[0]):
        yield pages, [tensor for _, tensor in run]


POLICY = Policy(build=build, experts="static", kv="host", cpu_attention=(1.0,))
