"""16-bit matmuls on a processor without instructions for them: through fp32, block by block, where that is faster.

A product is rounded once, as by a 16-bit kernel that adds in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klotski_compiler.cost import WIDENED_BLOCK, WIDENED_COLUMNS, WIDENED_ROWS

NARROW = (torch.bfloat16, torch.float16)


class Widener:
    """Multiplies by weights, for one thread: where that is faster by 16-bit ones in buffers that are reused. A block of weights is
    widened, used while caches hold it, and overwritten."""

    def __init__(self, least_rows: int, widest: int) -> None:
        """least_rows: from how many rows on it is faster than 16-bit kernels (0: never). widest: most columns of a weight."""
        self._least_rows = least_rows
        if least_rows:
            self._rows = torch.empty(WIDENED_ROWS * widest)
            self._weight = torch.empty(max(WIDENED_BLOCK, widest))
            self._out = torch.empty(WIDENED_ROWS * WIDENED_COLUMNS)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows ``x`` [m, k] had better be multiplied through fp32."""
        return 0 < self._least_rows <= x.shape[0] and x.dtype in NARROW and x.device.type == "cpu"

    def mm(
        self, x: torch.Tensor, *products: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None = None
    ) -> None:
        """``out`` [m, n] <- ``x`` [m, k] times the transpose of ``weight`` [n, k], plus ``bias`` [n], for every (weight, out): through
        fp32, for which the rows are widened once, or as they are."""
        if self.takes(x):
            self._widened(x, products, bias)
            return
        for weight, out in products:
            torch.mm(x, weight.t(), out=out)
            if bias is not None:
                out += bias

    def _widened(
        self, x: torch.Tensor, products: Sequence[tuple[torch.Tensor, torch.Tensor]], bias: torch.Tensor | None
    ) -> None:
        count, width = x.shape
        step = max(1, min(WIDENED_BLOCK // width, WIDENED_COLUMNS))
        for first in range(0, count, WIDENED_ROWS):
            rows = x[first : first + WIDENED_ROWS]
            wide = self._rows[: rows.numel()].view(rows.shape).copy_(rows)
            for weight, out in products:
                for begin in range(0, weight.shape[0], step):
                    narrow = weight[begin : begin + step]
                    block = self._weight[: narrow.numel()].view(narrow.shape).copy_(narrow)
                    product = self._out[: len(rows) * len(block)].view(len(rows), -1)
                    torch.mm(wide, block.t(), out=product)
                    if bias is not None:
                        product += bias[begin : begin + step]
                    out[first : first + len(rows), begin : begin + step].copy_(product)
