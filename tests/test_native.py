"""Threads of C code that share our kernels' work."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from klotski_runtime import own_kernels
from klotski_runtime.own_kernels import OwnKernels
from klotski_runtime.workers import Workers

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted where Linux lists them")


@pytest.fixture(autouse=True)
def all_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_kernels, "WORTH_SHARING_ELEMENTS", 1)
    monkeypatch.setattr(own_kernels, "WORTH_SHARING", 1)


def threads() -> set[int]:
    return {int(task.name) for task in TASKS.iterdir()}


def ended(count: int) -> bool:
    """Whether there are so many threads within a while."""
    end = time.monotonic() + 10
    while len(threads()) != count and time.monotonic() < end:
        time.sleep(0.01)
    return len(threads()) == count


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_come_with_the_first_work_and_go_with_the_kernels(count: int) -> None:
    x, weight = torch.randn(300, 64).bfloat16(), torch.ones(64).bfloat16()
    before, processors = len(threads()), os.sched_getaffinity(0)
    own = OwnKernels(1, 64, Workers(count))
    assert len(threads()) == before
    want = own.norm(x, weight, 0.0)
    for pause in (0.0, 0.0, 0.001, 0.02):  # while they look out, and when they sleep
        time.sleep(pause)
        assert torch.equal(own.norm(x, weight, 0.0), want)
        assert len(threads()) == before + count - 1
    assert os.sched_getaffinity(0) == processors, "who calls may be anywhere"
    del own
    gc.collect()
    assert ended(before)


def test_others_keep_off_the_processor_of_who_calls() -> None:
    processors = os.sched_getaffinity(0)
    if len(processors) < 2:
        pytest.skip("there is one processor")
    x, weight, before = torch.randn(300, 64).bfloat16(), torch.ones(64).bfloat16(), threads()
    own = OwnKernels(1, 64, Workers(3))
    own.norm(x, weight, 0.0)
    others = threads() - before
    try:
        for here in sorted(processors)[:2]:
            os.sched_setaffinity(0, {here})
            own.norm(x, weight, 0.0)
            assert [os.sched_getaffinity(thread) for thread in others] == [processors - {here}] * 2
    finally:
        os.sched_setaffinity(0, processors)


def test_workers_have_teams_of_their_own() -> None:
    """That work at the same time."""
    workers = Workers(4, 2)
    own = OwnKernels(1, 64, workers)
    x, weights = torch.randn(200, 64).bfloat16(), torch.randn(2, 96, 64).bfloat16()
    outs, want = torch.zeros(2, 200, 96).bfloat16(), (x.float() @ weights.float().transpose(1, 2)).bfloat16()
    seen, both = set[int](), threading.Barrier(2)

    def task(worker: int) -> None:
        both.wait(10)
        for _ in range(20):
            own.mm(x, (weights[worker], outs[worker]), worker=worker)
        seen.add(worker)

    workers.run([task, task])
    workers.close()
    assert seen == {0, 1}
    torch.testing.assert_close(outs, want, rtol=2**-7, atol=1e-3)
