"""Attention in three parts, the middle one elsewhere: transformers' own forward, halted where it calls its attention function.

A greenlet runs the module's forward up to the call, where it hands out queries, keys and values; it goes on when the mixed values
are back. So norms, projections, rotary embedding and output projection are the model's own, whatever the family.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from klotski_runtime.kv import KvBlock

SPLIT = "klotski_split"


def _halt(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any) -> Any:
    """The attention function of a split forward."""
    parent = getcurrent().parent
    assert parent is not None
    return parent.switch(Call(module, query, key, value, settings)), None


ALL_ATTENTION_FUNCTIONS.register(SPLIT, _halt)


@dataclass(slots=True)
class Call:
    """What attention is asked for: query [B, heads, 1, width], new key and value [B, kv heads, 1, width], and its settings."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    settings: dict[str, Any]

    def pack(self, out: torch.Tensor) -> None:
        """Query, key and value, one after the other, into ``out``, flat."""
        first = 0
        for part in (self.query, self.key, self.value):
            out[first : first + part.numel()].view(part.shape).copy_(part)
            first += part.numel()

    def unpack(self, source: torch.Tensor) -> list[torch.Tensor]:
        """The inverse: views of query, key and value."""
        first, found = 0, []
        for part in (self.query, self.key, self.value):
            found.append(source[first : first + part.numel()].view(part.shape))
            first += part.numel()
        return found


class NewOnly(Cache):
    """A cache of ``length`` positions that shows attention only what is new."""

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self._length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int | None) -> tuple[int, int]:
        return self._length + query_length, 0


class Split:
    """One call of attention on its way."""

    def __init__(self, config: Any, forward: Callable[[], torch.Tensor]) -> None:
        """Runs ``forward``, whose cache is a ``NewOnly``, up to its attention function. ``config``: the model's."""
        self._function = config._attn_implementation
        config._attn_implementation = SPLIT
        try:
            self._run = greenlet(forward)
            self.call: Call = self._run.switch()
            self._module = _on_host(self.call.module)
        finally:
            config._attn_implementation = self._function

    def attend(self, packed: torch.Tensor, kv: KvBlock, sequences: slice, past: int, mask: torch.Tensor | None) -> None:
        """Attention over cache and new token; the mixed values [B, 1, heads, width] take the place of the query in ``packed``."""
        query, key, value = self.call.unpack(packed)
        keys, values = kv.cache(sequences, past).update(key, value, 0)
        function = ALL_ATTENTION_FUNCTIONS.get(self._function) or _eager(self._module)
        mixed, _ = function(self._module, query, keys, values, mask, **self.call.settings)
        packed[: mixed.numel()].view(mixed.shape).copy_(mixed)

    def finish(self, packed: torch.Tensor) -> torch.Tensor:
        """What ``forward`` returns, given the mixed values."""
        query, value = self.call.query, self.call.value
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        count = query.shape[0] * query.shape[2] * query.shape[1] * value.shape[3]
        out: torch.Tensor = self._run.switch(packed[:count].view(shape))
        return out


def _on_host(module: Any) -> Any:
    """An attention module whose own parameters (gpt-oss has sinks), not those of its projections, are in host memory."""
    if all(own.device.type == "cpu" for own in module._parameters.values()):
        return module
    there = copy(module)
    there.__dict__["_parameters"] = {n: p.to("cpu", non_blocking=True) for n, p in module._parameters.items()}
    return there


def _eager(module: Any) -> Any:
    """The model's own attention function."""
    return importlib.import_module(type(module).__module__).eager_attention_forward
