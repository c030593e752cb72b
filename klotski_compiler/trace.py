"""Chrome trace events, for a plan's predicted pass and for a run's measured log alike: open them in Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from klotski_compiler.ops import op_text
from klotski_compiler.plan import Plan


class Row(NamedTuple):
    """An op that ran, or would. Times in microseconds. where: of a measured one the run of the phase, the pass and the op's number."""

    phase: str
    stream: str
    name: str
    start_us: float
    duration_us: float
    where: dict[str, int] | None = None


def chrome_trace(rows: Iterable[Row]) -> dict[str, object]:
    """The trace as an object to write as JSON: a process per phase, a thread per stream, both in order of appearance."""
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    names: list[dict[str, object]] = []
    events: list[dict[str, object]] = []
    for phase, stream, name, start_us, duration_us, where in rows:
        if phase not in processes:
            processes[phase] = len(processes)
            names.append({"ph": "M", "name": "process_name", "pid": processes[phase], "args": {"name": phase}})
        pid = processes[phase]
        if (phase, stream) not in threads:
            threads[phase, stream] = len(threads)
            tid = threads[phase, stream]
            names.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": stream}})
        place = {"pid": pid, "tid": threads[phase, stream]}
        shown = {"args": where} if where else {}
        events.append({"ph": "X", "name": name, **place, "ts": start_us, "dur": duration_us, **shown})
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def predicted(plan: Plan) -> Iterator[Row]:
    """One steady pass of every phase, as planned."""
    for phase in plan.phases:
        for step in plan.steps[phase.name]:
            name = op_text(step.op, plan.names).removeprefix(f"{step.op.stream} ")
            yield Row(phase.name, step.op.stream, name, step.start_us, step.end_us - step.start_us)
