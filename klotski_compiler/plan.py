"""The plan: the one small file that compiler, runtime and inspection share.

A *program* is ops in one total order. A *plan* adds slots, waits and predicted times, and is what ``plan.json`` holds.

Invariants (checked by ``verify``): streams are FIFO in the total order and every wait points backwards, therefore a plan cannot
deadlock; the slot map at the end of a pass equals the one at its start, therefore a pass can be replayed. Ids are positions,
times integer microseconds, sizes integer bytes. Equal inputs give a byte-identical ``plan.json``.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from klotski_compiler.errors import PlanError

if TYPE_CHECKING:
    import networkx

SCHEMA_VERSION = 11
PAGE_BYTES = 4096  # what O_DIRECT asks offsets, lengths and destinations to be multiples of
ALL = -1  # the batch of an op that covers the whole group; of several see ``span`` and ``onward``
MOST_BATCHES = 1 << 16  # of a group
CPU = "cpu"  # the processor of host memory, and its stream
APART, MIXED = "phases apart", "mixed passes"  # classes of schedules
NOWHERE = -1  # the slot of a pick that is computed where its expert lives


def align_up(nbytes: int, unit: int = PAGE_BYTES) -> int:
    """The smallest multiple of ``unit`` that is not below ``nbytes``."""
    return -(-nbytes // unit) * unit


def slot_bytes(nbytes: int, segments: int) -> int:
    """Room that pieces of files take in an arena: direct reads bring the page that each piece starts and ends in."""
    return align_up(nbytes + 2 * PAGE_BYTES * segments)


# ---------------------------------------------------------------------------------------------------- tensors and slots


class Pages(NamedTuple):
    """Pages ``first`` to ``end`` (exclusive) of the ``of`` equal byte ranges that a tensor's slot is cut into."""

    first: int
    end: int
    of: int

    @property
    def text(self) -> str:
        """``pages=17:18/18``."""
        return f"pages={self.first}:{self.end}/{self.of}"


class Tensor(NamedTuple):
    """What moves as a whole. ``kind``: a module, a late-bound expert (``pick``), KV cache (``kv``), hidden states of a phase
    (``state``), or what a GPU and the CPU, or ops of a GPU, exchange: ``query`` of a batch (queries, keys and values of its new tokens on
    the way there, mixed values on the way back), ``rows`` of a group (its experts' input, and how it is routed) and their ``sums``.

    index: expert, pick, batch or page number. nbytes: what crosses a link. segments: pieces in the checkpoint.
    home: the tier in which it lives when nobody needs it (``none`` for states and exchanges).
    """

    id: int
    kind: str
    layer: int
    index: int  # type: ignore[assignment]  # the field's own word; nobody searches a record
    nbytes: int
    segments: int
    home: str

    @property
    def name(self) -> str:
        """Short text, unique in a plan: ``L3.E5``, ``L3.attention``, ``head.2``."""
        where = f"L{self.layer}." if self.layer >= 0 else ""
        if self.kind in ("expert", "pick"):
            return f"{where}{'E' if self.kind == 'expert' else 'P'}{self.index}"
        return f"{where}{self.kind}" + (f".{self.index}" if self.kind in ("head", "kv", "state", "query") else "")

    @property
    def slot_bytes(self) -> int:
        """Room that it takes in an arena."""
        return slot_bytes(self.nbytes, self.segments)

    def span(self, pages: Pages) -> tuple[int, int]:
        """The bytes [begin, end) of its slot that pages are: multiples of a disk page, so that direct reads need no cutting."""
        units = self.slot_bytes // PAGE_BYTES
        return units * pages.first // pages.of * PAGE_BYTES, units * pages.end // pages.of * PAGE_BYTES

    def room(self, pages: Pages | None = None) -> int:
        """Room that all of it, or some of its pages, takes in an arena."""
        if pages is None:
            return self.slot_bytes
        begin, end = self.span(pages)
        return end - begin

    def moved_bytes(self, pages: Pages | None) -> int:
        """What of ``nbytes`` crosses a link with all of it, or with some of its pages."""
        if pages is None:
            return self.nbytes
        return self.nbytes * pages.end // pages.of - self.nbytes * pages.first // pages.of


