"""Streams as worker threads: each runs its ops in FIFO order, and an event is a flag that another stream waits for.

After a failure or an early stop the remaining ops do no work but still signal, so that every thread comes to its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from klotski_compiler.ops import Step

Perform = Callable[[int, Step, int], bool | None]
"""Does the work of an op (its number, the step, the pass); True: nothing more is to be done."""


class Ran(NamedTuple):
    """A finished op: pass, number in its phase, stream, start and end in seconds of ``time.perf_counter``."""

    at: int
    number: int
    stream: str
    start: float
    end: float


class ThreadStream:
    """One worker thread with its queue."""

    def __init__(self, name: str, backend: ThreadBackend) -> None:
        self.name, self._backend = name, backend
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def wait(self, event: threading.Event) -> None:
        """Whatever is issued next starts after ``event``."""
        self._queue.put(event.wait)

    def run(self, number: int, step: Step, at: int) -> None:
        """Issue one op."""
        self._queue.put(lambda: self._perform(number, step, at))

    def record(self) -> threading.Event:
        """An event that happens when everything issued so far has ended."""
        event = threading.Event()
        self._queue.put(event.set)
        return event

    def close(self) -> None:
        """Let the thread end after what is issued, and wait for it."""
        self._queue.put(None)
        self._thread.join()

    def _perform(self, number: int, step: Step, at: int) -> None:
        if self._backend.stopped:
            return
        start = time.perf_counter()
        self._try(number, step, at)
        self._backend.note(Ran(at, number, self.name, start, time.perf_counter()))

    def _try(self, number: int, step: Step, at: int) -> None:
        try:
            if self._backend.perform(number, step, at):
                self._backend.stop()
        except BaseException as failure:
            self._backend.fail(number, failure)

    def _work(self) -> None:
        try:
            self._backend.prepare(self.name)
        except BaseException as failure:
            self._backend.fail(-1, failure)
        while (item := self._queue.get()) is not None:
            try:
                item()
            except BaseException as failure:  # the thread goes on: others wait for its events
                self._backend.fail(-1, failure)


class ThreadBackend:
    """Runs one phase on threads, one per stream. Use as a context manager.

    compute: the stream by which passes are counted. prepare: called in each thread as it starts. note: told of each finished op,
    in its thread; nothing is kept here, since a night of ops would outgrow the memory budget.
    """

    PASSES_AHEAD = 2  # issued but unfinished passes: the next one must be there for its loads to start early

    def __init__(
        self,
        compute: str,
        perform: Perform,
        prepare: Callable[[str], None] = lambda name: None,
        note: Callable[[Ran], None] = lambda ran: None,
    ) -> None:
        self._compute, self.perform, self.prepare, self.note = compute, perform, prepare, note
        self._streams: dict[str, ThreadStream] = {}
        self._ends: deque[threading.Event] = deque()
        self.stopped = False
        self.failure: tuple[int, BaseException] | None = None

    def stream(self, name: str) -> ThreadStream:
        """The thread of that stream."""
        if name not in self._streams:
            self._streams[name] = self._make(name)
        return self._streams[name]

    def _make(self, name: str) -> ThreadStream:
        return ThreadStream(name, self)

    def begin(self, at: int) -> bool:
        """Hold the issuing thread back until the pass before the last issued one has ended; False once stopped."""
        if at > 0:
            self._ends.append(self.stream(self._compute).record())
        if len(self._ends) >= self.PASSES_AHEAD:
            self._ends.popleft().wait()
        return not self.stopped

    def stop(self) -> None:
        """Do no further work: every sequence has ended, or something failed."""
        self.stopped = True

    def fail(self, number: int, failure: BaseException) -> None:
        """Keep the first failure and stop."""
        self.failure = self.failure or (number, failure)
        self.stop()

    def __enter__(self) -> ThreadBackend:
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if kind is not None:
            self.stop()
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()  # they refer to this backend: in a cycle, what an op holds would outlive the phase
