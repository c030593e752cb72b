"""Tiny random checkpoints of every supported family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "intermediate_size": 128,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, "n_shared_experts": 2, "n_group": 1},
    "deepseek_v3": {**LATENT, "n_shared_experts": 1, "n_group": 2},
    "glm4_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "phimoe": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def make_checkpoint(
    family: str,
    folder: Path,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a random model of ``family`` into ``folder``; ``overrides`` are fields of its configuration.

    Values are normal with a deviation of 0.08, around 1 in norms and 0 elsewhere: routing differs between tokens.
    """
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            tensor.copy_(mean + 0.08 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
