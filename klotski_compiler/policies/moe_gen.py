"""moe_gen: module-based batching; attention in micro-batches, part of them on the CPU, each expert once over all of them.

MoE-Gen (arXiv 2503.09716, section 4). KV lives in host memory. A layer's attention runs batch by batch, a share of the batches on
the CPU where their KV is, the others on the GPU, which is sent theirs; the results accumulate, and every expert then computes once
over the whole group, in sequence, while the next ones travel.

    link    | KV b0, KV b1 .. | router, e0, e1 ................ | attn l+1 | KV b0 ..
    gpu     | attn b0, b1 ..  | out bk .. | router | e0 | e1 | ...
    cpu     | attend bk .. bn             |

Approximations: experts are fetched whatever the router says (the paper assumes near-uniform routing over large batches); weights
and KV share one lane of the link, in the order of need.
"""

from functools import partial

from klotski_compiler.policies import Policy
from klotski_compiler.program import Program

SHARES = (0.0, 0.3, 0.6, 1.0)  # of the batches that the CPU attends to, to try; the paper's own are 0.3 and 0.6


def build(p: Program) -> None:
    """attention over micro-batches | router | experts in sequence, the next ones ahead."""
    p.embed()
    for layer in p.layers:
        for _ in p.attend_with_cpu(layer):
            pass
        p.evict(*p.attention_weights(layer))
        p.load(*p.router_weights(layer))
        for batch in p.batches:
            p.route(layer, batch)
        p.evict(*p.router_weights(layer))
        p.stream(
            layer, p.static_experts(layer), ready=p.resident_experts(layer), then=partial(next_attention, p, layer)
        )
    p.logits()


def next_attention(p: Program, layer: int) -> None:
    """The dense modules of the layer to come, in a buffer of their own."""
    p.load(*p.attention_weights(p.after(layer)), next_pass=p.is_last(layer))


POLICY = Policy(build=build, experts="static", kv="host", cpu_attention=SHARES)
