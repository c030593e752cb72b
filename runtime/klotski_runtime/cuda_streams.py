"""Streams of a GPU: each has a thread that issues its ops, so that waiting for what routing decides holds up no other stream.

An op has been issued when its thread is through with it, and has ended when the GPU is. Between streams of the GPU an event orders
both: the issuing threads by a flag, for a CUDA event that is not recorded yet holds nobody, and the GPU by the CUDA event.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from klotski_compiler.ops import Load, Step, Store
from klotski_runtime.streams import Perform, Ran, ThreadBackend, ThreadStream

SWITCH_S = 1e-3
"""For how long a thread that only computes in Python keeps the interpreter from the others. Every call that issues a kernel lets go of
it: with Python's own 5 ms, the thread that computes on a GPU would wait for it as long as a layer takes."""


class CudaEvent(threading.Event):
    """Set once it is recorded; whoever waits for it also waits until the GPU has come that far."""

    def __init__(self) -> None:
        super().__init__()
        self._on_gpu = torch.cuda.Event(blocking=True)  # a spinning thread would take a core from the CPU's own ops

    def record(self, stream: torch.cuda.Stream) -> None:
        """The event happens when everything issued to ``stream`` so far has ended."""
        try:
            self._on_gpu.record(stream)
        finally:
            self.set()  # whoever waits must come to its end, also on a GPU that has failed

    def wait(self, timeout: float | None = None) -> bool:
        issued = super().wait(timeout)
        if issued:
            self._on_gpu.synchronize()
        return issued

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Whatever is issued to ``stream`` next starts after the event; this thread waits until it is recorded."""
        super().wait()
        stream.wait_event(self._on_gpu)


class _Issued(NamedTuple):
    """An op on its way through the GPU."""

    at: int
    number: int
    start: torch.cuda.Event
    end: torch.cuda.Event


class CudaStream(ThreadStream):
    """A stream of the GPU and the thread that issues to it."""

    def __init__(self, name: str, backend: CudaBackend, stream: torch.cuda.Stream) -> None:
        self._cuda, self._clock = stream, backend.clock
        self._issued: deque[_Issued] = deque()
        super().__init__(name, backend)

    def wait(self, event: threading.Event) -> None:
        if isinstance(event, CudaEvent):
            self._queue.put(lambda: event.hold(self._cuda))
        else:
            super().wait(event)

    def run(self, number: int, step: Step, at: int) -> None:
        super().run(number, step, at)
        time.sleep(0)  # lets go of the interpreter: this thread is a pass ahead, and the GPU's threads are in a hurry

    def record(self) -> CudaEvent:
        event = CudaEvent()
        self._queue.put(lambda: event.record(self._cuda))
        return event

    def _perform(self, number: int, step: Step, at: int) -> None:
        if self._backend.stopped:
            return
        start = self._mark()
        self._try(number, step, at)
        self._issued.append(_Issued(at, number, start, self._mark()))
        self._report()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._cuda)
        return event

    def _report(self) -> None:
        """Tell of the ops that the GPU is through with."""
        while self._issued and self._issued[0].end.query():
            ran = self._issued.popleft()
            self._backend.note(Ran(ran.at, ran.number, self.name, self._clock.at(ran.start), self._clock.at(ran.end)))

    def _work(self) -> None:
        with torch.cuda.stream(self._cuda):
            super()._work()
            try:
                self._cuda.synchronize()
                self._report()
            except BaseException as failure:
                self._backend.fail(-1, failure)


class Clock:
    """Places what the GPU has timed on the clock of ``time.perf_counter``."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._base = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(stream.device)
        self._base.record(stream)
        self._base.synchronize()
        self._base_s = time.perf_counter()

    def at(self, event: torch.cuda.Event) -> float:
        """When an event happened that has happened, in seconds."""
        return self._base_s + 1e-3 * float(self._base.elapsed_time(event))


class Lanes:
    """The streams of a GPU, for as long as a plan runs: torch keeps the memory that a stream has freed for that stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: dict[str, torch.cuda.Stream] = {}

    def __getitem__(self, name: str) -> torch.cuda.Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self.device)
        return self._streams[name]


def of_gpu(steps: Sequence[Step], tier: str = "gpu") -> frozenset[str]:
    """The streams that compute on the GPU, or whose ops move what is in its memory."""
    return frozenset(
        step.op.stream
        for step in steps
        if tier in (step.op.link if isinstance(step.op, Load | Store) else step.op.stream).split(">")
    )


class CudaBackend(ThreadBackend):
    """Runs one phase on a GPU and on threads. gpu: the names of the GPU's streams."""

    def __init__(
        self,
        lanes: Lanes,
        gpu: frozenset[str],
        compute: str,
        perform: Perform,
        prepare: Callable[[str], None] = lambda name: None,
        note: Callable[[Ran], None] = lambda ran: None,
    ) -> None:
        super().__init__(compute, perform, prepare, note)
        self._lanes, self._gpu = lanes, gpu
        self.clock = Clock(lanes[compute])

    def __enter__(self) -> ThreadBackend:
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        return super().__enter__()

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        super().__exit__(kind, value, trace)
        sys.setswitchinterval(self._switch_s)

    def _make(self, name: str) -> ThreadStream:
        return CudaStream(name, self, self._lanes[name]) if name in self._gpu else super()._make(name)
