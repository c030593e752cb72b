"""Which tokens go to which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
