"""Fixtures of more than one test file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from same import Models, Resident, Same
from tiny import make_checkpoint

GPU = torch.cuda.is_available()

# Matmuls of tiny models gain nothing from a second thread, and wait for it long where tests run side by side.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tiny models by family and further arguments of ``make_checkpoint``, each made once."""

    @lru_cache
    def make(family: str, **options: Any) -> Resident:
        return Resident(make_checkpoint(family, tmp_path_factory.mktemp(family), **options))

    return make


@pytest.fixture
def same(record_property: Callable[[str, object], None]) -> Iterator[Same]:
    """Counts, and shows, the rows that part from the reference."""
    rule = Same()
    yield rule
    record_property("rows that part from the reference", rule.parted)
    if rule.parted:
        warnings.warn(f"{rule.parted} rows part from the reference where it hardly decides", stacklevel=1)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda:0", marks=(pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device"))),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Whose memory is a GPU's tier: the CPU's, emulated, or a GPU's."""
    return torch.device(request.param)
