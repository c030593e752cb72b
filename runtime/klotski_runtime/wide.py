"""16-bit matmuls on a CPU by the package's own kernel (``matmul.c``), where that is faster than PyTorch's: always on a processor without
instructions for them, where it goes through fp32; else for few rows, and for numbers of rows that PyTorch rounds up.

A product is rounded once, as by a 16-bit kernel that adds in fp32. What a row's product is depends on that row alone, not on how many
others there are, nor on who computes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from klotski_compiler.kernel_facts import FIXED_ROWS, widened_bytes
from klotski_runtime.native import matmul_library
from klotski_runtime.workers import WORTH_SHARING, Workers

NARROW = (torch.bfloat16, torch.float16)

Products = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Pairs of a weight [n, k] and where its product with rows goes [m, n]."""


class _Team:
    """Threads that one worker shares a product's columns among, and what each of them needs."""

    def __init__(self, workers: Workers, widest: int) -> None:
        self.workers = workers
        self.scratch = [torch.empty(widened_bytes(widest) // 4) for _ in range(workers.count)]


class Widener:
    """Multiplies by weights; where that is faster, with our kernel. ``workers`` share a matmul's columns, or multiply each on its own."""

    def __init__(self, least_rows: int, widest: int, workers: Workers | None = None, most_rows: int = 0) -> None:
        """least_rows, most_rows: from how many rows on it is faster than PyTorch's kernels (0: never), and up to how many (0: any
        number). widest: most columns of a weight.

        Raises ConfigError where it is to multiply so and the kernel cannot be compiled."""
        self._least_rows, self._most_rows = least_rows, most_rows or sys.maxsize
        self._widest, self._workers = widest, workers or Workers(1)
        if least_rows:
            library = matmul_library()
            self._matmul = {torch.bfloat16: library.matmul_bf16, torch.float16: library.matmul_fp16}
            self._teams = [_Team(team, widest) for team in self._workers.teams()]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows ``x`` [m, k] had better be multiplied by our kernel."""
        return 0 < self._least_rows <= x.shape[0] <= self._most_rows and x.dtype in NARROW and x.device.type == "cpu"

    def mm(
        self,
        x: torch.Tensor,
        *products: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None = None,
        worker: int | None = None,
    ) -> None:
        """``out`` [m, n] <- ``x`` [m, k] times the transpose of ``weight`` [n, k], plus ``bias`` [n], for every (weight, out). All of one
        type, with rows of x and out in one piece. worker: whose task this is part of (None: of none)."""
        if not self.takes(x):
            for weight, out in products:
                torch.mm(x, weight.t(), out=out)
                if bias is not None:
                    out += bias
            return
        self._check(x, products, bias)
        part = partial(self._part, x, products, bias)
        large = 2 * (len(x) + FIXED_ROWS) * sum(weight.numel() for weight, _ in products) >= WORTH_SHARING
        if large and worker is None:
            _shared(self._workers, partial(self._by_team, part))
        elif large:
            self._by_team(part, 0, 1, worker or 0)
        else:
            part(0, 1, self._teams[worker or 0].scratch[0])

    def _check(self, x: torch.Tensor, products: Products, bias: torch.Tensor | None) -> None:
        """Raise ValueError where the kernel, which knows addresses and no tensors, would read or write beside them."""
        for weight, out in products:
            (rows, width), columns = x.shape, len(weight)
            if weight.shape[1] != width or out.shape != (rows, columns) or width > self._widest:
                raise ValueError(
                    f"{tuple(weight.shape)} into {tuple(out.shape)}: other shapes than {tuple(x.shape)} takes"
                )
            if {weight.dtype, out.dtype} != {x.dtype} or x.stride(1) != 1 or out.stride(1) != 1:
                raise ValueError(f"rows in one piece and one type, not {x.dtype}, {weight.dtype}, {out.dtype}")
            if bias is not None and (bias.shape != (columns,) or bias.dtype != x.dtype or bias.stride(0) != 1):
                raise ValueError(f"a bias of {tuple(bias.shape)}, {bias.dtype} beside {x.dtype}")

    def _by_team(self, part: Callable[[int, int, torch.Tensor], None], number: int, parts: int, worker: int) -> None:
        """One of so many parts, in which every thread of a worker's team has its own."""
        team = self._teams[worker]
        count = team.workers.count
        _shared(team.workers, lambda n, _, thread: part(number * count + n, parts * count, team.scratch[thread]))

    def _part(
        self,
        x: torch.Tensor,
        products: Products,
        bias: torch.Tensor | None,
        number: int,
        parts: int,
        scratch: torch.Tensor,
    ) -> None:
        """One of so many parts of the columns of every product."""
        for weight, out in products:
            columns = slice(len(weight) * number // parts, len(weight) * (number + 1) // parts)
            own, to = weight[columns], out[:, columns]
            self._matmul[x.dtype](
                x.data_ptr(),
                x.stride(0),
                own.data_ptr(),
                *own.stride(),
                None if bias is None else bias[columns].data_ptr(),
                to.data_ptr(),
                to.stride(0),
                len(x),
                *own.shape,
                scratch.data_ptr(),
            )


def _shared(workers: Workers, part: Callable[[int, int, int], object]) -> None:
    """Call ``part`` with a number, how many there are, and who calls it: one part for each of them."""
    count = workers.count
    workers.run([partial(part, number, count) for number in range(count)])
