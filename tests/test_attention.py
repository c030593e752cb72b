"""Attention functions of our own against transformers' eager ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe

from klotski_runtime.attention import attention_with_sinks, grouped_attention, sink_as_key

sinks_eager: Any = modeling_gpt_oss.eager_attention_forward
plain_eager: Any = modeling_qwen3_moe.eager_attention_forward

BATCH, HEADS, WIDTH, CONTEXT = 3, 8, 16, 21


def drawn(groups: int, queries: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value."""
    generator = torch.Generator().manual_seed(0)
    shared = HEADS // groups
    shapes = (BATCH, HEADS, queries, WIDTH), (BATCH, shared, CONTEXT, WIDTH), (BATCH, shared, CONTEXT, WIDTH)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def causal(queries: int, dtype: torch.dtype) -> torch.Tensor:
    """What is to be added to scores [B, 1, q, context]: the first sequence has four positions of padding, so a long query there begins
    with rows that may see nothing."""
    seen = torch.arange(CONTEXT) <= torch.arange(CONTEXT - queries, CONTEXT)[:, None]
    present = torch.arange(CONTEXT) >= torch.tensor([4, 0, 0])[:, None]
    allowed = seen & present[:, None]
    return torch.where(allowed, 0.0, torch.finfo(dtype).min)[:, None].to(dtype)


def module(groups: int) -> Any:
    """What the functions look at of an attention module."""
    sinks = torch.linspace(-2, 4, HEADS)
    return SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=False, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, CONTEXT])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_sinks_take_their_share(groups: int, queries: int, dtype: torch.dtype) -> None:
    parts, mask, own = drawn(groups, queries, dtype), causal(queries, dtype), module(groups)
    found, _ = attention_with_sinks(own, *parts, mask, scaling=WIDTH**-0.5)
    wanted, _ = sinks_eager(own, *(p.float() for p in parts), mask.float(), WIDTH**-0.5)
    assert found.shape == wanted.shape == (BATCH, queries, HEADS, WIDTH)
    assert found.isfinite().all()
    visible = slice(4, None) if queries > 1 else slice(None)
    error = (found.float() - wanted)[:, visible].abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5, CONTEXT])
@pytest.mark.parametrize("context", [CONTEXT, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_sink_is_one_more_key(queries: int, context: int, masked: bool, dtype: torch.dtype) -> None:
    """What a GPU computes."""
    query, key, value = drawn(1, min(queries, context), dtype)
    key, value, mask = (
        key[:, :, -context:],
        value[:, :, -context:],
        causal(min(queries, context), dtype)[..., -context:],
    )
    own, seen = module(1), mask if masked else torch.zeros_like(mask)
    found = sink_as_key(query, key, value, mask if masked else None, own.sinks.view(1, -1, 1, 1), WIDTH**-0.5)
    wanted, _ = sinks_eager(own, *(p.float() for p in (query, key, value)), seen.float(), WIDTH**-0.5)
    assert found.shape == query.shape
    error = (found.transpose(1, 2).float() - wanted)[:, 4 if queries > 1 else 0 :].abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("padded", [False, True])
def test_a_query_sees_what_it_would_see_eagerly(groups: int, padded: bool, dtype: torch.dtype) -> None:
    parts, own = drawn(groups, 1, dtype), module(groups)
    mask = causal(1, dtype) if padded else None
    found, _ = grouped_attention(own, *parts, None if mask is None else mask == 0, scaling=WIDTH**-0.5)
    wanted, _ = plain_eager(own, *(p.float() for p in parts), None if mask is None else mask.float(), WIDTH**-0.5)
    assert found.shape == wanted.shape
    assert (found.float() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)
