"""flexgen: zig-zag block schedule; the next layer's weights travel while all batches of this layer compute.

FlexGen (arXiv 2303.06865, section 4.2), ``generation_loop_overlap_multi_batch``. Each batch passes attention and MoE of a layer
before the next batch does; the whole next layer is fetched, whatever the router says. Attention is the GPU's or, where the cache
lives in host memory (its ``cpu_cache_compute``), all the CPU's, for which the GPU waits.

    link    | weights l+1 ......................... | weights l+2 ......
    compute | b0: attn moe | b1: attn moe | ... | bn | b0: attn moe | ...

Approximation: FlexGen synchronises after every batch; here only true dependencies wait.
"""

from klotski_compiler.policies import Policy
from klotski_compiler.program import Program


def build(p: Program) -> None:
    """for layer: fetch layer + 1; for batch: compute."""
    p.embed()
    for layer in p.layers:
        p.load(*weights(p, p.after(layer)), next_pass=p.is_last(layer))
        for batch in p.attend(layer):
            p.route(layer, batch)
            p.experts(layer, [*p.resident_experts(layer), *p.static_experts(layer)], batch)
        p.evict(*weights(p, layer))
    p.logits()


def weights(p: Program, layer: int) -> list[int]:
    """Everything that a layer streams."""
    return [*p.attention_weights(layer), *p.router_weights(layer), *p.static_experts(layer)]


POLICY = Policy(build=build, experts="static", cpu_attention=(0.0, 1.0))
