"""The KV cache: in place, right masks, and the file layout of spilled positions."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from klotski_compiler.errors import ExecError
from klotski_runtime.kv import KvBlock, KvShape
from klotski_runtime.skeleton import CACHE

SHAPE = KvShape(key_heads=2, key_width=4, value_heads=3, value_width=5)


def block(batch: int = 3, capacity: int = 8) -> KvBlock:
    storage = torch.full((batch * capacity * SHAPE.elements,), torch.nan)
    return KvBlock(storage, SHAPE, batch, capacity)


def states(batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, count, 4), torch.randn(batch, 3, count, 5)


def test_update_writes_in_place_and_returns_views() -> None:
    kv = block()
    first, more = states(3, 4), states(3, 1)
    kv.cache(slice(0, 3), 0).update(*first, layer_idx=5)
    keys, values = kv.cache(slice(0, 3), 4).update(*more, layer_idx=5)
    assert torch.equal(keys, torch.cat([first[0], more[0]], 2))
    assert torch.equal(values, torch.cat([first[1], more[1]], 2))
    assert keys.data_ptr() == kv.keys.data_ptr() and values.data_ptr() == kv.values.data_ptr()
    assert kv.keys[:, :, 5:].isnan().all()


def test_sequences_are_written_a_few_at_a_time() -> None:
    kv, (keys, values) = block(), states(3, 4)
    for rows in (slice(0, 2), slice(2, 3)):
        kv.cache(rows, 0).update(keys[rows], values[rows], layer_idx=0)
    assert torch.equal(kv.keys[:, :, :4], keys) and torch.equal(kv.values[:, :, :4], values)


def test_lengths() -> None:
    cache = block().cache(slice(0, 3), 4)
    assert cache.get_seq_length() == 4 and cache.get_mask_sizes(2, 7) == (6, 0) and cache.get_max_length() == 8
    cache.update(*states(3, 2), layer_idx=7)
    assert cache.get_seq_length(7) == 6


def test_beyond_the_capacity() -> None:
    with pytest.raises(ExecError, match="8 positions"):
        block().cache(slice(0, 3), 8).update(*states(3, 1), layer_idx=0)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("window", [None, 3])
def test_masks_with_left_padding(past: int, window: int | None) -> None:
    queries = 4 if past == 0 else 1
    config = MixtralConfig(sliding_window=window)
    config._attn_implementation = "sdpa"
    pad = torch.tensor([0, 1, 2])
    present = torch.arange(past + queries) >= pad[:, None]
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = make(
        config=config,
        inputs_embeds=torch.empty(3, queries, 1),
        attention_mask=present,
        **{CACHE: block().cache(slice(0, 3), past)},
    )
    key, query = torch.arange(past + queries), torch.arange(past, past + queries)[:, None]
    seen = (key <= query) & (key > query - (window or 99))
    assert isinstance(mask, torch.Tensor)
    assert torch.equal(mask, seen[None, None] & present[:, None, None])


def test_pack_is_position_major_and_unpack_its_inverse() -> None:
    kv, other = block(), block()
    kv.cache(slice(0, 3), 0).update(*states(3, 6), layer_idx=0)
    packed = torch.empty(2 * 3 * SHAPE.elements)
    kv.pack(2, 4, packed)
    row = packed.view(2, -1)[1]
    assert torch.equal(row[:24].view(3, 2, 4), kv.keys[:, :, 3]) and torch.equal(
        row[24:].view(3, 3, 5), kv.values[:, :, 3]
    )
    other.unpack(2, 4, packed)
    assert torch.equal(other.keys[:, :, 2:4], kv.keys[:, :, 2:4]) and torch.equal(
        other.values[:, :, 2:4], kv.values[:, :, 2:4]
    )
    assert other.keys[:, :, :2].isnan().all() and other.keys[:, :, 4:].isnan().all()


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        KvBlock(torch.empty(7), SHAPE, 1, 1)
    with pytest.raises(ValueError, match="packed position"):
        block().pack(0, 2, torch.empty(2 * 3 * SHAPE.elements + 2))
