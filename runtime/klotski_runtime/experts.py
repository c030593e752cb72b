"""The feed-forward of routed experts: one by one in buffers that are reused, or on a GPU several in a few kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from klotski_compiler.kernel_facts import FEW_ROWS, ROW_STEP, inner_bytes
from klotski_runtime.assignment import Assignment
from klotski_runtime.own_kernels import NARROW, Fed, OwnKernels
from klotski_runtime.skeleton import HOST

GROUPED_BYTES = 16
"""Where matrices must begin, and how far apart they must be, for kernels that take several: multiples of this."""

Parts = Mapping[str, torch.Tensor]
"""One expert's weights: gate, up, down; or gate_up, down and, where the model has them, gate_up_bias and down_bias."""

Multiply = Callable[..., None]
"""``OwnKernels.mm`` for one worker."""

Runs = tuple[list[tuple[list[int], Parts]], list[int]]
"""Places of experts that are taken together, with their matrices, and places of those that are not."""


class ExpertKernel:
    """Feed-forward of one routed expert for up to ``rows`` tokens in buffers that are reused.

    Fresh pages cost ten times what reused ones do, so nothing of a chunk's size is allocated; only an activation other
    than SiLU, and the experts' own ``_apply_gate`` where it is special (gpt-oss), allocate in transformers.
    """

    def __init__(
        self,
        rows: int,
        hidden: int,
        intermediate: int,
        compute: torch.dtype,
        wide: torch.dtype,
        device: torch.device = HOST,
        own: OwnKernels | None = None,
    ) -> None:
        self.rows, self.flops_per_row = rows, 6 * hidden * intermediate
        self._own = own or OwnKernels(0, 0)
        self._x = torch.zeros(rows, hidden, dtype=compute, device=device)
        self._inner = torch.empty(2 * rows * intermediate, dtype=compute, device=device)
        self._out = torch.empty(rows, hidden, dtype=wide, device=device)

    def run(
        self,
        experts: Any,
        parts: Parts,
        x: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        worker: int | None = None,
    ) -> torch.Tensor:
        """``weights`` [r] x expert(``x``[``rows``]) as [r, hidden] in the wide type; valid until the next call. worker: whose task this
        is part of (None: of none)."""
        mm = partial(self._own.mm, worker=worker)
        count = rows.shape[0]
        source, out = self._x[: self._computed(count)], self._out[:count]
        torch.index_select(x, 0, rows, out=source[:count])
        down = parts["down"].t() if experts.is_transposed else parts["down"]
        # The experts' input is not needed once the inner values are there: its buffer takes the output.
        mm(self._gated(experts, parts, source, mm), (down, source))
        if "down_bias" in parts:
            source.add_(parts["down_bias"])
        return _weighted(source[:count], weights, out)

    def run_together(
        self,
        experts: Any,
        stacked: Parts,
        x: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """The same for several experts in a few kernels: ``stacked`` [experts, ...], of which expert i has the rows from ``ends[i - 1]``
        to ``ends[i]`` (int32)."""
        count = rows.shape[0]
        source, out = self._x[:count], self._out[:count]
        torch.index_select(x, 0, rows, out=source)
        gated = torch._grouped_mm(source, stacked["gate"].mT, offs=ends)
        other = torch._grouped_mm(source, stacked["up"].mT, offs=ends)
        inner = _activation(experts.act_fn)(gated).mul_(other)
        return _weighted(torch._grouped_mm(inner, stacked["down"].mT, offs=ends), weights, out)

    def _computed(self, count: int) -> int:
        """Rows that are computed for ``count`` tokens; what stands in the surplus ones does not matter.

        oneDNN, which has the 16-bit kernels, compiles and keeps code for every number of rows that it meets, and routing makes nearly
        all of them.
        """
        x = self._x[:count]
        if count <= FEW_ROWS or x.dtype not in NARROW or self._own.takes(x):
            return count
        return min(-(-count // ROW_STEP) * ROW_STEP, self.rows)

    def _gated(self, experts: Any, parts: Parts, x: torch.Tensor, mm: Multiply) -> torch.Tensor:
        """act(gate(x)) * up(x), or what the family has in its place, as [r, intermediate]."""
        count, common = x.shape[0], is_common(experts)
        if "gate" in parts:
            gate, up = parts["gate"], parts["up"]
        elif common:
            gate, up = parts["gate_up"].chunk(2)
        else:
            return self._fused(experts, parts, x, mm)
        size = count * gate.shape[0]
        gated, other = self._inner[:size].view(count, -1), self._inner[size : 2 * size].view(count, -1)
        mm(x, (gate, gated), (up, other))
        if common:
            return _activation(experts.act_fn)(gated).mul_(other)
        special: torch.Tensor = experts._apply_gate(torch.cat([gated, other], dim=1))
        return special

    def _fused(self, experts: Any, parts: Parts, x: torch.Tensor, mm: Multiply) -> torch.Tensor:
        """The same from one gate_up matrix, by the experts module's own rules."""
        weight = parts["gate_up"].t() if experts.is_transposed else parts["gate_up"]
        inner = self._inner[: x.shape[0] * weight.shape[0]].view(x.shape[0], -1)
        mm(x, (weight, inner))
        if "gate_up_bias" in parts:
            inner.add_(parts["gate_up_bias"])
        gated: torch.Tensor = experts._apply_gate(inner)
        return gated


class OwnExperts:
    """Feed-forwards of routed experts in one call of our own kernel, where ``own`` takes them."""

    def __init__(self, intermediate: int, own: OwnKernels) -> None:
        self._own = own
        self._inner = torch.empty(inner_bytes(intermediate), dtype=torch.uint8)

    def takes(self, experts: Any, parts: Parts, x: torch.Tensor, rows: torch.Tensor) -> bool:
        """Whether it had better compute an expert of such a module, over so many rows of x."""
        if x.dtype not in NARROW or not self._own.takes_rows(len(rows)):
            return False
        common = is_common(experts) and isinstance(experts.act_fn, nn.SiLU | SiLUActivation)
        return common and all(part.dtype == x.dtype for part in parts.values())

    def add(
        self,
        module: Any,
        experts: Sequence[tuple[int, Parts]],
        assignment: Assignment,
        x: torch.Tensor,
        into: torch.Tensor,
    ) -> list[tuple[int, Parts]]:
        """``into`` += weight x expert(x) for as many of them as it takes; returns the others that have tokens."""
        taken, others = list[Fed](), list[tuple[int, Parts]]()
        for expert, parts in experts:
            rows, weights, _ = assignment.of_each[expert]
            if self.takes(module, parts, x, rows):
                taken.append((*_three(parts), rows, weights))
            elif len(rows):
                others.append((expert, parts))
        self._own.feed_forward(x, into, taken, self._inner)
        return others


def _three(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down."""
    gate, up = (parts["gate"], parts["up"]) if "gate" in parts else parts["gate_up"].chunk(2)
    return gate, up, parts["down"]


def is_common(experts: Any) -> bool:
    """Whether a family's experts are what most are: act(gate(x)) * up(x), without biases."""
    return type(experts)._apply_gate is _default_apply_gate and not experts.is_transposed and not experts.has_bias


def runs(parts: Sequence[Parts]) -> Runs:
    """Experts whose matrices a GPU can take as one: those that lie in memory at equal distances, as long as they do, with their places
    and their matrices as [experts, ...], without a copy. Then the places of the others."""
    found, alone = list[tuple[list[int], Parts]](), list[int]()
    if any("gate" not in part or any(matrix.dtype != torch.bfloat16 for matrix in part.values()) for part in parts):
        return found, list(range(len(parts)))
    order = sorted(range(len(parts)), key=lambda place: parts[place]["gate"].data_ptr())
    while order:
        count = next((n for n in range(len(order), 1, -1) if _stacked([parts[place] for place in order[:n]])), 1)
        places, order = order[:count], order[count:]
        together = _stacked([parts[place] for place in places]) if count > 1 else None
        if together:
            found.append((places, together))
        else:
            alone += places
    return found, alone


def _stacked(parts: Sequence[Parts]) -> Parts | None:
    """The matrices of all of them as [experts, ...]; None where they do not lie at equal distances, first to last, or not as kernels of a
    GPU need them."""
    found = {}
    for name, first in parts[0].items():
        places = [part[name].data_ptr() for part in parts]
        apart = {after - before for before, after in pairwise(places)}
        if len(apart) != 1 or min(apart) <= 0 or any(place % GROUPED_BYTES for place in (places[0], *apart)):
            return None
        steps = apart.pop() // first.itemsize, *first.stride()
        found[name] = first.as_strided((len(parts), *first.shape), steps)
    return found


def _weighted(rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` <- weights x rows in the wide type, which out and weights have."""
    if out.is_cuda:  # in one kernel; a CPU would first make a copy of the rows
        return torch.mul(rows, weights[:, None], out=out)
    return out.copy_(rows).mul_(weights[:, None])


def _activation(function: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """``function``, in place where torch has it so."""
    return partial(functional.silu, inplace=True) if isinstance(function, nn.SiLU | SiLUActivation) else function
