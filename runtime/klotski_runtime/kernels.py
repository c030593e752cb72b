"""What the ops of a plan compute, in host RAM or on a GPU.

A group's tokens are rows of two tensors, batch after batch and sequence after sequence, padding included:
    wide  [tokens, hidden] in a type twice as wide as the compute dtype: the residual stream, into which experts add
    x     [tokens, hidden] in the compute dtype: the residual stream until the router, then the experts' input
so a token costs 3 x hidden x compute bytes, and no op needs a third buffer of that size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from klotski_compiler.ops import ALL, batches_of
from klotski_runtime.arena import Room
from klotski_runtime.assignment import Assignment, Routing, rows_worth, shares
from klotski_runtime.batch import Batch, Frame, abreast
from klotski_runtime.checkpoint import EMBEDDING
from klotski_runtime.experts import ExpertKernel, OwnExperts, Parts, Runs, is_common, runs
from klotski_runtime.graphs import Graphs, Piece
from klotski_runtime.head import Head
from klotski_runtime.kv import KvBlock
from klotski_runtime.own_kernels import OwnKernels
from klotski_runtime.reader import RowGather
from klotski_runtime.skeleton import HOST, Skeleton
from klotski_runtime.split import Call, Ends, NewOnly, Regions, Split, on_host
from klotski_runtime.workers import WORTH_SHARING


@dataclass(frozen=True, slots=True)
class Chunks:
    """How much an op takes at a time, which bounds what it allocates.

    attention_batch, decode_batch: sequences per attention call in prefill and in decode (which needs a bound too where
    attention expands its cache, as latent attention does). token_rows: tokens per call of embedding, router or dense
    MLP. expert_rows: tokens per call of an expert.
    """

    attention_batch: int
    decode_batch: int
    token_rows: int
    expert_rows: int


class Kernels(NamedTuple):
    """Of experts: one for every worker of the CPU, or one for the GPU, which take them one by one; and, where it is known, our own."""

    alone: list[ExpertKernel]
    own: OwnExperts | None


@dataclass(frozen=True, slots=True)
class Halted:
    """Decode attention of some rows before its middle part."""

    ends: Ends
    hidden: torch.Tensor
    regions: Regions


@dataclass(frozen=True, slots=True)
class Asked:
    """The middle part for some sequences of a batch, which may run elsewhere with ``module`` and ``mask``."""

    sequences: slice
    call: Call
    module: Any
    mask: torch.Tensor | None


class Group:
    """n batches that share each weight load, and the ops over them. Its methods belong to one thread, but for ``attend``, ``send``
    and ``experts_elsewhere``, which are the CPU's part where the device is a GPU.

    A pass: ``begin``, ``embed``; per layer ``attention``, then ``dense`` or ``router``, ``experts``;
    ``final``, ``head`` for every page of the vocabulary, ``sample``. The first pass is the prefill.
    Rows of padding are computed by attention and router, but not routed to experts nor counted.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        prompts: Sequence[Sequence[Sequence[int]]],
        chunks: Chunks,
        embedding: RowGather | None = None,
        every_token: bool = False,
    ) -> None:
        """prompts: [batch][sequence][token id]. embedding: reads rows from disk where the embedding is not bound. every_token: of a prompt
        goes through all of the last layer, where only what the last one becomes has a use."""
        self._skeleton, self._chunks, self._embedding, self._every_token = skeleton, chunks, embedding, every_token
        self._device = skeleton.device
        self.batches = {number: Batch(sequences, self._device) for number, sequences in enumerate(prompts)}
        self._kernels = self._make_kernels(self._device, skeleton.own_kernels)
        self._elsewhere: Kernels | None = None
        self._adding = threading.Lock()
        self._found: dict[tuple[int, ...], tuple[Sequence[Parts], Runs]] = {}
        self._halted: dict[int, list[Halted]] = {}
        self._asked: dict[int, list[Asked]] = {}
        self._frames: dict[tuple[int, ...], Frame] = {}  # frames of several batches, by where they lie
        self._graphs = Graphs(self._device)
        self._room = Room(skeleton.compute_dtype, self._device)
        self._routing = Routing(torch.empty(0, 0), torch.empty(0, 0))
        self._assignments: dict[int, Assignment] = {}  # by the batches that they are for
        self._head = Head(skeleton.own_kernels, skeleton.compute_dtype, self._device)

    def _make_kernels(self, device: torch.device, own: OwnKernels) -> Kernels:
        skeleton = self._skeleton
        inner = max(map(skeleton.inner, range(skeleton.layers)))
        count = skeleton.workers.count if device == HOST else 1
        rows, dtypes = -(-self._chunks.expert_rows // count), (skeleton.compute_dtype, skeleton.wide_dtype)
        alone = [ExpertKernel(rows, skeleton.hidden, inner, *dtypes, device, own) for _ in range(count)]
        return Kernels(alone, OwnExperts(inner, own) if device == HOST and own.known else None)

    @property
    def tokens(self) -> int:
        """Rows of the current pass, padding included."""
        return sum(batch.ids.numel() for batch in self.batches.values())

    def part(self, batches: Mapping[int, int]) -> Group:
        """A view of some batches as a group of their own, by the numbers that they have in it: those of one pass. Batches are shared,
        routing is not."""
        own = copy(self)
        own.batches = {number: self.batches[batch] for number, batch in batches.items()}
        own._assignments = {}
        return own

    def begin(self, wide: torch.Tensor, x: torch.Tensor) -> None:
        """Start a pass in ``wide`` (wide type) and ``x`` (compute dtype), each of at least [tokens, hidden]."""
        first = 0
        for batch in self.batches.values():
            batch.first = first
            first += batch.ids.numel()
        self._wide, self._x = wide[:first], x[:first]
        self._addresses = self._x.data_ptr(), self._wide.data_ptr()
        self._renewed: set[tuple[int, ...]] = set()
        self._assignments.clear()

    @torch.inference_mode()
    def embed(self) -> None:
        """wide <- the embeddings of all batches' tokens, gathered from disk where the embedding is not bound."""
        ids = torch.cat([batch.ids.flatten().to(self._device) for batch in self.batches.values()])
        every, limit = slice(0, len(ids)), self._chunks.token_rows
        if self._skeleton.is_bound(EMBEDDING):
            for part in _split(every, limit):
                self._wide[part] = self._skeleton.embed(ids[part])
            return
        order = ids.argsort()  # rows that are near in the file are then read together
        for part in _split(every, min(limit, self._gather.max_rows)):
            rows = order[part]
            distinct, inverse = torch.unique_consecutive(ids[rows], return_inverse=True)
            embedded = self._skeleton.embed(inverse, self._gather.gather(distinct.tolist()))
            self._wide[rows] = embedded.to(self._wide.dtype)

    @torch.inference_mode()
    def attention(self, layer: int, batch: int, kv: KvBlock) -> None:
        """x <- h + attention(norm(h)) where h is wide in the compute dtype; new keys and values go into ``kv``."""
        own = self.batches[batch]
        graphs = own.past and self._graphs.capturing and not self._skeleton.latent(layer)
        limit = self._chunks.decode_batch if own.past else self._chunks.attention_batch
        for sequences in _split(slice(0, own.size), limit):
            if own.queries > 1 and self._only_last(layer):
                self._attend_last(layer, own, sequences, kv)
                continue
            if graphs:
                self._attend_in_pieces(layer, batch, sequences, kv)
            else:
                frame, cache = self._frame(own, sequences), kv.cache(sequences, own.past)
                mask = self._mask(layer, own, sequences, frame, cache, self._device)
                hidden = self._take(own, sequences)
                hidden += self._skeleton.attention(layer, hidden, mask, frame.positions, frame.angles, cache)

    def _attend_in_pieces(self, layer: int, batch: int, sequences: slice, kv: KvBlock) -> None:
        """The same of sequences that decode: what surrounds the attention function can be replayed."""
        own, count = self.batches[batch], sequences.stop - sequences.start
        rows, frame = own.rows_of(sequences), self._abreast(batch, [own]).of(sequences)
        ends, hidden = self._ends(layer, rows, frame.positions, [self._room.held])
        start = partial(self._start, layer, rows, hidden, frame.positions, frame.angles)
        call = ends.begin(start, partial(self._taken, count))
        mask = self._mask_of(layer, own, sequences, self._device)
        call.attend(self._room.held, kv, sequences, own.past, mask, call.module)
        ends.finish(hidden, [(count, self._room.held)])

    def _attend_last(self, layer: int, own: Batch, sequences: slice, kv: KvBlock) -> None:
        """The same of each prompt's last token, as if it were the first to be decoded, once keys and values of all are cached."""
        skeleton, hidden, frame = self._skeleton, self._take(own, sequences), self._frame(own, sequences)
        skeleton.remember(layer, hidden, frame.positions, frame.angles, kv.cache(sequences, own.past))
        last, positions = hidden[:, -1:], frame.positions[:, -1:]
        cache = kv.cache(sequences, own.past + own.queries - 1)
        mask = skeleton.mask(layer, own.present(sequences, self._device), own.padded(sequences), 1, cache)
        last += skeleton.attention(layer, last, mask, positions, skeleton.rotary(positions), cache)

    def _taken(self, sequences: int, elements: int) -> Regions:
        return [(sequences, self._room.take(elements))]

    def _ends(
        self, layer: int, rows: slice, positions: torch.Tensor, regions: Iterable[torch.Tensor]
    ) -> tuple[Ends, torch.Tensor]:
        """The ends of decode attention of sequences, one a row, and where their x is: [B, 1, hidden]."""
        hidden = self._x[rows].view(-1, 1, self._skeleton.hidden)
        where = (part.data_ptr() for part in (positions, *regions))
        weights = self._skeleton.addresses("attention", layer)
        key = layer, rows.start, rows.stop, *self._addresses, *where, *weights
        return self._graphs.find(key, Ends), hidden

    def _start(self, layer: int, rows: slice, hidden: torch.Tensor, positions: torch.Tensor, angles: Any) -> Split:
        self._x[rows].copy_(self._wide[rows])
        forward = partial(self._skeleton.attention, layer, hidden, None, positions, angles, NewOnly(0))
        return Split(self._skeleton.config, forward)

    def _take(self, own: Batch, sequences: slice) -> torch.Tensor:
        """x of some sequences, which gets h in the compute dtype: [B, q, hidden]."""
        rows = own.rows_of(sequences)
        self._x[rows].copy_(self._wide[rows])
        return self._x[rows].view(-1, own.queries, self._skeleton.hidden)

    def _mask(
        self, layer: int, own: Batch, sequences: slice, frame: Frame, cache: Cache, device: torch.device
    ) -> torch.Tensor | None:
        """The mask of an attention call on ``device``, made once per frame and kind of layer."""
        kind = self._skeleton.sliding(layer), device
        if kind not in frame.masks:
            present, padded = own.present(sequences, device), own.padded(sequences)
            frame.masks[kind] = self._skeleton.mask(layer, present, padded, own.queries, cache)
        return frame.masks[kind]

    @torch.inference_mode()
    def project(self, layer: int, packed: Mapping[int, torch.Tensor], elsewhere: Container[int] = ()) -> None:
        """The first part of decode attention of batches in a row: queries, keys and values of the new tokens into each one's memory, flat.
        elsewhere: batches whose middle part is the CPU's."""
        batches, halted = [self.batches[number] for number in packed], list[Halted]()
        frame, first = self._abreast(next(iter(packed)), batches), batches[0].first
        self._asked |= {number: [] for number in packed}
        for rows in _split(slice(first, batches[-1].rows.stop), self._chunks.token_rows):
            parts = list(self._parts(packed, rows))
            regions = [(part.stop - part.start, region) for _, part, region in parts]
            some = frame.of(slice(rows.start - first, rows.stop - first))
            ends, hidden = self._ends(layer, rows, some.positions, [region for _, region in regions])
            start = partial(self._start, layer, rows, hidden, some.positions, some.angles)
            call = ends.begin(start, partial(_given, regions))
            halted.append(Halted(ends, hidden, regions))
            for number, part, _ in parts:
                there = HOST if number in elsewhere else self._device
                module = on_host(call.module) if number in elsewhere else call.module
                mask = self._mask_of(layer, self.batches[number], part, there)
                self._asked[number].append(Asked(part, call.of(part.stop - part.start), module, mask))
        self._halted[next(iter(packed))] = halted

    def _parts(self, packed: Mapping[int, torch.Tensor], rows: slice) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Of batches that decode, what one call of attention takes of some rows: batch, sequences, and their part of its memory."""
        for number, region in packed.items():
            own = self.batches[number]
            there = slice(max(rows.start, own.first) - own.first, min(rows.stop, own.rows.stop) - own.first)
            for part in _split(there, self._chunks.decode_batch):
                yield number, part, region[_region(region, own, part)]

    def _mask_of(self, layer: int, own: Batch, sequences: slice, device: torch.device) -> torch.Tensor | None:
        return self._mask(layer, own, sequences, self._frame(own, sequences), NewOnly(own.past), device)

    def _abreast(self, first: int, batches: Sequence[Batch]) -> Frame:
        """The frame of batches that decode, of which ``first`` is the number of the first one: made once per pass, in the same memory each
        time, which is never freed, for captured work may know it by its address alone."""
        key = first, *(own.size for own in batches)
        if key not in self._renewed:
            split = ((own, part) for own in batches for part in _split(slice(0, own.size), self._chunks.decode_batch))
            made = abreast([self._frame(own, part) for own, part in split])
            if key in self._frames:
                self._frames[key].renew(made.past, made.positions, made.angles)
            else:
                self._frames[key] = made
            self._renewed.add(key)
        return self._frames[key]

    @torch.inference_mode()
    def attend(self, batch: int, kv: KvBlock, packed: torch.Tensor) -> None:
        """The middle part for one of them: the mixed values take the place of the queries in ``packed``."""
        own = self.batches[batch]
        for part in self._asked.pop(batch):
            region = packed[_region(packed, own, part.sequences)]
            part.call.attend(region, kv, part.sequences, own.past, part.mask, part.module)

    @torch.inference_mode()
    def output(self, first: int) -> None:
        """The last part for what was projected with batch ``first`` as the first one, as ``attention`` leaves it: x <- h + the output
        projection."""
        for part in self._halted.pop(first):
            part.ends.finish(part.hidden, part.regions)

    @torch.inference_mode()
    def router(self, layer: int, batch: int, shared: bool = True) -> None:
        """wide <- h + base and x <- the experts' input, where h is x; notes the experts and weights of each token of one batch, or of
        several (``ops.batches_of``); in the last layer of each prompt's last token. shared: with what the shared expert adds."""
        self._make_room(self._routing.indices.shape[1])
        for rows in self._fed(layer, batch):
            routing = self._routing.indices, self._routing.weights
            piece = self._piece(batch, ("router", "shared") if shared else ("router",), layer, rows, routing)
            piece(partial(self._route, layer, rows, shared))
        for scope in [other for other in self._assignments if other == batch or min(other, batch) < 0]:
            del self._assignments[scope]  # it has this batch, or may have it
        self._routed = layer

    @torch.inference_mode()
    def shared(self, layer: int, batch: int) -> None:
        """wide += the shared expert of x, of batches that ``router`` has been through without it."""
        for rows in self._fed(layer, batch):
            self._piece(batch, ("shared",), layer, rows, ())(partial(self._share, layer, rows))

    @torch.inference_mode()
    def dense(self, layer: int, batch: int) -> None:
        """wide <- h + mlp(norm(h)) where h is x, of the batches that ``router`` would take."""
        for rows in self._fed(layer, batch):
            self._piece(batch, ("dense",), layer, rows, ())(partial(self._feed, layer, rows))

    def _piece(
        self, batch: int, kinds: tuple[str, ...], layer: int, rows: slice, others: Sequence[torch.Tensor]
    ) -> Callable[[Callable[[], None]], None]:
        """How work on some rows of x and wide with a layer's weights, and on others' memory, is done: in prefill just so."""
        if not all(own.past for own in self._scope(batch)):
            return _as_it_is
        weights = [address for kind in kinds for address in self._skeleton.addresses(kind, layer)]
        where = [part.data_ptr() for part in (self._x, self._wide, *others)]
        return self._graphs.find((kinds, layer, rows.start, rows.stop, *where, *weights), Piece)

    def _route(self, layer: int, rows: slice, shared: bool) -> None:
        hidden, routing = self._x[rows], self._routing
        routed = self._skeleton.moe_block(layer, hidden, shared)
        self._wide[rows].copy_(hidden)
        if shared:
            self._wide[rows].add_(routed.base)
        hidden.copy_(routed.x)
        self._make_room(routed.indices.shape[1])  # the first time; pieces that are replayed find it done
        routing.indices[rows] = routed.indices.int()
        routing.weights[rows] = routed.weights.to(self._wide.dtype)

    def _make_room(self, choices: int) -> None:
        """For the routing of all rows of x, in the place that it has if that is large enough."""
        held = self._routing
        if len(held.indices) < len(self._x) or held.indices.shape[1] != choices:
            shape = max(len(held.indices), len(self._x)), choices
            held.indices = torch.empty(shape, dtype=torch.int32, device=self._device)
            held.weights = torch.empty(shape, dtype=self._wide.dtype, device=self._device)

    def _share(self, layer: int, rows: slice) -> None:
        self._wide[rows].add_(self._skeleton.shared_block(layer, self._x[rows]))

    def _feed(self, layer: int, rows: slice) -> None:
        hidden = self._x[rows]
        self._wide[rows].copy_(hidden).add_(self._skeleton.dense_block(layer, hidden))

    def _fed(self, layer: int, batch: int) -> Iterator[slice]:
        """The rows of one batch, or of several, that go on after a layer's attention, some at a time."""
        own = self._scope(batch)
        if self._only_last(layer):
            for rows in (slice(b.first + b.queries - 1, b.rows.stop, b.queries) for b in own):
                yield from _split(rows, self._chunks.token_rows)
        elif own:
            yield from _split(slice(own[0].first, own[-1].rows.stop), self._chunks.token_rows)

    def _scope(self, batch: int) -> list[Batch]:
        """Of the batches that an op works on, those that are there."""
        return [self.batches[n] for n in batches_of(batch, max(self.batches) + 1) if n in self.batches]

    def _only_last(self, layer: int) -> bool:
        """Whether of each prompt only the last token goes on after a layer's attention."""
        last = layer == self._skeleton.layers - 1 and not self._every_token
        return last and any(batch.queries > 1 for batch in self.batches.values())

    @torch.inference_mode()
    def counts(self, layer: int, batch: int = ALL) -> list[int]:
        """Tokens routed to each expert, in one batch or several (``ops.batches_of``); their routers have run."""
        return self._assignment(layer, batch).counts

    @torch.inference_mode()
    def requests(self, layer: int, last: int = ALL) -> list[int]:
        """Experts that the batches up to number ``last`` (all) ask for, in the order of the first token that does."""
        order: dict[int, None] = {}
        for batch in (b for b in self.batches if last == ALL or b <= last):
            assignment = self._assignment(layer, batch)
            asked = [expert for expert, count in enumerate(assignment.counts) if count]
            first = assignment.rows[[assignment.starts[expert] for expert in asked]].tolist()
            order.update(dict.fromkeys(expert for _, expert in sorted(zip(first, asked, strict=True))))
        return list(order)

    @torch.inference_mode()
    def experts(self, layer: int, experts: Sequence[tuple[int, Parts]], batch: int = ALL) -> None:
        """wide += weight x expert(x) for the tokens of one batch, or of several, that chose these experts.

        Sums are formed in the wide type and rounded to the compute dtype once, by the next op. Before that rounding two
        orders of the same expert ops differ by about 2^-53 (fp32) or 2^-24 (bf16) of the sum, and the rounding hides
        this unless the sum lies as close to a rounding boundary: in fp32 the order of expert ops cannot be seen.
        """
        self._add_experts(self._kernels, layer, experts, self._assignment(layer, batch), self._x, self._wide)

    @torch.inference_mode()
    def send(self, rows: torch.Tensor) -> None:
        """What experts elsewhere need: their input into ``rows``, flat, and who is routed to whom."""
        rows[: self._x.numel()].view(self._x.shape).copy_(self._x, non_blocking=True)
        # Not the one that the other experts use: on a GPU that is another stream's.
        self._sent = self._assign(self._routed, ALL).to(HOST)

    @torch.inference_mode()
    def experts_elsewhere(
        self, layer: int, experts: Sequence[tuple[int, Parts]], rows: torch.Tensor, sums: torch.Tensor
    ) -> None:
        """sums <- the sum of weight x expert(rows) in the wide type, for all tokens of the group; both flat."""
        shape = self._wide.shape
        x, out = rows[: self._x.numel()].view(shape), sums[: self._wide.numel()].view(shape)
        self._elsewhere = self._elsewhere or self._make_kernels(HOST, self._skeleton.make_own_kernels())
        self._add_experts(self._elsewhere, layer, experts, self._sent, x, out.zero_())

    @torch.inference_mode()
    def add(self, sums: torch.Tensor) -> None:
        """wide += ``sums``, flat."""
        self._wide += sums[: self._wide.numel()].view(self._wide.shape)

    def _add_experts(
        self,
        kernels: Kernels,
        layer: int,
        experts: Sequence[tuple[int, Parts]],
        assignment: Assignment,
        x: torch.Tensor,
        into: torch.Tensor,
    ) -> None:
        module, alone = self._skeleton.experts(layer), kernels.alone
        if into.is_cuda:
            experts = self._add_together(alone[0], module, experts, assignment, x, into)
        elif kernels.own:
            experts = kernels.own.add(module, experts, assignment, x, into)
        each = assignment.of_each

        def add(expert: int, stored: Parts, piece: slice, worker: int | None) -> None:
            parts = {name: part if part.dtype == x.dtype else part.to(x.dtype) for name, part in stored.items()}
            rows, weights, _ = each[expert]
            if piece.stop - piece.start < len(rows):
                own = slice(piece.start - assignment.starts[expert], piece.stop - assignment.starts[expert])
                rows, weights = rows[own], weights[own]
            out = alone[worker or 0].run(module, parts, x, rows, weights, worker)
            with self._adding:
                into.index_add_(0, rows, out)

        def add_share(share: Sequence[tuple[int, slice]], worker: int | None) -> None:
            for number, rows in share:
                for piece in _split(rows, alone[0].rows):
                    add(*experts[number], piece, worker)

        chosen = [slice(assignment.starts[expert], assignment.starts[expert + 1]) for expert, _ in experts]
        if len(alone) > 1 and rows_worth(chosen) * alone[0].flops_per_row >= WORTH_SHARING:
            self._skeleton.workers.run([partial(add_share, share) for share in shares(chosen, len(alone))])
        else:
            add_share(list(enumerate(chosen)), None)

    def _add_together(
        self,
        kernel: ExpertKernel,
        module: Any,
        experts: Sequence[tuple[int, Parts]],
        assignment: Assignment,
        x: torch.Tensor,
        into: torch.Tensor,
    ) -> Sequence[tuple[int, Parts]]:
        """As many of an op's experts as a GPU can take in a few kernels, where nothing is gained by taking them one by one; returns the
        others."""
        count = sum(assignment.starts[expert + 1] - assignment.starts[expert] for expert, _ in experts)
        if len(experts) < 2 or not 0 < count <= kernel.rows or x.dtype != torch.bfloat16 or not is_common(module):
            return experts
        runs, alone = self._runs([parts for _, parts in experts])
        for places, weights in runs:
            parts = zip(*[assignment.of_each[experts[place][0]] for place in places], strict=True)
            rows, shares, sizes = (torch.cat(part) for part in parts)
            if not len(rows):
                continue
            ends = sizes.cumsum(0, dtype=torch.int32)
            # A token may have chosen two of them: which is added first may differ from run to run, by what the wide type rounds.
            into.index_add_(0, rows, kernel.run_together(module, weights, x, rows, shares, ends))
        return [experts[place] for place in alone]

    def _runs(self, parts: Sequence[Parts]) -> Runs:
        """``runs`` of them; found once, for slots keep the views of what they hold."""
        name = tuple(map(id, parts))
        if name not in self._found:
            self._found[name] = parts, runs(parts)
        return self._found[name][1]

    @torch.inference_mode()
    def final(self) -> None:
        """Normed hidden states of every sequence's last position: what ``head`` multiplies."""
        last = [
            torch.arange(b.first + b.queries - 1, b.rows.stop, b.queries, device=self._device)
            for b in self.batches.values()
        ]
        self._head.begin(self._skeleton.norm(self._wide[torch.cat(last)].to(self._skeleton.compute_dtype)))

    def head(self, first: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Compare the logits of words ``first`` onwards, whose rows are ``weight`` [words, hidden], with the best yet."""
        self._head.page(first, weight, bias)

    def sample(self) -> torch.Tensor:
        """The most likely next token of every sequence of the group [sequences]: the next pass's input.

        Raises ExecError where no page gave a sequence a finite logit.
        """
        tokens, sizes = self._head.tokens(), [batch.size for batch in self.batches.values()]
        for batch, ids in zip(self.batches.values(), torch.split(tokens, sizes), strict=True):
            batch.advance(ids)
        return tokens

    @property
    def _gather(self) -> RowGather:
        assert self._embedding is not None, "the embedding is neither bound nor readable"
        return self._embedding

    def _frame(self, batch: Batch, sequences: slice) -> Frame:
        """The frame of one attention call: made once per pass in decode. In prefill the masks of a batch would take
        B x T x T bytes, so there a frame lives for one call.
        """
        key = sequences.start, sequences.stop
        frame = batch.frames.get(key)
        if frame and frame.past == batch.past:
            return frame
        new = torch.arange(batch.past, batch.past + batch.queries, device=self._device)
        positions = (new - batch.pads[self._device][sequences, None]).clamp(min=0)
        angles = self._skeleton.rotary(positions)
        if frame:
            frame.renew(batch.past, positions, angles)
            return frame
        frame = Frame(batch.past, positions, angles)
        if batch.past:
            batch.frames[key] = frame
        return frame

    def _assignment(self, layer: int, batch: int) -> Assignment:
        """The assignment of a scope, sorted on first use after its routers."""
        if batch not in self._assignments:
            self._assignments[batch] = self._assign(layer, batch)
        return self._assignments[batch]

    def _assign(self, layer: int, batch: int) -> Assignment:
        scope = self._scope(batch)
        rows = slice(scope[0].first, scope[-1].rows.stop)
        # Padding is at the beginning: what is new in decode is a token.
        only_last = self._only_last(layer)
        whole = not only_last and all(b.past or not b.padded(slice(None)) for b in scope)
        presence = (b.last(self._device) if only_last else b.new(self._device) for b in scope)
        present = None if whole else torch.cat([part.flatten() for part in presence])
        return Assignment.of(
            self._routing.indices[rows],
            self._routing.weights[rows].contiguous(),
            present,
            rows.start,
            self._skeleton.num_experts(layer),
        )


def _as_it_is(work: Callable[[], None]) -> None:
    work()


def _split(rows: slice, limit: int) -> Iterator[slice]:
    """``rows`` in pieces of at most ``limit``."""
    step = rows.step or 1
    starts = range(rows.start, rows.stop, limit * step)
    return (slice(begin, min(begin + limit * step, rows.stop), rows.step) for begin in starts)


def _given(regions: Regions, _: int) -> Regions:
    return regions


def _region(packed: torch.Tensor, own: Batch, sequences: slice) -> slice:
    """Where a packed batch has what belongs to some of its sequences."""
    width = len(packed) // own.size
    return slice(sequences.start * width, sequences.stop * width)
