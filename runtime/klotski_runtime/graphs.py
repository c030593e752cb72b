"""Decode ops on a GPU as CUDA graphs: their kernels, the same in every pass, are issued as one.

To issue the kernels of a layer's attention one by one takes a thread longer than a GPU takes to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

MOST = 8192
"""Pieces of which graphs are kept; only weights that change their place from pass to pass make so many."""

T = TypeVar("T")


class Graphs:
    """The pieces of a model's ops. Their temporaries share memory, since pieces run one after another."""

    def __init__(self, device: torch.device) -> None:
        """On a CPU pieces are done as they are."""
        self.capturing = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self.capturing else None
        self._found: dict[Hashable, Any] = {}

    def find(self, key: Hashable, make: Callable[[Graphs], T]) -> T:
        """What ``make`` made when ``key`` was asked for first. key: what the work is and where all that it uses lies."""
        if not self.capturing or (key not in self._found and len(self._found) >= MOST):
            return make(self)
        if key not in self._found:
            self._found[key] = make(self)
        found: T = self._found[key]
        return found

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The kernels that ``work`` would launch. Other threads go on meanwhile, whatever they call."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph


class Piece:
    """Work that uses the same memory each time: done as it is, then captured, from then on replayed.

    The first time brings in what kernels need and no capture may: libraries, their workspace.
    """

    def __init__(self, graphs: Graphs) -> None:
        self._graphs, self._seen = graphs, False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Issue ``work`` to the current stream, which is not torch's default one. It must not wait for the GPU."""
        if self._graph is None and self._seen and self._graphs.capturing:
            self._graph = self._graphs.capture(work)
        self._seen = True
        if self._graph is None:
            work()
        else:
            self._graph.replay()
