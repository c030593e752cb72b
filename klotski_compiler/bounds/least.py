"""The least that ops take, however work is cut into them: what the bounds are made of (design 7.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import floor, inf, log

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Workload
from klotski_compiler.hardware import Processor, matmul_us
from klotski_compiler.kernel_facts import FEW_ROWS
from klotski_compiler.model import Layer
from klotski_compiler.ops import CPU
from klotski_compiler.tensors import MODULES, rows_bytes, sums_bytes

EXACT_SHARES = 256  # so many different experts are bounded one by one
ROUNDING = 1.01
ROUNDED = 1e-9  # what a quotient may be off by
SPANS, GROWN = 4, 1.2  # decode whose context grows by more than that factor is bounded in so many spans
SCALE_US = 1e6  # of times in linear programs: they run to 1e9 microseconds beside shares of one, and solvers want both near one
PREFILL, DECODE = 0, 1  # kinds of passes, as indices of a weight's work

Cores = list[tuple[float, float]]  # reading keys and values, of each kind of attention: on the processor and on the CPU


@dataclass(frozen=True, slots=True)
class Weight:
    """What a tier may keep. nbytes: room. Then, per kind of passes (prefill, decode), what the whole workload takes: moved_bytes, what
    crosses a link if it is not kept; far_bytes, what crosses the disk's link if it lives on disk before a GPU, empty where it cannot;
    compute_us, work of the compute tier's processor; cpu_us, of the CPU, were it computed there, infinite where it cannot be.

    Of decode beside a CPU, see ``apart.Relaxation``: split_us as compute_us, if no op covers all sequences but a few; most_us, of an op
    that does; alone_us as cpu_us, without waiting for attention."""

    nbytes: float
    moved_bytes: tuple[float, ...]
    compute_us: tuple[float, ...]
    cpu_us: tuple[float, ...] = (inf, inf, inf, inf)
    far_bytes: tuple[float, ...] = ()
    split_us: float = 0.0
    most_us: float = 0.0
    alone_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Attention:
    """Layers that attend alike: (layer, how many are like it). Of all of them, bytes of a position's keys and values, and of what a token's
    attention yields."""

    layers: tuple[tuple[Layer, int], ...]
    position_bytes: int
    mixed_bytes: int

    @property
    def count(self) -> int:
        """Layers."""
        return sum(n for _, n in self.layers)


class Least:
    """The workload on the machine: what all groups take at least, if they have between ``low`` and ``high`` sequences each."""

    def __init__(self, cost: Cost, workload: Workload, budgets: dict[str, int]) -> None:
        """budgets: bytes of each tier; a tier that is not named has what the machine has."""
        self.cost, self.workload, spec = cost, workload, cost.spec
        self.tier = cost.hardware.compute_tier
        self.budget = {t: budgets.get(t, tier.capacity_bytes) for t, tier in cost.hardware.tiers.items()}
        self.passes = workload.gen_len - 1  # of decode, per group
        prompt = workload.prompt_len
        self.contexts = (prompt + 1, prompt + self.passes)  # first and last; phases are timed at both (``simulate``)
        self.layers = list(cost.layers.items())
        self.experts, self.routed = self._experts()
        self.attentions = self._attentions()
        self.kv_position = sum(kind.position_bytes for kind in self.attentions)
        modules = [m for layer in spec.layers for kind in MODULES if (m := getattr(layer, kind))]
        self.module_bytes = sum(m.nbytes for m in modules) + spec.head.nbytes
        grows = self.passes >= SPANS and self.contexts[1] > GROWN * self.contexts[0]
        self.spans = SPANS if grows else 0
        self.expert_bytes = spec.expert_bytes

    def _experts(self) -> tuple[list[tuple[Layer, float, int]], list[Counter[int]]]:
        """(layer, q, count): experts that a token picks with probability q, rounded down to a percent where many
        differ. Then of every layer that routes, how many of these entries each has."""
        found: dict[tuple[int, float], int] = {}
        routed = []
        # The hash of a layer is that of all its parts, so that it is taken once and not for each expert.
        kinds = {layer: kind for kind, (layer, _) in enumerate(self.layers)}
        numbers = (kinds[layer] for layer in self.cost.spec.layers)
        pairs = list(zip(numbers, self.cost.picked, strict=True))
        rounded = len({(kind, q) for kind, popular in pairs for q in popular}) > EXACT_SHARES
        for kind, popular in pairs:
            shares = [ROUNDING ** floor(log(q, ROUNDING)) if rounded else q for q in popular if q > 0]
            if shares:
                routed.append(Counter(found.setdefault((kind, q), len(found)) for q in shares))
        counts = sum(routed, Counter[int]())
        return [(self.layers[kind][0], q, counts[number]) for (kind, q), number in found.items()], routed

    def _attentions(self) -> list[Attention]:
        """By what an op does with keys and values: what is best for one kind of layers is not for another."""
        alike: dict[tuple[int | None, ...], list[tuple[Layer, int]]] = {}
        for layer, n in self.layers:
            kind = (layer.sliding_window, layer.kv_elements, layer.attention_flops, layer.expand_flops)
            alike.setdefault(kind, []).append((layer, n))
        found = []
        for layers in alike.values():
            elements = sum(n * layer.kv_elements for layer, n in layers)
            mixed = sum(n * (layer.attention_flops // 4) for layer, n in layers)
            found.append(Attention(tuple(layers), *(each * self.cost.compute_bytes for each in (elements, mixed))))
        return found

    @property
    def positions(self) -> int:
        """Positions that a sequence's KV is reserved for."""
        return self.workload.prompt_len + self.workload.gen_len

    def _least(
        self,
        per_pass: Callable[[int], float],
        tokens: int,
        first: int,
        low: int,
        high: int,
        evened: Callable[[int], float] | None = None,
    ) -> float:
        """Of what every group does on all its sequences, ``tokens`` of each. evened: no more than that, and what a token takes does not
        grow with their number."""
        even = evened or per_pass
        return max(first * per_pass(low * tokens), self.workload.num_sequences * even(high * tokens) / high)

    def _fed(self, layer: Layer) -> int:
        """Tokens of each prompt that go on after a layer's attention."""
        return 1 if layer.last else self.workload.prompt_len

    def compute_us(self, first: int, low: int, high: int) -> tuple[float, float]:
        """Least work of the processor beside experts and cached keys and values, in all prefills and in all decodes."""
        head = self._least(self.cost.head_us, 1, first, low, high)
        prefill = self._least(self._whole_us, self.workload.prompt_len, first, low, high) + head + self.pairs_us()
        prefill += sum(
            count * self._least(partial(self.cost.mlp_us, layer), self._fed(layer), first, low, high)
            for layer, count in self.layers
        )
        return prefill, self.passes * (self._least(self._pass_us, 1, first, low, high) + head)

    def cores_us(self, high: int, span: tuple[float, float] = (0.0, 1.0)) -> Cores:
        """What reading keys and values takes the processor in decode or a span of it, and what it takes the CPU, by ``attentions``; zero
        where it cannot."""
        here, cpu = self.cost.processor, self.cost.hardware.processors.get(CPU) if self.cost.cpu_attends else None

        def core_us(kind: Attention, processor: Processor) -> float:
            return sum(n * self._core_us(layer, high, processor, span) for layer, n in kind.layers)

        return [(core_us(kind, here), core_us(kind, cpu) if cpu else 0.0) for kind in self.attentions]

    def pairs_us(self) -> float:
        """Attention of all prompts to themselves, in the last layer of one token of each."""
        total, prompt, processor = self.workload.num_sequences, self.workload.prompt_len, self.cost.processor
        one = [(layer, n) for layer, n in self.layers if layer.last or prompt == 1]
        seen = sum(n * layer.kv_elements * min(prompt, layer.sliding_window or prompt) for layer, n in one)
        read_us = 1e6 * total * seen * self.cost.compute_bytes / processor.kv_bytes_per_s
        per_pair = sum(n * layer.attention_flops for layer, n in self.layers if (layer, n) not in one)
        return read_us + 1e6 * total * prompt * prompt * per_pair / processor.prefill_attention_flops_per_s

    def _pass_us(self, tokens: int) -> float:
        """A pass over so many tokens, without experts, head and what attention does with keys and values."""
        return self._once_us(tokens) + self._layers_us(tokens)

    def _whole_us(self, tokens: int) -> float:
        """Of that, what is for every token of a prompt in all layers."""
        return self._once_us(tokens) + self._prompts_us(tokens)

    def _once_us(self, tokens: int) -> float:
        """Of that, what need not be done for each batch: the fixed cost of an op of experts, or of adding what the CPU computed, too."""
        return self._ends_us(tokens) + len(self.routed) * self.cost.processor.op_us

    def _ends_us(self, tokens: int) -> float:
        """Of that, what is outside the layers."""
        return 4 * self.cost.processor.op_us + self.cost.embed_us(tokens, resident=self.tier == "host")

    def _layers_us(self, tokens: float) -> float:
        """Of that, what is before the experts of all layers, and shared ones."""
        return self._projections_us(tokens) + self._mlps_us(tokens)

    def _projections_us(self, tokens: float) -> float:
        """Attention in all layers, without what it does with keys and values: an op works on one batch."""
        return sum(count * self._projected_us(layer, tokens) for layer, count in self.layers)

    def _prompts_us(self, tokens: float) -> float:
        """The same for tokens of whole prompts, of which in the last layer one attends."""
        return sum(n * self._prompted_us(layer, tokens) for layer, n in self.layers)

    def _prompted_us(self, layer: Layer, tokens: float) -> float:
        if not layer.last or self.workload.prompt_len == 1:
            return self._projected_us(layer, tokens)
        return self.cost.keys_us(layer, tokens) + self._projected_us(layer, tokens / self.workload.prompt_len)

    def _mlps_us(self, tokens: float) -> float:
        """Router and shared expert, or the dense MLP, in all layers: an op may work on all batches."""
        return sum(count * self.cost.mlp_us(layer, tokens) for layer, count in self.layers)

    def _choices_us(self, tokens: float) -> float:
        """Of that, what nothing else of the MLP comes before: all but shared experts."""
        return sum(count * self.cost.choice_us(layer, tokens) for layer, count in self.layers)

    def _projected_us(self, layer: Layer, tokens: float) -> float:
        return self.cost.processor.attention_op_us + self.cost.projections_us(layer, tokens)

    def _batches_us(self, layer: Layer, tokens: float, batches: float) -> float:
        """What surrounds attention to so many batches of equal size, with so many tokens in all, in decode: each by itself or, on a GPU
        beside a CPU that may attend, together."""
        apart = batches * self._projected_us(layer, tokens / batches)
        if not self.cost.cpu_attends or batches <= 1:
            return apart
        return min(apart, self._projected_us(layer, tokens))

    def _core_us(self, layer: Layer, high: int, processor: Processor, span: tuple[float, float]) -> float:
        """Keys and values of all sequences in a span of decode, times being affine between its first and its last pass: linear in
        sequences, but for the expansion of latent ones."""
        if not self.passes:
            return 0.0
        seen = [min(c, layer.sliding_window or c) for c in self.contexts]
        middle = sum(span) / 2
        read = self.workload.num_sequences * self.passes * (span[1] - span[0])
        read *= seen[0] + middle * (seen[1] - seen[0])
        time_us = 1e6 * read * layer.kv_elements * self.cost.compute_bytes / processor.kv_bytes_per_s
        if layer.expand_flops:
            rows = high * seen[1]
            time_us += read * matmul_us(processor, self.cost.dtype, rows, layer.expand_flops // 2, 0) / rows
        return time_us

    def _on_cpu_us(
        self, layer: Layer, q: float, count: int, tokens: float, waiting: bool = True, even: bool = True
    ) -> float:
        """Experts on the CPU, and their share of the time for which it has nothing to do in a layer where it computes any: until their
        input has come, and from their last sum until that is added; if ``waiting``, also what is around attention."""
        processor = self.cost.processor
        waits = self._exchange_us(tokens) + (processor.attention_op_us + processor.router_op_us if waiting else 0.0)
        return self._expert_us(layer, q, count, CPU, tokens, even) + waits * count / layer.num_experts

    def _exchange_us(self, tokens: float) -> float:
        """The CPU's experts' input on its way there, then the way back of their sums, and adding them."""
        cost, (into, back) = self.cost, self.cost.links
        there_us = cost.transfer_us(back, rows_bytes(cost.spec, int(tokens), cost.dtype))
        back_us = cost.transfer_us(into, sums_bytes(cost.spec, int(tokens), cost.dtype))
        return there_us + back_us + cost.sums_us(tokens) + cost.processor.op_us

    def _expert_us(self, layer: Layer, q: float, count: int, processor: str, tokens: float, even: bool = True) -> float:
        """Experts over their share of so many tokens, of which more never take less. even: what a token takes does not grow with them;
        where kernels round rows up beyond a few, as if they could take that few at a time."""
        share, touched = tokens * q, 1.0 - (1.0 - q) ** tokens
        us, rows = self.cost.expert_share_us(layer, share, touched, processor), share / touched if touched > 0 else 0.0
        if rows < (wide := self.cost.processor_of(processor).least_own_rows):  # from where on fewer are rounded up
            us = min(us, self.cost.expert_share_us(layer, wide * touched, touched, processor))
        if even and (pieces := rows / FEW_ROWS * (1 + ROUNDED)) > 1:
            us = min(us, pieces * self.cost.expert_share_us(layer, share / pieces, touched, processor))
        return count * us
