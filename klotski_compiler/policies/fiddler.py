"""fiddler: an expert that is not on the GPU computes wherever that takes less time, whatever else waits.

Fiddler (arXiv 2402.07033, section 3.3): HybriMoE's list with a fixed end. For each expert by itself, the CPU's time for its tokens
is compared with the time to send it to the GPU and compute it there; below a break-even number of tokens the CPU wins.

    link    |             | rows | rank 0 | rank 1 ..             | sums
    gpu     | attn router | resident      | rank 0 | rank 1       | add | attn l+1 ..
    cpu     |                    | all ranks below the break-even |

Approximation: the break-even is applied to the expected numbers of tokens.
"""

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision
from klotski_compiler.ops import CPU
from klotski_compiler.policies import Policy
from klotski_compiler.policies.hybrimoe import build


def decide(cost: Cost, decision: Decision) -> Decision:
    """How many of the late experts, in a decode pass, the CPU computes sooner than they are sent and computed."""
    if not cost.cpu_helps:
        return decision
    layers, tokens = [], decision.sequences
    for number, (layer, chosen) in enumerate(zip(cost.spec.layers, decision.layers, strict=True)):
        cheaper = 0
        if layer.expert is None:
            layers.append(chosen)
            continue
        touched, link_us = cost.experts(number, tokens), cost.transfer_us("host>gpu", layer.expert.nbytes)
        here_us, there_us = cost.experts_us(number, tokens), cost.experts_us(number, tokens, CPU)
        for expert in chosen.late:
            cheaper += there_us[expert] < touched[expert][1] * link_us + here_us[expert]
        layers.append(chosen.model_copy(update={"cpu_picks": cheaper}))
    return decision.model_copy(update={"layers": tuple(layers)})


POLICY = Policy(build=build, experts="picks", one_batch=True, cpu_experts=True, decide=decide)
