"""Sequences that are computed together, and what attention needs of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from klotski_runtime.skeleton import HOST


@dataclass(slots=True)
class Frame:
    """What attention needs besides hidden states, the same in every layer of a pass; ``masks`` by whether a layer is sliding, and where."""

    past: int
    positions: torch.Tensor
    angles: Any
    masks: dict[tuple[bool, torch.device], torch.Tensor | None] = field(default_factory=dict)

    def of(self, sequences: slice) -> Frame:
        """That of some of its sequences, without masks."""
        if (sequences.start, sequences.stop) == (0, len(self.positions)):
            return self
        return Frame(self.past, self.positions[sequences], _each(self.angles, lambda part: part[sequences]))

    def renew(self, past: int, positions: torch.Tensor, angles: Any) -> None:
        """For another pass, in the same memory."""
        self.past = past
        self.positions.copy_(positions)
        for old, new in zip(_tensors(self.angles), _tensors(angles), strict=True):
            old.copy_(new)


class Batch:
    """Sequences computed together, left-padded to the longest prompt.

    ids: [B, q], the tokens of the current pass: in host memory those of prompts, of which many may wait, then on the device. pads: [B],
    padding positions of each sequence, in both. past: cached positions, padding included. first: the batch's first row in the group's
    tensors.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device = HOST) -> None:
        width = max(map(len, prompts))
        pad = torch.tensor([width - len(prompt) for prompt in prompts])
        self.pads = {HOST: pad, device: pad.to(device)}
        self.ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        self.past = 0
        self.first = 0
        self.frames: dict[tuple[int, int], Frame] = {}  # by sequences

    @property
    def size(self) -> int:
        """Sequences."""
        return int(self.ids.shape[0])

    @property
    def queries(self) -> int:
        """Positions of each sequence in this pass."""
        return int(self.ids.shape[1])

    @property
    def rows(self) -> slice:
        """The batch's rows in the group's tensors."""
        return slice(self.first, self.first + self.ids.numel())

    def rows_of(self, sequences: slice) -> slice:
        """The rows of some of its sequences."""
        return slice(self.first + sequences.start * self.queries, self.first + sequences.stop * self.queries)

    def present(self, sequences: slice, device: torch.device) -> torch.Tensor:
        """[B, past + q]: whether a position of each of ``sequences`` holds a token rather than padding."""
        return torch.arange(self.past + self.queries, device=device) >= self.pads[device][sequences, None]

    def new(self, device: torch.device) -> torch.Tensor:
        """[B, q]: whether a position of this pass holds a token."""
        return self.present(slice(None), device)[:, self.past :]

    def last(self, device: torch.device) -> torch.Tensor:
        """[B, q]: whether it is the last one."""
        return (torch.arange(self.queries, device=device) == self.queries - 1).expand(self.size, -1)

    def padded(self, sequences: slice) -> bool:
        """Whether any of ``sequences`` has padding."""
        return bool(self.pads[HOST][sequences].any())

    def advance(self, ids: torch.Tensor) -> None:
        """End the pass: its tokens are cached, ``ids`` [B] are the next ones."""
        self.past += self.queries
        self.ids = ids[:, None]
        for frame in self.frames.values():
            frame.masks.clear()  # they are for this pass


def abreast(frames: Sequence[Frame]) -> Frame:
    """One for the sequences of several, each with its own past, without masks."""
    angles = [_tensors(frame.angles) for frame in frames]
    joined = tuple(torch.cat(parts) for parts in zip(*angles, strict=True))
    whole = joined if isinstance(frames[0].angles, tuple) else joined[0]
    return Frame(max(frame.past for frame in frames), torch.cat([frame.positions for frame in frames]), whole)


def _each(angles: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return tuple(map(change, angles)) if isinstance(angles, tuple) else change(angles)


def _tensors(angles: Any) -> tuple[torch.Tensor, ...]:
    """Position embeddings, which some models have as a pair."""
    return angles if isinstance(angles, tuple) else (angles,)
