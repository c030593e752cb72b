"""accelerate: each module's weights are copied just before its forward and dropped after it; nothing overlaps.

Hugging Face accelerate, ``hooks.py`` and ``big_modeling.py`` (disk and CPU offload). One batch at a time; all experts of a layer
are one module, so all of them are copied.

    compute | LOAD attn | attn | LOAD moe ............ | router experts | LOAD attn | ...
    link    | (the copies block the compute stream, so the link has no lane of its own)

Approximation: accelerate's own disk hook also copies through an mmap and allocates anew; here the readers are ours.
"""

from klotski_compiler.policies import Policy
from klotski_compiler.program import Program


def build(p: Program) -> None:
    """Load, compute, evict; module by module."""
    p.embed()
    for layer in p.layers:
        p.load(*p.attention_weights(layer), sync=True)
        for _ in p.attend(layer, sync=True):
            pass
        p.evict(*p.attention_weights(layer))
        mlp = [*p.router_weights(layer), *p.static_experts(layer)]
        p.load(*mlp, sync=True)
        for batch in p.batches:
            p.route(layer, batch)
            p.experts(layer, [*p.resident_experts(layer), *p.static_experts(layer)], batch)
        p.evict(*mlp)
    p.logits(sync=True)


POLICY = Policy(build=build, experts="static", one_batch=True, overlaps=False)
