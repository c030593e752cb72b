"""Attention functions that do what transformers' own do, without their copies and, on a CPU, without their slow paths.

*On a CPU* the package's own kernel attends in 16 bits where it is known (``own_kernels``). What follows is for all else.

*Decode.* transformers copies keys and values once for each query head that shares them, wherever torch's kernels do not take groups, as
with any mask. The queries of one group are rows to the same keys and values, so a kernel takes them as such, and nothing is copied.

*Sinks* (gpt-oss): a score per head that takes a share of the softmax and has no value. transformers has that only with all scores in
memory. On a CPU: if L is the logarithm of the sum of a row's exponentials, which torch's kernel knows, the row's share without the
sink s is exp(L) / (exp(L) + exp(s)). On a GPU, whose kernels do not say L where there is a mask: one more key, without a value,
which has 1 where all other keys have 0, and queries s / scaling.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from klotski_runtime.own_kernels import OwnKernels

GROUPED, SINKS = "klotski_grouped", "klotski_sinks"
OWN = "_klotski_kernels"
"""Where an attention module has the package's own kernels."""

ALIGNED = 8
"""Kernels that save memory take masks whose rows, and heads whose widths, are multiples of so many values."""

ROWS_BF16 = 2
"""Fewest query rows for torch's bf16 kernel on a CPU: a single one takes it longer than two."""


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
    own: OwnKernels | None = getattr(module, OWN, None)
    if own and own.attends(query, key, attention_mask):
        return own.attend(
            query, key, value, attention_mask, query.shape[3] ** -0.5 if scaling is None else scaling
        ), None
    heads, queries = query.shape[1:3]
    one_by_one = heads == key.shape[1] and not _twice(query)
    for_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    if queries > 1 or one_by_one or not for_all_heads:
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
    rows = _rows(query, key)
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return _heads(out, heads), None


def attention_with_sinks(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, Any]:
    """The same with ``module.sinks`` [heads]."""
    assert scaling is not None
    groups, queries = query.shape[1] // key.shape[1], query.shape[2]
    sinks = module.sinks.view(1, -1, 1, 1)
    if queries > 1:
        rows, key, value = query, repeat_kv(key, groups), repeat_kv(value, groups)
    else:
        rows, sinks = _rows(query, key), _rows(sinks, key)
    if query.device.type == "cpu":
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key, value, attn_mask=attention_mask, scale=scaling
        )
        out.mul_(torch.sigmoid(log_sums[..., None] - sinks.float()))
    else:
        out = sink_as_key(rows, key, value, attention_mask, sinks, scaling)
    return (out.transpose(1, 2).contiguous() if queries > 1 else _heads(out, query.shape[1])), None


def sink_as_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Mixed values [B, heads, q, width] of query [B, heads, q, width], key and value [B, heads, context, width], with a score that has no
    value for each head, or row, of ``sinks`` [1, heads, 1 or q, 1]. mask: what is added to scores [B, 1, q, context]."""
    context = key.shape[2]
    more = ALIGNED - context % ALIGNED
    if mask is None:
        mask = query.new_zeros(1, 1, 1, context)
    mask = functional.pad(mask, (0, 1))  # all see the sink
    mask = functional.pad(mask, (0, more - 1), value=torch.finfo(mask.dtype).min)
    query = functional.pad(query, (0, ALIGNED))
    query[..., -1] = (sinks / scaling)[..., 0]
    key = functional.pad(key, (0, ALIGNED, 0, more))
    key[:, :, context, -1] = 1
    value = functional.pad(value, (0, 0, 0, more))
    mask = mask.expand(len(query), -1, query.shape[2], -1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def eager(module: Any) -> Any:
    """The model's own attention function."""
    return importlib.import_module(type(module).__module__).eager_attention_forward


def _twice(query: torch.Tensor) -> bool:
    """Whether a single row had better be computed twice."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


def _rows(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Queries of one position [B, heads, 1, width] as [B, kv heads, rows, width]: those of a group, or a single one twice."""
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    return rows.expand(-1, -1, ROWS_BF16, -1) if rows.shape[2] == 1 and _twice(key) else rows


def _heads(mixed: torch.Tensor, heads: int) -> torch.Tensor:
    """Their mixed values [B, 1, heads, width]."""
    batch, shared, _, width = mixed.shape
    return mixed[:, :, : heads // shared].reshape(batch, 1, heads, width)


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)
ALL_ATTENTION_FUNCTIONS.register(SINKS, attention_with_sinks)
ALL_MASK_ATTENTION_FUNCTIONS.register(SINKS, eager_mask)
