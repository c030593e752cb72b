"""The KV cache of one layer and one batch, inside one byte range of an arena.

transformers' own caches concatenate, so they allocate outside any budget; this one writes in place and returns views.
Layers with a sliding window keep all positions too: the mask does the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from klotski_compiler.errors import ExecError


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one layer caches per sequence and position: keys of ``key_heads`` x ``key_width``, and values likewise.

    Latent attention caches its compressed latent as the key and its rotary part as the value, with one head each.
    """

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int

    @property
    def elements(self) -> int:
        """Cached values per sequence and position."""
        return self.key_heads * self.key_width + self.value_heads * self.value_width


class KvBlock:
    """Keys [B, heads, capacity, width], then values likewise, in ``storage`` [B x capacity x shape.elements]; or, ``by_position``, of one
    position after the other keys [B, heads, width], then values."""

    def __init__(
        self, storage: torch.Tensor, shape: KvShape, batch_size: int, capacity: int, by_position: bool = False
    ) -> None:
        if storage.numel() != batch_size * capacity * shape.elements:
            raise ValueError(f"{storage.numel()} elements cannot hold {batch_size} x {capacity} positions of {shape}")
        self.capacity = capacity
        self.position_bytes = batch_size * shape.elements * storage.itemsize
        heads = (shape.key_heads, shape.key_width), (shape.value_heads, shape.value_width)
        sizes = [batch_size * count * width for count, width in heads]
        if by_position:
            parts = storage.view(capacity, -1).split(sizes, dim=1)
            views = [
                part.unflatten(1, (batch_size, *each)).permute(1, 2, 0, 3)
                for part, each in zip(parts, heads, strict=True)
            ]
        else:
            parts = storage.split([capacity * size for size in sizes])
            views = [
                part.view(batch_size, count, capacity, width) for part, (count, width) in zip(parts, heads, strict=True)
            ]
        self.keys, self.values = views

    def cache(self, rows: slice, past: int) -> KvCache:
        """The cache that transformers' attention sees for sequences ``rows`` with ``past`` filled positions."""
        return KvCache(self.keys[rows], self.values[rows], past)

    def take(self, other: KvBlock, first: int, last: int) -> None:
        """Copy positions ``first:last`` of another block of the same batch; on a GPU it is issued to the current stream."""
        for to, source in zip(self._words, other._words, strict=True):
            to[:, :, first:last].copy_(source[:, :, first:last], non_blocking=True)

    @cached_property
    def _words(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _widest(self.keys), _widest(self.values)


def _widest(block: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers of eight, if heads are so wide: a GPU copies rows element by element."""
    return block.view(torch.int64) if block.shape[-1] * block.itemsize % 8 == 0 else block


class _Filled(CacheLayerMixin):
    """The one layer of a KvCache: preallocated keys and values, of which ``length`` positions are filled."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the storage was given."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            raise ExecError(f"a KV block of {self.keys.shape[2]} positions cannot take {end}")
        self.keys[:, :, self.length : end].copy_(key_states)
        self.values[:, :, self.length : end].copy_(value_states)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[2])


class KvCache(Cache):
    """Some sequences of one block as a transformers Cache for one call of one layer's attention, whatever its index."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, past: int) -> None:
        self._layer = _Filled(keys, values, past)
        super().__init__(layers=[self._layer])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, heads, new, width] in place; returns views of all filled positions. Raises ExecError when full."""
        return self._layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self._layer.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int | None) -> tuple[int, int]:
        return self._layer.get_mask_sizes(query_length)
