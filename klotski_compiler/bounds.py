"""A lower bound on time over all decisions (design 7.2): a relaxation in which only work and memory count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from math import floor, inf, isinf, log

from klotski_compiler.cost import Cost
from klotski_compiler.hardware import Processor, matmul_us
from klotski_compiler.milp.formulation import SCALE_US, Model, Row, Terms, Variable, plus, times
from klotski_compiler.milp.solve import Solver
from klotski_compiler.model import Layer
from klotski_compiler.plan import CPU, Decision, Workload
from klotski_compiler.tensors import MODULES, state_bytes
from klotski_compiler.workspace import workspace

EXACT_SHARES = 256  # so many different experts are bounded one by one
ROUNDING = 1.01
GIB = 1 << 30  # of memory in the linear program
TOLERANCE = 1e-6  # of its solver


def bound_tokens_per_s(cost: Cost, workload: Workload, budgets: dict[str, int], rolling: bool = False) -> float:
    """No schedule of its class generates tokens faster: phases apart, or mixed in rolling order.

    A schedule in k groups has at least ceil(N / k) sequences in each, so all that matters is k. Intervals of k are
    bounded (``Relaxation.least_us``), best first, and the most promising one is split until it is a single k. 0 if
    nothing fits.
    """
    relaxation = Relaxation(cost, workload, budgets, rolling)
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
class Weight:
    """What a tier may keep. nbytes: room. moved_bytes: what crosses a link in each phase of the whole workload if it is not kept.
    leaving_bytes: likewise in rolling order, once the last cohort has joined. compute_us: work of the compute tier's processor in each
    phase. cpu_us: of the CPU, were decode to compute it there; infinite where it cannot."""

    nbytes: float
    moved_bytes: tuple[float, ...]
    compute_us: tuple[float, ...] = (0.0, 0.0)
    cpu_us: float = inf
    leaving_bytes: float = 0.0


class Relaxation:
    """The least work on every resource if the workload runs in ``first`` to ``last`` groups (design 7.2), as a linear program.

    With S sequences per group, S between low = ceil(N / last) and high = ceil(N / first):

    *Phases* follow one another, so each takes as long as its own busiest resource.
    *Compute.* An op's time grows with its tokens and falls per token (``hardware.matmul_us``; for an expert, tokens per
    touch grow with tokens), so k groups take at least first f(low) and N f(high) / high, however they are split into
    batches, prefill parts or chunks. On a machine with a GPU, in decode, the CPU may compute any share of an expert that lives in
    host memory, and attend to any share of the KV that does.
    *Links.* What is not kept in the tier crosses its link in every pass: weights whole, experts at least if they are
    touched, which is least likely at low; KV as written and read back. Latencies are left out.
    *Memory* at S = low: states, least workspace, one expert slot, KV. Keeping is relaxed to fractions.
    *Load.* What memory keeps is read from disk once, before all else.

    In *rolling* order S sequences, A >= 2 cohorts of S / A, are there at once. One cohort joins every s = ceil(gen_len / A) passes, and
    the last one takes gen_len: at least N / S gen_len - s + gen_len passes in all, s <= (gen_len + 1) / 2. All passes together take as
    long as the one busiest resource; those until the last cohort joins as long as all prefill, and the gen_len - 1 after that as
    weights take to stream so often. An op works on at most S prompts. With x <= S sequences in a pass, an expert is touched with at
    least x / S of the probability for S.
    """

    def __init__(self, cost: Cost, workload: Workload, budgets: dict[str, int], rolling: bool = False) -> None:
        """budgets: bytes of each tier; a tier that is not named has what the machine has."""
        self.cost, self.workload, self.rolling, spec = cost, workload, rolling, cost.spec
        self.tier = cost.hardware.compute_tier
        self.budget = {t: budgets.get(t, tier.capacity_bytes) for t, tier in cost.hardware.tiers.items()}
        self.passes = workload.gen_len - 1  # of decode, per group
        prompt = workload.prompt_len
        self.contexts = (prompt + 1, prompt + self.passes)  # first and last; phases are timed at both (``simulate``)
        self.layers = list(Counter(spec.layers).items())
        self.experts = self._experts()
        width = cost.compute_bytes
        self.kv_position = sum(layer.kv_elements for layer in spec.layers) * width
        self.mixed_position = sum(layer.attention_flops // 4 for layer in spec.layers) * width
        modules = [m for layer in spec.layers for kind in MODULES if (m := getattr(layer, kind))]
        self.module_bytes = sum(m.nbytes for m in modules) + spec.head.nbytes
        self.expert_bytes = sum(layer.num_experts * layer.expert.nbytes for layer in spec.layers if layer.expert)

    def _experts(self) -> list[tuple[Layer, float, int]]:
        """(layer, q, count): experts that a token picks with probability q, rounded down to a percent where many
        differ."""
        found: Counter[tuple[Layer, float]] = Counter()
        pairs = zip(self.cost.spec.layers, self.cost.picked, strict=True)
        shares = [(layer, q) for layer, popular in pairs for q in popular]
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
        answer = Solver(self.program(first, low, high, room)).relaxed()
        return inf if answer.status == "infeasible" else SCALE_US * answer.objective * (1 - TOLERANCE)

    def program(self, first: int, low: int, high: int, room: float) -> Model:
        """min load + sum over phases of T, subject to T >= the work of each resource, and to the memory of each tier.

        Variables, all shares of a weight i or of the KV cache: kept[i] in the compute tier, near[i] in host memory before a GPU
        (the rest lives on disk), cpu[i] computed there in decode, far[i.p] read from disk in a pass; kept[kv], cpu[kv].
        """
        model, total = Model(), self.workload.num_sequences
        links, on_gpu = self.cost.hardware.links, self.tier == "gpu"
        into, back = self.cost.links
        weights = self.weights(first, low, high)
        kv_bytes, kv_read = (
            low * self.positions * self.kv_position,
            total * self.passes * sum(self.contexts) / 2 * self.kv_position,
        )
        other, core, core_cpu = self.compute_us(first, low, high)

        def share(name: str, most: float = 1.0) -> str:
            model.variables[name] = Variable(name, 0.0, most, False)
            return name

        def row(name: str, terms: Terms, lower: float = -inf, upper: float = inf) -> None:
            constant = terms.pop("", 0.0)
            model.rows.append(Row(name, terms, lower - constant, upper - constant))

        for name in ("load", "prefill", "decode"):
            share(name, inf)
            model.objective[name] = 1.0
        kept_kv = share("kept[kv]")
        cpu_kv = share("cpu[kv]", 1.0 if core_cpu < inf else 0.0)
        row("kv", {kept_kv: 1.0, cpu_kv: 1.0}, upper=1.0)
        if back not in links:
            row("kv_stays", {kept_kv: 1.0}, lower=1.0)

        here: Terms = {kept_kv: kv_bytes / GIB}
        host: Terms = {"": kv_bytes / GIB, kept_kv: -kv_bytes / GIB}
        disk_us = 1e6 / links["disk>host"].bandwidth_bytes_per_s / SCALE_US
        load: Terms = {"": 0.0}
        work: dict[str, list[Terms]] = {}
        leaving: Terms = {"": 0.0}
        for number, phase in enumerate(("prefill", "decode")):
            moved_kv = kv_read if phase == "decode" else 0.0
            new_kv = total * self.kv_position * (self.passes if phase == "decode" else self.workload.prompt_len)
            link_us, back_us = (
                1e6 / links[n].bandwidth_bytes_per_s / SCALE_US if n in links else 0.0 for n in (into, back)
            )
            enter: Terms = {"": moved_kv * link_us, kept_kv: -moved_kv * link_us, cpu_kv: -moved_kv * link_us}
            leave: Terms = {"": new_kv * back_us, kept_kv: -new_kv * back_us}
            compute: Terms = {"": other[number] / SCALE_US}
            cpu: Terms = {"": 0.0}
            far: Terms = {"": 0.0}
            if phase == "decode" and core_cpu < inf:
                enter[cpu_kv] += total * self.passes * self.mixed_position * link_us
                leave[cpu_kv] = total * self.passes * self.mixed_position * back_us
                compute[cpu_kv] = -core / SCALE_US
                cpu[cpu_kv] = core_cpu / SCALE_US
            for i, weight in enumerate(weights):
                kept, moved_us = share(f"kept[{i}]"), weight.moved_bytes[number] * link_us
                enter[""] += moved_us
                enter[kept] = -moved_us
                compute[""] += weight.compute_us[number] / SCALE_US
                helped = phase == "decode" and weight.cpu_us < inf
                leaving[""] += weight.leaving_bytes * link_us if phase == "decode" else 0.0
                leaving[kept] = -weight.leaving_bytes * link_us
                if helped:
                    by_cpu = share(f"cpu[{i}]")
                    enter[by_cpu], leaving[by_cpu] = -moved_us, leaving[kept]
                    compute[by_cpu] = -weight.compute_us[number] / SCALE_US
                    cpu[by_cpu] = weight.cpu_us / SCALE_US
                    row(f"once[{i}]", {kept: 1.0, by_cpu: 1.0}, upper=1.0)
                if on_gpu:
                    near, away = share(f"near[{i}]"), share(f"far[{i}.{phase}]")
                    row(f"far[{i}.{phase}]", {away: 1.0, kept: 1.0, near: 1.0}, lower=1.0)
                    if helped:
                        row(f"near[{i}]", {near: 1.0, by_cpu: -1.0}, lower=0.0)
                    far[away] = weight.moved_bytes[number] * disk_us
            work[phase] = [*self._shared(enter, compute, cpu), leave, far]
        for i, weight in enumerate(weights):
            here[f"kept[{i}]"] = weight.nbytes / GIB
            if on_gpu:
                row(f"one_place[{i}]", {f"kept[{i}]": 1.0, f"near[{i}]": 1.0}, upper=1.0)
                host[f"near[{i}]"] = weight.nbytes / GIB
                load[f"kept[{i}]"] = load[f"near[{i}]"] = weight.nbytes * disk_us
            else:
                load[f"kept[{i}]"] = weight.nbytes * disk_us
        row("memory", here, upper=room / GIB)
        if on_gpu:
            row("host", host, upper=self.budget["host"] / GIB)
        if self.rolling:  # "prefill" is all until the last cohort has joined, "decode" what is left then
            both = [plus(*resource) for resource in zip(*work.values(), strict=True)]
            work = {"prefill": work["prefill"], "decode": [leaving], "prefill decode": both}
        for phase, resources in (("load", [load]), *work.items()):
            for number, terms in enumerate(resources):
                row(f"work[{phase}.{number}]", dict.fromkeys(phase.split(), 1.0) | times(-1.0, terms), lower=0.0)
        return model

    def _shared(self, enter: Terms, compute: Terms, cpu: Terms) -> tuple[Terms, Terms, Terms]:
        """The link into the compute tier, its processor and the CPU, each with what sharing host memory costs it (``Cost.drag``)."""
        into, cost = self.cost.links[0], self.cost
        if CPU not in cost.hardware.processors:
            return enter, compute, cpu
        beside = compute if cost.processor_name == CPU else cpu
        slower = plus(beside, times(cost.drag(CPU, into), enter))
        link = plus(enter, times(cost.drag(into, CPU), beside))
        return (link, slower, cpu) if beside is compute else (link, compute, slower)

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

    def weights(self, first: int, low: int, high: int) -> list[Weight]:
        """Every weight, by kind: modules and head cross in every pass; an expert if it is touched."""
        modules, prompt = float(self.module_bytes), low * self.workload.prompt_len
        gen_len, total = self.workload.gen_len, self.workload.num_sequences
        out = [Weight(modules, (first * modules, first * self.passes * modules))]
        if self.rolling:
            passes = total * gen_len / high + (gen_len - 1) / 2
            out = [Weight(modules, (0.0, passes * modules), leaving_bytes=self.passes * modules)]
        helped = self.cost.cpu_helps
        for layer, q, count in self.experts:
            assert layer.expert is not None
            nbytes = float(count * layer.expert.nbytes)
            touched = 1 - (1 - q) ** prompt, self.passes * (1 - (1 - q) ** low)
            moved = first * touched[0] * nbytes, first * touched[1] * nbytes
            leaving = self.passes * (1 - (1 - q) ** max(1, low // gen_len)) * nbytes
            if self.rolling:
                moved = 0.0, total * gen_len / high * (1 - (1 - q) ** high) * nbytes

            def least(tokens: int, processor: str, layer: Layer = layer, q: float = q, count: int = count) -> float:
                return self._least(lambda m: count * self._expert_us(layer, q, m, processor), tokens, first, low, high)

            out.append(
                Weight(
                    nbytes,
                    moved,
                    (least(self.workload.prompt_len, ""), self.passes * least(1, "")),
                    self.passes * self._least_decode(partial(self._cpu_us, layer, q, count), first, low, high)
                    if helped
                    else inf,
                    leaving,
                )
            )
        return out

    # ------------------------------------------------------------------------------------------------------- compute

    def _least(self, per_pass: Callable[[int], float], tokens: int, first: int, low: int, high: int) -> float:
        """Of what every group does on all its sequences, ``tokens`` of each; in rolling order an op may work on prompts as well."""
        if self.rolling:
            most = high * self.workload.prompt_len
            return self.workload.num_sequences * tokens * per_pass(most) / most
        return max(first * per_pass(low * tokens), self.workload.num_sequences * per_pass(high * tokens) / high)

    def _least_decode(self, per_pass: Callable[[int], float], first: int, low: int, high: int) -> float:
        """The same of what the CPU does, which helps in passes in which all decode."""
        if self.rolling:
            return self.workload.num_sequences * per_pass(high) / high
        return self._least(per_pass, 1, first, low, high)

    def compute_us(self, first: int, low: int, high: int) -> tuple[tuple[float, float], float, float]:
        """Least work of the processor outside the experts, in all prefills and in all decodes; of the latter, what reads keys and
        values; and what that would take the CPU, infinite where it cannot."""
        cost = self.cost
        attention = [0.0, 0.0]
        for layer, count in self.layers:
            for phase, time_us in enumerate(self._attention_us(layer, high, cost.processor)):
                attention[phase] += count * time_us

        def ops(tokens: int) -> float:
            time_us = 4 * cost.processor.op_us + cost.embed_us(tokens, True)
            return time_us + sum(count * self._layer_us(layer, tokens) for layer, count in self.layers)

        head = self._least(partial(cost.module_us, cost.spec.head), 1, first, low, high)
        prefill = self._least(ops, self.workload.prompt_len, first, low, high) + head + attention[0]
        decode = self.passes * (self._least(ops, 1, first, low, high) + head) + attention[1] if self.passes else 0.0
        elsewhere = inf
        if cost.cpu_attends:
            cpu = cost.hardware.processors[CPU]
            elsewhere = sum(count * self._attention_us(layer, high, cpu)[1] for layer, count in self.layers)
        return (prefill, decode), attention[1], elsewhere

    def _layer_us(self, layer: Layer, tokens: int) -> float:
        """Projections of attention, then router and shared expert, or the dense MLP."""
        op_us, processor = self.cost.processor.op_us, self.cost.processor
        time_us = processor.attention_op_us + self.cost.projections_us(layer, tokens)
        return time_us + (
            self.cost.router_us(layer, tokens) + op_us if layer.expert else self.cost.dense_us(layer, tokens)
        )

    def _attention_us(self, layer: Layer, high: int, processor: Processor) -> tuple[float, float]:
        """Keys and values of all sequences: linear in sequences, but for the expansion of latent ones."""
        total, prompt = self.workload.num_sequences, self.workload.prompt_len
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

    def _cpu_us(self, layer: Layer, q: float, count: int, tokens: int) -> float:
        return count * self._expert_us(layer, q, tokens, CPU)

    def _expert_us(self, layer: Layer, q: float, tokens: int, processor: str) -> float:
        return self.cost._expert_us(layer, tokens * q, 1.0 - (1.0 - q) ** tokens, processor)
