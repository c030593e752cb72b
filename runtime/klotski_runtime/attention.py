"""The attention function of models that use torch's: as transformers has it, but for decode with grouped queries.

There transformers copies keys and values once for each query head that shares them, wherever torch's kernels do not take groups, as
with any mask. The queries of one group are rows to the same keys and values, so a kernel takes them as such, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED = "klotski_grouped"


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Mixed values [B, q, heads, width] of query [B, heads, q, width], key and value [B, kv heads, context, width]."""
    batch, heads, queries, width = query.shape
    shared = key.shape[1]
    for_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    if queries > 1 or heads == shared or not for_all_heads:
        mixed, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            **settings,
        )
        return mixed, None
    rows = query.reshape(batch, shared, heads // shared, width)
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)
