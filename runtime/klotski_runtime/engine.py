"""Runs a plan: slots in one arena per tier, a thread per stream, transformers' own modules as kernels.

The engine decides nothing: order, slots and waits are the plan's, and ``binding`` says which expert a pick stands for.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from klotski_compiler.errors import ConfigError, ExecError, KlotskiError, PlanError, window
from klotski_compiler.execute import execute
from klotski_compiler.kernel_facts import GATHERED_ROWS, ROW_READERS
from klotski_compiler.model import gate_bytes, spec_from_config
from klotski_compiler.ops import (
    ALL,
    CPU,
    NOWHERE,
    PAGE_BYTES,
    Bind,
    Compute,
    Load,
    Step,
    Store,
    Tensor,
    align_up,
    batches_of,
)
from klotski_compiler.plan import Phase, Plan
from klotski_compiler.tensors import QUERY_ELEMENTS, page_rows
from klotski_compiler.verify import verify
from klotski_runtime import binding
from klotski_runtime.checkpoint import EMBEDDING, HEAD, Checkpoint, ModuleKey
from klotski_runtime.cuda_streams import CudaBackend, Lanes, of_gpu
from klotski_runtime.device import cpu_threads, use
from klotski_runtime.kernels import Chunks, Group
from klotski_runtime.kv import KvBlock
from klotski_runtime.measured import Measured, Watch
from klotski_runtime.places import Places, module_key
from klotski_runtime.reader import DiskReader, RowGather
from klotski_runtime.roster import Roster, Seat
from klotski_runtime.skeleton import HOST, Skeleton
from klotski_runtime.spill import SpillFile
from klotski_runtime.streams import Perform, Ran, ThreadBackend
from klotski_runtime.workers import Workers, decode_threads, kernel_threads

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
        device: torch.device = HOST,
        emulate: bool = False,
    ) -> None:
        """config: from ``skeleton.import_model``. threads: of a kernel (0: ``cpu_threads``). keep_log: of every op, for a trace.
        device: whose memory a GPU's tier is, index included. emulate: it may be the host's.

        Raises ConfigError or PlanError where plan, model and machine do not fit.
        """
        verify(plan)
        if (device.type == "cuda") != (plan.compute_tier == "gpu") and not (emulate and device == HOST):
            raise ConfigError("plan", "compute_tier", f"a plan for {plan.compute_tier} memory does not run on {device}")
        use(device)
        self.lanes = Lanes(device) if device.type == "cuda" else None
        self.plan, self._config, self._keep_log = plan, config, keep_log
        self.attended = [frozenset(plan.decision.attended(layer)) for layer in range(len(plan.decision.layers))]
        self.threads = threads or cpu_threads(device)
        kernel_threads(1)
        self.workers = Workers(self.threads)
        self.skeleton = Skeleton(
            config, DTYPES[plan.dtype], device, (plan.least_own_rows, plan.most_own_rows), self.workers
        )
        self.checkpoint = Checkpoint.open(folder, self.skeleton.model)
        self._check_model()
        self.reader = DiskReader()
        self.places = Places(plan, self.skeleton, self.checkpoint, self.reader)
        self._spill = self._open_spill(scratch)
        self._row_reader = DiskReader(ROW_READERS)  # its own: gathers must not queue behind a large load
        self._rows = self._gather()
        self.measured = Measured()

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
        """Generate for one batch group or, in rolling order, for any number of sequences, in batches in the given order; fills in
        ``tokens``.

        end_tokens: ids that end a sequence. number: of the group, for the trace. progress: called after every pass with the
        tokens generated in it. Raises ExecError.
        """
        if self.lanes:
            torch.cuda.empty_cache()  # what the graphs of the group before held, else this one's take as much again
        decision, firsts = self.plan.decision, [0]
        while firsts[-1] < len(sequences):
            firsts.append(firsts[-1] + decision.size_of(len(firsts) - 1))
        batches = [list(sequences[first:end]) for first, end in pairwise(firsts)]
        chunks = Chunks(decision.attention_batch, decision.decode_batch, decision.expert_rows, decision.expert_rows)
        with self._on_compute_stream():
            group = Group(self.skeleton, [[s.prompt for s in batch] for batch in batches], chunks, self._rows)
        active = ActiveGroup(group, list(sequences), firsts, Roster(self.plan, len(batches)), end_tokens, progress)
        once = active.roster.back_to_back
        for round_ in range(1 if once else active.roster.rounds):
            if all(s.done for s in sequences):
                break
            began = time.perf_counter()
            prefill = self.plan.phase("prefill")
            parts = min(prefill.passes, -(-len(batches) // prefill.batches))  # a short group may need fewer
            self._run_phase(prefill, active, number, round_, active.roster.rounds if once else parts)
            between = time.perf_counter()
            self.measured.prefill_s += between - began
            if not once and not all(s.done for s in sequences):
                self._run_phase(self.plan.phase("decode"), active, number, round_)
            self.measured.decode_s += time.perf_counter() - between

    def close(self) -> None:
        """Close files; memory goes with the last view."""
        self.places.close()
        self.workers.close()
        self.reader.close()
        self._row_reader.close()
        if self._spill:
            self._spill.close()

    @property
    def bytes_per_link(self) -> dict[str, int]:
        """Bytes moved so far over each link, alignment included."""
        moved = {"disk>host": self.reader.bytes_read + self._row_reader.bytes_read} | self.places.moved_bytes
        if self._spill:
            moved["host>disk"] = self._spill.bytes_written
        return moved

    def _run_phase(
        self, phase: Phase, active: ActiveGroup | None, number: int, round_: int = 0, passes: int | None = None
    ) -> None:
        steps = self.plan.steps[phase.name]
        if not steps:
            return
        runner = PhaseRunner(self, phase, steps, active, round_)
        compute = next((s.op.stream for s in steps if isinstance(s.op, Compute)), "disk>host")
        watch, before = Watch(steps, compute, self._keep_log), self.bytes_per_link
        with self._backend(phase.name, steps, compute, runner.perform, watch.note) as backend:
            execute(steps, phase.passes if passes is None else passes, backend)
            # In here, so that an interrupt stops the streams before they are joined.
            backend.stream(compute).record().wait()
        if backend.failure:
            index, cause = backend.failure
            if isinstance(cause, KlotskiError) and not isinstance(cause, ExecError):
                raise cause
            why = cause.why if isinstance(cause, ExecError) else f"{type(cause).__name__}: {cause}"
            raise ExecError(why, window(phase.lines, index)) from cause
        if self._keep_log:
            self.measured.log.append((number, phase.name, watch.log))
        if phase.name != "load":
            moved = {link: nbytes - before.get(link, 0) for link, nbytes in self.bytes_per_link.items()}
            self.measured.add(phase.name, watch, moved)

    def _backend(
        self, phase: str, steps: Sequence[Step], compute: str, perform: Perform, note: Callable[[Ran], None]
    ) -> ThreadBackend:
        if self.lanes is None:
            threads = decode_threads(self.threads, self.skeleton.own_attention) if phase == "decode" else self.threads
            return ThreadBackend(compute, perform, lambda name: kernel_threads(threads if name == compute else 1), note)
        return CudaBackend(
            self.lanes,
            of_gpu(steps),
            compute,
            perform,
            lambda name: kernel_threads(self.threads if name == CPU else 1),
            note,
        )

    def settle(self) -> None:
        """Wait for what the calling thread has issued to its stream of the GPU: its next op works on host memory at once."""
        if self.lanes:
            torch.cuda.current_stream(self.lanes.device).synchronize()

    def _on_compute_stream(self) -> AbstractContextManager[object]:
        """Tensors that ops are to use belong to their stream."""
        return torch.cuda.stream(self.lanes[self.plan.compute_tier]) if self.lanes else nullcontext()

    # ------------------------------------------------------------------------------------------------------- placing

    def spill(self) -> SpillFile:
        """The file of spilled KV."""
        assert self._spill is not None
        return self._spill

    def region(self, layer: int, batch: int) -> int:
        """Number of the spilled KV region of a layer and batch."""
        return layer * self.plan.decision.num_batches + batch

    def _gather(self) -> RowGather | None:
        if any(tensor.kind == "embedding" for tensor in self.plan.tensors):
            return None
        return RowGather(self._row_reader, self.checkpoint.modules[EMBEDDING][0], GATHERED_ROWS)

    def _open_spill(self, scratch: Path) -> SpillFile | None:
        spilled = [t for t in self.plan.tensors if t.kind == "kv" and t.id not in self.places.resident]
        if not spilled:
            return None
        decision = self.plan.decision
        regions = len(decision.layers) * decision.num_batches
        row = (
            max(shape.elements for shape in self.places.kv_shapes)
            * max(decision.batch_size, decision.last_batch)
            * self.skeleton.compute_dtype.itemsize
        )
        return SpillFile(scratch, regions, align_up(self.places.capacity * row), self.reader)

    def _check_model(self) -> None:
        """The plan must be for this checkpoint: for its architecture by config.json, for its modules and bytes by its files."""
        plan, folder = self.plan, self.checkpoint.folder
        other = f"the plan is for {plan.model}, another model than this checkpoint"
        mend = f"name that model with --model, or compile a plan for this one with klotski-compile {folder}"
        try:
            spec = spec_from_config(self.checkpoint.config, plan.model, folder / "config.json", gate=gate_bytes(folder))
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
            if tensor.kind != "pick" and tensor.segments:
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
            if abs(planned[key] - found[key]) > (PAGE_BYTES + planned[key] // 16 if same else 0):
                return f"{name} has {found[key]:,} bytes there, {planned[key]:,} in the plan"
        return ""


class ActiveGroup:
    """A batch group while its phases run. firsts: number of the first sequence of each batch."""

    def __init__(
        self,
        group: Group,
        sequences: list[Row],
        firsts: list[int],
        roster: Roster,
        end_tokens: frozenset[int],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.group, self.sequences, self.firsts, self.roster = group, sequences, firsts, roster
        self.end_tokens, self.progress = end_tokens, progress
        self.widths = [batch.queries for batch in group.batches.values()]

    def take(self, numbers: Iterable[int], tokens: list[int]) -> bool:
        """Append the new tokens of some sequences; True once every sequence of the run has ended."""
        fresh = 0
        for number, token in zip(numbers, tokens, strict=True):
            sequence = self.sequences[number]
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

    def __init__(
        self, engine: Engine, phase: Phase, steps: Sequence[Step], active: ActiveGroup | None, round_: int = 0
    ) -> None:
        self.engine, self.phase, self.steps, self.active, self.round = engine, phase, steps, active, round_
        self.tensors = engine.plan.tensors
        self.part: Group | None = None
        self.seats: dict[int, Seat] = {}
        self.bound: dict[int, dict[int, tuple[int, bool]]] = {}
        self._before: list[int] = []

    def perform(self, number: int, step: Step, at: int) -> bool:
        """Run one op in pass ``at``; True once every sequence of the group has ended."""
        match step.op:
            case Load():
                self._load(step.op, step, at)
            case Store():
                self._store(step.op, step, at)
            case Bind():
                self._bind(step.op)
            case Compute():
                return self._compute(step.op, step, at)
        return False

    # ------------------------------------------------------------------------------------------------------ transfers

    def _load(self, op: Load, step: Step, at: int) -> None:
        from_disk, places = op.link.startswith("disk>"), self.engine.places
        modules = []
        for number, (index, slot) in enumerate(zip(op.tensors, step.slots, strict=True)):
            tensor = self.tensors[index]
            expert, wanted = tensor.index, True
            source = step.sources[number] if step.sources else None
            if tensor.kind == "kv":
                self._move_kv(tensor, op.link, source, slot, at, store=False)
                continue
            if tensor.kind in ("query", "sums"):
                self._copy(source, slot)
                continue
            if tensor.kind == "pick":
                expert, wanted = self.bound[tensor.layer][tensor.index]
                source = None if from_disk else places.home(tensor.layer, expert)
            if wanted and source is None:
                modules.append((tensor, slot, expert))
            elif wanted:
                assert source is not None
                places.move(tensor, source, slot, expert, op.pages)
        if modules:
            self.engine.settle()
            places.fetch(modules, op.pages)

    def _store(self, op: Store, step: Step, at: int) -> None:
        for number, index in enumerate(op.tensors):
            tensor = self.tensors[index]
            target = step.slots[number] if step.slots else None
            if tensor.kind == "rows":
                if self.part is not None and self.part.batches:
                    self.part.send(self._exchange(target, self.engine.skeleton.compute_dtype))
            elif tensor.kind == "kv":
                self._move_kv(tensor, op.link, step.sources[number], target, at, store=True)
            else:
                self._copy(step.sources[number], target)

    def _exchange(self, slot: int | None, dtype: torch.dtype) -> torch.Tensor:
        assert slot is not None
        return self.engine.places.exchange(slot, dtype)

    def _copy(self, source: int | None, target: int | None) -> None:
        """What GPU and CPU exchange, from one tier to the other."""
        assert source is not None and target is not None
        self.engine.places.carry(source, target)

    def _move_kv(self, tensor: Tensor, link: str, source: int | None, target: int | None, at: int, store: bool) -> None:
        """New positions on their way home, or all old ones on their way to attention. No slot: on disk."""
        if self.active is None or (seat := self._seat(tensor.index, at)) is None:
            return
        # A transfer may run before or after the pass's own ``sample``, so the positions follow from the pass, not the batch.
        width = self.active.widths[seat.batch]
        past, end = (width + seat.passes - 1, width + seat.passes) if seat.passes else (0, width)
        region = self.engine.region(tensor.layer, seat.place)
        first, last = (past, end) if store else (0, past)
        blocks = [None if s is None else self._block(tensor, seat, s, moving=True) for s in (source, target)]
        match blocks:
            case [KvBlock() as here, KvBlock() as there]:
                there.take(here, first, last)
                self.engine.places.moved_bytes[link] += (last - first) * here.position_bytes
            case [KvBlock() as here, None]:
                row = here.position_bytes
                self.engine.spill().store(region, self._memory(source), first * row, last * row)
            case [None, KvBlock() as there] if last:
                self.engine.spill().load(region, self._memory(target), last * there.position_bytes)

    def _memory(self, slot: int | None) -> memoryview:
        assert slot is not None
        return self.engine.places.memory(slot)

    def _block(self, tensor: Tensor, seat: Seat, slot: int, moving: bool = False) -> KvBlock:
        """The KV of a batch in a slot, which where it is a permanent one is that of the batch's place."""
        assert self.active is not None
        places, size = self.engine.places, self.active.group.batches[seat.batch].size
        own = None if slot == places.resident.get(tensor.id) else slot
        return places.kv(tensor.layer, seat.place, size, own, moving)

    # ------------------------------------------------------------------------------------------------------- compute

    def _seat(self, number: int, at: int) -> Seat | None:
        """Who batch ``number`` of pass ``at`` is; None where nobody is."""
        assert self.active is not None
        return self.active.roster.seat(self.phase, number, self.round, at)

    def _compute(self, op: Compute, step: Step, at: int) -> bool:
        if op.fn == "embed":
            self._begin(at)
        group = self.part
        if group is None or not (there := self._there(op, group)):
            return False
        match op.fn:
            case "embed":
                group.embed()
            case "attention":
                self._attention(op, step, group)
            case "project":
                packed = {number: self._packed(number, op, step, group) for number in there}
                group.project(op.layer, packed, self.engine.attended[op.layer])
            case "attend":
                group.attend(op.batch, self._kv(op, step, group), self._packed(op.batch, op, step, group))
            case "output":
                group.output(there[0])
            case "add":
                group.add(self._exchange(step.slots[0], self.engine.skeleton.wide_dtype))
            case "router":
                group.router(op.layer, op.batch, any(self.tensors[t].kind == "shared" for t in op.tensors))
            case "shared":
                group.shared(op.layer, op.batch)
            case "dense":
                group.dense(op.layer, op.batch)
            case "experts":
                self._experts(op, step, group)
            case "norm":
                group.final()
            case "head":
                page, weights = self.engine.places.parts(step.slots[0])
                pages = self.engine.plan.decision.head_parts
                first = page_rows(self.engine.checkpoint.modules[HEAD][0].shape[0], pages, page)[0]
                group.head(first, weights["lm_head.weight"], weights.get("lm_head.bias"))
            case "sample":
                return self._sample(group)
        return False

    def _there(self, op: Compute, group: Group) -> list[int]:
        """Of the batches that an op works on, those that are there."""
        return [number for number in batches_of(op.batch, self.phase.batches) if number in group.batches]

    def _begin(self, at: int) -> None:
        assert self.active is not None
        found = {number: self._seat(number, at) for number in range(self.phase.batches)}
        self.seats = {number: seat for number, seat in found.items() if seat}
        self.part = self.active.group.part({number: seat.batch for number, seat in self.seats.items()})
        if self.part.batches:
            self.part.begin(*self.engine.places.state(self.phase, self.part.tokens))

    def _attention(self, op: Compute, step: Step, group: Group) -> None:
        group.attention(op.layer, op.batch, self._kv(op, step, group))

    def _kv(self, op: Compute, step: Step, group: Group) -> KvBlock:
        """What is cached of a batch: in a slot that the op names, or in the place where it stays."""
        seat, places = self.seats[op.batch], self.engine.places
        for tensor, slot in zip(op.tensors, step.slots, strict=True):
            if self.tensors[tensor].kind == "kv":
                return self._block(self.tensors[tensor], seat, slot)
        return places.kv(op.layer, seat.place, group.batches[op.batch].size, None)

    def _experts(self, op: Compute, step: Step, group: Group) -> None:
        chosen, sent, places, skeleton = [], dict[str, int](), self.engine.places, self.engine.skeleton
        for index, slot in zip(op.tensors, step.slots, strict=True):
            tensor, where = self.tensors[index], slot
            if tensor.kind == "pick":
                expert, wanted = self.bound[op.layer][tensor.index]
                if not wanted:
                    continue
                where = places.home(op.layer, expert) if slot == NOWHERE else slot
            if tensor.kind in ("rows", "sums"):
                sent[tensor.kind] = slot
            else:
                chosen.append(places.parts(where))
        if sent:
            rows, sums = (
                self._exchange(sent["rows"], skeleton.compute_dtype),
                self._exchange(sent["sums"], skeleton.wide_dtype),
            )
            group.experts_elsewhere(op.layer, chosen, rows, sums)
        else:
            group.experts(op.layer, chosen, op.batch)

    def _packed(self, batch: int, op: Compute, step: Step, group: Group) -> torch.Tensor:
        """The exchange of a batch, as far as its sequences fill it: each of them begins where a GPU's kernels can read it."""
        named = ((self.tensors[tensor], slot) for tensor, slot in zip(op.tensors, step.slots, strict=True))
        slot = next(slot for tensor, slot in named if (tensor.kind, tensor.index) == ("query", batch))
        whole, size = self._exchange(slot, self.engine.skeleton.compute_dtype), group.batches[batch].size
        return whole[: len(whole) // size // QUERY_ELEMENTS * QUERY_ELEMENTS * size]

    def _sample(self, group: Group) -> bool:
        assert self.active is not None
        firsts = [(self.active.firsts[seat.batch], group.batches[number].size) for number, seat in self.seats.items()]
        numbers = [number for first, count in firsts for number in range(first, first + count)]
        return self.active.take(numbers, group.sample().tolist())

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
        tokens = group.counts(layer) if whole else []
        if whole:
            self._before = tokens
        match op.rule:
            case "rank":
                order = binding.rank(candidates, tokens)
            case "arrival":
                order = binding.arrival(candidates, group.requests(layer, op.batch))
            case _:
                table = self.engine.plan.predictor[layer - 1] if layer and self.engine.plan.predictor else ()
                order = binding.predicted(candidates, self._before if table else (), table)
        for pick, expert in zip(range(op.first, op.first + op.count), order, strict=False):
            done[pick] = (expert, not whole or tokens[expert] > 0)
