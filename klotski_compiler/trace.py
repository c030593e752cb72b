"""Chrome trace events, for a plan's predicted pass and for a run's measured log alike: open them in Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from klotski_compiler.plan import Plan, op_text

Row = tuple[str, str, str, float, float]  # phase, stream, name, start and duration in microseconds


def chrome_trace(rows: Iterable[Row]) -> dict[str, object]:
    """The trace as an object to write as JSON: a process per phase, a thread per stream, both in order of appearance."""
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    names: list[dict[str, object]] = []
    events: list[dict[str, object]] = []
    for phase, stream, name, start_us, duration_us in rows:
        if phase not in processes:
            processes[phase] = len(processes)
            names.append({"ph": "M", "name": "process_name", "pid": processes[phase], "args": {"name": phase}})
        pid = processes[phase]
        if (phase, stream) not in threads:
            threads[phase, stream] = len(threads)
            tid = threads[phase, stream]
            names.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": stream}})
        place = {"pid": pid, "tid": threads[phase, stream]}
        events.append({"ph": "X", "name": name, **place, "ts": start_us, "dur": duration_us})
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def predicted(plan: Plan) -> Iterator[Row]:
    """One steady pass of every phase, as planned."""
    for phase in plan.phases:
        for step in plan.steps[phase.name]:
            name = op_text(step.op, plan.names).removeprefix(f"{step.op.stream} ")
            yield phase.name, step.op.stream, name, step.start_us, step.end_us - step.start_us
