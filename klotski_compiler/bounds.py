"""A lower bound on time over all decisions (design 7.2): a relaxation in which only work and memory count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import product
from math import floor, inf, isinf, log

from klotski_compiler.cost import Cost
from klotski_compiler.hardware import Processor, matmul_us
from klotski_compiler.milp.formulation import SCALE_US, Model, Row, Terms, Variable, plus, times
from klotski_compiler.milp.solve import Solver
from klotski_compiler.model import Layer
from klotski_compiler.plan import CPU, Decision, Workload
from klotski_compiler.simulate import NEGLIGIBLE
from klotski_compiler.tensors import MODULES, state_bytes
from klotski_compiler.workspace import workspace

EXACT_SHARES = 256  # so many different experts are bounded one by one
ROUNDING = 1.01
GIB = 1 << 30  # of memory in the linear program
TOLERANCE = 1e-6  # of its solver
CLOSE = 1e-4  # bounds that differ by less are equal
SPANS, GROWN = 4, 1.2  # decode whose context grows by more than that factor is bounded in so many spans


def bound_tokens_per_s(cost: Cost, workload: Workload, budgets: dict[str, int], rolling: bool = False) -> float:
    """No schedule of its class generates tokens faster: phases apart, or mixed in rolling order.

    A schedule in k groups has at least ceil(N / k) sequences in each, so all that matters is k. Intervals of k are
    bounded (``Relaxation.least_us``), best first, and the most promising one is split until it is a single k. 0 if
    nothing fits.
    """
    relaxation = Relaxation(cost, workload, budgets, rolling)
    total = workload.num_sequences
    queue = [(relaxation.least_us(1, total), 1, total, False)]
    while True:
        time_us, first, last, refined = heappop(queue)
        if isinf(time_us):
            return 0.0
        if refined:
            return 1e6 * total * workload.gen_len / time_us
        if first == last:
            heappush(queue, (relaxation.refined_us(first), first, last, True))
            continue
        middle = (first + last) // 2
        for low, high in ((first, middle), (middle + 1, last)):
            heappush(queue, (relaxation.least_us(low, high), low, high, False))


@dataclass(frozen=True, slots=True)
class Weight:
    """What a tier may keep. nbytes: room. moved_bytes: what crosses a link in each phase of the whole workload if it is not kept;
    far_bytes: what crosses the disk's link if it lives on disk before a GPU, empty where it cannot. compute_us: work of the compute
    tier's processor in each phase. cpu_us: of the CPU, were decode to compute it there; infinite where it cannot. leaving_bytes: as
    moved_bytes, in rolling order once the last cohort has joined."""

    nbytes: float
    moved_bytes: tuple[float, ...]
    compute_us: tuple[float, ...] = (0.0, 0.0)
    cpu_us: float = inf
    far_bytes: tuple[float, ...] = ()
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
    *Spans.* What is decided is decided for all of decode: while contexts grow, no share can follow what is busiest. Decode takes
    at least what the busiest resource of each of its spans does (op times are affine in the position).
    *Disk.* Before a GPU only experts may live on disk, and those travel by name, whole, in every pass.
    *Parts.* Prefill in p parts keeps the states of a p-th of the prompts, and reads what is not kept p times (``refined_us``).
    *Memory* at S = low: states, least workspace, one expert slot, KV. Keeping is relaxed to fractions. Where host memory cannot hold
    all experts, some pass through it, to be kept on the GPU or to be streamed: one place in it is theirs, or two; with one,
    disk and link take turns.
    *Load.* What memory keeps is read from disk once, before all else.

    In *rolling* order S sequences, A >= 2 cohorts of S / A, are there at once. One cohort joins every s = ceil(gen_len / A) passes, and
    the last one takes gen_len: at least N / S gen_len - s + gen_len passes in all, s <= (gen_len + 1) / 2. All passes together take as
    long as the one busiest resource; those until the last cohort joins as long as all prefill, and the gen_len - 1 after that as
    weights take to stream so often. Either a cohort joins in every pass, s = 1, and the CPU computes no experts, since it would have to
    for prompts; or at least half of decode is done in passes in which none joins, and takes its time beside prefill's. An op works on
    at most S prompts. With x <= S sequences in a pass, an expert is touched with at least x / S of the probability for S.
    """

    def __init__(
        self,
        cost: Cost,
        workload: Workload,
        budgets: dict[str, int],
        rolling: bool = False,
        every: bool | None = None,
    ) -> None:
        """budgets: bytes of each tier; a tier that is not named has what the machine has. every: in rolling order, whether a cohort
        joins in every pass; None: either."""
        self.cost, self.workload, self.rolling, spec = cost, workload, rolling, cost.spec
        self.every = bool(every)
        either = (True, False) if rolling and every is None else ()
        self.orders = [Relaxation(cost, workload, budgets, True, order) for order in either]
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

    def refined_us(self, groups: int) -> float:
        """``least_us`` of one number of groups, with what prefill in parts takes: few parts keep the states of many prompts at once, many
        read the weights as often. Intervals of their number are bounded; where one adds nothing, the others need no look."""
        least = self.least_us(groups, groups)
        if self.rolling:  # where prefill's parts are the cohorts
            return least
        found, parts, low = inf, 1, -(-self.workload.num_sequences // groups)
        while not isinf(least):
            found = min(found, self.least_us(groups, groups, parts, 2 * parts - 1))
            if found <= least * (1 + CLOSE):
                return least
            if 2 * parts > low:
                break
            parts *= 2
        return max(least, found)

    def least_us(self, first: int, last: int, parts: int = 1, most_parts: int = 0) -> float:
        """Lower bound on load plus all groups, for every number of groups in first .. last, and of prefill's parts from parts to
        most_parts (0: any); infinite if nothing fits."""
        if self.orders:
            return min(order.least_us(first, last, parts, most_parts) for order in self.orders)
        total, prompt = self.workload.num_sequences, self.workload.prompt_len
        low, high = -(-total // last), -(-total // first)
        room = self.room(low)
        if most_parts:
            decoding = low if self.passes else 0
            states = [max(decoding, n * prompt) for n in (1, -(-low // most_parts))]
            room -= state_bytes(self.cost.spec, states[1] - states[0], self.cost.dtype)
        if room < 0:
            return inf
        places = (1, 2) if self.tier == "gpu" and self.budget["host"] < self.expert_bytes else (0,)
        answers = [Solver(self.program(first, low, high, room, staging, parts)).relaxed() for staging in places]
        found = [answer.objective for answer in answers if answer.status != "infeasible"]
        return SCALE_US * min(found) * (1 - TOLERANCE) if found else inf

    def program(self, first: int, low: int, high: int, room: float, staging: int = 0, parts: int = 1) -> Model:
        """min load + sum over phases of T, subject to T >= the work of each resource, and to the memory of each tier.

        Variables, all shares of a weight i or of the KV cache: kept[i] in the compute tier, near[i] in host memory before a GPU
        (the rest lives on disk), cpu[i] computed there in decode; kept[kv], cpu[kv]. T of decode's spans: decode[j].
        staging: places of an expert in host memory on its way to a GPU; 0 where none is needed for sure. parts: of prefill, at least.
        """
        model = Model()
        links, on_gpu = self.cost.hardware.links, self.tier == "gpu"
        weights = self.weights(first, low, high, parts)
        kv_bytes = low * self.positions * self.kv_position
        helped = [weight.cpu_us < inf for weight in weights]

        def share(name: str, most: float = 1.0) -> str:
            model.variables[name] = Variable(name, 0.0, most, False)
            return name

        def row(name: str, terms: Terms, lower: float = -inf, upper: float = inf) -> None:
            constant = terms.pop("", 0.0)
            model.rows.append(Row(name, terms, lower - constant, upper - constant))

        for name in ("load", "prefill", "decode"):
            share(name, inf)
            model.objective[name] = 1.0
        share("kept[kv]")
        share("cpu[kv]", 1.0 if self.cost.cpu_attends else 0.0)
        row("kv", {"kept[kv]": 1.0, "cpu[kv]": 1.0}, upper=1.0)
        if self.cost.links[1] not in links:
            row("kv_stays", {"kept[kv]": 1.0}, lower=1.0)

        here: Terms = {"kept[kv]": kv_bytes / GIB}
        host: Terms = {"": kv_bytes / GIB, "kept[kv]": -kv_bytes / GIB}
        disk_us = 1e6 / links["disk>host"].bandwidth_bytes_per_s / SCALE_US
        load: Terms = {"": 0.0}
        for i, weight in enumerate(weights):
            kept, near = share(f"kept[{i}]"), f"near[{i}]"
            if helped[i]:
                row(f"once[{i}]", {kept: 1.0, share(f"cpu[{i}]", 0.0 if self.every else 1.0): 1.0}, upper=1.0)
            here[kept] = weight.nbytes / GIB
            load[kept] = weight.nbytes * disk_us
            if on_gpu:
                row(f"one_place[{i}]", {kept: 1.0, share(near): 1.0}, 0.0 if weight.far_bytes else 1.0, 1.0)
                if helped[i]:
                    row(f"near[{i}]", {near: 1.0, f"cpu[{i}]": -1.0}, lower=0.0)
                host[near] = weight.nbytes / GIB
                load[near] = weight.nbytes * disk_us
        row("memory", here, upper=room / GIB)
        if on_gpu:
            passing = min(layer.expert.nbytes for layer in self.cost.spec.layers if layer.expert) * staging
            row("host", host, upper=(self.budget["host"] - passing) / GIB)
        work = {"load": [load], "prefill": self.work(0, first, low, high, weights, staging)}
        work["decode"] = self.work(1, first, low, high, weights, staging)
        spans = (
            SPANS if self.passes >= SPANS and self.contexts[1] > GROWN * self.contexts[0] and not self.rolling else 0
        )
        for j in range(spans):
            share(f"decode[{j}]", inf)
            work[f"decode[{j}]"] = self.work(1, first, low, high, weights, staging, (j / spans, (j + 1) / spans))
        if spans:  # what grows little is simulated at its middle only, which may take this much less
            least = {f"decode[{j}]": NEGLIGIBLE / 8 - 1 for j in range(spans)}
            row("spans", {"decode": 1.0, **least}, lower=0.0)
        if self.rolling:  # "prefill" is all until the last cohort has joined, "decode" what is left then
            prefill, decode = work["prefill"], work["decode"]
            both = [plus(*resource) for resource in zip(prefill, decode, strict=True)]
            if not self.every:
                both += [plus(one, times(0.5, other)) for one, other in product(prefill, decode)]
            work |= {"decode": [self._leaving(weights)], "prefill decode": both}
        for phase, resources in work.items():
            for number, terms in enumerate(resources):
                row(f"work[{phase}.{number}]", dict.fromkeys(phase.split(), 1.0) | times(-1.0, terms), lower=0.0)
        return model

    def work(
        self,
        phase: int,
        first: int,
        low: int,
        high: int,
        weights: list[Weight],
        staging: int,
        span: tuple[float, float] | None = None,
    ) -> list[Terms]:
        """What link, processor, CPU, link back and disk do in prefill (0), in decode (1) or in a span of that, by what is kept. A span
        leaves out what sharing a memory costs: that is a matter of whole phases."""
        total, links, decode = self.workload.num_sequences, self.cost.hardware.links, phase == 1
        begin, end = span or (0.0, 1.0)
        part = end - begin if decode else 1.0
        passes = self.passes * part
        context = (begin + end) / 2 * (self.contexts[1] - self.contexts[0]) + self.contexts[0]
        read = total * passes * (context - 1) * self.kv_position if decode else 0.0  # the new position is not sent
        new = total * self.kv_position * (passes if decode else self.workload.prompt_len)
        link_us, back_us = (
            1e6 / links[n].bandwidth_bytes_per_s / SCALE_US if n in links else 0.0 for n in self.cost.links
        )
        disk_us = 1e6 / links["disk>host"].bandwidth_bytes_per_s / SCALE_US
        other, core, _ = self.compute_us(first, low, high)
        core_here, core_cpu = self._cores_us(high, (begin, end))
        compute: Terms = {"": ((other[1] - core) * part + core_here if decode else other[0]) / SCALE_US}
        enter: Terms = {"": read * link_us, "kept[kv]": -read * link_us, "cpu[kv]": -read * link_us}
        leave: Terms = {"": new * back_us, "kept[kv]": -new * back_us}
        cpu: Terms = {"": 0.0}
        far: Terms = {"": 0.0}
        if decode and core_cpu < inf:
            enter["cpu[kv]"] += total * passes * self.mixed_position * link_us
            leave["cpu[kv]"] = total * passes * self.mixed_position * back_us
            compute["cpu[kv]"] = -core_here / SCALE_US
            cpu["cpu[kv]"] = core_cpu / SCALE_US
        for i, weight in enumerate(weights):
            moved_us, compute_us = (
                weight.moved_bytes[phase] * part * link_us,
                weight.compute_us[phase] * part / SCALE_US,
            )
            enter[""] += moved_us
            enter[f"kept[{i}]"] = -moved_us
            compute[""] += compute_us
            if decode and weight.cpu_us < inf:
                enter[f"cpu[{i}]"] = -moved_us
                compute[f"cpu[{i}]"] = -compute_us
                cpu[f"cpu[{i}]"] = weight.cpu_us * part / SCALE_US
            if self.tier == "gpu" and weight.far_bytes:
                far_us = weight.far_bytes[phase] * part * (disk_us + (link_us if staging == 1 else 0.0))
                far[""] += far_us
                far |= {f"kept[{i}]": -far_us, f"near[{i}]": -far_us}
        shared = (enter, compute, cpu) if span else self._shared(enter, compute, cpu)
        return [*shared, leave, far]

    def _leaving(self, weights: list[Weight]) -> Terms:
        """What the link into the compute tier carries once the last cohort has joined."""
        link_us = 1e6 / self.cost.hardware.links[self.cost.links[0]].bandwidth_bytes_per_s / SCALE_US
        terms: Terms = {"": 0.0}
        for i, weight in enumerate(weights):
            terms[""] += weight.leaving_bytes * link_us
            terms |= dict.fromkeys(
                [f"kept[{i}]", *([f"cpu[{i}]"] if weight.cpu_us < inf else [])], -weight.leaving_bytes * link_us
            )
        return terms

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

    def weights(self, first: int, low: int, high: int, parts: int = 1) -> list[Weight]:
        """Every weight, by kind: modules and head cross in every pass, of which prefill has ``parts`` or more; an expert if it is
        touched: in all parts together, with more of them, more often. In rolling order passes are decode's."""
        modules, prompt = float(self.module_bytes), low * self.workload.prompt_len / parts
        gen_len, total = self.workload.gen_len, self.workload.num_sequences
        passes: tuple[float, float] = first * parts, first * self.passes
        if self.rolling:
            passes = 0.0, total * gen_len / high + (gen_len - 1) / 2
        out = [Weight(modules, (passes[0] * modules, passes[1] * modules), leaving_bytes=self.passes * modules)]
        helped = self.cost.cpu_helps
        for layer, q, count in self.experts:
            assert layer.expert is not None
            nbytes = float(count * layer.expert.nbytes)
            touched = first * parts * (1 - (1 - q) ** prompt), first * self.passes * (1 - (1 - q) ** low)
            leaving = self.passes * (1 - (1 - q) ** max(1, low // gen_len))
            if self.rolling:
                touched = 0.0, total * gen_len / high * (1 - (1 - q) ** high)

            def least(tokens: int, processor: str, layer: Layer = layer, q: float = q, count: int = count) -> float:
                return self._least(lambda m: count * self._expert_us(layer, q, m, processor), tokens, first, low, high)

            out.append(
                Weight(
                    nbytes,
                    (touched[0] * nbytes, touched[1] * nbytes),
                    (least(self.workload.prompt_len, ""), self.passes * least(1, "")),
                    self.passes * self._least_decode(partial(self._cpu_us, layer, q, count), first, low, high)
                    if helped
                    else inf,
                    (passes[0] * nbytes, passes[1] * nbytes),
                    leaving * nbytes,
                )
            )
        return out

    # ------------------------------------------------------------------------------------------------------- compute

    def _least(self, per_pass: Callable[[int], float], tokens: int, first: int, low: int, high: int) -> float:
        """Of what every group does on all its sequences, ``tokens`` of each. In rolling order an op may work on prompts as well: those of
        one cohort of gen_len where one joins in every pass; else half of what decodes does so without any."""
        if self.rolling:
            gen_len, prompt = self.workload.gen_len, self.workload.prompt_len
            most = -(-high * (prompt + gen_len - 1) // gen_len) if self.every else high * prompt
            each = per_pass(most) / most
            if tokens == 1 and not self.every:
                each = (each + per_pass(high) / high) / 2
            return self.workload.num_sequences * tokens * each
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
        return (prefill, decode), *self._cores_us(high)

    def _cores_us(self, high: int, span: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
        """What reading keys and values takes the processor in decode or a span of it, and what it takes the CPU."""
        cost, cpu = self.cost, self.cost.hardware.processors.get(CPU)
        here = sum(n * self._attention_us(layer, high, cost.processor, span)[1] for layer, n in self.layers)
        if not cpu or not cost.cpu_attends:
            return here, inf
        return here, sum(n * self._attention_us(layer, high, cpu, span)[1] for layer, n in self.layers)

    def _layer_us(self, layer: Layer, tokens: int) -> float:
        """Projections of attention, then router and shared expert, or the dense MLP."""
        op_us, processor = self.cost.processor.op_us, self.cost.processor
        time_us = processor.attention_op_us + self.cost.projections_us(layer, tokens)
        return time_us + (
            self.cost.router_us(layer, tokens) + op_us if layer.expert else self.cost.dense_us(layer, tokens)
        )

    def _attention_us(
        self, layer: Layer, high: int, processor: Processor, span: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[float, float]:
        """Keys and values of all sequences: linear in sequences, but for the expansion of latent ones. Of decode, the part in the span:
        times are affine between its first and its last pass."""
        total, prompt = self.workload.num_sequences, self.workload.prompt_len
        prefill = 1e6 * total * prompt * prompt * layer.attention_flops / processor.prefill_attention_flops_per_s
        decode = 0.0
        if self.passes:
            seen = [min(c, layer.sliding_window or c) for c in self.contexts]
            middle = sum(span) / 2
            read = self.passes * (span[1] - span[0]) * (seen[0] + middle * (seen[1] - seen[0]))
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
