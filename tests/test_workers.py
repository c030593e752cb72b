"""Threads that take tasks side by side."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from klotski_compiler.kernel_facts import WORKERS
from klotski_runtime.workers import Workers


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7])
def test_every_task_is_done_once_by_one_worker(threads: int, tasks: int) -> None:
    workers, done = Workers(threads), list[tuple[int, int, int]]()
    before = torch.get_num_threads()

    def task(number: int, worker: int) -> None:
        time.sleep(0.002)
        done.append((number, worker, threading.get_ident()))

    for _ in range(2):
        done.clear()
        workers.run([lambda worker, number=number: task(number, worker) for number in range(tasks)])  # type: ignore[misc]
        assert sorted(number for number, _, _ in done) == list(range(tasks))
        assert {worker for _, worker, _ in done} <= set(range(min(threads, WORKERS)))
        assert len({(worker, thread) for _, worker, thread in done}) == len({worker for _, worker, _ in done})
        assert (0, threading.get_ident()) in {(worker, thread) for _, worker, thread in done} or not done
    workers.close()
    torch.set_num_threads(before)


def test_a_failure_ends_the_tasks_and_is_raised() -> None:
    workers, done = Workers(2), list[int]()

    def fail(worker: int) -> None:
        raise ValueError("so")

    with pytest.raises(ValueError, match="so"):
        workers.run([fail, *[done.append] * 50])
    workers.run([done.append, done.append])
    assert len(done) >= 2
    workers.close()