class Slot(NamedTuple):
    """A fixed byte range of a tier's arena that holds tensors one after another."""

    id: int
    tier: str
    offset: int
    nbytes: int


# ------------------------------------------------------------------------------------------------------------------ ops


class Load(NamedTuple):
    """Bring tensors one hop over ``link``. On a compute stream it is a synchronous copy. ``wraps``: for the next pass.

    pages: of each tensor, if it is not all of it. In the compute tier pages come into one slot, in order, the first one first; on
    its way through host memory a page has a slot of its own.
    """

    stream: str
    link: str
    tensors: tuple[int, ...]
    wraps: bool = False
    pages: Pages | None = None


class Store(NamedTuple):
    """Take tensors (KV, or what goes to the CPU) one hop away from the compute tier over ``link``."""

    stream: str
    link: str
    tensors: tuple[int, ...]


class Compute(NamedTuple):
    """Run ``fn`` of a layer (-1: outside the layers) on one batch, on ``ALL`` or (``SEVERAL``) on several in a row, with ``tensors`` in
    the tier of the processor that the stream is named after.

    ``attention`` is a whole block of one batch; ``project``, ``attend`` (of one batch, on either processor) and ``output`` are its three
    parts. ``router`` computes a layer's shared expert, too, where it names that; else ``shared`` does, later. ``experts`` on the CPU add
    into ``sums``, which ``add`` adds to the hidden states.
    """

    stream: str
    fn: str
    layer: int
    batch: int
    tensors: tuple[int, ...]


class Bind(NamedTuple):
    """Give picks ``first .. first + count - 1`` of a layer their experts, by ``rule``, from what is routed so far (5.3)."""

    stream: str
    layer: int
    batch: int
    rule: str
    first: int
    count: int  # type: ignore[assignment]  # the field's own word; nobody counts in a record


Op = Load | Store | Compute | Bind
FUNCTIONS = (
    "embed", "attention", "project", "attend", "output", "router", "shared", "dense", "experts", "add", "norm", "head", "sample",
)  # fmt: skip
OVERWRITE = ("attention", "project", "router")
"""Functions that write where the experts of a layer find their input."""
SEVERAL = ("project", "output", "router", "shared", "dense", "experts")
"""Functions that may work on some batches in a row."""
SINGLE = ("attention", "attend")
"""Functions that work on one batch; those that are neither work on all."""
RULES = ("rank", "arrival", "predicted")


def writes(fn: str, kind: str) -> bool:
    """Whether a compute op of that function writes its tensors of a kind; the others it reads."""
    return kind == "kv" or (fn, kind) in (("project", "query"), ("attend", "query"), ("experts", "sums"))


class Wait(NamedTuple):
    """An op that must have ended, in this pass (back 0) or in the one before (back 1)."""

    op: int
    back: int


class Step(NamedTuple):
    """An op as planned: slots, one per tensor, where a processor reads and a transfer writes; sources, where a transfer reads;
    waits; times. A transfer has no slots towards the disk and no sources from it. A pick that is computed where it lives has slot
    NOWHERE: only its binding knows.

    Times are those of one steady pass at the middle of the phase, from the pass's first op.
    """

    op: Op
    slots: tuple[int, ...]
    sources: tuple[int, ...]
    waits: tuple[Wait, ...]
    start_us: int
    end_us: int


def op_text(op: Op, names: list[str]) -> str:
    """One line without its number: ``disk>host load L3.E5 L3.E6``. ``parse_op`` is the inverse."""
    tensors = () if isinstance(op, Bind) else tuple(names[t] for t in op.tensors)
    match op:
        case Load() | Store():
            verb = "load" if isinstance(op, Load) else "store"
            words = [op.stream, verb, *([f"via={op.link}"] if op.link != op.stream else [])]
            words += [op.pages.text] if isinstance(op, Load) and op.pages else []
            words += [*tensors, *(["next"] if isinstance(op, Load) and op.wraps else [])]
            return " ".join(words)
        case Compute():
            return " ".join([op.stream, op.fn, f"L{op.layer}", _batch_text(op.batch), *tensors])
        case Bind():
            picks = f"P{op.first}:P{op.first + op.count}"
            return f"{op.stream} bind L{op.layer} {_batch_text(op.batch)} {op.rule} {picks}"


