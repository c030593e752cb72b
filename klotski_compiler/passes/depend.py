"""depend: the only file that knows the rule. Read after write, write after read, write after write, over the cells of memory.

Cells are slots, the hidden states of a batch, the experts' input, the routing and the bindings of a layer, KV on disk, and the
token ids. A phase is replayed, so edges are found on an unrolled sequence: the openings (loads for the next pass, issued once
before the first), then two whole passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from klotski_compiler.passes.slots import Placed
from klotski_compiler.plan import ALL, NOWHERE, OVERWRITE, Bind, Compute, Load, Store, Tensor, batches_of, writes

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


def depend(
    ops: Sequence[Placed], cells: Sequence[Cells], passes: int, place: Callable[[int, int], int] | None = None
) -> dict[Instance, list[Instance]]:
    """For every op of the unrolled sequence, the earlier ones that it must follow (on whatever stream), in order. place: where KV
    changes hands from pass to pass, the batch in whose place that of a batch is then."""
    writer: dict[Cell, Instance] = {}
    readers: dict[Cell, list[Instance]] = {}
    edges: dict[Instance, list[Instance]] = {}
    for instance in unrolled(ops, passes):
        reads, writes = cells[instance[1]]
        if place:
            reads, writes = ([_in_place(cell, place, instance[0]) for cell in side] for side in (reads, writes))
        before: set[Instance] = set()
        for cell in reads:
            if cell in writer:
                before.add(writer[cell])
            readers.setdefault(cell, []).append(instance)
        for cell in writes:
            if cell in writer:
                before.add(writer[cell])
            before.update(readers.get(cell, ()))
            writer[cell] = instance
            readers[cell] = []
        before.discard(instance)
        edges[instance] = sorted(before)
    return edges


def _in_place(cell: Cell, place: Callable[[int, int], int], copy: int) -> Cell:
    return cell._replace(batch=place(cell.batch, copy)) if isinstance(cell, KvCell) else cell


def cells_of(
    placed: Placed, tensors: Sequence[Tensor], batches: int, homes: Mapping[int, Tensor] = MappingProxyType({})
) -> Cells:
    """What an op reads and what it writes. homes: the KV that lives in a slot."""
    reads, written = _cells_of(placed, tensors, batches)

    def named(cell: Cell) -> Cell:
        kv = homes.get(cell) if isinstance(cell, int) else None
        return KvCell("kv", kv.layer, kv.index) if kv else cell

    return [named(cell) for cell in reads], [named(cell) for cell in written]


def _cells_of(placed: Placed, tensors: Sequence[Tensor], batches: int) -> Cells:
    op, reads, written = placed.op, list[Cell](), list[Cell]()
    match op:
        case Load():
            reads += placed.sources
            written += placed.slots
            for tensor in (tensors[t] for t in op.tensors):
                if tensor.kind == "pick":
                    reads.append(("bound", tensor.layer, tensor.index))
                elif tensor.kind == "kv" and not placed.sources:
                    reads.append(KvCell("spilled", tensor.layer, tensor.index))
        case Store():
            reads += placed.sources
            written += placed.slots
            for tensor in (tensors[t] for t in op.tensors):
                if tensor.kind == "rows":
                    reads.append("input")
                elif not placed.slots:
                    written.append(KvCell("spilled", tensor.layer, tensor.index))
        case Bind():
            scope = range(batches) if op.batch == ALL else range(op.batch + 1)
            if op.rule != "predicted":
                reads += [("routed", op.layer, batch) for batch in scope]
            written += [("bound", op.layer, pick) for pick in range(op.first, op.first + op.count)]
        case Compute():
            _compute_cells(op, placed, tensors, batches, reads, written)
    return reads, written


def _compute_cells(
    op: Compute, placed: Placed, tensors: Sequence[Tensor], batches: int, reads: list[Cell], written: list[Cell]
) -> None:
    scope = list(batches_of(op.batch, batches))
    hidden: list[Cell] = [("hidden", batch) for batch in scope]
    for number, slot in zip(op.tensors, placed.slots, strict=True):
        tensor = tensors[number]
        if slot != NOWHERE:
            (written if writes(op.fn, tensor.kind) else reads).append(slot)
            if tensor.kind == "query":
                reads.append(slot)  # the way through host memory is one chain
        if tensor.kind == "pick":
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
