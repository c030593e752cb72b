"""Pieces of ops that are replayed do in every pass what they did when they were captured, in the same memory.

Here a replay calls the captured work again, which on a GPU launches its kernels: whatever it does not find where it was shows either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from asked import decided
from klotski_runtime import kernels
from klotski_runtime.graphs import MOST, Graphs, Piece
from klotski_runtime.skeleton import HOST
from same import STEPS, Models, Same, run
from tiny import FAMILIES


@dataclass
class Captured:
    """In a CUDA graph's place."""

    work: Callable[[], None]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@dataclass
class Recorded:
    """make: graphs of the CPU. graphs: what was captured."""

    make: Callable[[torch.device], Graphs]
    graphs: list[Captured] = field(default_factory=list)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """All kernels have them."""

    class Emulated(Graphs):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.capturing = True

        def capture(self, work: Callable[[], None]) -> Any:
            found.graphs.append(Captured(work))
            return found.graphs[-1]

    found = Recorded(Emulated)
    monkeypatch.setattr(kernels, "Graphs", Emulated)
    return found


PAIRS = list(zip(FAMILIES, cycle(["klotski", "hybrimoe", "moe_lightning", "joint"]), strict=False))


@pytest.mark.parametrize(("family", "policy"), PAIRS)
def test_replayed_pieces_write_the_same_tokens(
    family: str, policy: str, recorded: Recorded, models: Models, same: Same, tmp_path: Path
) -> None:
    model = models(family)
    plan = decided(model, policy, gpu=True, unit=2, head_pages=3, embedding=False)
    same(model, run(plan, model, tmp_path, device=HOST).rows)
    assert recorded.graphs and sum(graph.replays for graph in recorded.graphs) > STEPS


def test_routing_keeps_its_place_from_cohort_to_cohort(
    recorded: Recorded, models: Models, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece that makes its memory while it is captured would, replayed, write where nobody reads."""
    model, moved, route = models("qwen2_moe"), list[bool](), kernels.Group._route

    def routed(group: kernels.Group, layer: int, rows: slice, shared: bool) -> None:
        before = group._routing.indices
        route(group, layer, rows, shared)
        moved.append(group._routing.indices is not before)

    monkeypatch.setattr(kernels.Group, "_route", routed)
    plan = decided(model, "joint", "gpu", 9, True, num_batches=4, prefill_groups=2, rolling=True)
    same(model, run(plan, model, tmp_path, device=HOST).rows)
    assert recorded.graphs and sum(moved) == 1, "but for the first time, which is not captured"


def test_a_piece_is_done_then_captured_then_replayed(recorded: Recorded) -> None:
    graphs, done = recorded.make(HOST), list[int]()
    for number in range(4):
        graphs.find("key", Piece)(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == [0, 1, 1, 1] and len(recorded.graphs) == 1


def test_what_changes_its_place_all_the_time_is_not_captured(recorded: Recorded) -> None:
    graphs, done = recorded.make(HOST), list[int]()
    for key in range(MOST + 10):
        graphs.find(key, Piece)
    for number in range(3):
        graphs.find(MOST + 5, Piece)(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == [0, 1, 2] and not recorded.graphs
