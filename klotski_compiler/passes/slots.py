"""slots: gives every streamed tensor a fixed byte range, by linear scan, and drops the evictions it has consumed.

A pass is replayed, so lifetimes are arcs on a circle: a tensor loaded for the next pass must land in the slot that it leaves at the
start of this one. Those arcs are placed first; every other lifetime lies inside the pass and takes the slot that has been free for
longest, so that a load waits for the oldest reader. Tensors of one kind share a pool of equal slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from klotski_compiler.errors import PlanError
from klotski_compiler.ops import NOWHERE, Bind, Compute, Load, Op, Pages, Tensor
from klotski_compiler.program import Evict

FOREVER = 1 << 60


class Placed(NamedTuple):
    """An op with its slots and sources, as a ``Step`` has them."""

    op: Op
    slots: tuple[int, ...]
    sources: tuple[int, ...]


@dataclass(slots=True)
class Pool:
    """Equal slots of one tier for one kind of tensor. free: heap of (position from which it is free, slot)."""

    tier: str
    kind: str
    nbytes: int = 0
    members: list[int] = field(default_factory=list)
    free: list[tuple[int, int]] = field(default_factory=list)


def staged(tier: str, pages: Pages | None) -> str:
    """What stands for a tier where a page on its way is looked for: that is beside what of its tensor lives there."""
    return f"{tier} {pages.text}" if pages else tier


def slots(
    entries: Sequence[Op | Evict],
    tensors: Sequence[Tensor],
    fixed: dict[tuple[str, int], int],
    processors: dict[str, str],
    first: int,
) -> tuple[list[Placed], list[Pool]]:
    """Place the ops of one phase. ``fixed``: (tier, tensor) -> slot that it keeps, of a page (``staged``, tensor). ``processors``: the
    tier of each. New slots are numbered from ``first``.

    Raises PlanError where a policy loads what it never evicts, or reads what it has not loaded.
    """
    ends = _lifetimes(entries)
    pools: dict[tuple[str, str], Pool] = {}
    reserved: dict[int, int] = {}
    where = dict(fixed)
    count = first

    def pool_of(tier: str, tensor: Tensor, pages: Pages | None = None) -> Pool:
        key = tier, "expert" if tensor.kind == "pick" else tensor.kind
        pool = pools.get(key)
        if pool is None:
            pool = pools[key] = Pool(*key)
        if (room := tensor.room(pages)) > pool.nbytes:
            pool.nbytes = room
        return pool

    def take(pool: Pool, start: int, end: int) -> int:
        nonlocal count
        passed: list[tuple[int, int]] = []
        while pool.free and pool.free[0][0] <= start:
            freed_at, chosen = heappop(pool.free)
            if end < reserved.get(chosen, FOREVER):
                break
            passed.append((freed_at, chosen))
        else:
            chosen, count = count, count + 1
            pool.members.append(chosen)
        for entry in passed:
            heappush(pool.free, entry)
        heappush(pool.free, (end, chosen))
        return chosen

    tail: dict[tuple[str, int, int], int] = {}
    for start, entry in enumerate(entries):
        if isinstance(entry, Load) and entry.wraps:
            tier, pages = target_of(entry.link), entry.pages
            for tensor in entry.tensors if pages is None or pages.first == 0 else ():
                # passes through: staged on its way, and gone within this pass
                if (staged(tier, pages), tensor, start) in ends:
                    continue
                end = ends.get((tier, tensor, -1), FOREVER)
                if end > start:
                    raise PlanError(
                        "slots", f"{tensors[tensor].name} is loaded for the next pass before this one has evicted it"
                    )
                slot = take(pool_of(tier, tensors[tensor]), -1, end)
                reserved[slot] = start
                where[tier, tensor] = tail[tier, tensor, start] = slot

    placed: list[Placed] = []
    for start, entry in enumerate(entries):
        if isinstance(entry, Evict):
            tier = staged(entry.tier, entry.pages)
            for tensor in entry.tensors:
                del where[tier, tensor]
            continue
        if isinstance(entry, Bind):
            placed.append(Placed(entry, (), ()))
            continue
        if isinstance(entry, Load):
            source, _, target = entry.link.partition(">")
            pages, here, there = entry.pages, source, target
            if pages:
                here, there, first = staged(source, pages), staged(target, pages), entry.tensors[0]
                here = here if (here, first) in where else source
                there = there if (there, first) in fixed or (there, first, start) in ends else target
            for tensor in entry.tensors:
                key, lifetime = (there, tensor), (there, tensor, start)
                if lifetime in tail:
                    where[key] = tail[lifetime]
                    continue
                if key in fixed or (pages and pages.first and there == target and key in where):  # or has been begun
                    continue
                end = ends.get(lifetime, FOREVER)
                if end == FOREVER:
                    raise PlanError("slots", f"{tensors[tensor].name} is loaded and never evicted from {target}")
                part = pages if there != target else None
                where[key] = take(pool_of(target, tensors[tensor], part), start, end)
            sources = tuple([where[here, t] for t in entry.tensors if (here, t) in where])
            placed.append(Placed(entry, tuple([where[there, t] for t in entry.tensors]), sources))
            continue
        tier, target = (processors[entry.stream], "") if isinstance(entry, Compute) else entry.link.split(">")
        found = tuple([where.get((tier, t), NOWHERE) for t in entry.tensors])
        if NOWHERE in found:
            for number, slot in zip(entry.tensors, found, strict=True):
                kind = tensors[number].kind
                # What the CPU computes of late experts, and what it is sent of hidden states, needs no slot to be found.
                if slot == NOWHERE and not (kind == "pick" and tier == "host") and kind != "rows":
                    raise PlanError("slots", f"{entry.stream} op reads {tensors[number].name}, which is not in {tier}")
        if isinstance(entry, Compute):
            placed.append(Placed(entry, found, ()))
        else:
            into = tuple([where[target, t] for t in entry.tensors if (target, t) in where])
            placed.append(Placed(entry, into, tuple([slot for slot in found if slot != NOWHERE])))
    return placed, [pools[key] for key in sorted(pools)]


def target_of(link: str) -> str:
    """The tier in which a link ends."""
    return link.rpartition(">")[2]


def _lifetimes(entries: Sequence[Op | Evict]) -> dict[tuple[str, int, int], int]:
    """(tier, tensor, position of its load or -1 for one carried over) -> position of the eviction that ends it."""
    opened: dict[tuple[str, int], int] = {}
    ends: dict[tuple[str, int, int], int] = {}
    for position, entry in enumerate(entries):
        if isinstance(entry, Load):
            tier, pages = target_of(entry.link), entry.pages
            for tensor in entry.tensors:
                if pages:
                    opened[staged(tier, pages), tensor] = position
                if not pages or pages.first == 0:
                    opened[tier, tensor] = position
        elif isinstance(entry, Evict):
            place = staged(entry.tier, entry.pages)
            for tensor in entry.tensors:
                ends[place, tensor, opened.get((place, tensor), -1)] = position
    return ends
