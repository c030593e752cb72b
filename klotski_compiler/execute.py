"""The executor core: wait, run, record. Simulator, threads and CUDA differ in their stream class alone.

All ops stand in one total order, every wait points backwards and each stream is FIFO in that order; therefore nothing deadlocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from klotski_compiler.ops import Load, Step

Event = TypeVar("Event")


class Stream(Protocol[Event]):
    """A FIFO lane."""

    def wait(self, event: Event) -> None:
        """Whatever is issued next starts after ``event``."""

    def run(self, number: int, step: Step, at: int) -> None:
        """Issue op ``number`` in pass ``at`` (-1: the opening)."""

    def record(self) -> Event:
        """An event that happens when everything issued so far has ended."""


class Backend(Protocol[Event]):
    """A clock, threads, or CUDA."""

    def stream(self, name: str) -> Stream[Event]:
        """The lane of that name."""

    def begin(self, at: int) -> bool:
        """Called before pass ``at`` is issued; False ends the phase early (every sequence has ended)."""


def execute(steps: Sequence[Step], passes: int, backend: Backend[Event]) -> None:
    """Issue a phase: its opening (loads for the next pass), then all passes.

    The last pass opens no other, but its loads for the next one still wait and signal: others rely on the order they carry on.
    """
    signalled = {wait.op for step in steps for wait in step.waits}
    issued = [
        (number, step, isinstance(step.op, Load) and step.op.wraps, number in signalled, backend.stream(step.op.stream))
        for number, step in enumerate(steps)
    ]
    opening = [entry for entry in issued if entry[2]]
    before: dict[int, Event] = {}
    for at in range(-1, passes):
        if at >= 0 and not backend.begin(at):
            break
        events: dict[int, Event] = {}
        for number, step, wraps, signals, stream in opening if at == -1 else issued:
            for awaited, back in step.waits:
                if (event := (before if back else events).get(awaited)) is not None:
                    stream.wait(event)
            if not (wraps and at == passes - 1):
                stream.run(number, step, at)
            if signals:
                events[number] = stream.record()
        before = events
