"""Lower bounds on time (design 7.2): the critical path of a decision's program, and a relaxation over all decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import product
from math import floor, inf, isinf, log

from klotski_compiler.cost import Cost
from klotski_compiler.hardware import matmul_us
from klotski_compiler.model import Layer
from klotski_compiler.passes.depend import Cell, Cells
from klotski_compiler.plan import Decision, Workload
from klotski_compiler.tensors import MODULES, state_bytes
from klotski_compiler.workspace import workspace

EXACT_SHARES = 256  # so many different experts are bounded one by one
ROUNDING = 1.01
SEARCH_STEPS = 10  # each keeps 62 % of the interval of weights


def critical_us(cells: Sequence[Cells], duration_us: Sequence[float]) -> float:
    """Longest path of one pass over read-after-write edges only, from the token ids on: no stream, no slot can make it
    shorter.

    cells: what each op reads and writes (``depend``). The next pass starts from the ids that this one ends with, so
    such paths add up over passes. Paths that start with a load would not: it may run while the pass before computes.
    Hidden states that an op updates in place count as read.
    """
    ready: dict[Cell, float] = {"tokens": 0.0}
    longest = 0.0
    for (reads, writes), took in zip(cells, duration_us, strict=True):
        updated = [cell for cell in writes if (isinstance(cell, tuple) and cell[0] == "hidden") or cell == "last"]
        starts = [ready[cell] for cell in (*reads, *updated) if cell in ready]
        for cell in writes:
            if starts:
                ready[cell] = max(starts) + took
            else:
                ready.pop(cell, None)
        if starts:
            longest = max(longest, max(starts) + took)
    return longest


# ------------------------------------------------------------------------------------------- over all decisions


def bound_tokens_per_s(cost: Cost, workload: Workload, budgets: dict[str, int]) -> float:
    """No schedule of this kind (phases apart, all compute on the compute tier's processor) generates tokens faster.

    A schedule in k groups has at least ceil(N / k) sequences in each, so all that matters is k. Intervals of k are
    bounded (``Relaxation.least_us``), best first, and the most promising one is split until it is a single k. 0 if
    nothing fits.
    """
    relaxation = Relaxation(cost, workload, budgets)
    total = workload.num_sequences
    queue = [(relaxation.least_us(1, total), 1, total)]
    while True:
        time_us, first, last = heappop(queue)
        if isinf(time_us):
            return 0.0
        if first == last:
            return 1e6 * total * workload.gen_len / time_us
        middle = (first + last) // 2
        for low, high in ((first, middle), (middle + 1, last)):
            heappush(queue, (relaxation.least_us(low, high), low, high))


@dataclass(frozen=True, slots=True)
class Item:
    """What a tier may keep. nbytes: room. moved_bytes: what crosses the link in each phase of the whole workload if it
    is not kept. load_bytes: what crosses it once before, if it is."""

    nbytes: float
    moved_bytes: tuple[float, ...]
    load_bytes: float


class Relaxation:
    """The least work on every resource if the workload runs in ``first`` to ``last`` groups (design 7.2).

    With S sequences per group, S between low = ceil(N / last) and high = ceil(N / first):

    *Phases* follow one another, so each takes as long as its own busiest resource.
    *Compute.* An op's time grows with its tokens and falls per token (``hardware.matmul_us``; for an expert, tokens per
    touch grow with tokens), so k groups take at least first f(low) and N f(high) / high, however they are split into
    batches, prefill parts or chunks.
    *Links.* What is not kept in the tier crosses its link in every pass: weights whole, experts at least if they are
    touched, which is least likely at low; KV as written and read back. Latencies are left out.
    *Memory* at S = low: states, least workspace, one expert slot, KV. Keeping is relaxed to a fractional knapsack, one
    per link.
    *Load.* What is kept is read from disk once, before all else.
    """

    def __init__(self, cost: Cost, workload: Workload, budgets: dict[str, int]) -> None:
        """budgets: bytes of each tier; a tier that is not named has what the machine has."""
        self.cost, self.workload, spec = cost, workload, cost.spec
        self.tier = cost.hardware.compute_tier
        self.budget = {t: budgets.get(t, tier.capacity_bytes) for t, tier in cost.hardware.tiers.items()}
        self.passes = workload.gen_len - 1  # of decode, per group
        prompt = workload.prompt_len
        self.contexts = (prompt + 1, prompt + self.passes)  # first and last; phases are timed at both (``simulate``)
        self.layers = list(Counter(spec.layers).items())
        self.experts = self._experts()
        width = cost.compute_bytes
        self.kv_position = sum(layer.kv_elements for layer in spec.layers) * width
        modules = [m for layer in spec.layers for kind in MODULES if (m := getattr(layer, kind))]
        self.module_bytes = sum(m.nbytes for m in modules) + spec.head.nbytes
        self.expert_bytes = sum(layer.num_experts * layer.expert.nbytes for layer in spec.layers if layer.expert)

    def _experts(self) -> list[tuple[Layer, float, int]]:
        """(layer, q, count): experts that a token picks with probability q, rounded down to a percent where many
        differ."""
        found: Counter[tuple[Layer, float]] = Counter()
        pairs = zip(self.cost.spec.layers, self.cost.routing.popularity, strict=True)
        shares = [(layer, min(1.0, layer.top_k * p)) for layer, popular in pairs for p in popular]
        rounded = len(set(shares)) > EXACT_SHARES
        for layer, q in shares:
            if q > 0:
                found[layer, ROUNDING ** floor(log(q, ROUNDING)) if rounded else q] += 1
        return [(layer, q, count) for (layer, q), count in found.items()]

    def least_us(self, first: int, last: int) -> float:
        """Lower bound on load plus all groups, for every number of groups in first .. last; infinite if nothing
        fits."""
        total = self.workload.num_sequences
        low, high = -(-total // last), -(-total // first)
        room = self.room(low)
        if room < 0:
            return inf
        prompt, width = self.workload.prompt_len, self.kv_position
        kv = Item(low * self.positions * width, (0.0, total * self.passes * sum(self.contexts) / 2 * width), 0.0)
        weights = self.weights(first, low)
        links = self.cost.hardware.links
        other = self.compute_us(first, low, high)
        if back := links.get("gpu>host" if self.tier == "gpu" else "host>disk"):
            spilled = 1e6 * total * width * max(0.0, 1.0 - room / kv.nbytes) / back.bandwidth_bytes_per_s
            other = (max(other[0], spilled * prompt), max(other[1], spilled * self.passes))
        elif kv.nbytes > room:
            return inf
        disk = 1e6 / links["disk>host"].bandwidth_bytes_per_s
        if self.tier != "gpu":
            return least_time_us([*weights, kv], room, other, disk)
        kept = [Item(w.nbytes, w.moved_bytes, 0.0) for w in weights]  # what fills the GPU is priced by the disk, below
        into = least_time_us([*kept, kv], room, other, 1e6 / links["host>gpu"].bandwidth_bytes_per_s)
        room += self.budget["host"] - kv.nbytes
        if room < 0:
            return inf
        whole = [Item(w.nbytes, (sum(w.moved_bytes),), w.load_bytes) for w in weights]
        return least_time_us(whole, room, (into,), disk)

    # -------------------------------------------------------------------------------------------------------- memory

    @property
    def positions(self) -> int:
        """Positions that a sequence's KV is reserved for."""
        return self.workload.prompt_len + self.workload.gen_len

    def room(self, sequences: int) -> float:
        """Bytes of the compute tier for residents and KV: without states, the least workspace and, unless all fit, an
        expert."""
        spec, cost = self.cost.spec, self.cost
        least = Decision(
            num_batches=1,
            batch_size=1,
            lead=1,
            unit=max(layer.num_experts for layer in spec.layers) or 1,
            head_pages=spec.vocab_size,
            prefill_groups=1,
            attention_batch=1,
            decode_batch=1,
            expert_rows=1,
            hot=0,
            embedding=True,
            layers=(),
        )
        taken = sum(workspace(cost, least, self.workload)[self.tier].values())
        taken += state_bytes(spec, max(sequences if self.passes else 0, self.workload.prompt_len), cost.dtype)
        free = self.budget[self.tier] - taken
        if self.expert_bytes > free:
            free -= max(layer.expert.nbytes for layer in spec.layers if layer.expert)
        return free

    # --------------------------------------------------------------------------------------------------------- links

    def weights(self, groups: int, sequences: int) -> list[Item]:
        """Every weight, by kind: modules and head cross in every pass; an expert if it is touched."""
        modules = float(self.module_bytes)
        out = [Item(modules, (groups * modules, groups * self.passes * modules), modules)]
        prompt = sequences * self.workload.prompt_len
        for layer, q, count in self.experts:
            assert layer.expert is not None
            nbytes = float(count * layer.expert.nbytes)
            touched = 1 - (1 - q) ** prompt, self.passes * (1 - (1 - q) ** sequences)
            out.append(Item(nbytes, (groups * touched[0] * nbytes, groups * touched[1] * nbytes), nbytes))
        return out

    # ------------------------------------------------------------------------------------------------------- compute

    def compute_us(self, first: int, low: int, high: int) -> tuple[float, float]:
        """Least work of the processor in all prefills and in all decodes."""
        total, cost = self.workload.num_sequences, self.cost
        attention = [0.0, 0.0]
        for layer, count in self.layers:
            for phase, time_us in enumerate(self._attention_us(layer, high)):
                attention[phase] += count * time_us

        def least(per_pass: Callable[[int], float], tokens: int) -> float:
            """Of what every group does on all its sequences, ``tokens`` of each."""
            return max(first * per_pass(low * tokens), total * per_pass(high * tokens) / high)

        def ops(tokens: int) -> float:
            time_us = 4 * cost.processor.op_us + cost.embed_us(tokens, True)
            time_us += sum(count * self._layer_us(layer, tokens) for layer, count in self.layers)
            return time_us + sum(count * self._expert_us(layer, q, tokens) for layer, q, count in self.experts)

        head = least(partial(cost.module_us, cost.spec.head), 1)
        prefill = least(ops, self.workload.prompt_len) + head + attention[0]
        return prefill, self.passes * (least(ops, 1) + head) + attention[1] if self.passes else 0.0

    def _layer_us(self, layer: Layer, tokens: int) -> float:
        """Projections of attention, then router and shared expert, or the dense MLP."""
        op_us, processor = self.cost.processor.op_us, self.cost.processor
        time_us = processor.attention_op_us + self.cost.projections_us(layer, tokens)
        return time_us + (
            self.cost.router_us(layer, tokens) + op_us if layer.expert else self.cost.dense_us(layer, tokens)
        )

    def _attention_us(self, layer: Layer, high: int) -> tuple[float, float]:
        """Keys and values of all sequences: linear in sequences, but for the expansion of latent ones."""
        total, prompt, processor = self.workload.num_sequences, self.workload.prompt_len, self.cost.processor
        prefill = 1e6 * total * prompt * prompt * layer.attention_flops / processor.prefill_attention_flops_per_s
        decode = 0.0
        if self.passes:
            seen = [min(c, layer.sliding_window or c) for c in self.contexts]
            read = self.passes * sum(seen) / 2
            decode = 1e6 * total * read * layer.kv_elements * self.cost.compute_bytes / processor.kv_bytes_per_s
            if layer.expand_flops:
                rows = high * seen[1]
                whole = matmul_us(processor, self.cost.dtype, rows, layer.expand_flops // 2, 0)
                decode += total * read * whole / rows
        return prefill, decode

    def _expert_us(self, layer: Layer, q: float, tokens: int) -> float:
        return self.cost._expert_us(layer, tokens * q, 1.0 - (1.0 - q) ** tokens)


def least_time_us(items: Sequence[Item], room: float, other_us: tuple[float, ...], us_per_byte: float) -> float:
    """min over what is kept (y in 0 .. 1, at most ``room`` bytes) of load(y) + sum over phases p of max(link_p(y),
    other_p).

    max(a, b) >= w a + (1 - w) b for every weight w in 0 .. 1, and for fixed weights the rest is a fractional knapsack:
    so any weights give a lower bound. It is concave in the weights, and the best ones give the minimum itself
    (duality).
    """
    phases = range(len(other_us))

    def weighted(weights: Sequence[float]) -> tuple[float, list[float]]:
        """The bound at these weights, and its slopes: link_p(y) - other_p."""
        gains = [
            ((sum(w * m for w, m in zip(weights, i.moved_bytes, strict=True)) - i.load_bytes) / i.nbytes, number)
            for number, i in enumerate(items)
            if i.nbytes
        ]
        link = [sum(i.moved_bytes[p] for i in items) for p in phases]
        left, load = room, 0.0
        for gain, number in sorted(gains, reverse=True):
            if gain <= 0 or left <= 0:
                break
            share = min(1.0, left / items[number].nbytes)
            left -= items[number].nbytes
            load += share * items[number].load_bytes
            link = [link[p] - share * items[number].moved_bytes[p] for p in phases]
        slopes = [link[p] * us_per_byte - other_us[p] for p in phases]
        return load * us_per_byte + sum(other_us) + sum(w * s for w, s in zip(weights, slopes, strict=True)), slopes

    best = 0.0
    for corner in product((1.0, 0.0), repeat=len(other_us)):
        value, slopes = weighted(corner)
        best = max(best, value)
        if all(slope >= 0 if w else slope <= 0 for w, slope in zip(corner, slopes, strict=True)):
            return value  # no weight wants to move: this is the maximum

    def highest(fixed: tuple[float, ...]) -> float:
        """The maximum over the weights that follow the fixed ones, by golden section in one after another."""
        if len(fixed) == len(other_us):
            return weighted(fixed)[0]
        low, high, most = 0.0, 1.0, 0.0
        for _ in range(SEARCH_STEPS):
            a, b = low + (high - low) * 0.382, low + (high - low) * 0.618
            at_a, at_b = highest((*fixed, a)), highest((*fixed, b))
            most = max(most, at_a, at_b)
            low, high = (a, high) if at_a < at_b else (low, b)
        return most

    return max(best, highest(()))
