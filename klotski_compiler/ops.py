"""Ops in one total order, and what they move: tensors, slots, steps, and each as text.

Invariants (checked by ``verify``): streams are FIFO in the total order and every wait points backwards, therefore a plan cannot
deadlock; the slot map at the end of a pass equals the one at its start, therefore a pass can be replayed. Ids are positions,
times integer microseconds, sizes integer bytes.
"""

from __future__ import annotations

from typing import NamedTuple

PAGE_BYTES = 4096  # what O_DIRECT asks offsets, lengths and destinations to be multiples of
ALL = -1  # the batch of an op that covers the whole group; of several see ``span`` and ``onward``
MOST_BATCHES = 1 << 16  # of a group
CPU = "cpu"  # the processor of host memory, and its stream
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
