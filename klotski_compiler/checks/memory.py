"""Whether everything is where an op looks for it, and nothing takes more memory than there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from klotski_compiler.checks.common import LOAD, UNROLLED, Fault, phases_of
from klotski_compiler.execute import execute
from klotski_compiler.ops import NOWHERE, OVERWRITE, Bind, Compute, Load, Pages, Step, Store, Tensor, writes
from klotski_compiler.plan import Phase, Plan


def arena(plan: Plan) -> None:
    """Slots that exist at the same time, the permanent ones and those of one phase, share no byte."""
    permanent = {slot for _, slot in plan.placed}
    for phase, steps in phases_of(plan):
        used = permanent | {slot for _, slot in phase.placed}
        for step in steps:
            used.update(step.slots, step.sources)
        used.discard(NOWHERE)
        ordered = sorted((plan.slots[slot] for slot in used), key=lambda s: (s.tier, s.offset))
        for low, high in pairwise(ordered):
            if low.tier == high.tier and low.offset + low.nbytes > high.offset:
                end = low.offset + low.nbytes
                raise Fault(
                    f"slots {low.id} and {high.id} of phase {phase.name} share the bytes {high.offset}..{end} of {low.tier}"
                )
        if ordered and min(slot.offset for slot in ordered) < 0:
            raise Fault(f"a slot of phase {phase.name} starts before its arena")


def budget(plan: Plan) -> None:
    """Arena and workspace stay within the forecast peak, and that within the budget, in every tier."""
    ends = dict.fromkeys((*plan.workspace, *(slot.tier for slot in plan.slots)), 0)
    for slot in plan.slots:
        ends[slot.tier] = max(ends[slot.tier], slot.offset + slot.nbytes)
    for tier, end in ends.items():
        need, peak = end + sum(plan.workspace.get(tier, {}).values()), plan.forecast.peak_bytes.get(tier, 0)
        if need > peak:
            raise Fault(f"{tier} needs {need:,} bytes (arena {end:,}), its forecast peak is {peak:,}")
    for tier, peak in plan.forecast.peak_bytes.items():
        if peak > plan.budgets.get(tier, 0):
            raise Fault(f"{tier} peaks at {peak:,} bytes, its budget is {plan.budgets.get(tier, 0):,}")


def residents(plan: Plan) -> None:
    """A permanent slot, and one that a tensor has for a whole phase, holds that alone, and it fits; the experts in permanent slots of the
    compute tier are the resident ones. Hidden states have a slot there in every phase that computes."""
    for phase in plan.phases:
        taken = [slot for _, slot in (*plan.placed, *phase.placed)]
        if len(set(taken)) != len(taken):
            raise Fault(f"two tensors share a slot all through phase {phase.name}")
        states = [plan.slots[slot].tier for t, slot in phase.placed if plan.tensors[t].kind == "state"]
        if states != [plan.compute_tier] * (phase.name != LOAD):
            raise Fault(
                f"hidden states have {len(states)} slots in phase {phase.name}, in {', '.join(states) or 'no tier'}"
            )
    for tensor, slot in (*plan.placed, *(pair for phase in plan.phases for pair in phase.placed)):
        if why := _misfit(plan, tensor, slot, _part(plan, plan.tensors[tensor], slot)):
            raise Fault(why)
    found = {
        (plan.tensors[t].layer, plan.tensors[t].index)
        for t, slot in plan.placed
        if plan.tensors[t].kind == "expert" and plan.slots[slot].tier == plan.compute_tier
    }
    decided = {(number, e) for number, layer in enumerate(plan.decision.layers) for e in layer.resident_experts}
    for layer, expert in sorted(found ^ decided):
        where = "has a permanent slot but is not" if (layer, expert) in found else "has no permanent slot but is"
        raise Fault(f"L{layer}.E{expert} {where} decided to be resident")


def _part(plan: Plan, tensor: Tensor, slot: int) -> Pages | None:
    """What a permanent slot holds of its tensor: of an expert whose last page lives on disk, the others."""
    away = tensor.kind == "expert" and tensor.home == "disk" and plan.slots[slot].tier != plan.compute_tier
    return plan.decision.near if away else None


def _misfit(plan: Plan, tensor: int, slot: int, pages: Pages | None = None) -> str:
    held, room = plan.tensors[tensor], plan.slots[slot].nbytes
    # Hidden states never come from a file, so that they need no room for the pages around a segment.
    need = held.nbytes if held.kind == "state" else held.room(pages)
    return f"{held.name} needs {need:,} bytes, slot {slot} has {room:,}" if need > room else ""


def residency(plan: Plan) -> None:
    """Every tensor is in its slot whenever an op reads it, in every pass, and as it was last written; nothing is written over a resident;
    a KV cache is where it lives when a phase ends."""
    for phase, steps in phases_of(plan):
        memory = _Memory(plan, phase)
        execute(steps, min(phase.passes, UNROLLED), memory)
        for tensor in memory.stale():
            raise Fault(f"phase {phase.name} ends before {plan.names[tensor]} is written to where it lives")
        for tensor, slot in plan.placed if phase.name == LOAD else ():
            whole = memory.parts.get(slot) == _part(plan, plan.tensors[tensor], slot)
            if memory.content.get(slot) != tensor or (plan.tensors[tensor].kind != "kv" and not whole):
                raise Fault(f"{plan.names[tensor]} is never loaded into its permanent slot {slot}")


WRITTEN = ("kv", "query", "rows", "sums")
"""Kinds of tensors that ops write; what a slot holds of one may be older than what is elsewhere."""
ANEW = (("project", "query"), ("experts", "sums"))
"""Functions, and what they write without reading it."""


def _within(pages: Pages, held: Pages) -> bool:
    return pages.of == held.of and held.first <= pages.first and pages.end <= held.end


class _Memory:
    """A backend that remembers which tensor each slot holds and, of those that ops write, as of which write. It is its own only stream:
    what a slot holds depends on the order of the lines alone once ``race`` has proved that conflicting ops keep it."""

    def __init__(self, plan: Plan, phase: Phase) -> None:
        self.plan, self.phase = plan, phase
        self.tensors, self.names, self.tiers = plan.tensors, plan.names, [slot.tier for slot in plan.slots]
        self.permanent = {slot: tensor for tensor, slot in plan.placed}
        self.placed = {slot: tensor for tensor, slot in phase.placed}
        self.homes = {(tensor, self.tiers[slot]): slot for tensor, slot in plan.placed}
        # Before the load phase no weight is anywhere but at home; a KV cache needs only its place, as what is exchanged does.
        self.content = {
            slot: tensor
            for slot, tensor in self.permanent.items()
            if phase.name != LOAD or plan.tensors[tensor].kind == "kv"
        } | self.placed
        # Of what a slot does not hold whole, the pages that it does.
        self.parts = {
            slot: pages
            for slot, tensor in self.content.items()
            if (pages := _part(plan, plan.tensors[tensor], slot)) is not None
        }
        self.written = frozenset(tensor.id for tensor in plan.tensors if tensor.kind in WRITTEN)
        self.rows = [tensor.id for tensor in plan.tensors if tensor.kind == "rows"]
        self.newest = Counter[int]()  # writes of each of those
        self.as_of = Counter[int]()  # by slot, or for what lives on disk by ``_home``: the last write that it has
        self.ends = {
            link: tuple(link.split(">"))
            for link in {s.op.link for s in plan.steps[phase.name] if isinstance(s.op, Load | Store)}
        }

    def stream(self, name: str) -> _Memory:
        return self

    def begin(self, at: int) -> bool:
        # A pick means another expert in every pass: what is left of it is of no use.
        self.content = {slot: t for slot, t in self.content.items() if self.tensors[t].kind != "pick"}
        return True

    def wait(self, event: None) -> None:
        pass

    def record(self) -> None:
        pass

    def run(self, number: int, step: Step, at: int) -> None:
        match step.op:
            case Compute(tensors=tensors):
                why = self._read(tensors, step.slots, self.plan.processors[step.op.stream]) or self._write(
                    step.op, step
                )
            case Load():
                why = self._load(step.op, step)
            case Store():
                why = self._store(step.op, step)
            case Bind():
                return
        if why:
            raise Fault(why, self.phase.name, number)

    def _read(self, tensors: Sequence[int], slots: Sequence[int], tier: str, pages: Pages | None = None) -> str:
        for tensor, slot in zip(tensors, slots, strict=True):
            if slot == NOWHERE:
                if self.tensors[tensor].home != tier:
                    return f"reads {self.names[tensor]} where it lives, which is not {tier}"
                continue
            if self.content.get(slot) != tensor:
                held = self.content.get(slot)
                name = "nothing" if held is None else self.names[held]
                return f"reads {self.names[tensor]} in slot {slot}, which holds {name}"
            if (part := self.parts.get(slot)) and not (pages and _within(pages, part)):
                return f"reads {self.names[tensor]} in slot {slot}, of which that holds {part.text} only"
            if self.tiers[slot] != tier:
                return f"reads slot {slot} in {tier}, but it is in {self.tiers[slot]}"
        return ""

    def _write(self, op: Compute, step: Step) -> str:
        """What an op writes is newer than any copy of it; what it reads of such must be the newest."""
        if op.fn in OVERWRITE:  # what is sent of the experts' input must be sent anew
            self.newest.update(self.rows)
        if self.written.isdisjoint(op.tensors):
            return ""
        for tensor, slot in zip(op.tensors, step.slots, strict=True):
            if tensor not in self.written:
                continue
            kind = self.tensors[tensor].kind
            if (op.fn, kind) not in ANEW and self.as_of[slot] != self.newest[tensor]:
                return f"reads {self.names[tensor]} in slot {slot}, which does not have what was last written of it"
            if writes(op.fn, kind):
                self.newest[tensor] += 1
                self.as_of[slot] = self.newest[tensor]
        return ""

    def _home(self, tensor: int) -> int:
        """Where a tensor lives: its slot there, or a number that no slot has."""
        return self.homes.get((tensor, self.tensors[tensor].home), -1 - tensor)

    def stale(self) -> Iterator[int]:
        """KV caches of which the place where they live does not have what was last written."""
        for tensor, newest in self.newest.items():
            if self.tensors[tensor].kind == "kv" and self.as_of[self._home(tensor)] != newest:
                yield tensor

    def _load(self, op: Load, step: Step) -> str:
        source, target = self.ends[op.link]
        if step.sources and (why := self._read(op.tensors, step.sources, source, op.pages)):
            return why
        for number, slot in zip(op.tensors, step.slots, strict=True):
            tensor = self.tensors[number]
            home = "disk" if self.phase.name == LOAD else tensor.home  # at first there is only the checkpoint
            if not step.sources and home != source:
                return f"brings {tensor.name} from {source}, but it lives in {home}"
            # Only the binding knows the source of a pick; every other tensor that memory holds has a slot there.
            if not step.sources and source != "disk" and tensor.kind != "pick":
                return f"brings {tensor.name} from {source} without naming its slot there"
            if self.tiers[slot] != target:
                return f"brings {tensor.name} to {target}, but slot {slot} is in {self.tiers[slot]}"
            if slot in self.permanent and (self.phase.name != LOAD or self.permanent[slot] != number):
                return f"writes {tensor.name} over {self.names[self.permanent[slot]]}, which is resident in slot {slot}"
            if self.placed.get(slot, number) != number:
                return f"writes {tensor.name} over {self.names[self.placed[slot]]}, which has slot {slot} all through the phase"
            if op.wraps and tensor.kind in ("pick", "kv"):
                return f"brings {tensor.name} for the next pass, before its expert or contents are known"
            if why := self._arrive(number, slot, op.pages):
                return why
        if not self.written.isdisjoint(op.tensors):
            places = step.sources or [self._home(number) for number in op.tensors]
            for slot, place in zip(step.slots, places, strict=True):
                self.as_of[slot] = self.as_of[place]
        return ""

    def _arrive(self, number: int, slot: int, pages: Pages | None) -> str:
        """A tensor, or some pages of it, comes into a slot: in the compute tier all of them in order, each once."""
        tensor = self.tensors[number]
        gathers = pages is not None and self.tiers[slot] == self.plan.compute_tier
        if why := _misfit(self.plan, number, slot, None if gathers else pages):
            return why
        held, same = self.parts.pop(slot, None), self.content.get(slot) == number
        held = held if same else None
        self.content[slot] = number
        if pages is None:
            return ""
        if gathers:
            if (pages.first > 0 or held) and not (held and held.of == pages.of and held.end == pages.first):
                return f"brings {pages.text} of {tensor.name} to slot {slot}, which holds {held.text if held else 'no part of it'}"
            pages = pages._replace(first=0)
        if pages.end - pages.first < pages.of:
            self.parts[slot] = pages
        return ""

    def _store(self, op: Store, step: Step) -> str:
        source, target = self.ends[op.link]
        for number in op.tensors:
            tensor = self.tensors[number]
            if tensor.home not in (target, "none"):
                return f"writes {tensor.name} to {target}, but it lives in {tensor.home}"
            if not step.sources and tensor.kind != "rows":
                return f"writes {tensor.name} without naming where it is"
            if not step.slots and target != "disk":
                return f"writes {tensor.name} to {target} without naming its slot there"
        if why := self._read(op.tensors, step.sources, source) if step.sources else "":
            return why
        if why := self._read(op.tensors, step.slots, target) if step.slots else "":
            return why
        for at, number in enumerate(op.tensors):
            place = step.slots[at] if step.slots else self._home(number)
            self.as_of[place] = self.as_of[step.sources[at]] if step.sources else self.newest[number]
        return ""
