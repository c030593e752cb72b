"""Which tokens go to which expert, and which worker takes them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klotski_compiler.cost import FIXED_ROWS


@dataclass(slots=True)
class Routing:
    """What routers said of a pass's tokens: each one's experts and their weights, in the wide type [tokens, k]."""

    indices: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class Assignment:
    """The (token, choice) pairs of a scope, sorted by expert: those of expert e are ``starts[e]:starts[e + 1]``.

    rows: each pair's row in the group's tensors. weights: its routing weight, in the wide type. sizes: [experts], pairs of each.
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
        every = torch.arange(num_experts, device=choice.device, dtype=choice.dtype)
        ends = torch.searchsorted(chosen, every, right=True)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        starts = [0, *ends.tolist()]
        order = order[: starts[-1]]
        return cls(order // indices.shape[1] + first, weights.flatten()[order], sizes, starts)

    def to(self, device: torch.device) -> Assignment:
        """The same, on ``device``."""
        return Assignment(self.rows.to(device), self.weights.to(device), self.sizes.to(device), self.starts)

    @property
    def counts(self) -> list[int]:
        """Tokens of each expert."""
        return [end - begin for begin, end in zip(self.starts, self.starts[1:], strict=False)]


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
