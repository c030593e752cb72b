"""Attention in three parts, the middle one elsewhere: transformers' own forward, halted where it calls its attention function.

A greenlet runs the module's forward up to the call, where it hands out queries, keys and values; it goes on when the mixed values
are back. So norms, projections, rotary embedding and output projection are the model's own, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from klotski_runtime.attention import eager
from klotski_runtime.graphs import Graphs, Piece
from klotski_runtime.kv import KvBlock

SPLIT = "klotski_split"

Regions = Sequence[tuple[int, torch.Tensor]]
"""How many sequences, and flat memory for what goes in and out of their attention."""


def _halt(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any) -> Any:
    """The attention function of a split forward."""
    parent = getcurrent().parent
    assert parent is not None
    return parent.switch((module, (query, key, value), settings)), None


ALL_ATTENTION_FUNCTIONS.register(SPLIT, _halt)


@dataclass(frozen=True, slots=True)
class Call:
    """What attention is asked for. shapes: of query [B, heads, 1, width], new key and value [B, kv heads, 1, width]. function: the
    name of transformers' attention function."""

    module: Any
    shapes: tuple[torch.Size, ...]
    settings: dict[str, Any]
    function: str

    @property
    def elements(self) -> int:
        """Values of query, key and value."""
        return sum(shape.numel() for shape in self.shapes)

    def of(self, sequences: int) -> Call:
        """The same for some of its sequences."""
        return replace(self, shapes=tuple(torch.Size((sequences, *shape[1:])) for shape in self.shapes))

    def views(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value, one after the other in ``packed``, flat."""
        parts = packed[: self.elements].split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def mixed(self, packed: torch.Tensor) -> torch.Tensor:
        """The mixed values [B, 1, heads, width], which take the place of the query."""
        (batch, heads, queries, _), width = self.shapes[0], self.shapes[2][3]
        return packed[: batch * queries * heads * width].view(batch, queries, heads, width)

    def attend(
        self, packed: torch.Tensor, kv: KvBlock, sequences: slice, past: int, mask: torch.Tensor | None, module: Any
    ) -> None:
        """Attention over cache and new token. module: the call's, with its own parameters where ``packed`` is."""
        query, key, value = self.views(packed)
        keys, values = kv.cache(sequences, past).update(key, value, 0)
        function = ALL_ATTENTION_FUNCTIONS.get(self.function) or eager(module)
        self.mixed(packed).copy_(function(module, query, keys, values, mask, **self.settings)[0])


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
        function = config._attn_implementation
        config._attn_implementation = SPLIT
        try:
            self._run = greenlet(forward)
            module, self._parts, settings = self._run.switch()
        finally:
            config._attn_implementation = function
        self.call = Call(module, tuple(part.shape for part in self._parts), settings, function)

    def pack(self, regions: Regions) -> None:
        """Query, key and value of the sequences of every region into it, flat."""
        first = 0
        for sequences, packed in regions:
            for view, part in zip(self.call.of(sequences).views(packed), self._parts, strict=True):
                view.copy_(part[first : first + sequences])
            first += sequences

    def finish(self, regions: Regions) -> torch.Tensor:
        """What ``forward`` returns, given the mixed values."""
        mixed = [self.call.of(sequences).mixed(packed) for sequences, packed in regions]
        out: torch.Tensor = self._run.switch(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        return out


class Ends:
    """What a layer's attention does before and after its attention function, each a piece. Between the two only regions carry what was
    computed."""

    def __init__(self, graphs: Graphs) -> None:
        self._before, self._after = Piece(graphs), Piece(graphs)
        self._split: Split | None = None
        self._call: Call | None = None

    def begin(self, start: Callable[[], Split], regions: Callable[[int], Regions]) -> Call:
        """``start`` a forward and pack what its attention function is asked for, so many elements, into ``regions``."""

        def work() -> None:
            self._split = start()
            self._call = self._split.call
            self._split.pack(regions(self._call.elements))

        self._before(work)
        assert self._call is not None
        return self._call

    def finish(self, hidden: torch.Tensor, regions: Regions) -> None:
        """hidden += what the forward returns."""

        def work() -> None:
            assert self._split is not None
            hidden.add_(self._split.finish(regions))

        self._after(work)
        self._split = None


def on_host(module: Any) -> Any:
    """An attention module whose own parameters (gpt-oss has sinks), not those of its projections, are in host memory."""
    if all(own.device.type == "cpu" for own in module._parameters.values()):
        return module
    there = copy(module)
    there.__dict__["_parameters"] = {n: p.to("cpu", non_blocking=True) for n, p in module._parameters.items()}
    return there
