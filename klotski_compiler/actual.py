"""Planned against actual: the trace of a run beside the plan that it ran, by stream and by kind of op."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from klotski_compiler.errors import ConfigError
from klotski_compiler.ops import Bind, Compute, Load, Op, Step
from klotski_compiler.plan import Plan
from klotski_compiler.report import CAUSES
from klotski_compiler.simulate import bubbles, cause_of
from klotski_compiler.words import span

Log = dict[tuple[int, int], tuple[float, float]]
"""What one run of a phase did: (pass, op) -> (start, end) in microseconds."""

COLUMNS = "{:<12}{:<46}{:>12}{:>12}{:>14}"


def is_trace(path: Path) -> bool:
    """Whether a file is a Chrome trace rather than a plan. A file that cannot be read is neither."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "traceEvents" in found


def read(plan: Plan, path: Path) -> dict[str, list[Log]]:
    """The logs of a measured trace, by phase. Raises ConfigError where the file is none, or of another plan's run."""
    try:
        found = json.loads(path.read_bytes())
        events: list[dict[str, Any]] = found["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ConfigError(
            path, "", f"cannot be read as a trace ({fault}); klotski-run --trace FILE writes one"
        ) from None
    if "plan" not in found:
        raise ConfigError(
            path, "", "is a forecast, not a measurement; klotski-run --trace FILE writes what was measured"
        )
    if found["plan"] != plan.digest:
        raise ConfigError(path, "", "was measured with another plan; name the plan that klotski-run was given")
    try:
        phases = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
        runs: dict[tuple[str, int], Log] = {}
        for event in (e for e in events if e["ph"] == "X"):
            where, start = event["args"], float(event["ts"])
            log = runs.setdefault((phases[event["pid"]], where["run"]), {})
            log[where["pass"], where["op"]] = (start, start + float(event["dur"]))
    except (KeyError, TypeError, ValueError) as fault:
        raise ConfigError(path, "", f"has an event that cannot be read ({fault!r}); write the trace again") from None
    logs: dict[str, list[Log]] = {}
    for (phase, _), log in sorted(runs.items(), key=lambda item: item[0][1]):
        logs.setdefault(phase, []).append(log)
    return logs


class Part(NamedTuple):
    """What a stream spends on one kind of work in a mean pass, in microseconds, as planned and as measured. waits: it is idle time."""

    stream: str
    what: str
    planned_us: float
    measured_us: float
    waits: bool = False


class Passes(NamedTuple):
    """A phase in the mean: its passes, planned and measured, and what they are made of. Of the compute stream the parts add up to the
    pass."""

    phase: str
    number: int
    planned_us: float
    measured_us: float
    parts: list[Part]


def passes(plan: Plan, logs: dict[str, list[Log]]) -> Iterator[Passes]:
    """Every phase that computes and was measured."""
    for phase in plan.phases:
        steps = plan.steps[phase.name]
        compute = next((s.op.stream for s in steps if isinstance(s.op, Compute)), "")
        if not compute or phase.name not in logs:
            continue
        last = max(number for number, step in enumerate(steps) if step.op.stream == compute)
        count, total = 0, 0.0
        measured, idle = defaultdict[tuple[str, str], float](float), defaultdict[str, float](float)
        for log in logs[phase.name]:
            ends = sorted(end for (_, number), (_, end) in log.items() if number == last)
            if not ends:  # the run was over before a pass was
                continue
            began = min(start for start, _ in log.values())
            whole = {key: (start - began, end - began) for key, (start, end) in log.items()}
            count += len(ends)
            total += ends[-1] - began
            for (_, number), (start, end) in whole.items():
                op = steps[number].op
                measured[op.stream, kind(plan, op)] += end - start
            for cause, us in bubbles(steps, whole, 1 + max(at for at, _ in whole), compute).items():
                idle[cause] += us
        if count:
            planned = Counter[tuple[str, str]]()
            for step in steps:
                planned[step.op.stream, kind(plan, step.op)] += step.end_us - step.start_us
            length = plan.forecast.pass_us[phase.name]
            waits = planned_idle_us(steps, length, compute)
            parts = [Part(*key, planned[key], measured[key] / count) for key in planned if not _copies(*key, compute)]
            parts += [
                Part(compute, f"waits for {words}", waits.get(cause, 0.0), idle[cause] / count, True)
                for cause, words in CAUSES.items()
            ]
            yield Passes(phase.name, count, length, total / count, parts)


def _copies(stream: str, what: str, compute: str) -> bool:
    """Whether it is a copy that blocks the compute stream: that counts as waiting."""
    return stream == compute and what.startswith(("load", "store"))


def planned_idle_us(steps: Sequence[Step], pass_us: float, compute: str) -> dict[str, float]:
    """Idle time of the compute stream in the settled pass of a plan, by cause."""
    idle, now = defaultdict[str, float](float), None
    own = [step for step in steps if step.op.stream == compute and isinstance(step.op, Compute | Bind)]
    for step in own:
        # A pass begins when the one before it ends, wherever the plan counts its times from.
        since = step.start_us - now if now is not None else pass_us - (own[-1].end_us - step.start_us)
        idle[cause_of(step)] += max(0, since)
        now = step.end_us
    return idle


def kind(plan: Plan, op: Op) -> str:
    """What an op does, in a word or two, whatever its layer."""
    if isinstance(op, Bind):
        return "bind"
    kinds = {plan.tensors[t].kind for t in op.tensors}
    if isinstance(op, Compute):
        return "late experts" if op.fn == "experts" and "pick" in kinds else op.fn
    what = {"pick": "late experts", "expert": "experts"}.get(min(kinds), min(kinds))
    return f"{'load' if isinstance(op, Load) else 'store'} {what}"


def compare(plan: Plan, logs: dict[str, list[Log]]) -> str:
    """Where the time of a run went beyond the plan: for each phase the compute stream, whose parts add up to the pass, then the streams
    beside it; what differs most comes first."""
    lines: list[str] = []
    for found in passes(plan, logs):
        over = found.measured_us / found.planned_us - 1 if found.planned_us else 0.0
        lines += [
            f"{found.phase}: a pass takes {span(found.measured_us)}, planned {span(found.planned_us)} ({over:+.1%}); mean of {found.number}"
        ]
        lines.append(COLUMNS.format("  stream", "what", "planned", "measured", "beyond"))
        compute = next(part.stream for part in found.parts if part.waits)
        for part in sorted(
            found.parts, key=lambda p: (p.stream != compute, p.stream, -abs(p.measured_us - p.planned_us))
        ):
            if part.planned_us or part.measured_us:
                beyond = part.measured_us - part.planned_us
                sign = "+" if beyond >= 0 else "-"
                row = part.what, span(part.planned_us), span(part.measured_us), f"{sign} {span(abs(beyond))}"
                lines.append(COLUMNS.format(f"  {part.stream}", *row))
        lines.append("")
    return "\n".join(lines) if lines else "the trace has no pass that was run to its end\n"
