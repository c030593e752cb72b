"""Slots of every tier and what is in them: weights, KV cache, hidden states, exchanges.

Where the skeleton is the CPU's, a GPU's tier is host memory too (``Engine(emulate=True)``): the same plan, the same ops on the same
streams, on a machine without a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from klotski_compiler.errors import ConfigError, PlanError
from klotski_compiler.ops import Pages, Slot, Tensor
from klotski_compiler.plan import Phase, Plan
from klotski_compiler.tensors import page_rows
from klotski_runtime.arena import Arena, GpuArena, Reservation
from klotski_runtime.checkpoint import EMBEDDING, HEAD, Checkpoint, Layout, ModuleKey, Segment, layout
from klotski_runtime.kv import KvBlock
from klotski_runtime.reader import DiskReader
from klotski_runtime.skeleton import Skeleton

PIECE_BYTES = 1 << 30
"""Host memory is locked for a GPU in pieces of about this size: a system may refuse to lock all of it at once."""

ALIGNED_BYTES = 256
"""Where CUDA's own allocations begin: matrix kernels read fastest from multiples of it."""


class _Known(NamedTuple):
    """How a module lies in a slot. lead: bytes before it that a GPU's slot lacks, so that its matrices begin where kernels are fastest;
    in host memory they begin where direct reads have put them. form: equal for modules that lie alike, but for their lead."""

    segments: tuple[Segment, ...]
    layout: Layout
    lead: int
    form: int


