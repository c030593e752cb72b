"""hybrimoe: after the router, GPU and CPU take a layer's experts from the two ends of one list.

HybriMoE (arXiv 2504.05897, section 4.1). Cached experts compute on the GPU; of the others, those with most tokens are sent to it,
one after another, while the CPU computes those with fewest where they live; each step gives the next expert to whichever would
finish it earlier. Prefill is the GPU's, layer by layer, the next layer on its way.

    link    |             | rows | rank 0 | rank 1 | rank 2 ..    | sums
    gpu     | attn router | resident      | rank 0 | rank 1 | ..  | add | attn l+1 ..
    cpu     |                    | rank n, n-1, n-2 ...           |

Approximations: the two ends meet where they would for the expected numbers of tokens; the cache holds what is most popular on the
whole, which is where its score, a running mean of the router's, settles; nothing is prefetched into it.
"""

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision
from klotski_compiler.ops import CPU
from klotski_compiler.policies import Policy
from klotski_compiler.program import Program


def build(p: Program) -> None:
    """attention | router | rank | GPU from the front, CPU from the back | sums."""
    if not p.shape.decoding:
        prefill(p)
        return
    p.embed()
    for layer in p.layers:
        p.load(*p.attention_weights(layer), *p.router_weights(layer))
        p.attend_and_route(layer)
        p.bind(layer, "rank", 0, len(p.late[layer]))
        p.experts_on_cpu(layer)
        p.experts(layer, p.resident_experts(layer))
        p.stream(layer, p.picks(layer))
        p.add_sums(layer)
    p.logits()


def prefill(p: Program) -> None:
    """Every layer whole, the next one ahead: experts are bound before the router has spoken."""
    p.embed()
    for layer in p.layers:
        for coming in (0, 1) if layer == 0 else (layer + 1,):
            if coming in p.layers:
                p.bind(coming, "predicted", 0, len(p.late[coming]))
                p.load(*p.attention_weights(coming), *p.router_weights(coming), *p.picks(coming))
        for batch in p.attend(layer):
            p.route(layer, batch)
        p.experts(layer, [*p.resident_experts(layer), *p.picks(layer)])
        p.evict(*p.attention_weights(layer), *p.router_weights(layer), *p.picks(layer))
    p.logits()


def decide(cost: Cost, decision: Decision) -> Decision:
    """Where the two ends meet in every layer, for a decode pass with the expected numbers of tokens."""
    if not cost.cpu_helps:
        return decision
    layers, tokens = [], decision.sequences
    for number, (layer, chosen) in enumerate(zip(cost.spec.layers, decision.layers, strict=True)):
        front, back, link_us, cpu_us = 0, len(chosen.late), 0.0, 0.0
        touched, nbytes = cost.experts(number, tokens), layer.expert.nbytes if layer.expert else 0
        on_gpu, on_cpu = cost.experts_us(number, tokens), cost.experts_us(number, tokens, CPU)
        gpu_us = sum(on_gpu[e] for e in chosen.resident_experts)
        while front < back:
            load_us = touched[chosen.late[front]][1] * cost.transfer_us("host>gpu", nbytes)
            there_us = max(gpu_us, link_us + load_us) + on_gpu[chosen.late[front]]
            here_us = cpu_us + on_cpu[chosen.late[back - 1]]
            if here_us < there_us:
                back, cpu_us = back - 1, here_us
            else:
                front, gpu_us, link_us = front + 1, there_us, link_us + load_us
        layers.append(chosen.model_copy(update={"cpu_picks": len(chosen.late) - back}))
    return decision.model_copy(update={"layers": tuple(layers)})


POLICY = Policy(build=build, experts="picks", one_batch=True, cpu_experts=True, decide=decide)
