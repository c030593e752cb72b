"""What every op costs: microseconds and bytes from the model, the machine and the routing; no state, no schedule.

Transfer: latency + bytes / bandwidth. Matmul: ``hardware.matmul_us``. Decode attention: KV bytes over the measured rate.
One deterministic model serves forecast and bound (design 7.1, 7.2): a load that is issued before the router costs its full
bytes, one that is bound after it the bytes of the experts that are expected to be touched.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from klotski_compiler.hardware import Hardware, Processor, head_us, matmul_us
from klotski_compiler.kernel_facts import DTYPE_BYTES, FEW_ROWS, FIXED_ROWS, OWN_STEP, ROW_READERS, ROW_STEP
from klotski_compiler.model import Layer, ModelSpec, Module
from klotski_compiler.ops import ALL, CPU, Bind, Compute, Load, Op, Store, Tensor, batches_of, onward, span
from klotski_compiler.routing import Routing
from klotski_compiler.shape import Shape

ROW_OPS = 6  # small ops that a row takes: to ask a reader for it, and to copy it from the page that holds it
LOAD_OPS = 10  # small ops that a load from disk is worth: to hand pieces to readers, to bind what has arrived
BIND_OPS = 20  # small ops that binding picks is worth: to sort a layer's tokens by expert
ATTEND_OPS = 4  # launches that a GPU's attention to one batch takes between what surrounds that of all: new keys, values; the mix
SPILL_OPS = 50  # small ops that handing one batch's KV to the disk, and waiting for it, is worth
PICKED_DIGITS = 9


@dataclass(frozen=True, eq=False)
class Cost:
    """Prices ops of one model on one machine under one routing. All times in microseconds."""

    spec: ModelSpec
    hardware: Hardware
    routing: Routing
    dtype: str

    @cached_property
    def processor_name(self) -> str:
        """The processor of the compute tier; also the name of its stream."""
        return next(n for n, p in self.hardware.processors.items() if p.tier == self.hardware.compute_tier)

    @cached_property
    def processor(self) -> Processor:
        """The processor that computes in the compute tier."""
        return self.hardware.processors[self.processor_name]

    def processor_of(self, name: str) -> Processor:
        """That processor, or where no name is given the compute tier's."""
        return self.hardware.processors[name] if name else self.processor

    @cached_property
    def links(self) -> tuple[str, str]:
        """The links into the compute tier and back."""
        return ("host>gpu", "gpu>host") if self.hardware.compute_tier == "gpu" else ("disk>host", "host>disk")

    @cached_property
    def layers(self) -> Counter[Layer]:
        """The model's layers: those that differ, and how many there are of each."""
        return Counter(self.spec.layers)

    @cached_property
    def cpu_helps(self) -> bool:
        """Whether a CPU may compute beside a GPU."""
        return self.hardware.compute_tier == "gpu" and CPU in self.hardware.processors

    @cached_property
    def cpu_attends(self) -> bool:
        """Whether that holds for attention: a latent cache would have to be expanded on the CPU, to some 70 times its size."""
        return self.cpu_helps and not any(layer.expand_flops for layer in self.layers)

    @property
    def compute_bytes(self) -> int:
        """Bytes of one value in the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def picked(self) -> tuple[tuple[float, ...], ...]:
        """Per layer and expert the probability that a token picks it, rounded: what differs by rounding only is equal."""
        return tuple(
            tuple(round(min(1.0, layer.top_k * p), PICKED_DIGITS) for p in shares)
            for layer, shares in zip(self.spec.layers, self.routing.popularity, strict=True)
        )

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each layer the number of its kind: those alike have equal parts, and experts that are picked alike."""
        known = dict[tuple[Layer, tuple[float, ...]], int]()
        return tuple(known.setdefault(pair, len(known)) for pair in zip(self.spec.layers, self.picked, strict=True))

    @lru_cache(maxsize=4096)  # noqa: B019 - one Cost lives as long as its compilation
    def experts(self, layer: int, tokens: int) -> tuple[tuple[float, float], ...]:
        """For each expert of a layer (expected tokens, probability of being touched) when ``tokens`` tokens are routed."""
        return tuple((tokens * q, 1.0 - (1.0 - q) ** tokens) for q in self.picked[layer])

    @lru_cache(maxsize=4096)  # noqa: B019
    def popular(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer, most popular first (ties by number)."""
        return tuple(sorted(range(len(self.picked[layer])), key=lambda e: (-self.picked[layer][e], e)))

    def sharing(self, utilisation: dict[str, float]) -> dict[str, float]:
        """How many times as long ops take on each stream, given the share of time for which each stream is busy.

        Streams that use one memory slow each other down while both are busy; on average an op of one meets the other as often as
        that is busy.
        """
        slower = dict[str, float]()
        for stream in utilisation:
            more = max(min(1.0, share) * self._slowdown(stream, other) for other, share in utilisation.items())
            if more and utilisation[stream]:
                slower[stream] = 1 + more
        return slower

    def drag(self, stream: str, other: str) -> float:
        """What share of the other stream's busy time, at least, a stream's work takes longer because both use one memory. With C and L
        busy alone, u = L / T and s the slowdown, T >= C (1 + s u); for u <= 1 that implies T >= C + s / (1 + s) L."""
        slower = self._slowdown(stream, other)
        return slower / (1 + slower)

    def _slowdown(self, stream: str, other: str) -> float:
        """By what share of its time an op of a stream takes longer while the other stream is busy: measured for the processor of
        the compute tier and the links into it, and for a GPU beside the CPU; else what both together ask of host memory beyond its
        rate."""
        processors, links = self.hardware.processors, self.hardware.links
        if (stream, other) == (self.processor_name, CPU) and self.cpu_helps:
            return 1 / self.processor.beside_cpu - 1
        for name, link in ((stream, other), (other, stream)):
            if name == self.processor_name and link in links and link.endswith(f">{self.hardware.compute_tier}"):
                return 1 / (processors[name] if name == stream else links[link]).shared_speed - 1
            if name in processors and processors[name].tier == "host" and link in links and "host" in link.split(">"):
                asked = processors[name].kv_bytes_per_s + links[link].bandwidth_bytes_per_s
                return max(0.0, asked / processors[name].memory_bytes_per_s - 1)
        return 0.0

    # ------------------------------------------------------------------------------------------ single modules

    def transfer_us(self, link: str, nbytes: float) -> float:
        """latency + bytes / bandwidth; nothing costs nothing."""
        engine = self.hardware.links[link]
        return engine.latency_us + 1e6 * nbytes / engine.bandwidth_bytes_per_s if nbytes > 0 else 0.0

    def load_op_us(self, link: str) -> float:
        """What a load of weights takes whatever it brings."""
        return self.hardware.links[link].latency_us + self._arrival_us(link)

    def _arrival_us(self, link: str) -> float:
        """What handing a load to readers and binding it takes."""
        return LOAD_OPS * self.processor.op_us if link == "disk>host" else 0.0

    @property
    def bind_us(self) -> float:
        """Binding a layer's picks."""
        return BIND_OPS * self.processor.op_us

    def kv_us(self, link: str, nbytes: float) -> float:
        """KV of one layer and batch; each transfer waits for the disk."""
        waits = SPILL_OPS * self.processor.op_us if "disk" in link and nbytes > 0 else 0.0
        return self.transfer_us(link, nbytes) + waits

    def module_us(self, module: Module, tokens: float, processor: Processor | None = None) -> float:
        """The matmuls of a module over ``tokens`` tokens; weights are read once from the processor's tier."""
        if module.flops_per_token == 0:
            return 0.0
        params = module.flops_per_token // 2
        return matmul_us(processor or self.processor, self.dtype, tokens, params, params * self.compute_bytes)

    def head_us(self, sequences: float) -> float:
        """The head over one position of each sequence."""
        params = self.spec.head.flops_per_token // 2
        return head_us(self.processor, self.dtype, sequences, params, params * self.compute_bytes)

    def elementwise_us(self, elements: float) -> float:
        """Norm, residual and copies of one block over its input's ``elements``."""
        return 1e6 * elements * self.compute_bytes / self.processor.hidden_bytes_per_s

    def projections_us(self, layer: Layer, tokens: float) -> float:
        """What attention does for ``tokens`` tokens but for the fixed cost, the keys and the values of others."""
        return self.module_us(layer.attention, tokens) + self._around_attention_us(layer, tokens)

    def _around_attention_us(self, layer: Layer, tokens: float) -> float:
        """Elementwise work of attention: over its input and over all heads."""
        return self.elementwise_us(tokens * (self.spec.hidden_size + layer.attention_flops // 4))

    def keys_us(self, layer: Layer, tokens: float) -> float:
        """Keys and values of ``tokens`` tokens, and nothing else of attention."""
        share = self.spec.hidden_size * layer.kv_elements / layer.attention.params
        matmuls = self.module_us(layer.attention, tokens) * share
        return self.processor.attention_op_us / 2 + matmuls + self._around_attention_us(layer, tokens)

    def attention_us(self, layer: Layer, shape: Shape, context: float, batch: int = 0) -> float:
        """One batch through attention: projections, then keys and values of ``context`` positions (decode) or all pairs."""
        tokens_each, context = shape.tokens_of(batch), shape.context_of(batch, context)
        sequences = shape.size_of(batch)
        calls = -(-sequences // shape.most_attended(batch))
        tokens = sequences / calls * tokens_each
        if layer.last and tokens_each > 1:  # of these the last one attends, once keys and values of all are there
            decoded = self.projections_us(layer, sequences / calls) + self.attend_us(
                layer, sequences / calls, context, self.processor
            )
            return calls * (self.keys_us(layer, tokens) + self.processor.attention_op_us + decoded)
        fixed = self.processor.attention_op_us + self.projections_us(layer, tokens)
        if tokens_each == 1:
            return calls * (fixed + self.attend_us(layer, sequences / calls, context, self.processor))
        flops = tokens * context * layer.attention_flops
        return calls * (fixed + 1e6 * flops / self.processor.prefill_attention_flops_per_s)

    def attended_us(self, layer: Layer, shape: Shape, context: float, batch: int) -> float:
        """The GPU's attention to one batch that decodes, between what surrounds that of all."""
        sequences = shape.size_of(batch)
        calls = -(-sequences // shape.most_attended(batch))
        seen = self.attend_us(layer, sequences, shape.context_of(batch, context), self.processor)
        return calls * ATTEND_OPS * self.processor.op_us + seen

    def attentions_us(self, layer: Layer, shape: Shape, context: float) -> float:
        """All batches through attention."""
        total, decoding = 0.0, shape.scope_tokens(onward(shape.first_decoding)) if shape.together else 0
        if decoding:
            total += self.project_us(layer, decoding) + self.output_us(layer, decoding)
        for count, batch in shape.alike:
            apart = not shape.together or not shape.decodes(batch)
            total += count * (self.attention_us if apart else self.attended_us)(layer, shape, context, batch)
        return total

    def project_us(self, layer: Layer, sequences: int) -> float:
        """The first part of a block whose keys and values the CPU reads: norm, queries, keys and values of the new tokens."""
        return (
            self.processor.attention_op_us / 2
            + self.projections_us(layer, sequences)
            - self._mixing_us(layer, sequences)
        )

    def output_us(self, layer: Layer, sequences: int) -> float:
        """The last part of such a block: the output projection."""
        return self.processor.attention_op_us / 2 + self._mixing_us(layer, sequences)

    def _mixing_us(self, layer: Layer, sequences: int) -> float:
        """The output projection's share of the projections, by its parameters."""
        params = layer.attention_flops // 4 * self.spec.hidden_size
        return self.module_us(layer.attention, sequences) * params / layer.attention.params

    def sums_us(self, tokens: float) -> float:
        """Adding what experts on the CPU computed: two reads and a write in twice the compute width."""
        nbytes = 6 * tokens * self.spec.hidden_size * self.compute_bytes
        return 1e6 * nbytes / self.processor.memory_bytes_per_s

    def attend_us(self, layer: Layer, sequences: float, context: float, processor: Processor) -> float:
        """Keys and values of ``context`` positions, one new token of each sequence: what a processor reads, and expands."""
        seen = min(context, layer.sliding_window) if layer.sliding_window else context
        kv_bytes = sequences * seen * layer.kv_elements * self.compute_bytes
        core = 1e6 * kv_bytes / processor.kv_bytes_per_s
        if layer.expand_flops:
            core += matmul_us(processor, self.dtype, sequences * seen, layer.expand_flops // 2, 0)
        return core

    def expert_us(self, layer: int, expert: int, tokens: int, processor: str = "") -> float:
        """One expert over its share of ``tokens`` routed tokens: expected cost, gather and scatter included."""
        return self.experts_us(layer, tokens, processor)[expert]

    def expert_parts_us(self, layer: int, expert: int, shape: Shape, first: int) -> tuple[float, float, float]:
        """One expert over the batches before ``first``, over the others, and over all of them at once."""
        fed = [shape.fed_tokens(scope, self.spec.layers[layer]) for scope in (span(0, first), onward(first), ALL)]
        early, later, whole = (self.expert_us(layer, expert, tokens) for tokens in fed)
        return early, later, whole

    @lru_cache(maxsize=4096)  # noqa: B019
    def experts_us(self, number: int, tokens: int, processor: str = "") -> tuple[float, ...]:
        """The same for every expert of a layer; those that are equally popular are priced once."""
        layer, shares = self.spec.layers[number], self.experts(number, tokens)
        each = {share: self.expert_share_us(layer, *share, processor) for share in set(shares)}
        return tuple([each[share] for share in shares])

    def expert_share_us(self, layer: Layer, share: float, touched: float, name: str = "") -> float:
        """One expert of a layer over ``share`` tokens in the mean, where it is asked for with probability ``touched``."""
        if touched <= 0 or layer.expert is None:
            return 0.0
        processor = self.processor_of(name)
        moved = share * self.spec.hidden_size * 8 * self.compute_bytes  # gather (2) and add in twice the width (6)
        rows = share / touched
        rows += self._surplus(processor, rows)
        busy = processor.expert_op_us + self.module_us(layer.expert, rows, processor)
        return touched * busy + 1e6 * moved / processor.memory_bytes_per_s

    def experts_op_us(self, layer: Layer, processor: str = "") -> float:
        """What an op of experts takes whatever they are: where PyTorch multiplies, workers of a CPU share their rows evenly, so that the
        weights of one that is cut are read twice."""
        own = self.processor_of(processor)
        if (
            own.tier != "host"
            or own.threads == 1
            or layer.expert is None
            or (own.least_own_rows and self.compute_bytes == 2)
        ):
            return own.op_us
        return own.op_us + self.module_us(layer.expert, FIXED_ROWS, own)

    def _surplus(self, processor: Processor, rows: float) -> float:
        """How many more rows an expert computes than it has tokens, in the mean: with the CPU's 16-bit kernels."""
        if processor.tier != "host" or self.compute_bytes != 2 or rows <= FEW_ROWS:
            return 0.0
        own = 0 < processor.least_own_rows <= rows  # beyond most_own_rows rounding is next to nothing
        return (OWN_STEP if own else ROW_STEP) / 2

    # ------------------------------------------------------------------------------------------------------------ ops

    def op_us(self, op: Op, tensors: list[Tensor], shape: Shape, context: float, late: dict[int, list[int]]) -> float:
        """Expected time of an op at ``context`` cached positions. ``late[layer]``: the experts that picks range over,
        most popular first, so that pick r is priced as the r-th of them. What is for a batch that is not there takes no time."""
        match op:
            case Compute():
                there = op.batch == ALL or any(map(shape.has, batches_of(op.batch, shape.batches)))
                return self._compute_us(op, tensors, shape, context, late) if there else 0.0
            case Load() | Store():
                kind = tensors[op.tensors[0]].kind
                nbytes = self.moved_bytes(op, tensors, shape, context, late)
                if kind == "kv":
                    return self.kv_us(op.link, nbytes)
                return self.transfer_us(op.link, nbytes) + (self._arrival_us(op.link) if nbytes > 0 else 0.0)
            case Bind():
                return self.bind_us

    def moved_bytes(
        self, op: Load | Store, tensors: list[Tensor], shape: Shape, context: float, late: dict[int, list[int]]
    ) -> float:
        """Bytes that a load or store is expected to move: KV up to the current position, late experts if touched."""
        total, pages = 0.0, op.pages if isinstance(op, Load) else None
        for tensor in [tensors[t] for t in op.tensors]:
            kind = tensor.kind
            if kind == "expert":  # as nearly all are
                total += tensor.moved_bytes(pages)
            elif kind in ("kv", "query") and not shape.has(tensor.index):
                continue
            elif kind == "kv":
                new = shape.tokens_of(tensor.index)
                positions = shape.context_of(tensor.index, context) - new if isinstance(op, Load) else new
                total += (
                    shape.size_of(tensor.index)
                    * positions
                    * self.spec.layers[tensor.layer].kv_elements
                    * self.compute_bytes
                )
            elif kind == "query" and isinstance(op, Load):
                total += (
                    shape.size_of(tensor.index)
                    * max(x.attention_flops for x in self.spec.layers)
                    // 4
                    * self.compute_bytes
                )
            elif kind == "pick":
                expert = late[tensor.layer][tensor.index]
                fed = shape.fed_tokens(ALL, self.spec.layers[tensor.layer])
                total += tensor.nbytes * self.experts(tensor.layer, fed)[expert][1]
            else:
                total += tensor.moved_bytes(pages)
        return total

    def _compute_us(
        self, op: Compute, tensors: list[Tensor], shape: Shape, context: float, late: dict[int, list[int]]
    ) -> float:
        processor = self.hardware.processors[op.stream]
        after = op.fn in ("router", "shared", "dense", "experts")
        tokens = shape.fed_tokens(op.batch, self.spec.layers[op.layer]) if after else shape.scope_tokens(op.batch)
        fixed = processor.op_us
        match op.fn:
            case "attention":
                return self.attention_us(self.spec.layers[op.layer], shape, context, op.batch)
            case "project":
                return self.project_us(self.spec.layers[op.layer], tokens)
            case "attend":
                if processor is self.processor:
                    return self.attended_us(self.spec.layers[op.layer], shape, context, op.batch)
                seen = shape.context_of(op.batch, context)
                return fixed + self.attend_us(self.spec.layers[op.layer], shape.size_of(op.batch), seen, processor)
            case "output":
                return self.output_us(self.spec.layers[op.layer], tokens)
            case "add":
                return fixed + self.sums_us(tokens)
            case "router":
                named = any(tensors[i].kind == "shared" for i in op.tensors)
                price = self.mlp_us if named else self.router_us
                return price(self.spec.layers[op.layer], tokens)
            case "shared":
                return self.shared_us(self.spec.layers[op.layer], tokens)
            case "dense":
                return self.dense_us(self.spec.layers[op.layer], tokens)
            case "experts":
                each, own = self.experts_us(op.layer, tokens, op.stream), 0.0
                for tensor in [tensors[i] for i in op.tensors]:
                    if tensor.kind == "expert":
                        own += each[tensor.index]
                    elif tensor.kind == "pick":
                        own += each[late[op.layer][tensor.index]]
                return own + self.experts_op_us(self.spec.layers[op.layer], op.stream)
            case "head":
                page = tensors[op.tensors[0]]
                end = page.id + 1  # its pages follow one another, and something follows them
                while tensors[end].kind == "head":
                    end += 1
                return fixed + self.head_us(shape.sequences) / (end - page.id + page.index)
            case "embed":
                return fixed + self.embed_us(tokens, bool(op.tensors))
        return fixed

    def routers_us(self, layer: Layer, shape: Shape) -> float:
        """All batches through router and shared expert, or through the dense MLP."""
        return sum(count * self.mlp_us(layer, shape.fed_tokens(batch, layer)) for count, batch in shape.alike)

    def mlp_us(self, layer: Layer, tokens: float) -> float:
        """What comes before the experts of a layer, or in their place: router and shared expert, or the dense MLP."""
        return self.choice_us(layer, tokens) + self.shared_us(layer, tokens)

    def choice_us(self, layer: Layer, tokens: float) -> float:
        """Of that, what must be done before any expert is known: the router, or the dense MLP."""
        return (self.router_us if layer.expert else self.dense_us)(layer, tokens)

    def router_us(self, layer: Layer, tokens: float) -> float:
        """Norm, gate and choice."""
        gate = self.module_us(layer.router, tokens) if layer.router else 0.0
        return self.processor.router_op_us + self.elementwise_us(tokens * self.spec.hidden_size) + gate

    def shared_us(self, layer: Layer, tokens: float) -> float:
        """The shared expert, if there is one."""
        return self.processor.op_us + self.module_us(layer.shared, tokens) if layer.shared else 0.0

    def dense_us(self, layer: Layer, tokens: float) -> float:
        """The MLP of a dense layer."""
        matmuls = self.module_us(layer.dense, tokens) if layer.dense else 0.0
        return self.processor.op_us + self.elementwise_us(tokens * self.spec.hidden_size) + matmuls

    def embed_us(self, tokens: int, resident: bool) -> float:
        """Rows of the embedding: from the compute tier, from host memory before a GPU, or from disk: one by one while they are few, so
        many that all of it passes by at most."""
        row_bytes = self.spec.hidden_size * self.compute_bytes
        if self.hardware.compute_tier == "gpu" and not resident:
            return self.transfer_us("host>gpu", tokens * row_bytes)
        if resident or "disk>host" not in self.hardware.links:
            return 1e6 * tokens * row_bytes / self.processor.memory_bytes_per_s
        each = self.transfer_us("disk>host", row_bytes) / ROW_READERS + ROW_OPS * self.processor.op_us
        return min(tokens * each, self.transfer_us("disk>host", self.spec.vocab_size * row_bytes))
