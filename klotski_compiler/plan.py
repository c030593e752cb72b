"""The plan: the one small file that compiler, runtime and inspection share.

A *program* is ops in one total order. A *plan* adds slots, waits and predicted times, and is what ``plan.json`` holds. Equal inputs
give a byte-identical one.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from klotski_compiler.decision import Decision, Record, Workload
from klotski_compiler.errors import PlanError
from klotski_compiler.ops import Slot, Step, Tensor, op_text, parse_step
from klotski_compiler.output import write_whole

if TYPE_CHECKING:
    import networkx

SCHEMA_VERSION = 13
APART, MIXED = "phases apart", "mixed passes"  # classes of schedules


class Envelope(Record):
    """What the plan can take: sequences of one group, longest prompt, most new tokens."""

    sequences: int
    prompt_len: int
    gen_len: int


class Phase(Record):
    """``load`` (resident weights, once), ``prefill`` or ``decode``: steps replayed ``passes`` times over ``batches`` batches.

    placed: tensors that stay in one slot for the whole phase. lines: the steps as text.
    """

    name: str
    passes: int
    batches: int
    placed: tuple[tuple[int, int], ...]
    lines: tuple[str, ...]


class Forecast(Record):
    """What the simulator and the bounds say. Times in microseconds, one entry per phase, stream, tier or cause.

    makespan_us: the whole workload without ``load``. pass_us: one middle pass. bound_us: for this decision (design 7.2).
    bubble_us: idle compute time of the whole workload by cause. link_bytes: planned bytes over each link, ``load`` included.
    tokens_per_s counts from the first weight byte to the last token. bound_tokens_per_s: of the schedule's own class; class_bounds:
    of either class, prefill and decode in phases of their own or mixed in rolling order. gap: by how much of tokens_per_s the bound
    is above it; below 0 only where the bound is wrong.
    """

    makespan_us: int
    load_us: int
    pass_us: dict[str, int]
    phase_us: dict[str, int]
    bound_us: int
    tokens_per_s: float
    bound_tokens_per_s: float
    gap: float
    bubble_fraction: float
    bubble_us: dict[str, int]
    busy_us: dict[str, int]
    peak_bytes: dict[str, int]
    link_bytes: dict[str, int]
    schedule_class: str = APART
    class_bounds: dict[str, float] = Field(default_factory=dict)


class Candidate(Record):
    """One policy's best schedule on this machine, or why it has none."""

    policy: str
    tokens_per_s: float
    feasible: bool
    batches: str = ""
    why_not: str = ""


class Plan(Record):
    """Everything that running and reading a schedule takes. processors: the tier in which each of them computes. least_own_rows,
    most_own_rows: of the CPU's 16-bit matmuls, as in the hardware profile. See ``load`` and ``dumps`` for the file."""

    schema_version: int
    model: str
    model_digest: str
    dtype: str
    hardware: str
    compute_tier: str
    processors: dict[str, str]
    least_own_rows: int
    most_own_rows: int
    budgets: dict[str, int]
    workload: Workload
    envelope: Envelope
    policy: str
    decision: Decision
    tensors: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    placed: tuple[tuple[int, int], ...]
    streams: tuple[str, ...]
    phases: tuple[Phase, ...]
    workspace: dict[str, dict[str, int]]
    predictor: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]
    forecast: Forecast
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    truncated: bool
    digest: str

    @cached_property
    def names(self) -> list[str]:
        """Tensor names by id."""
        return [t.name for t in self.tensors]

    def phase(self, name: str) -> Phase:
        """The phase of that name. Raises KeyError."""
        return {p.name: p for p in self.phases}[name]

    @cached_property
    def steps(self) -> dict[str, tuple[Step, ...]]:
        """The parsed steps of every phase. Raises PlanError where a line cannot be read."""
        ids = {name: i for i, name in enumerate(self.names)}
        out = {}
        for phase in self.phases:
            try:
                out[phase.name] = tuple([parse_step(line, ids) for line in phase.lines])
            except (ValueError, KeyError, IndexError) as fault:
                raise PlanError("text", f"a line of phase {phase.name} cannot be read: {fault}") from fault
        return out

    def graph(self, phase: str = "decode") -> networkx.DiGraph:
        """One pass of a phase: a node per op number with its ``text``; an edge to what runs after it, ``why`` fifo or wait.

        Waits for the pass before are left out, so that the graph has no cycle. Needs networkx.
        """
        import networkx

        graph = networkx.DiGraph()
        last: dict[str, int] = {}
        for number, step in enumerate(self.steps[phase]):
            graph.add_node(number, text=op_text(step.op, self.names))
            for wait in step.waits:
                if wait.back == 0:
                    graph.add_edge(wait.op, number, why="wait")
            if step.op.stream in last:
                graph.add_edge(last[step.op.stream], number, why="fifo")
            last[step.op.stream] = number
        return graph

    def computed_digest(self) -> str:
        """SHA-256 of the plan without its digest."""
        return hashlib.sha256(self._text(exclude_digest=True).encode()).hexdigest()

    def _text(self, exclude_digest: bool = False) -> str:
        return self.model_dump_json(exclude={"digest"} if exclude_digest else None)

    def sealed(self) -> Plan:
        """The same plan with its digest filled in."""
        return self.model_copy(update={"digest": self.computed_digest()})

    def dumps(self) -> str:
        """The text of ``plan.json``: one field per line, steps one per line."""
        data = json.loads(self._text())
        lines = [f"{json.dumps(k)}: {_pretty(v) if k == 'phases' else json.dumps(v)}" for k, v in data.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write ``plan.json`` whole or not at all. Raises OSError."""
        write_whole(path, self.dumps())


def _pretty(phases: list[dict[str, object]]) -> str:
    """Phases with one step per line, so that a plan reads, greps and diffs as text."""
    out = []
    for phase in phases:
        head = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in phase.items() if k != "lines")
        body = ",\n".join("  " + json.dumps(line) for line in phase["lines"])  # type: ignore[attr-defined]
        out.append(f'{{{head}, "lines": [\n{body}]}}')
    return "[" + ",\n".join(out) + "]"


def load(path: str | Path) -> Plan:
    """Read ``plan.json``. Raises PlanError for a file that is not a plan, was edited, or is of another schema version."""
    try:
        plan = Plan.model_validate_json(Path(path).read_bytes())
    except OSError as fault:
        raise PlanError("file", f"{path} cannot be read: {fault.strerror}") from fault
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PlanError("schema", f"{path}: {where}: {first['msg']}; compile the plan again") from fault
    if plan.schema_version != SCHEMA_VERSION:
        raise PlanError(
            "schema", f"{path} has version {plan.schema_version}, this program reads {SCHEMA_VERSION}; compile it again"
        )
    if plan.digest != plan.computed_digest():
        raise PlanError("digest", f"{path} was changed after it was compiled; compile it again")
    return plan
