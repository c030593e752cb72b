"""zero_inference: one batch, row by row; the next layer is prefetched while this one computes.

DeepSpeed ZeRO-Inference (DeepSpeedExamples ``inference/huggingface/zero_inference``). A MoE layer is one leaf module, so all of its
experts are fetched. No reuse of a layer over several batches: throughput comes from the largest batch that fits.

    link    | weights l+1 .............. | weights l+2 ..............
    compute | attn moe |   (wait)        | attn moe |

Approximation: the prefetch limit in bytes is one layer.
"""

from klotski_compiler.policies import Policy
from klotski_compiler.policies.flexgen import build

POLICY = Policy(build=build, experts="static", one_batch=True)
