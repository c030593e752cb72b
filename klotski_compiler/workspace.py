"""What kernels allocate outside the arena: one formula per purpose (design 5.5), checked against the measured high-water mark."""

from __future__ import annotations

from klotski_compiler.cost import Cost
from klotski_compiler.plan import Decision, Workload

RUNTIME_BYTES = 64 << 20  # skeleton, tokenizer, threads, allocator slack: measured, independent of the model's size


def workspace(cost: Cost, decision: Decision, workload: Workload) -> dict[str, dict[str, int]]:
    """Bytes by tier and purpose."""
    spec, width = cost.spec, cost.compute_bytes
    context = workload.prompt_len + workload.gen_len
    tokens = decision.attention_batch * workload.prompt_len
    inner = max((layer.expert.params // (3 * spec.hidden_size) for layer in spec.layers if layer.expert), default=0)
    parts = {
        "attention": tokens * spec.hidden_size * 8 * width,
        "kv expansion": max(
            max(decision.decode_batch, decision.attention_batch) * context * max(layer.expand_elements, 2 * layer.kv_elements) * width
            for layer in spec.layers
        ),
        "experts": decision.expert_rows * (spec.hidden_size * 3 + 2 * inner) * width,
        "logits": decision.sequences * (-(-spec.vocab_size // max(1, decision.head_pages))) * width,
        "runtime": RUNTIME_BYTES,
    }
    return {cost.hardware.compute_tier: parts}