def span(first: int, end: int) -> int:
    """The batch of an op that covers several, ``first`` to ``end`` (exclusive)."""
    return ALL - first - MOST_BATCHES * end


def onward(first: int) -> int:
    """The same for all from ``first`` on."""
    return ALL - first


def batches_of(batch: int, batches: int) -> range:
    """The batches that an op works on, of so many."""
    if batch >= 0:
        return range(batch, batch + 1)
    end, first = divmod(ALL - batch, MOST_BATCHES)
    return range(first, end or batches)


def _batch_text(batch: int) -> str:
    if batch >= 0:
        return f"b{batch}"
    end, first = divmod(ALL - batch, MOST_BATCHES)
    return f"b{first}:{end}" if end else f"b{first or ''}*"


def _parse_batch(word: str) -> int:
    if word.endswith("*"):
        return onward(int(word[1:-1] or 0))
    first, _, end = word[1:].partition(":")
    return span(int(first), int(end)) if end else int(first)


def _parse_pages(word: str) -> Pages:
    first, end, of = map(int, word[6:].replace("/", ":").split(":"))
    if not 0 <= first < end <= of:
        raise ValueError(f"{word!r} are no pages")
    return Pages(first, end, of)


def parse_op(text: str, ids: dict[str, int]) -> Op:
    """Inverse of ``op_text``. Raises ValueError or KeyError where the line is not an op."""
    stream, verb, *words = text.split()
    if verb in ("load", "store"):
        link = words.pop(0)[4:] if words[0].startswith("via=") else stream
        wraps = words[-1] == "next"
        pages = _parse_pages(words.pop(0)) if verb == "load" and words[0].startswith("pages=") else None
        tensors = tuple(ids[w] for w in (words[:-1] if wraps else words))
        return Load(stream, link, tensors, wraps, pages) if verb == "load" else Store(stream, link, tensors)
    layer, batch = int(words[0][1:]), _parse_batch(words[1])
    if verb == "bind":
        first, end = (int(p[1:]) for p in words[3].split(":"))
        return Bind(stream, layer, batch, words[2], first, end - first)
    if verb not in FUNCTIONS:
        raise ValueError(f"unknown op {verb!r}")
    return Compute(stream, verb, layer, batch, tuple(ids[w] for w in words[2:]))


def step_text(step: Step, names: list[str]) -> str:
    """The op, then ``>slot``, ``^source slot``, ``<awaited op`` (with ' where it is one pass back) and ``@start+duration``."""
    marks = [f">{s}" for s in step.slots] + [f"^{s}" for s in step.sources]
    marks += [f"<{w.op}{chr(39) * w.back}" for w in step.waits]
    return " ".join([op_text(step.op, names), *marks, f"@{step.start_us}+{step.end_us - step.start_us}"])


def parse_step(text: str, ids: dict[str, int]) -> Step:
    """Inverse of ``step_text``. Raises ValueError or KeyError where the line is not a step."""
    line, _, times = text.rpartition(" @")
    line, *waits = line.split(" <")
    line, *sources = line.split(" ^")
    line, *slots = line.split(" >")
    start, duration = map(int, times.split("+"))
    awaited = tuple([Wait(int(w[:-1]), 1) if w.endswith("'") else Wait(int(w), 0) for w in waits])
    return Step(parse_op(line, ids), tuple(map(int, slots)), tuple(map(int, sources)), awaited, start, start + duration)


# ----------------------------------------------------------------------------------------------------------- the plan


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Workload(_Record):
    """What the plan is for: ``num_sequences`` prompts of ``prompt_len`` tokens (the longest), ``gen_len`` new tokens each."""

    prompt_len: int
    gen_len: int
    num_sequences: int


