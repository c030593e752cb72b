"""The head: which word of the vocabulary comes next, page by page of its weight."""

from __future__ import annotations

import torch

from klotski_compiler.errors import ExecError
from klotski_runtime.arena import Room
from klotski_runtime.own_kernels import OwnKernels


class Head:
    """The most likely next token of every sequence: that of the greatest logit, in a tie the lowest id. Pages come in any order."""

    def __init__(self, own: OwnKernels, dtype: torch.dtype, device: torch.device) -> None:
        self._own, self._logits = own, Room(dtype, device)

    def begin(self, last: torch.Tensor) -> None:
        """Start with normed hidden states ``last`` [sequences, hidden] of each sequence's last position."""
        self._last = last
        self._best = torch.full((len(last),), -torch.inf, dtype=last.dtype, device=last.device)
        self._token = torch.zeros(len(last), dtype=torch.long, device=last.device)

    @torch.inference_mode()
    def page(self, first: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Compare the logits of words ``first`` onwards, whose rows are ``weight`` [words, hidden], with the best yet."""
        weight = weight.to(self._last.dtype)
        if self._own.finds(self._last):
            self._best, word = self._own.greatest(self._last, weight, bias, self._best, self._token - first)
            self._token = word + first
            return
        size = len(self._last) * len(weight)
        logits = self._logits.take(size)[:size].view(len(self._last), -1)
        self._own.mm(self._last, (weight, logits), bias=bias)
        value, word = logits.max(dim=1)
        word += first
        better = (value > self._best) | ((value == self._best) & (word < self._token))
        self._best = torch.where(better, value, self._best)
        self._token = torch.where(better, word, self._token)

    def tokens(self) -> torch.Tensor:
        """[sequences]. Raises ExecError where no page gave a sequence a finite logit."""
        if not torch.isfinite(self._best).all():
            raise ExecError(
                "logits are not finite; the checkpoint is damaged, or its values overflow the compute dtype"
            )
        return self._token
