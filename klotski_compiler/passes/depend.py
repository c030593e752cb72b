"""depend: the one pass that knows the rule, which the checks know by themselves. Read after write, write after read, write after
write, over the cells of memory.

Cells are slots, the hidden states of a batch, the experts' input, the routing and the bindings of a layer, KV on disk, and the
token ids. A phase is replayed, so edges are found on an unrolled sequence: the openings (loads for the next pass, issued once
before the first), then two whole passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from klotski_compiler.ops import ALL, NOWHERE, OVERWRITE, Bind, Compute, Load, Store, Tensor, batches_of, writes
from klotski_compiler.passes.slots import Placed

Cell = Hashable
Cells = tuple[list[Cell], list[Cell]]
Instance = tuple[int, int]  # (copy, op): copy 0 is the opening, 1 the first pass, 2 every later one


def unrolled(ops: Sequence[Placed], passes: int) -> Iterator[Instance]:
    """The sequence that stands for all passes."""
    for number, placed in enumerate(ops):
        if isinstance(placed.op, Load) and placed.op.wraps:
            yield 0, number
    for copy in range(1, min(passes, 2) + 1):
        for number in range(len(ops)):
            yield copy, number


class KvCell(NamedTuple):
    """The KV of a layer and batch where it lives: in memory, or on disk."""

    kind: str
    layer: int
    batch: int


class Edges(NamedTuple):
    """What the ops of an unrolled sequence must follow. after: for each of its places, earlier ones, in order."""

    order: list[Instance]
    after: list[list[int]]


def depend(
    ops: Sequence[Placed], cells: Sequence[Cells], passes: int, place: Callable[[int, int], int] | None = None
) -> Edges:
    """For every op of the unrolled sequence, the earlier ones that it must follow (on whatever stream). place: where KV changes hands from
    pass to pass, the batch in whose place that of a batch is then."""
    writer: dict[Cell, int] = {}
    readers: dict[Cell, list[int]] = {}
    edges = Edges(list(unrolled(ops, passes)), [])
    for now, (copy, number) in enumerate(edges.order):
        reads, writes = cells[number]
        if place:
            reads, writes = ([_in_place(cell, place, copy) for cell in side] for side in (reads, writes))
        before: set[int] = set()
        for cell in reads:
            if cell in writer:
                before.add(writer[cell])
            if cell in readers:
                readers[cell].append(now)
            else:
                readers[cell] = [now]
        for cell in writes:
            if cell in writer:
                before.add(writer[cell])
            if cell in readers:
                before.update(readers.pop(cell))
            writer[cell] = now
        before.discard(now)
        edges.after.append(sorted(before))
    return edges


def _in_place(cell: Cell, place: Callable[[int, int], int], copy: int) -> Cell:
    return cell._replace(batch=place(cell.batch, copy)) if isinstance(cell, KvCell) else cell


def cells_of(
    placed: Placed, tensors: Sequence[Tensor], batches: int, homes: Mapping[int, Tensor] = MappingProxyType({})
) -> Cells:
    """What an op reads and what it writes. homes: the KV that lives in a slot."""
    cells = _cells_of(placed, tensors, batches)
    if homes and not homes.keys().isdisjoint((*placed.slots, *placed.sources)):
        for side in cells:
            side[:] = [
                KvCell("kv", homes[cell].layer, homes[cell].index) if isinstance(cell, int) and cell in homes else cell
                for cell in side
            ]
    return cells


def _cells_of(placed: Placed, tensors: Sequence[Tensor], batches: int) -> Cells:
    op, reads, written = placed.op, list[Cell](placed.sources), list[Cell]()
    match op:
        case Compute():
            _compute_cells(op, placed, tensors, batches, reads, written)
        case Load():
            written += placed.slots
            for tensor in [tensors[t] for t in op.tensors]:
                if tensor.kind == "pick":
                    reads.append(("bound", tensor.layer, tensor.index))
                elif tensor.kind == "kv" and not placed.sources:
                    reads.append(KvCell("spilled", tensor.layer, tensor.index))
        case Store():
            written += placed.slots
            for tensor in [tensors[t] for t in op.tensors]:
                if tensor.kind == "rows":
                    reads.append("input")
                elif not placed.slots:
                    written.append(KvCell("spilled", tensor.layer, tensor.index))
        case Bind():
            scope = range(batches) if op.batch == ALL else range(op.batch + 1)
            if op.rule != "predicted":
                reads += [("routed", op.layer, batch) for batch in scope]
            written += [("bound", op.layer, pick) for pick in range(op.first, op.first + op.count)]
    return reads, written


def _compute_cells(
    op: Compute, placed: Placed, tensors: Sequence[Tensor], batches: int, reads: list[Cell], written: list[Cell]
) -> None:
    scope = batches_of(op.batch, batches)
    hidden: list[Cell] = [("hidden", batch) for batch in scope]
    for number, slot in zip(op.tensors, placed.slots, strict=True):
        tensor = tensors[number]
        kind = tensor.kind
        if slot != NOWHERE:
            (written if writes(op.fn, kind) else reads).append(slot)
            if kind == "query":
                reads.append(slot)  # the way through host memory is one chain
        if kind == "pick":
            reads.append(("bound", tensor.layer, tensor.index))
    if op.fn in OVERWRITE:
        written.append("input")
    match op.fn:
        case "embed":
            reads.append("tokens")
            written += hidden
        case "attention" | "project" | "output" | "shared" | "dense" | "add":
            written += hidden
        case "router":
            written += hidden
            written += [("routed", op.layer, batch) for batch in scope]
        case "experts":
            reads += [("routed", op.layer, batch) for batch in scope]
            if all(tensors[t].kind != "sums" for t in op.tensors):
                written += hidden
        case "norm":
            reads += hidden
            written.append("last")
        case "head":
            written.append("last")
        case "sample":
            reads.append("last")
            written.append("tokens")