class Envelope(_Record):
    """What the plan can take: sequences of one group, longest prompt, most new tokens."""

    sequences: int
    prompt_len: int
    gen_len: int


class LayerDecision(_Record):
    """One layer: its resident modules and experts, the experts streamed by name (in compute order), the late ones, KV tier.

    ``cpu``: experts that the CPU computes in decode where they live (in prefill they stream, as static ones do); ``cpu_picks``:
    how many of the late ones, those picked last, it computes likewise. ``resident`` names modules among attention, router, shared,
    dense; ``late`` the experts that the layer's picks range over, most popular first (as many picks as there are); ``on_disk``
    the experts whose home is the disk, or whose last page's is, although the machine has host memory between disk and compute
    tier. Every expert
    is in exactly one of ``resident_experts``, ``static``, ``late`` and ``cpu``. ``kv``: where keys and values live, but for those of
    the first ``kv_batches`` batches of each of prefill's sub-groups (which all run the same ops), which live in the compute tier.
    ``cpu_batches``: as in the decision, where this layer differs.
    """

    resident: tuple[str, ...] = ()
    resident_experts: tuple[int, ...] = ()
    static: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    cpu: tuple[int, ...] = ()
    cpu_picks: int = 0
    on_disk: tuple[int, ...] = ()
    kv: str = ""
    kv_batches: int = 0
    cpu_batches: int | None = None


