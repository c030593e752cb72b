"""What every stream does in a layer, drawn as text: a lane per stream, a box per op or run of like ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from klotski_compiler.ops import Bind, Compute, Op, Step, Store
from klotski_compiler.plan import Plan
from klotski_compiler.words import span

WIDTH = 100  # columns


@dataclass
class _Run:
    """Ops of one stream that follow each other closely and do the same for the same layer."""

    text: str
    start: float
    end: float
    busy: float
    count: int


def timeline(plan: Plan, phase: str, layer: int | None = None, width: int = WIDTH) -> str:
    """One layer as a lane per stream; the middle one unless told."""
    steps = plan.steps[phase]
    shown = len(plan.decision.layers) // 2 if layer is None else layer
    mine = [s for s in steps if isinstance(s.op, Compute | Bind) and s.op.layer == shown]
    if not mine:
        begin, end = min((s.start_us for s in steps), default=0), max((s.end_us for s in steps), default=1)
        title = f"Timeline of {phase}, whole: {span(end - begin)}"
    else:
        first = steps.index(mine[0])
        compute = mine[0].op.stream
        begin = max(
            (s.end_us for s in steps[:first] if s.op.stream == compute and isinstance(s.op, Compute | Bind)), default=0
        )
        end = max(s.end_us for s in mine)
        of = f"{span(end - begin)} of the {span(plan.forecast.pass_us[phase])} of a pass"
        title = f"Timeline of {phase}, layer {shown} (L0 to L{len(plan.decision.layers) - 1}): {of}"
    column = max(1e-9, (end - begin) / width)
    lines = [f"{title}; a column is {span(column)}", _axis(begin, end, width)]
    spent = []
    for lane in lanes(steps):
        runs = _runs(plan, [s for s in steps if s.op.stream == lane], begin, end, column)
        total = sum(run.busy for run in runs)
        lines.append(f"  {lane:<10}{_lane(runs, begin, column, width)} {total / max(1, end - begin):4.0%}")
        sums = f"  {lane:<10}{_sums(runs)}; idle {span(end - begin - total)}"
        spent += wrap(sums, WIDTH + 12, subsequent_indent=" " * 12)
    lines += spent
    return "\n".join(lines)


def lanes(steps: Sequence[Step]) -> list[str]:
    """The streams of a pass from top to bottom: links, then processors."""
    return sorted({s.op.stream for s in steps}, key=lambda name: (">" not in name, name))


def _axis(begin: float, end: float, width: int) -> str:
    ticks = 5
    cells = ""
    for tick in range(ticks):
        mark = f"|{span((end - begin) * tick / ticks) if tick else '0'}"
        cells += f"{mark:<{width // ticks}}"
    return f"  {'':<10}{cells[:width]}| busy"


def _runs(plan: Plan, steps: Sequence[Step], begin: float, end: float, column: float) -> list[_Run]:
    runs: list[_Run] = []
    for step in steps:
        start, stop = max(begin, step.start_us), min(end, step.end_us)
        if stop <= start:
            continue
        text, count = _does(plan, step.op)
        if runs and runs[-1].text == text and start - runs[-1].end < column:
            runs[-1].end, runs[-1].count = stop, runs[-1].count + count
            runs[-1].busy += stop - start
        else:
            runs.append(_Run(text, start, stop, stop - start, count))
    return runs


def _sums(runs: Sequence[_Run]) -> str:
    """How often a stream does what, and for how long."""
    count, us = Counter[str](), dict[str, float]()
    for run in runs:
        count[run.text] += run.count
        us[run.text] = us.get(run.text, 0.0) + run.busy
    return ", ".join(f"{n} x {text} {span(us[text])}" for text, n in count.items()) or "nothing"


def _does(plan: Plan, op: Op) -> tuple[str, int]:
    """What an op does, in a word or two, and on how many experts or batches."""
    if isinstance(op, Bind):
        return "bind", 1
    kinds = Counter(plan.tensors[t].kind for t in op.tensors)
    if isinstance(op, Compute):
        if op.fn != "experts":
            return op.fn, 1
        return "late experts" if kinds["pick"] else "experts", kinds["pick"] + kinds["expert"]
    layers = {plan.tensors[t].layer for t in op.tensors}
    where = f"L{min(layers)} " if min(layers) >= 0 else ""
    verb = "save " if isinstance(op, Store) else "copy " if op.link != op.stream else ""
    kind = min(kinds)
    what = {"expert": "experts", "pick": "late experts"}.get(kind, kind)
    return f"{verb}{where}{what}", len(op.tensors)


def _lane(runs: Sequence[_Run], begin: float, column: float, width: int) -> str:
    """Runs as boxes in proportion to their time. A box too narrow for its name shows as much of it as fits."""
    cells = ["."] * width
    free = 0
    for run in runs:
        first = max(free, int((run.start - begin) / column))
        last = min(width, max(first + 1, round((run.end - begin) / column)))
        if first >= width:
            break
        room = last - first - 1
        names = (
            f"{run.text} x{run.count}" if run.count > 1 else run.text,
            run.text,
            run.text.partition(" ")[2],
            run.text,
        )
        label = next((name for name in names if 0 < len(name) <= room), names[-1])
        box = "|" + label[:room].rstrip().ljust(room, "=")
        cells[first:last] = box
        free = last
    return "".join(cells)
