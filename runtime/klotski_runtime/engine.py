"""Runs a plan on a machine without a GPU: slots in one arena, a thread per stream, transformers' own modules as kernels.

The engine decides nothing: order, slots and waits are the plan's, and ``binding`` says which expert a pick stands for.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from klotski_compiler.cost import GATHERED_ROWS, ROW_READERS
from klotski_compiler.errors import ConfigError, ExecError, KlotskiError, PlanError, window
from klotski_compiler.execute import execute
from klotski_compiler.model import spec_from_config
from klotski_compiler.plan import ALL, Bind, Compute, Load, Phase, Plan, Slot, Step, Store, Tensor
from klotski_compiler.tensors import page_rows
from klotski_compiler.verify import verify
from klotski_runtime import binding
from klotski_runtime.arena import Arena
from klotski_runtime.checkpoint import EMBEDDING, HEAD, PAGE, Checkpoint, Layout, ModuleKey, Segment, layout
from klotski_runtime.kernels import Chunks, Group, kernel_threads
from klotski_runtime.kv import KvBlock
from klotski_runtime.measured import Measured, Watch
from klotski_runtime.reader import DiskReader, RowGather
from klotski_runtime.skeleton import Skeleton
from klotski_runtime.spill import SpillFile
from klotski_runtime.streams import ThreadBackend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(slots=True)
class Row:
    """One prompt on its way: token ids in, token ids out. ``done``: ended by an end token or by its own limit."""

    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    reason: str = "length"


class Engine:
    """A plan, its model and its memory. ``load`` once, then ``run`` any number of groups; ``close`` gives everything back."""

    def __init__(
        self,
        plan: Plan,
        folder: str | os.PathLike[str],
        config: PreTrainedConfig,
        scratch: Path,
        threads: int = 0,
        keep_log: bool = False,
    ) -> None:
        """config: from ``skeleton.import_model``. threads: of a kernel (0: one per core). keep_log: of every op, for a trace.

        Raises ConfigError or PlanError where plan, model and machine do not fit.
        """
        verify(plan)
        if plan.compute_tier != "host":
            raise ConfigError("plan", "compute_tier", f"{plan.compute_tier}: this runtime computes in host memory only")
        self.plan, self._config, self._keep_log = plan, config, keep_log
        self.threads = threads or len(os.sched_getaffinity(0))
        kernel_threads(1)
        self.skeleton = Skeleton(config, DTYPES[plan.dtype])
        self.checkpoint = Checkpoint.open(folder, self.skeleton.model)
        self._check_model()
        self.reader = DiskReader()
        self.arena = Arena(max((s.offset + s.nbytes for s in plan.slots if s.tier == "host"), default=0))
        self.arena.populate()
        self._resident = dict(plan.placed)
        self._layouts: dict[int, tuple[ModuleKey, tuple[Segment, ...], Layout]] = {}
        self._occupant: dict[int, ModuleKey] = {}
        self._parts: dict[int, tuple[int, dict[str, torch.Tensor]]] = {}
        self._kv_shapes = [self.skeleton.kv_shape(layer) for layer in range(self.skeleton.layers)]
        self._capacity = plan.envelope.prompt_len + plan.envelope.gen_len
        self._spill = self._open_spill(scratch)
        self._row_reader = DiskReader(ROW_READERS)  # its own: gathers must not queue behind a large load
        self._rows = self._gather()
        self.measured = Measured()
        self.observe: Callable[[int, Group], None] | None = None

    # ------------------------------------------------------------------------------------------------------- running

    def load(self) -> None:
        """Bring in what is resident."""
        began = time.perf_counter()
        self._run_phase(self.plan.phase("load"), None, 0)
        gc.freeze()  # plan, modules and libraries stay: to look through them for garbage takes 0.2 s in the middle of a pass
        self.measured.load_s = time.perf_counter() - began

    def run(
        self,
        sequences: Sequence[Row],
        end_tokens: frozenset[int] = frozenset(),
        number: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Generate for one batch group, in batches in the given order; fills in ``tokens``.

        end_tokens: ids that end a sequence. number: of the group, for the trace. progress: called after every pass with the
        tokens generated in it. Raises ExecError.
        """
        size = self.plan.decision.batch_size
        batches = [list(sequences[i : i + size]) for i in range(0, len(sequences), size)]
        decision = self.plan.decision
        chunks = Chunks(decision.attention_batch, decision.decode_batch, decision.expert_rows, decision.expert_rows)
        group = Group(self.skeleton, [[s.prompt for s in batch] for batch in batches], chunks, self._rows)
        active = ActiveGroup(group, list(sequences), end_tokens, progress)
        began = time.perf_counter()
        self._run_phase(self.plan.phase("prefill"), active, number)
        between = time.perf_counter()
        self.measured.prefill_s += between - began
        if not all(s.done for s in sequences):
            self._run_phase(self.plan.phase("decode"), active, number)
        self.measured.decode_s += time.perf_counter() - between

    def close(self) -> None:
        """Close files; memory goes with the last view."""
        self.reader.close()
        self._row_reader.close()
        if self._spill:
            self._spill.close()

    @property
    def bytes_per_link(self) -> dict[str, int]:
        """Bytes moved so far over each link, alignment included."""
        moved = {"disk>host": self.reader.bytes_read + self._row_reader.bytes_read}
        if self._spill:
            moved["disk>host"] += self._spill.bytes_read
            moved["host>disk"] = self._spill.bytes_written
        return moved

    def _run_phase(self, phase: Phase, active: ActiveGroup | None, number: int) -> None:
        steps = self.plan.steps[phase.name]
        if not steps:
            return
        runner = PhaseRunner(self, phase, steps, active)
        compute = next((s.op.stream for s in steps if isinstance(s.op, Compute)), "disk>host")
        watch = Watch(steps, compute, self._keep_log)
        with ThreadBackend(
            compute,
            runner.perform,
            lambda name: kernel_threads(self.threads if name == compute else 1),
            watch.note,
        ) as backend:
            execute(steps, phase.passes, backend)
            # In here, so that an interrupt stops the streams before they are joined.
            backend.stream(compute).record().wait()
        if backend.failure:
            index, cause = backend.failure
            if isinstance(cause, KlotskiError) and not isinstance(cause, ExecError):
                raise cause
            raise ExecError(f"{type(cause).__name__}: {cause}", window(phase.lines, index)) from cause
        if self._keep_log:
            self.measured.log.append((number, phase.name, watch.log))
        if phase.name != "load":
            self.measured.add(phase.name, watch)

    # ------------------------------------------------------------------------------------------------------- placing

    def slot(self, number: int) -> Slot:
        """The byte range of a slot."""
        return self.plan.slots[number]

    def fetch(self, modules: Sequence[tuple[Tensor, int, int]]) -> None:
        """Read modules (tensor, slot, expert) from the checkpoint into their slots and make their weights usable there."""
        parts, done = [], []
        for tensor, slot, expert in modules:
            key = module_key(tensor, expert)
            segments, plan = self._layout(tensor, key)
            at = self.slot(slot)
            if plan.slot_bytes > at.nbytes:
                raise PlanError(
                    "model", f"{tensor.name} needs {plan.slot_bytes:,} bytes, its slot has {at.nbytes:,}; compile again"
                )
            if old := self._occupant.pop(slot, None):
                self.skeleton.unbind(old)
            parts.append((plan.extents, self.arena.view(at.offset, at.nbytes)))
            done.append((slot, key, self._views(at, segments, plan)))
        self.reader.read_all(parts)
        for slot, key, views in done:
            if key.kind in ("expert", "head"):
                self._parts[slot] = (key.index, views)
            else:
                self.skeleton.bind(key, views)
                self._occupant[slot] = key

    def _views(self, at: Slot, segments: Sequence[Segment], plan: Layout) -> dict[str, torch.Tensor]:
        return {
            segment.name: self.arena.tensor(at.offset + offset, segment.nbytes, segment.dtype, segment.shape)
            for segment, offset in zip(segments, plan.offsets, strict=True)
        }

    def parts(self, slot: int) -> tuple[int, dict[str, torch.Tensor]]:
        """The expert (or head page) in a slot."""
        return self._parts[slot]

    def kv(self, layer: int, batch: int, size: int, slot: int | None) -> KvBlock:
        """The KV block of a layer and batch of ``size`` sequences: in its permanent slot, or in the one given."""
        number = self._resident[self._kv_id(layer, batch)] if slot is None else slot
        shape, dtype = self._kv_shapes[layer], self.skeleton.compute_dtype
        count = size * self._capacity * shape.elements
        storage = self.arena.tensor(self.slot(number).offset, count * dtype.itemsize, dtype, (count,))
        return KvBlock(storage, shape, size, self._capacity)

    def state(self, phase: Phase, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states of a phase: wide [tokens, hidden], then x."""
        skeleton, at = self.skeleton, self.slot(phase.placed[0][1])
        wide, width = tokens * skeleton.hidden * skeleton.wide_dtype.itemsize, skeleton.compute_dtype.itemsize
        shape = (tokens, skeleton.hidden)
        return (
            self.arena.tensor(at.offset, wide, skeleton.wide_dtype, shape),
            self.arena.tensor(at.offset + wide, tokens * skeleton.hidden * width, skeleton.compute_dtype, shape),
        )

    def spill(self) -> SpillFile:
        """The file of spilled KV."""
        assert self._spill is not None
        return self._spill

    def region(self, layer: int, batch: int) -> int:
        """Number of the spilled KV region of a layer and batch."""
        return layer * self.plan.decision.num_batches + batch

    def _layout(self, tensor: Tensor, key: ModuleKey) -> tuple[tuple[Segment, ...], Layout]:
        if tensor.kind == "pick":
            segments = self.checkpoint.modules[key]
            return segments, layout(segments)
        if tensor.id not in self._layouts:
            segments = self.checkpoint.modules[HEAD if key.kind == "head" else key]
            if key.kind == "head":
                pages = max(1, self.plan.decision.head_pages)
                vocabulary = segments[0].shape[0]
                segments = tuple(s.rows(*page_rows(vocabulary, pages, tensor.index)) for s in segments)
            self._layouts[tensor.id] = (key, segments, layout(segments))
        _, segments, plan = self._layouts[tensor.id]
        return segments, plan

    def _kv_id(self, layer: int, batch: int) -> int:
        if not hasattr(self, "_kv_ids"):
            self._kv_ids = {(t.layer, t.index): t.id for t in self.plan.tensors if t.kind == "kv"}
        return self._kv_ids[layer, batch]

    def _gather(self) -> RowGather | None:
        if self.plan.decision.embedding:
            return None
        return RowGather(self._row_reader, self.checkpoint.modules[EMBEDDING][0], GATHERED_ROWS)

    def _open_spill(self, scratch: Path) -> SpillFile | None:
        spilled = [t for t in self.plan.tensors if t.kind == "kv" and t.id not in self._resident]
        if not spilled:
            return None
        decision = self.plan.decision
        regions = len(decision.layers) * decision.num_batches
        row = (
            max(shape.elements for shape in self._kv_shapes)
            * decision.batch_size
            * self.skeleton.compute_dtype.itemsize
        )
        return SpillFile(scratch, regions, self._capacity, row)

    def _check_model(self) -> None:
        """The plan must be for this checkpoint: for its architecture by config.json, for its modules and bytes by its files."""
        plan, folder = self.plan, self.checkpoint.folder
        other = f"the plan is for {plan.model}, another model than this checkpoint"
        mend = f"name that model with --model, or compile a plan for this one with klotski-compile {folder}"
        try:
            spec = spec_from_config(self.checkpoint.config, plan.model, folder / "config.json")
        except ConfigError as fault:
            if fault.field != "model_type":
                raise
            raise PlanError("model", f"{other} ({fault.field} {fault.why.partition(';')[0]}); {mend}") from None
        same = plan.model_digest == spec.digest
        if why := self._difference(same):
            if same:
                other = f"the plan is for {plan.model} in another precision than this checkpoint's {spec.store_dtype}"
                mend = f"compile it again with klotski-compile {folder}"
            raise PlanError("model", f"{other} ({why}); {mend}")
        if plan.model_digest and not same:
            why = "config.json differs in what no weight shows: heads, experts per token, sliding window or tied head"
            raise PlanError("model", f"{other} ({why}); {mend}")
        if (positions := plan.envelope.prompt_len + plan.envelope.gen_len) > spec.max_positions:
            why = f"the plan takes {positions:,} positions, the model in {folder} has {spec.max_positions:,}"
            raise PlanError("model", f"{why}; compile it again")

    def _difference(self, same: bool) -> str:
        """The first module that only one of plan and checkpoint has, or that differs in bytes; empty where there is none.

        same: it is the same architecture, of which some files store a norm or a bias in another precision than most do.
        """
        planned: dict[ModuleKey, int] = {}
        for tensor in self.plan.tensors:
            if tensor.kind not in ("kv", "state", "pick"):
                key = HEAD if tensor.kind == "head" else module_key(tensor, tensor.index)  # pages of the head add up
                planned[key] = planned.get(key, 0) + tensor.nbytes
        modules = self.checkpoint.modules
        found = {key: sum(segment.nbytes for segment in segments) for key, segments in modules.items()}
        if EMBEDDING not in planned:
            del found[EMBEDDING]  # its rows are gathered
        for key in sorted(planned.keys() | found.keys()):
            part = f"expert {key.index}" if key.kind == "expert" else key.kind
            name = part if key.layer < 0 else f"{part} of layer {key.layer}"
            if key not in found or key not in planned:
                return f"only {'the checkpoint' if key in found else 'the plan'} has {name}"
            if abs(planned[key] - found[key]) > (PAGE + planned[key] // 16 if same else 0):
                return f"{name} has {found[key]:,} bytes there, {planned[key]:,} in the plan"
        return ""


class ActiveGroup:
    """A batch group while its phases run."""

    def __init__(
        self, group: Group, sequences: list[Row], end_tokens: frozenset[int], progress: Callable[[int], None] | None
    ) -> None:
        self.group, self.sequences, self.end_tokens, self.progress = group, sequences, end_tokens, progress
        self.widths = [batch.queries for batch in group.batches]

    def take(self, first: int, tokens: list[int]) -> bool:
        """Append the new tokens of sequences ``first`` onwards; True once every sequence of the group has ended."""
        fresh = 0
        for sequence, token in zip(self.sequences[first:], tokens, strict=False):
            if sequence.done:
                continue
            sequence.tokens.append(token)
            fresh += 1
            if token in self.end_tokens:
                sequence.done, sequence.reason = True, "stop"
            elif len(sequence.tokens) >= sequence.max_new_tokens:
                sequence.done = True
        if self.progress:
            self.progress(fresh)
        return all(s.done for s in self.sequences)


class PhaseRunner:
    """Does the work of the ops of one phase. Streams call ``perform`` concurrently; the plan's waits keep them apart."""

    def __init__(self, engine: Engine, phase: Phase, steps: Sequence[Step], active: ActiveGroup | None) -> None:
        self.engine, self.phase, self.steps, self.active = engine, phase, steps, active
        self.tensors = engine.plan.tensors
        self.part: Group | None = None
        self.bound: dict[int, dict[int, tuple[int, bool]]] = {}
        self._before: list[int] = []

    def perform(self, number: int, step: Step, at: int) -> bool:
        """Run one op in pass ``at``; True once every sequence of the group has ended."""
        match step.op:
            case Load():
                self._load([self.tensors[index] for index in step.op.tensors], step.slots, at)
            case Store():
                for index, slot in zip(step.op.tensors, step.slots, strict=True):
                    self._store(self.tensors[index], slot, at)
            case Bind():
                self._bind(step.op)
            case Compute():
                return self._compute(step.op, step, at)
        return False

    # ------------------------------------------------------------------------------------------------------ transfers

    def _load(self, tensors: Sequence[Tensor], slots: Sequence[int], at: int) -> None:
        modules = []
        for tensor, slot in zip(tensors, slots, strict=True):
            expert, wanted = tensor.index, True
            if tensor.kind == "kv":
                self._move_kv(tensor, slot, at, store=False)
                continue
            if tensor.kind == "pick":
                expert, wanted = self.bound[tensor.layer][tensor.index]
            if wanted:
                modules.append((tensor, slot, expert))
        self.engine.fetch(modules)

    def _store(self, tensor: Tensor, slot: int, at: int) -> None:
        self._move_kv(tensor, slot, at, store=True)

    def _move_kv(self, tensor: Tensor, slot: int, at: int, store: bool) -> None:
        batch = self._batch(tensor.index, at)
        if batch is None or self.active is None:
            return
        # A transfer may run before or after the pass's own ``sample``, so the positions follow from the pass, not the batch.
        width = self.active.widths[batch]
        past, end = (0, width) if self.phase.name == "prefill" else (width + at, width + at + 1)
        block = self.engine.kv(tensor.layer, batch, self.active.group.batches[batch].size, slot)
        region = self.engine.region(tensor.layer, batch)
        if store:
            self.engine.spill().store(region, block, past, end)
        elif past:
            self.engine.spill().load(region, block, past)

    # ------------------------------------------------------------------------------------------------------- compute

    def _batch(self, number: int, at: int) -> int | None:
        """The group's batch that batch ``number`` of pass ``at`` is; None where the last group is too short to have it."""
        assert self.active is not None
        batch = number + (at * self.phase.batches if self.phase.name == "prefill" else 0)
        return batch if batch < len(self.active.group.batches) else None

    def _compute(self, op: Compute, step: Step, at: int) -> bool:
        if op.batch != ALL and self._batch(op.batch, at) is None:
            return False
        if op.fn == "embed":
            self._begin(at)
        group = self.part
        if group is None or not group.batches:
            return False
        match op.fn:
            case "embed":
                group.embed()
            case "attention":
                self._attention(op, step, at, group)
            case "router":
                group.router(op.layer, op.batch)
            case "dense":
                group.dense(op.layer, op.batch)
            case "experts":
                self._experts(op, step, group)
            case "norm":
                group.final()
            case "head":
                page, weights = self.engine.parts(step.slots[0])
                pages = max(1, self.engine.plan.decision.head_pages)
                first = page_rows(self.engine.checkpoint.modules[HEAD][0].shape[0], pages, page)[0]
                group.head(first, weights["lm_head.weight"], weights.get("lm_head.bias"))
            case "sample":
                return self._sample(group, at)
        return False

    def _begin(self, at: int) -> None:
        assert self.active is not None
        first = at * self.phase.batches if self.phase.name == "prefill" else 0
        self.part = self.active.group.part(slice(first, first + self.phase.batches))
        if self.part.batches:
            self.part.begin(*self.engine.state(self.phase, self.part.tokens))

    def _attention(self, op: Compute, step: Step, at: int, group: Group) -> None:
        batch = self._batch(op.batch, at)
        assert batch is not None
        spilled = [s for t, s in zip(op.tensors, step.slots, strict=True) if self.tensors[t].kind == "kv"]
        block = self.engine.kv(op.layer, batch, group.batches[op.batch].size, spilled[0] if spilled else None)
        group.attention(op.layer, op.batch, block)

    def _experts(self, op: Compute, step: Step, group: Group) -> None:
        chosen = []
        for index, slot in zip(op.tensors, step.slots, strict=True):
            tensor = self.tensors[index]
            if tensor.kind == "pick" and not self.bound[op.layer][tensor.index][1]:
                continue
            chosen.append(self.engine.parts(slot))
        if self.engine.observe:
            self.engine.observe(op.layer, group)
        group.experts(op.layer, chosen, None if op.batch == ALL else op.batch)

    def _sample(self, group: Group, at: int) -> bool:
        assert self.active is not None
        first = at * self.phase.batches * self.engine.plan.decision.batch_size if self.phase.name == "prefill" else 0
        return self.active.take(first, group.sample().tolist())

    # ------------------------------------------------------------------------------------------------------- binding

    def _bind(self, op: Bind) -> None:
        group, layer = self.part, op.layer
        if group is None or not group.batches:
            return
        if op.first == 0:
            self.bound[layer] = {}
        done = self.bound[layer]
        taken = {expert for expert, _ in done.values()}
        candidates = [e for e in self.engine.plan.decision.layers[layer].late if e not in taken]
        routed = op.rule != "predicted"
        whole = routed and op.batch == ALL
        tokens = group.counts(layer, None) if whole else []
        if whole:
            self._before = tokens
        match op.rule:
            case "rank":
                order = binding.rank(candidates, tokens)
            case "arrival":
                present = len(group.batches) if op.batch == ALL else min(op.batch + 1, len(group.batches))
                order = binding.arrival(candidates, group.requests(layer, present))
            case _:
                table = self.engine.plan.predictor[layer - 1] if layer and self.engine.plan.predictor else ()
                order = binding.predicted(candidates, self._before if table else (), table)
        for pick, expert in zip(range(op.first, op.first + op.count), order, strict=False):
            done[pick] = (expert, not whole or tokens[expert] > 0)


def module_key(tensor: Tensor, expert: int) -> ModuleKey:
    """The checkpoint's module that a tensor is; ``expert``: what a pick stands for."""
    kind = "expert" if tensor.kind == "pick" else tensor.kind
    return ModuleKey(kind, tensor.layer, expert if kind == "expert" else tensor.index if kind == "head" else 0)
