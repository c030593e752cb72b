"""What only a GPU shows: streams that run ahead of the threads which issue to them, and copies that they leave to its engines.

The token tests run their plans for a GPU there, too (``pytest -m gpu`` runs all that needs one).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from klotski_compiler.execute import execute
from klotski_compiler.ops import Step
from klotski_compiler.policies import POLICIES
from klotski_runtime.arena import Arena, GpuArena
from klotski_runtime.cuda_streams import CudaBackend, Lanes, of_gpu
from klotski_runtime.kv import KvBlock, KvShape
from klotski_runtime.profile import measure
from klotski_runtime.streams import Ran
from plans import tiny_plan, tiny_spec

GPU = torch.device("cuda:0")
CYCLES = 200_000  # of the GPU: a tenth of a millisecond
CLOCK_S = 2e-5  # how far the GPU's clock and the host's may be apart
MIB = 1 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_streams_keep_every_wait_and_every_stream_in_order(policy: str) -> None:
    """By the GPU's own clock, with ops that take their time there while threads run ahead."""
    steps, log = tiny_plan(policy, True, "host", spec=tiny_spec(3, 4)).steps["decode"], list[Ran]()

    def perform(number: int, step: Step, at: int) -> None:
        torch.cuda._sleep(CYCLES * (1 + number % 3))  # to the thread's own stream; a thread of the host's goes on

    with CudaBackend(Lanes(GPU), of_gpu(steps), "gpu", perform, note=log.append) as backend:
        execute(steps, 3, backend)
    assert backend.failure is None, backend.failure
    spans = {(ran.at, ran.number): ran for ran in log}
    assert len(spans) == len(log) >= 2 * len(steps)
    for (at, number), ran in spans.items():
        for wait in steps[number].waits:
            awaited = spans.get((at - wait.back, wait.op))
            assert awaited is None or awaited.end <= ran.start + CLOCK_S, f"{number} did not wait for {wait}"
    for stream in {step.op.stream for step in steps}:
        lane = sorted((ran for ran in log if ran.stream == stream), key=lambda ran: (ran.at, ran.number))
        assert all(one.end <= two.start + CLOCK_S for one, two in pairwise(lane))


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Host memory, locked in two pieces."""
    arena = Arena(4 * MIB)
    yield arena
    torch.cuda.synchronize()
    arena.unpin()


def test_locked_memory_is_what_kernels_and_copies_see(arena: Arena) -> None:
    seen = arena.pin([0, MIB, 4 * MIB])
    assert seen is not None
    here, there = (
        arena.tensor(MIB, 4096, torch.int32, (1024,)),
        GpuArena(8192, GPU).tensor(0, 4096, torch.int32, (1024,)),
    )
    assert here.is_pinned()
    here.copy_(torch.arange(1024, dtype=torch.int32))
    there.copy_(here, non_blocking=True)
    seen.tensor(2 * MIB, 4096, torch.int32, (1024,)).copy_(2 * there)
    torch.cuda.synchronize()
    assert torch.equal(arena.tensor(2 * MIB, 4096, torch.int32, (1024,)), 2 * here)


def test_memory_that_cannot_be_locked_breaks_nothing(arena: Arena) -> None:
    assert arena.pin([0, MIB, 1 << 50]) is None
    assert not arena.tensor(0, 4, torch.int32, (1,)).is_pinned()
    assert torch.ones(3, device=GPU).sum().item() == 3


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.bfloat16), (3, torch.bfloat16), (16, torch.float32)])
def test_kv_goes_to_host_memory_and_back(width: int, dtype: torch.dtype, arena: Arena) -> None:
    seen, shape, capacity = arena.pin([0, 4 * MIB]), KvShape(2, width, 2, width), 24
    assert seen is not None
    count = 3 * capacity * shape.elements
    source, back = (KvBlock(torch.zeros(count, dtype=dtype, device=GPU), shape, 3, capacity) for _ in range(2))
    source.keys.normal_()
    source.values.normal_()
    home = KvBlock(seen.tensor(MIB, count * dtype.itemsize, dtype, (count,)), shape, 3, capacity)
    home.take(source, 5, 17)
    back.take(home, 6, 15)
    torch.cuda.synchronize()
    host = KvBlock(arena.tensor(MIB, count * dtype.itemsize, dtype, (count,)), shape, 3, capacity)
    assert torch.equal(host.keys[:, :, 5:17], source.keys[:, :, 5:17].cpu())
    assert torch.equal(back.values[:, :, 6:15], source.values[:, :, 6:15])
    assert not back.keys[:, :, :6].any()


def test_a_gpu_is_profiled(tmp_path: Path) -> None:
    hardware = measure("cuda:0", tmp_path, quick=True)
    assert (hardware.compute_tier, set(hardware.processors)) == ("gpu", {"cpu", "gpu"})
    assert {"host>gpu", "gpu>host", "disk>host"} <= set(hardware.links)
