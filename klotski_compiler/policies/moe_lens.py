"""moe_lens: prefill and decode in one pass; while the CPU attends for those who decode, the GPU takes in those who join.

MoE-Lens (arXiv 2504.09345, section 4). Every pass holds sequences of all ages: the new ones bring their prompts, which keep the GPU
busy while weights travel and while the CPU attends, in host memory, to what the older ones have cached. Weights come a layer ahead, in
packets of some 100 MB between which small copies of hidden states slip through.

    link    | weights l+1 .................. (packets)                        | weights l+2 ..
    urgent  |                              mixed values of those who decode    |
    gpu     | project old | attn new ............ | output old | router | experts l | project old ..
    cpu     |             | attend old ........................ |

Approximations: sequences join a cohort at a time, at equal distances, where the paper admits as many tokens as keep the GPU busy, and
none is ever preempted: the plan has room for all. Its two token groups, which take turns between CPU and GPU, are those who decode and
those who join; a packet is whole experts.
"""

from klotski_compiler.policies import Policy, flexgen
from klotski_compiler.program import URGENT, Program


def build(p: Program) -> None:
    """for layer: the next one's weights; attention of new and old; experts over all tokens."""
    p.returning = URGENT
    p.embed()
    for layer in p.layers:
        p.load(*flexgen.weights(p, p.after(layer)), next_pass=p.is_last(layer))
        for batch in p.attend_with_cpu(layer):
            p.route(layer, batch)
        p.experts(layer, [*p.resident_experts(layer), *p.static_experts(layer)])
        p.evict(*flexgen.weights(p, layer))
    p.logits()


POLICY = Policy(build=build, experts="static", rolling=(True,), kv="host", cpu_attention=(1.0,))
