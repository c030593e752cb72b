"""16-bit matmuls on a CPU by the package's own kernels (``csrc``), where they are faster than PyTorch's; then feed-forwards of routed
experts and attention with what surrounds it, too, each in one call.

A product is rounded once, as by a 16-bit kernel that adds in fp32. What a row's product is depends on that row alone, not on how many
others there are, nor on who computes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import torch

from klotski_compiler.kernel_facts import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    FIXED_ROWS,
    inner_bytes,
    own_finds,
    own_kernels_bytes,
    own_takes,
)
from klotski_runtime.native import Team, kernel_library
from klotski_runtime.structs import Attention, FeedForward, Norms, Piece, Product, Rotation, Search
from klotski_runtime.workers import WORTH_SHARING, Workers

NARROW = (torch.bfloat16, torch.float16)

WORTH_SHARING_ELEMENTS = 1 << 18
"""As ``workers.WORTH_SHARING``, where there are only a few operations on each element."""

Fed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""An expert's gate, up [inner, hidden] and down [hidden, inner], numbers of rows, and the weight of each."""


class OwnKernels:
    """Multiplies by weights, with our kernel where that is faster; feeds experts and attends. ``workers`` share the work, or have each
    their own."""

    def __init__(self, least_rows: int, widest: int, workers: Workers | None = None, most_rows: int = 0) -> None:
        """least_rows, most_rows: from how many rows on it is faster than PyTorch's kernels (0: never), and up to how many (0: any
        number). widest: most columns of a weight.

        Raises ConfigError where it is to multiply so and the kernel cannot be compiled."""
        self._least_rows, self._most_rows = least_rows, most_rows
        self._widest, self._workers = widest, workers or Workers(1)
        if least_rows:
            self._library = kernel_library()
            scratch = [torch.empty(own_kernels_bytes(widest) // 4) for _ in range(self._workers.threads)]
            each = len(scratch) // self._workers.count
            self._all = Team(self._library, scratch)
            self._teams = [
                Team(self._library, scratch[first : first + each])
                for first in range(0, each * self._workers.count, each)
            ]

    @property
    def known(self) -> bool:
        """Whether there is our kernel."""
        return self._least_rows > 0

    def takes(self, x: torch.Tensor) -> bool:
        """Whether rows ``x`` [m, k] had better be multiplied by our kernel."""
        return self.takes_rows(len(x)) and _is_known(x)

    def takes_rows(self, count: int) -> bool:
        """Whether so many of them had, in a type and place that it knows."""
        return own_takes(count, self._least_rows, self._most_rows)

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
        for weight, out in products:
            self._check(x, weight, bias)
            if out.shape != (len(x), len(weight)) or out.dtype != x.dtype or out.stride(1) != 1:
                raise ValueError(f"{tuple(x.shape)} by {tuple(weight.shape)} into {tuple(out.shape)}, {out.dtype}")
        jobs: list[Product] = []
        for weight, out in reversed(products):
            jobs.append(
                Product(
                    *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()),
                    *(x.stride(0), *weight.stride(), out.stride(0), len(x), *weight.shape),
                    ctypes.addressof(jobs[-1]) if jobs else None,
                )
            )
        flops = 2 * (len(x) + FIXED_ROWS) * sum(weight.numel() for weight, _ in products)
        self._share("matmul", x, jobs[-1], flops >= WORTH_SHARING, worker)

    def finds(self, x: torch.Tensor) -> bool:
        """Whether the greatest of their products had better be found by our kernel, which does not compute most of the others."""
        return own_finds(len(x), self._least_rows) and _is_known(x)

    def greatest(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        best: torch.Tensor,
        where: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The better of ``best`` [m] and, of what ``mm`` would make, each row's greatest product; its column, or ``where`` [m]: the lowest
        that has it. Not a number where one of them is none. The others are never in memory, and most of them never computed: the better
        ``best`` is already, the sooner it is done. Raises ValueError where shapes or types are others."""
        self._check(x, weight, bias)
        threads = self._workers.threads
        values, columns = best.float().repeat(threads, 1), where.repeat(threads, 1)
        job = Search(
            *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(values.data_ptr(), columns.data_ptr(), x.stride(0), *weight.stride(), len(x), *weight.shape),
        )
        self._share("greatest", x, job, 2 * (len(x) + FIXED_ROWS) * weight.numel() >= WORTH_SHARING)
        most = values.amax(dim=0)
        first = torch.where(values == most, columns, len(weight)).amin(dim=0)
        return most.to(x.dtype), first

    def _check(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Raise ValueError where the kernel, which knows addresses and no tensors, would read or write beside them."""
        if weight.shape[1] != x.shape[1] or x.shape[1] > self._widest:
            raise ValueError(f"{tuple(weight.shape)}: other shapes than {tuple(x.shape)} takes")
        if weight.dtype != x.dtype or x.dtype not in NARROW or x.stride(1) != 1:
            raise ValueError(f"rows in one piece and one type, not {x.dtype}, {weight.dtype}")
        if bias is not None and (bias.shape != (len(weight),) or bias.dtype != x.dtype or bias.stride(0) != 1):
            raise ValueError(f"a bias of {tuple(bias.shape)}, {bias.dtype} beside {x.dtype}")

    def feed_forward(
        self, x: torch.Tensor, out: torch.Tensor, experts: Sequence[Fed], inner: torch.Tensor, worker: int | None = None
    ) -> None:
        """``out`` [tokens, hidden], fp32 += weight x down(silu(gate(x)) * up(x)), each product rounded, of every expert's rows of ``x``
        [tokens, hidden]: gathered, computed and added in one call of each thread. inner: memory that it uses, of ``inner_bytes``.

        Raises ValueError where shapes or types are others."""
        self._check_experts(x, out, experts, inner)
        if not experts:
            return
        width, hidden = experts[0][0].shape
        pieces = list(_pieces(experts))
        listed = (Piece * len(pieces))(*pieces)
        locks = ctypes.create_string_buffer(-(-hidden // BLOCK_COLUMNS))
        job = FeedForward(
            x.data_ptr(),
            out.data_ptr(),
            *(x.stride(0), out.stride(0), hidden, width, len(pieces)),
            ctypes.addressof(listed),
            inner.data_ptr(),
            ctypes.addressof(locks),
        )
        flops = 6 * hidden * width * sum(FIXED_ROWS + len(rows) for *_, rows, _ in experts)
        self._share("experts", x, job, flops >= WORTH_SHARING, worker)

    def _check_experts(self, x: torch.Tensor, out: torch.Tensor, experts: Sequence[Fed], inner: torch.Tensor) -> None:
        """The same for ``feed_forward``."""
        hidden = x.shape[1]
        for gate, up, down, rows, weights in experts:
            width = len(gate)
            if gate.shape != (width, hidden) or up.shape != gate.shape or down.shape != (hidden, width):
                raise ValueError(
                    f"{tuple(gate.shape)}, {tuple(up.shape)}, {tuple(down.shape)}: other shapes than {hidden}"
                )
            if {gate.dtype, up.dtype, down.dtype} != {x.dtype} or x.dtype not in NARROW or out.dtype != torch.float32:
                raise ValueError(f"one type, added up in fp32, not {x.dtype}, {gate.dtype}, {out.dtype}")
            if any(part.stride(1) != 1 for part in (gate, up, down, x, out)):
                raise ValueError("rows in one piece")
            if rows.dtype != torch.int64 or weights.dtype != torch.float32 or len(rows) != len(weights):
                raise ValueError(f"as many rows as weights, not {len(rows)}, {len(weights)}")
            if not rows.is_contiguous() or not weights.is_contiguous():
                raise ValueError("rows and weights in one piece")
            if max(hidden, width) > self._widest or inner.nbytes < inner_bytes(width):
                raise ValueError(f"other sizes than {hidden} and {width} take")
        if out.shape != x.shape:
            raise ValueError(f"{tuple(x.shape)} into {tuple(out.shape)}")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Mixed values [B, q, heads, width] of query [B, heads, q, width], key and value [B, kv heads, context, width], groups of heads
        sharing keys and values. mask: [B, 1, q, context], True where a position is seen; without it, a query sees those up to its own,
        the last one all.

        Raises ValueError where shapes or types are others."""
        self._check_attention(query, key, value, mask)
        (batch, heads, queries, width), (_, kv_heads, context, value_width) = query.shape, value.shape
        out = query.new_empty(batch, queries, heads, value_width)
        job = Attention(
            *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
            None if mask is None else mask.data_ptr(),
            out.data_ptr(),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
            *((0, 0) if mask is None else (mask.stride(0), mask.stride(2))),
            *(batch, heads, queries, kv_heads, context, width, value_width, mask is None),
            scaling,
        )
        flops = 2 * batch * heads * queries * context * (width + value_width)
        self._share("attend", query, job, flops >= WORTH_SHARING)
        return out

    def attends(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether it attends for such queries, and with such a mask."""
        seen = len(query), 1, query.shape[2], key.shape[2]
        return self.known and _is_known(query) and (mask is None or (mask.dtype == torch.bool and mask.shape == seen))

    def _check_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """The same for ``attend``."""
        (batch, heads, queries, width), (_, kv_heads, context, value_width) = query.shape, value.shape
        if (
            key.shape != (batch, kv_heads, context, width)
            or len(value) != batch
            or heads % kv_heads
            or queries > context
        ):
            raise ValueError(f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}: other shapes")
        if {key.dtype, value.dtype} != {query.dtype} or query.dtype not in NARROW:
            raise ValueError(f"one type, not {query.dtype}, {key.dtype}, {value.dtype}")
        if any(part.stride(3) != 1 for part in (query, key, value)) or max(width, value_width) > self._widest:
            raise ValueError("heads in one piece")
        if mask is not None and (
            mask.dtype != torch.bool or mask.shape != (batch, 1, queries, context) or mask.stride(3) != 1
        ):
            raise ValueError(f"a mask of {tuple(mask.shape)}, {mask.dtype}")

    def knows(self, x: torch.Tensor) -> bool:
        """Whether ``norm`` and ``rotate`` take such rows."""
        return self.known and _is_known(x) and x.stride(-1) == 1

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """``weight`` [width] times ``x`` [..., width] over the root of its mean square and epsilon, rounded before and after it.

        Raises ValueError where shapes or types are others."""
        if not self.knows(x) or weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.stride(0) != 1:
            raise ValueError(f"{tuple(weight.shape)}, {weight.dtype} for {tuple(x.shape)}, {x.dtype}")
        rows, out = x.reshape(-1, x.shape[-1]), x.new_empty(x.shape)
        job = Norms(
            *(rows.data_ptr(), weight.data_ptr(), out.data_ptr()),
            *(rows.stride(0), rows.shape[1], *rows.shape, epsilon),
        )
        self._share("norm", x, job, x.numel() >= WORTH_SHARING_ELEMENTS)
        return out

    def rotate(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """``x`` [B, heads, positions, width] turned by rotary angles, of which cosine and sine [B or 1, positions, width] are given; in
        memory as x is.

        Raises ValueError where shapes or types are others."""
        batch, heads, positions, width = x.shape
        if not self.knows(x) or width % 2:
            raise ValueError(f"heads in one piece, of pairs, not {tuple(x.shape)}, {x.dtype}")
        angles = tuple(part.expand(batch, -1, -1) for part in (cosine, sine))
        for part in angles:
            if part.shape != (batch, positions, width) or part.dtype != x.dtype or part.stride(2) != 1:
                raise ValueError(f"{tuple(part.shape)}, {part.dtype} for {tuple(x.shape)}, {x.dtype}")
        out = torch.empty_like(x)
        job = Rotation(
            *(x.data_ptr(), *(part.data_ptr() for part in angles), out.data_ptr()),
            *(*x.stride()[:3], *out.stride()[:3], *(step for part in angles for step in part.stride()[:2])),
            *(batch, heads, positions, width),
        )
        self._share("rotate", x, job, x.numel() >= WORTH_SHARING_ELEMENTS)
        return out

    def _share(
        self, what: str, like: torch.Tensor, job: ctypes.Structure, large: bool, worker: int | None = None
    ) -> None:
        """Do ``job``, in the type that ``like`` has: with a worker's threads, or with all."""
        work = getattr(self._library, f"{what}_{'bf16' if like.dtype == torch.bfloat16 else 'fp16'}")
        team = self._all if worker is None else self._teams[worker]
        team.run(work, job, self._widest, alone=not large)


def _is_known(x: torch.Tensor) -> bool:
    """Whether it is of a type and in a place that the kernel knows."""
    return x.dtype in NARROW and x.device.type == "cpu"


def _pieces(experts: Iterable[Fed]) -> Iterator[Piece]:
    """At most BLOCK_ROWS rows of an expert each."""
    for gate, up, down, rows, weights in experts:
        at = gate.data_ptr(), up.data_ptr(), down.data_ptr()
        strides = gate.stride(0), up.stride(0), down.stride(0)
        first_row, first_weight, count = rows.data_ptr(), weights.data_ptr(), len(rows)
        for first in range(0, count, BLOCK_ROWS):
            named = first_row + 8 * first, first_weight + 4 * first
            yield Piece(*at, *named, min(BLOCK_ROWS, count - first), *strides)
