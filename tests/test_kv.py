"""The KV cache: in place, right masks, and the file layout of spilled positions."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from klotski_compiler.errors import ExecError
from klotski_compiler.ops import PAGE_BYTES, align_up
from klotski_runtime.arena import Arena
from klotski_runtime.kv import KvBlock, KvShape
from klotski_runtime.reader import DiskReader
from klotski_runtime.skeleton import CACHE
from klotski_runtime.spill import SpillFile

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


def test_what_the_disk_fills_is_position_by_position() -> None:
    storage = torch.full((3 * 8 * SHAPE.elements,), torch.nan)
    kv, other = KvBlock(storage, SHAPE, 3, 8, by_position=True), block()
    first, more = states(3, 6), states(3, 1)
    for each in (kv, other):
        each.cache(slice(0, 3), 0).update(*first, layer_idx=0)
        seen = each.cache(slice(0, 3), 6).update(*more, layer_idx=0)
        assert torch.equal(seen[0], torch.cat([first[0], more[0]], 2))
    assert torch.equal(kv.keys[:, :, :7], other.keys[:, :, :7]) and torch.equal(
        kv.values[:, :, :7], other.values[:, :, :7]
    )
    row = storage.view(8, -1)[3]
    assert kv.position_bytes == row.nbytes and storage.view(8, -1)[7].isnan().all()
    assert torch.equal(row[:24].view(3, 2, 4), first[0][:, :, 3]) and torch.equal(
        row[24:].view(3, 3, 5), first[1][:, :, 3]
    )


@pytest.mark.parametrize("direct", [True, False])
def test_a_slot_comes_back_from_disk(direct: bool, tmp_path: Path) -> None:
    """In whole pages, with rows of any size, past the page cache or through it."""
    generator = random.Random(0)
    for row in (4096, 6144, 520):
        size, reader = align_up(9 * row), DiskReader()
        spill = SpillFile(tmp_path, 4, size, reader)
        if not direct:
            spill._close_direct()
        here, there = Arena(size), Arena(size)
        slots = [generator.randbytes(9 * row) for _ in range(4)]
        for end in range(5, 10):  # a prompt of five positions, then one by one, as passes write them
            for region, want in enumerate(slots):
                here.view(0, 9 * row)[:] = bytes(9 * row)
                if end > 5:
                    spill.load(region, here.view(0, size), (end - 1) * row)
                begin = (end - 1) * row if end > 5 else 0
                here.view(begin, end * row - begin)[:] = want[begin : end * row]
                spill.store(region, here.view(0, size), begin, end * row)
        for region, want in enumerate(slots):
            spill.load(region, there.view(0, size), 9 * row)
            assert bytes(there.view(0, 9 * row)) == want
        reader.close()
        spill.close()


def test_a_fault_names_the_folder(tmp_path: Path) -> None:
    reader, slot = DiskReader(), Arena(PAGE_BYTES)
    spill = SpillFile(tmp_path, 1, PAGE_BYTES, reader)
    os.ftruncate(spill._file.fileno(), 0)
    with pytest.raises(ExecError, match=f"{tmp_path}: spilled KV: ends at byte 0"):
        spill.load(0, slot.view(0, PAGE_BYTES), 8)
    reader.close()
    spill.close()


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        KvBlock(torch.empty(7), SHAPE, 1, 1)
