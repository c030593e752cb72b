"""16-bit matmuls on a processor without instructions for them: through fp32, block by block, where that is faster.

A product is rounded once, as by a 16-bit kernel that adds in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from klotski_compiler.cost import WIDENED_BLOCK, WIDENED_COLUMNS, WIDENED_ROWS
from klotski_runtime.workers import WORTH_SHARING, Workers

NARROW = (torch.bfloat16, torch.float16)


Products = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a weight [n, k] and where its product with rows goes [m, n]."""


class _Buffers:
    """What one worker needs: widened rows, a block of widened weights, their product."""

    def __init__(self, widest: int, rows: int) -> None:
        self.rows = torch.empty(rows * widest)
        self.weight = torch.empty(max(WIDENED_BLOCK, widest))
        self.out = torch.empty(rows * WIDENED_COLUMNS)


class Widener:
    """Multiplies by weights: where that is faster by 16-bit ones in buffers that are reused. A block of weights is widened, used while
    caches hold it, and overwritten. ``workers`` share a matmul's columns, or multiply each on its own."""

    def __init__(
        self, least_rows: int, widest: int, workers: Workers | None = None, rows_at_once: int = WIDENED_ROWS
    ) -> None:
        """least_rows: from how many rows on it is faster than 16-bit kernels (0: never). widest: most columns of a weight."""
        self._least_rows, self._workers, self._at_once = least_rows, workers or Workers(1), rows_at_once
        self._buffers = [_Buffers(widest, rows_at_once) for _ in range(self._workers.count if least_rows else 0)]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows ``x`` [m, k] had better be multiplied through fp32."""
        return 0 < self._least_rows <= x.shape[0] and x.dtype in NARROW and x.device.type == "cpu"

    def mm(
        self,
        x: torch.Tensor,
        *products: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None = None,
        worker: int | None = None,
    ) -> None:
        """``out`` [m, n] <- ``x`` [m, k] times the transpose of ``weight`` [n, k], plus ``bias`` [n], for every (weight, out): through
        fp32, for which the rows are widened once, or as they are. worker: whose task this is part of (None: of none)."""
        if self.takes(x):
            self._widened(x, products, bias, worker)
            return
        for weight, out in products:
            torch.mm(x, weight.t(), out=out)
            if bias is not None:
                out += bias

    def _widened(self, x: torch.Tensor, products: Products, bias: torch.Tensor | None, worker: int | None) -> None:
        own = self._buffers[worker or 0]
        for first in range(0, len(x), self._at_once):
            rows = slice(first, min(first + self._at_once, len(x)))
            wide = own.rows[: x[rows].numel()].view(x[rows].shape).copy_(x[rows])
            flops = 2 * wide.numel() * sum(len(weight) for weight, _ in products)
            if worker is None and flops >= WORTH_SHARING:
                parts = self._workers.count
                self._workers.run([partial(self._part, wide, rows, products, bias, n, parts) for n in range(parts)])
            else:
                self._part(wide, rows, products, bias, 0, 1, worker or 0)

    def _part(
        self,
        wide: torch.Tensor,
        rows: slice,
        products: Products,
        bias: torch.Tensor | None,
        number: int,
        parts: int,
        worker: int,
    ) -> None:
        """One of so many parts of the columns of every product."""
        own, step = self._buffers[worker], max(1, min(WIDENED_BLOCK // wide.shape[1], WIDENED_COLUMNS))
        for weight, out in products:
            end = len(weight) * (number + 1) // parts
            for begin in range(len(weight) * number // parts, end, step):
                columns = slice(begin, min(begin + step, end))
                narrow = weight[columns]
                block = own.weight[: narrow.numel()].view(narrow.shape).copy_(narrow)
                product = own.out[: len(wide) * len(block)].view(len(wide), -1)
                torch.mm(wide, block.t(), out=product)
                if bias is not None:
                    product += bias[columns]
                out[rows, columns].copy_(product)
