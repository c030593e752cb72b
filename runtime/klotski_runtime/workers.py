"""Threads of the CPU that take independent work side by side, each with kernels of its own.

Threads that share one kernel wait for each other at its end. Where the cores of a virtual machine are far apart that takes as long as
a block of a matmul, so what can be cut into pieces of its own is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch

from klotski_compiler.kernel_facts import WORKERS

WORTH_SHARING = 40_000_000
"""Flops from which on work is shared: to call another thread, and to wait for it, takes as long as a fifth of them."""

Task = Callable[[int], object]
"""Work for one thread, given the number of the worker that does it."""


def kernel_threads(count: int) -> None:
    """Let the calling thread's kernels use ``count`` threads.

    OpenMP keeps a team for every thread that asks for one. With more team members than cores it puts them to sleep after each
    operation, and to wake them takes ten times as long as a small kernel; therefore one stream has a team and no other.
    """
    torch.get_num_threads()  # a thread's first question sets it to what another thread asked for last
    torch.set_num_threads(count)


def decode_threads(threads: int, own: bool) -> int:
    """How many of so many threads PyTorch's kernels have in decode. own: what takes longest is our own kernels', which have all of them.

    Then one of two: the other's has slept while the disk was waited for, and what is left is done before it is awake. With more of them
    this was not measured.
    """
    return 1 if own and threads == 2 else threads


class Workers:
    """The thread that calls ``run``, always the same one, and others beside it. A kernel has ``threads`` threads, or its share of them
    in a task."""

    def __init__(self, threads: int, count: int = WORKERS) -> None:
        """count: so many workers, if there are as many threads."""
        self.count, self.threads = min(count, threads), threads
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._others: list[threading.Thread] = []

    def run(self, tasks: Sequence[Task]) -> None:
        """Do all of them, in this order where there is one worker. Raises what the first failure raised."""
        if self.count == 1 or len(tasks) == 1:
            for task in tasks:
                task(0)
            return
        self._start()
        left, failures = iter(tasks), list[BaseException]()
        taking, ended = threading.Lock(), threading.Semaphore(0)

        def work(number: int) -> None:
            while not failures:
                with taking:
                    task = next(left, None)
                if task is None:
                    return
                try:
                    task(number)
                except BaseException as failure:
                    failures.append(failure)

        def work_beside(number: int) -> None:
            work(number)
            ended.release()

        others = range(1, min(self.count, len(tasks)))
        for number in others:
            self._tasks.put(lambda number=number: work_beside(number))  # type: ignore[misc]
        before = torch.get_num_threads()
        kernel_threads(self.threads // self.count)
        try:
            work(0)
        finally:
            kernel_threads(before)
            for _ in others:
                ended.acquire()
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Let the threads end."""
        for _ in self._others:
            self._tasks.put(None)
        self._others.clear()

    def _start(self) -> None:
        while len(self._others) < self.count - 1:
            name = f"worker {len(self._others) + 1}"
            self._others.append(threading.Thread(target=self._work, name=name, daemon=True))
            self._others[-1].start()

    def _work(self) -> None:
        kernel_threads(self.threads // self.count)
        with torch.inference_mode():
            while (task := self._tasks.get()) is not None:
                task()
