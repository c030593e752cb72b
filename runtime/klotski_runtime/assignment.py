"""Which tokens go to which expert, and which worker takes them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from klotski_compiler.kernel_facts import FIXED_ROWS


@dataclass(slots=True)
class Routing:
    """What routers said of a pass's tokens: each one's experts and their weights, in the wide type [tokens, k]."""

    indices: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Assignment:
    """The (token, choice) pairs of a scope, sorted by expert: those of expert e are ``starts[e]:starts[e + 1]``.

    rows: each pair's row in the group's tensors. weights: its routing weight, in the wide type. sizes: [experts], pairs of each.
    Each has its parts ``of_each`` expert cut at once: that takes as long as to cut one.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    sizes: torch.Tensor
    starts: list[int]

    @classmethod
    def of(
        cls, indices: torch.Tensor, weights: torch.Tensor, present: torch.Tensor | None, first: int, num_experts: int
    ) -> Assignment:
        """Sort ``indices`` [t, k] of rows ``first`` onwards, leaving out the rows that are not ``present`` [t] (None: all are)."""
        choice = (indices if present is None else indices.masked_fill(~present[:, None], num_experts)).flatten()
        chosen, order = torch.sort(choice, stable=True)
        ends = torch.searchsorted(chosen, _numbers(num_experts, choice.dtype, choice.device), right=True)
        sizes = ends.diff(prepend=_numbers(1, ends.dtype, ends.device))
        starts = [0, *ends.tolist()]
        order = order[: starts[-1]]
        return cls(order // indices.shape[1] + first, weights.flatten()[order], sizes, starts)

    def to(self, device: torch.device) -> Assignment:
        """The same, on ``device``."""
        return Assignment(self.rows.to(device), self.weights.to(device), self.sizes.to(device), self.starts)

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each expert."""
        return [end - begin for begin, end in zip(self.starts, self.starts[1:], strict=False)]

    @cached_property
    def of_each(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows, weights and size of each expert."""
        return list(
            zip(self.rows.split(self.counts), self.weights.split(self.counts), self.sizes.split(1), strict=True)
        )


@lru_cache
def _numbers(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0, 1, ... on a device."""
    return torch.arange(count, dtype=dtype, device=device)


def rows_worth(runs: Sequence[slice]) -> int:
    """As many rows of one expert as take as long as the rows of several, ``runs``."""
    return sum(FIXED_ROWS + run.stop - run.start for run in runs if run.stop > run.start)


def shares(runs: Sequence[slice], count: int) -> list[list[tuple[int, slice]]]:
    """The rows of experts, ``runs``, in ``count`` shares that take equally long: (number of the run, rows of it). A run that lies across
    the border of two is cut, unless that costs more than it gains."""
    found: list[list[tuple[int, slice]]] = [[]]
    limit, filled = rows_worth(runs) / count, 0
    for number, run in enumerate(runs):
        while run.stop > run.start:
            cost, room = FIXED_ROWS + run.stop - run.start, limit * len(found) - filled
            fitting = int(room) - FIXED_ROWS
            cut = cost - room > FIXED_ROWS and fitting > FIXED_ROWS
            if len(found) == count or cost <= room or (not cut and 2 * room >= cost):
                part = run
            elif cut:
                part = slice(run.start, run.start + fitting)
            else:
                found.append([])
                continue
            found[-1].append((number, part))
            filled += FIXED_ROWS + part.stop - part.start
            run = slice(part.stop, run.stop)
            if part.stop < run.stop:
                found.append([])
    return found