class Places:
    """The memory of one plan. A slot belongs to the op that the plan's waits give it to; nothing here locks."""

    def __init__(self, plan: Plan, skeleton: Skeleton, checkpoint: Checkpoint, reader: DiskReader) -> None:
        """Takes the memory of every arena at once, so that no pass pays for a page's first touch.

        Raises ConfigError where a GPU has not so much.
        """
        self._plan, self._skeleton, self._checkpoint, self._reader = plan, skeleton, checkpoint, reader
        self._host: dict[str, Arena] = {}
        self._seen: dict[str, Reservation] = {}
        self.arenas: dict[str, Reservation] = {}
        for tier, cuts in _pieces(plan.slots).items():
            self._reserve(tier, cuts)
        self.moved_bytes: Counter[str] = Counter()
        self.resident = dict(plan.placed)
        self._permanent = frozenset(self.resident.values())
        self.kv_shapes = [skeleton.kv_shape(layer) for layer in range(skeleton.layers)]
        self.capacity = plan.envelope.prompt_len + plan.envelope.gen_len
        self._modules: dict[ModuleKey, _Known] = {}
        self._forms: dict[tuple[object, ...], int] = {}
        self._made: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}
        self._ranges: dict[tuple[int, int, int], torch.Tensor] = {}
        self._blocks: dict[tuple[int, int, int, bool], KvBlock] = {}
        self._exchanges: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._occupant: dict[int, ModuleKey] = {}
        self._parts: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
        self._caches = {(t.layer, t.index): t.id for t in plan.tensors if t.kind == "kv"}
        self._homes = {
            (plan.tensors[t].layer, plan.tensors[t].index): slot
            for t, slot in plan.placed
            if plan.tensors[t].kind == "expert"
        }

    def _reserve(self, tier: str, cuts: Sequence[int]) -> None:
        device = self._skeleton.device
        if device.type == "cuda" and tier == self._plan.compute_tier:
            try:
                self.arenas[tier] = GpuArena(cuts[-1], device)
            except torch.OutOfMemoryError:
                free, _ = torch.cuda.mem_get_info(device)
                why = f"the plan takes {cuts[-1]:,} bytes of slots, {device} has {free:,} free; compile with less --memory {tier}="
                raise ConfigError("plan", "memory", why) from None
            return
        arena = self.arenas[tier] = self._host[tier] = Arena(cuts[-1])
        arena.populate()
        if device.type == "cuda" and (seen := arena.pin(cuts)):
            self._seen[tier] = seen

    @property
    def pinned(self) -> bool:
        """Whether a GPU's copy engines, if there is a GPU, read and write host memory themselves."""
        return self._skeleton.device.type != "cuda" or len(self._seen) == len(self._host)

    def close(self) -> None:
        """Unlock memory; it goes with the last view."""
        for arena in self._host.values():
            arena.unpin()

    def slot(self, number: int) -> Slot:
        """The byte range of a slot."""
        return self._plan.slots[number]

    def memory(self, number: int) -> memoryview:
        """The bytes of a slot in host memory."""
        at = self.slot(number)
        return self._host[at.tier].view(at.offset, at.nbytes)

    def home(self, layer: int, expert: int) -> int:
        """The slot where an expert lives that is kept in memory."""
        return self._homes[layer, expert]

    # ------------------------------------------------------------------------------------------------------ weights

    def fetch(self, modules: Sequence[tuple[Tensor, int, int]], pages: Pages | None = None) -> None:
        """Read modules (tensor, slot, expert), or pages of them, from the checkpoint into their slots and make their weights usable there
        once all of them have come."""
        parts = []
        for tensor, number, expert in modules:
            plan, at = self._known(tensor, expert).layout, self.slot(number)
            begin, end = self._span(tensor, plan, pages)
            origin = begin if pages and at.tier != self._plan.compute_tier else 0
            if (need := end - origin) > at.nbytes:
                why = f"{tensor.name} needs {need:,} bytes, its slot has {at.nbytes:,}; compile again"
                raise PlanError("model", why)
            self._vacate(number)
            parts.append((plan.between(begin, end, origin), self.memory(number)))
        self._reader.read_all(parts)
        for tensor, number, expert in modules:
            self._arrived(tensor, number, expert, pages)

    def move(self, tensor: Tensor, source: int, target: int, expert: int, pages: Pages | None = None) -> None:
        """Copy a module, or pages of it, from one tier's slot to another's and make its weights usable there once all has come."""
        here, there, known = self.slot(source), self.slot(target), self._known(tensor, expert)
        begin, end = self._span(tensor, known.layout, pages)
        self._vacate(target)
        first = begin if source in self._permanent else 0  # a page on its way has a slot of its own
        lead = known.lead if self._on_gpu(there) else 0
        skipped = max(0, lead - begin)
        self._copy(there, begin + skipped - lead, here, first + skipped, end - begin - skipped)
        self._arrived(tensor, target, expert, pages)

    def carry(self, source: int, target: int) -> None:
        """Copy all of a slot to another tier's.

        To a GPU a kernel does it: a copy engine first takes all whole experts that have been issued to it, whatever their stream.
        """
        here, there = self.slot(source), self.slot(target)
        nbytes = min(here.nbytes, there.nbytes)
        if (seen := self._seen.get(here.tier)) is None or nbytes % 8:
            self._copy(there, 0, here, 0, nbytes)
            return
        to, words = (
            arena.tensor(at.offset, nbytes, torch.int64, (nbytes // 8,))
            for arena, at in ((self.arenas[there.tier], there), (seen, here))
        )
        torch.bitwise_or(words, 0, out=to)  # torch gives whatever it sees to be a copy to the copy engine
        self.moved_bytes[f"{here.tier}>{there.tier}"] += nbytes

    def _copy(self, there: Slot, to: int, here: Slot, first: int, nbytes: int) -> None:
        """On a GPU the copy is issued to the current stream."""
        self._bytes(there, to, nbytes).copy_(self._bytes(here, first, nbytes), non_blocking=True)
        self.moved_bytes[f"{here.tier}>{there.tier}"] += nbytes

    def _on_gpu(self, at: Slot) -> bool:
        return at.tier == self._plan.compute_tier != "host"

    @staticmethod
    def _span(tensor: Tensor, plan: Layout, pages: Pages | None) -> tuple[int, int]:
        """The bytes of its slot that all of a module, or pages of it, takes: of the last one, the files may have less than was planned."""
        begin, end = tensor.span(pages) if pages else (0, plan.slot_bytes)
        return min(begin, plan.slot_bytes), min(end, plan.slot_bytes)

    def _arrived(self, tensor: Tensor, number: int, expert: int, pages: Pages | None) -> None:
        whole = pages is None or (pages.end == pages.of and self.slot(number).tier == self._plan.compute_tier)
        if whole:
            self._occupy(tensor, number, expert)

    def parts(self, number: int) -> tuple[int, dict[str, torch.Tensor]]:
        """The expert (or head page) in a slot."""
        return self._parts[number]

    def _vacate(self, number: int) -> None:
        if old := self._occupant.pop(number, None):
            self._skeleton.unbind(old)

    def _occupy(self, tensor: Tensor, number: int, expert: int) -> None:
        key, at, known = module_key(tensor, expert), self.slot(number), self._known(tensor, expert)
        if key.kind in ("expert", "head"):
            self._parts[number] = (key.index, self._views(at, known))
        elif at.tier == self._plan.compute_tier:
            self._skeleton.bind(key, self._views(at, known))
            self._occupant[number] = key
        elif key == EMBEDDING:  # a GPU reads what rows it needs from where they are
            self._skeleton.bind(key, self._views(at, known, self._seen.get(at.tier)))

    def _views(self, at: Slot, known: _Known, seen: Reservation | None = None) -> dict[str, torch.Tensor]:
        """A module's weights in a slot, or as a GPU has ``seen`` it. Modules of one form share them: to make a tensor takes as long as
        to launch a kernel."""
        begin = 0 if self._on_gpu(at) else known.lead
        name = at.id, known.form, begin
        if name not in self._made:
            arena, base = seen or self.arenas[at.tier], at.offset + begin - known.lead
            self._made[name] = {
                segment.name: arena.tensor(base + offset, segment.nbytes, segment.dtype, segment.shape)
                for segment, offset in zip(known.segments, known.layout.offsets, strict=True)
            }
        return self._made[name]

    def _bytes(self, at: Slot, first: int, nbytes: int) -> torch.Tensor:
        name = at.id, first, nbytes
        if name not in self._ranges:
            self._ranges[name] = self.arenas[at.tier].tensor(at.offset + first, nbytes, torch.uint8, (nbytes,))
        return self._ranges[name]

    def _known(self, tensor: Tensor, expert: int) -> _Known:
        key = module_key(tensor, expert)
        if key not in self._modules:
            segments = self._checkpoint.modules[HEAD if key.kind == "head" else key]
            if key.kind == "head":
                pages = self._plan.decision.head_parts
                vocabulary = segments[0].shape[0]
                segments = tuple(s.rows(*page_rows(vocabulary, pages, tensor.index)) for s in segments)
            plan = layout(segments)
            lead = min(plan.offsets) % ALIGNED_BYTES
            shape = tuple((s.name, s.dtype, s.shape, at - lead) for s, at in zip(segments, plan.offsets, strict=True))
            self._modules[key] = _Known(segments, plan, lead, self._forms.setdefault(shape, len(self._forms)))
        return self._modules[key]

    # --------------------------------------------------------------------------------------------------- activations

    def kv(self, layer: int, batch: int, size: int, number: int | None = None, moving: bool = False) -> KvBlock:
        """The KV block of a layer and batch of ``size`` sequences: in its permanent slot, or in the one given, which the disk fills and
        empties where there is no GPU.

        moving: for a copy between tiers. Its rows are strided, so that on a GPU a kernel copies them, host memory included. Beside a GPU
        blocks are made once: to make one takes as long as to issue what it is for.
        """
        at = self.slot(self.resident[self._caches[layer, batch]] if number is None else number)
        name = layer, at.id, size, moving
        if name in self._blocks:
            return self._blocks[name]
        arena = self._seen.get(at.tier, self.arenas[at.tier]) if moving else self.arenas[at.tier]
        shape, dtype = self.kv_shapes[layer], self._skeleton.compute_dtype
        count = size * self.capacity * shape.elements
        storage = arena.tensor(at.offset, count * dtype.itemsize, dtype, (count,))
        by_position = number is not None and self._plan.compute_tier == "host"
        block = KvBlock(storage, shape, size, self.capacity, by_position)
        if self._plan.compute_tier == "gpu":
            self._blocks[name] = block
        return block

    def state(self, phase: Phase, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states of a phase: wide [tokens, hidden], then x."""
        skeleton = self._skeleton
        at = next(self.slot(slot) for tensor, slot in phase.placed if self._plan.tensors[tensor].kind == "state")
        wide, width = tokens * skeleton.hidden * skeleton.wide_dtype.itemsize, skeleton.compute_dtype.itemsize
        shape, arena = (tokens, skeleton.hidden), self.arenas[at.tier]
        return (
            arena.tensor(at.offset, wide, skeleton.wide_dtype, shape),
            arena.tensor(at.offset + wide, tokens * skeleton.hidden * width, skeleton.compute_dtype, shape),
        )

    def exchange(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """All of a slot, flat."""
        if (number, dtype) not in self._exchanges:
            at = self.slot(number)
            count = at.nbytes // dtype.itemsize
            whole = self.arenas[at.tier].tensor(at.offset, count * dtype.itemsize, dtype, (count,))
            self._exchanges[number, dtype] = whole
        return self._exchanges[number, dtype]


def _pieces(slots: Sequence[Slot]) -> dict[str, list[int]]:
    """Per tier the offsets, from 0 to the end, that no slot lies across and that are at least PIECE_BYTES apart."""
    cuts: dict[str, list[int]] = {}
    ends: dict[str, int] = {}
    for slot in sorted(slots, key=lambda s: s.offset):
        begun, end = cuts.setdefault(slot.tier, [0]), ends.get(slot.tier, 0)
        if slot.offset >= max(end, begun[-1] + PIECE_BYTES):
            begun.append(slot.offset)
        ends[slot.tier] = max(end, slot.offset + slot.nbytes)
    return {tier: [*found, ends[tier]] for tier, found in cuts.items()}


def module_key(tensor: Tensor, expert: int) -> ModuleKey:
    """The checkpoint's module that a tensor is; ``expert``: what a pick stands for."""
    kind = "expert" if tensor.kind == "pick" else tensor.kind
    return ModuleKey(kind, tensor.layer, expert if kind == "expert" else tensor.index if kind == "head" else 0)