class Decision(_Record):
    """The numbers that a policy needs.

    batch_size: sequences of a batch; last_batch: of the last one of each of prefill's sub-groups, where it is the CPU's own and of
    another size. lead: experts that may be in flight or waiting (slots) at once. unit: experts per load. pages: that an expert is cut
    into; if there are several, of an expert on disk only the last one lives there, the others in host memory. head_pages: loads of the
    head (0: resident). prefill_groups: sub-groups that prefill runs in, each re-reading the weights. rolling: whether they join one
    after another, at equal distances over the life of a sequence, each in a pass in which the others decode, rather than all before the
    first decode pass. attention_batch, decode_batch: sequences whose attention runs at once in prefill and in decode. expert_rows:
    tokens per matmul of an expert, router or dense MLP at most. cpu_batches: batches, the last ones, in rolling order as many of each
    age, whose decode attention the CPU computes where the KV lives. kv_ahead: batches whose KV, where a link brings it, may be on its
    way or wait for attention. together: whether what surrounds decode attention is one op for several batches, which takes a GPU fewer
    calls; in between it attends to one after the other. by_batch: whether decode computes experts batch by batch, those of one while
    the CPU attends to the next.
    hot: experts per layer that are prefetched before the router speaks. embedding: whether its rows are
    resident where the CPU computes; a GPU reads them from host memory.
    """

    num_batches: int
    batch_size: int
    last_batch: int = 0
    lead: int
    unit: int
    head_pages: int
    prefill_groups: int
    attention_batch: int
    decode_batch: int
    expert_rows: int
    cpu_batches: int = 0
    kv_ahead: int = 2
    together: bool = False
    by_batch: bool = False
    hot: int
    embedding: bool
    rolling: bool = False
    pages: int = 1
    layers: tuple[LayerDecision, ...]

    @property
    def near(self) -> Pages | None:
        """Of an expert on disk, what lives in host memory nonetheless."""
        return Pages(0, self.pages - 1, self.pages) if self.pages > 1 else None

    @property
    def far(self) -> Pages | None:
        """Of an expert on disk, the pages that live there; None: all of it."""
        return Pages(self.pages - 1, self.pages, self.pages) if self.pages > 1 else None

    def stride(self, gen_len: int) -> int:
        """Passes from one sub-group's joining to the next one's, in rolling order; a sequence lives for ``gen_len`` of them."""
        return -(-gen_len // self.prefill_groups)

    def rounds(self, num_sequences: int) -> int:
        """How often prefill and decode follow one another in a workload: once per group or, in rolling order, once per sub-group
        that joins, and then until the last one is done."""
        if not self.rolling:
            return -(-num_sequences // self.sequences)
        return self.cohorts(num_sequences) + self.prefill_groups - 1

    def cohorts(self, num_sequences: int) -> int:
        """Sub-groups of prefill that a workload takes."""
        return -(-num_sequences // sum(map(self.size_of, range(self.part_batches))))

    def place(self, batch: int, round_: int) -> int:
        """The batch in whose place, in memory or on disk, the KV of a batch is in a round. In rolling order what is a sub-group's in
        one round is the next older one's in the next, and the oldest one's place the newcomer's (as in a file of rotating
        registers)."""
        if not self.rolling:
            return batch
        age, number = divmod(batch, self.part_batches)
        return (round_ - age) % self.prefill_groups * self.part_batches + number

    @property
    def part_batches(self) -> int:
        """Batches of one of prefill's sub-groups, the last of which may have fewer."""
        return -(-self.num_batches // self.prefill_groups)

    def away(self, layer: int) -> list[int]:
        """Batches whose keys and values live where ``kv`` says."""
        kept = self.layers[layer].kv_batches
        return [batch for batch in range(self.num_batches) if batch % self.part_batches >= kept]

    def attended(self, layer: int) -> list[int]:
        """Batches whose decode attention the CPU computes in a layer: the last ones of those in host memory; in rolling order of each
        sub-group's, which are of one age, so that a share of them is one of the work, too."""
        chosen = self.layers[layer]
        share = self.cpu_batches if chosen.cpu_batches is None else chosen.cpu_batches
        away = self.away(layer) if chosen.kv == "host" and share else []
        if self.rolling:
            first = self.part_batches - share // self.prefill_groups
            return [batch for batch in away if batch % self.part_batches >= first]
        return away[max(0, len(away) - share) :]

    def sends_kv(self, compute_tier: str) -> bool:
        """Whether in any layer a link brings the KV of a batch that decodes."""
        layers = (layer for layer, chosen in enumerate(self.layers) if chosen.kv != compute_tier)
        return any(len(self.away(layer)) > len(self.attended(layer)) for layer in layers)

    @property
    def sequences(self) -> int:
        """Sequences of one batch group."""
        lasts = self.num_batches // self.part_batches if self.last_batch else 0
        return self.num_batches * self.batch_size + lasts * (self.last_batch - self.batch_size)

    @property
    def batches(self) -> str:
        """``8 x 32``, or ``7 x 31 + 1 x 40``."""
        lasts = self.prefill_groups if self.last_batch else 0
        other = f" + {lasts} x {self.last_batch}" if lasts else ""
        return f"{self.num_batches - lasts} x {self.batch_size}{other}"

    def size_of(self, batch: int) -> int:
        """Sequences of one batch."""
        last = self.last_batch and batch % self.part_batches == self.part_batches - 1
        return self.last_batch if last else self.batch_size


class Phase(_Record):
    """``load`` (resident weights, once), ``prefill`` or ``decode``: steps replayed ``passes`` times over ``batches`` batches.

    placed: tensors that stay in one slot for the whole phase. lines: the steps as text.
    """

    name: str
    passes: int
    batches: int
    placed: tuple[tuple[int, int], ...]
    lines: tuple[str, ...]


class Forecast(_Record):
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
    class_bounds: dict[str, float] = {}


class Candidate(_Record):
    """One policy's best schedule on this machine, or why it has none."""

    policy: str
    tokens_per_s: float
    feasible: bool
    batches: str = ""
    why_not: str = ""


class Plan(_Record):
    """Everything that running and reading a schedule takes. processors: the tier in which each of them computes. widen_rows: of the
    CPU's 16-bit matmuls, as in the hardware profile. See ``load`` and ``dumps`` for the file."""

    schema_version: int
    model: str
    model_digest: str
    dtype: str
    hardware: str
    compute_tier: str
    processors: dict[str, str]
    widen_rows: int
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
        """Write ``plan.json`` whole or not at all."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(self.dumps())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


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
