"""Phases apart: a lower bound on time over all decisions (design 7.2), as a relaxation in which only work and memory count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import floor, inf, isinf, log

from klotski_compiler.cost import Cost
from klotski_compiler.hardware import Processor, matmul_us
from klotski_compiler.milp.formulation import SCALE_US, Model, Row, Terms, Variable, plus, times
from klotski_compiler.milp.solve import Solver
from klotski_compiler.model import Layer
from klotski_compiler.pipeline import most_pages
from klotski_compiler.plan import CPU, Decision, Workload
from klotski_compiler.simulate import NEGLIGIBLE
from klotski_compiler.tensors import MODULES, query_bytes, rows_bytes, state_bytes, sums_bytes
from klotski_compiler.workspace import workspace

EXACT_SHARES = 256  # so many different experts are bounded one by one
ROUNDING = 1.01
GIB = 1 << 30  # of memory in the linear program
TOLERANCE = 1e-6  # of its solver
CLOSE = 1e-4  # bounds that differ by less are equal
SPANS, GROWN = 4, 1.2  # decode whose context grows by more than that factor is bounded in so many spans
FEW = 8  # sequences of a group: an op of an expert on all but so many leaves little to attend to beside it
MOST_BATCHES = 8  # of a group: so many numbers of batches are bounded one by one
RUNS = 3  # layers without a barrier between them: so many are bounded apart, the last number with all that are more
SPLITS = 5  # intervals of the share of sequences in the larger of two parts, in each of which costs are bounded
PREFILL, DECODE = 0, 1  # kinds of passes, as indices of a weight's work


@dataclass(frozen=True, slots=True)
class Weight:
    """What a tier may keep. nbytes: room. Then, per kind of passes (prefill, decode), what the whole workload takes: moved_bytes, what
    crosses a link if it is not kept; far_bytes, what crosses the disk's link if it lives on disk before a GPU, empty where it cannot;
    compute_us, work of the compute tier's processor; cpu_us, of the CPU, were it computed there, infinite where it cannot be.

    Of decode beside a CPU, see ``Relaxation``: split_us as compute_us, if no op covers all sequences but a few; most_us, of an op that
    does; alone_us as cpu_us, without waiting for attention."""

    nbytes: float
    moved_bytes: tuple[float, ...]
    compute_us: tuple[float, ...]
    cpu_us: tuple[float, ...] = (inf, inf, inf, inf)
    far_bytes: tuple[float, ...] = ()
    split_us: float = 0.0
    most_us: float = 0.0
    alone_us: float = 0.0


class Relaxation:
    """The least work on every resource if the workload runs in ``first`` to ``last`` groups (design 7.2), as a linear program.

    With S sequences per group, S between low = ceil(N / last) and high = ceil(N / first):

    *Phases* follow one another, so each takes as long as its own busiest resource.
    *Compute.* An op's time grows with its tokens and falls per token (``hardware.matmul_us``; for an expert, tokens per
    touch grow with tokens), so k groups take at least first f(low) and N f(high) / high, however they are split into
    batches, prefill parts or chunks. On a machine with a GPU, in decode, the CPU may compute any share of an expert that lives in
    host memory, and attend to any share of the KV that does. It computes a layer's experts over all tokens at once, so that it has
    nothing to do between attention and those, and between those and the next attention; a layer counts by the share of its experts.
    *Beside one another.* While an op computes an expert over all sequences, nobody attends: attention of its layer is done, that of the
    next has not begun. So the CPU's experts, which are computed so, take their time beside the GPU's attention; and so do the GPU's
    beside the CPU's attention, but for what that has left to do when an op covers all but a few; or an expert is computed by parts,
    which reads it more than once. In every layer a whole number of batches is attended to by the CPU, each with its ops
    (``refined_us``, ``attention``).
    *Links.* What is not kept in the tier crosses its link in every pass: weights whole, experts at least if they are
    touched, which is least likely at low; KV as written and read back. Latencies are left out.
    *Spans.* What is decided is decided for all of decode: while contexts grow, no share can follow what is busiest. Decode takes
    at least what the busiest resource of each of its spans does (op times are affine in the position).
    *Disk.* Before a GPU only experts may live on disk, and those travel by name, whole, in every pass.
    *Parts.* Prefill in p parts keeps the states of a p-th of the prompts, and reads what is not kept p times (``refined_us``).
    *Memory* at S = low: states, least workspace, one expert slot, KV. Keeping is relaxed to fractions. Where host memory cannot hold
    all experts, some pass through it, to be kept on the GPU or to be streamed: one place in it is theirs, or two, of a page; with one,
    disk and link take turns.
    *Load.* What memory keeps is read from disk once, before all else.
    """

    phases: tuple[str, ...] = ("load", "prefill", "decode")

    def __init__(self, cost: Cost, workload: Workload, budgets: dict[str, int]) -> None:
        """budgets: bytes of each tier; a tier that is not named has what the machine has."""
        self.cost, self.workload, spec = cost, workload, cost.spec
        self.tier = cost.hardware.compute_tier
        self.budget = {t: budgets.get(t, tier.capacity_bytes) for t, tier in cost.hardware.tiers.items()}
        self.passes = workload.gen_len - 1  # of decode, per group
        prompt = workload.prompt_len
        self.contexts = (prompt + 1, prompt + self.passes)  # first and last; phases are timed at both (``simulate``)
        self.layers = list(Counter(spec.layers).items())
        self.experts, self.routed = self._experts()
        width = cost.compute_bytes
        self.kv_position = sum(layer.kv_elements for layer in spec.layers) * width
        self.mixed_position = sum(layer.attention_flops // 4 for layer in spec.layers) * width
        modules = [m for layer in spec.layers for kind in MODULES if (m := getattr(layer, kind))]
        self.module_bytes = sum(m.nbytes for m in modules) + spec.head.nbytes
        grows = self.passes >= SPANS and self.contexts[1] > GROWN * self.contexts[0]
        self.spans = SPANS if grows else 0
        self.expert_bytes = sum(layer.num_experts * layer.expert.nbytes for layer in spec.layers if layer.expert)

    def _experts(self) -> tuple[list[tuple[Layer, float, int]], list[Counter[int]]]:
        """(layer, q, count): experts that a token picks with probability q, rounded down to a percent where many
        differ. Then of every layer that routes, how many of these entries each has."""
        found: dict[tuple[Layer, float], int] = {}
        routed = []
        pairs = list(zip(self.cost.spec.layers, self.cost.picked, strict=True))
        rounded = len({(layer, q) for layer, popular in pairs for q in popular}) > EXACT_SHARES
        for layer, popular in pairs:
            shares = [ROUNDING ** floor(log(q, ROUNDING)) if rounded else q for q in popular if q > 0]
            if shares:
                routed.append(Counter(found.setdefault((layer, q), len(found)) for q in shares))
        counts = sum(routed, Counter[int]())
        return [(layer, q, counts[number]) for (layer, q), number in found.items()], routed

    def refined_us(self, groups: int) -> float:
        """``least_us`` of one number of groups, whatever the number of batches, with what prefill in parts takes: few parts keep the
        states of many prompts at once, many read the weights as often. Intervals of their number are bounded; where one adds nothing,
        the others need no look."""
        least = self.least_us(groups, groups)
        if self.cost.cpu_attends and self.passes and not isinf(least):
            shared = inf
            for batches in range(1, MOST_BATCHES + 2):
                shared = min(shared, self.least_us(groups, groups, batches=batches))
                if shared <= least * (1 + CLOSE):
                    break
            else:
                least = max(least, shared)
        found, parts, low = inf, 1, -(-self.workload.num_sequences // groups)
        while not isinf(least):
            found = min(found, self.least_us(groups, groups, parts, 2 * parts - 1))
            if found <= least * (1 + CLOSE):
                return least
            if 2 * parts > low:
                break
            parts *= 2
        return max(least, found)

    def least_us(self, first: int, last: int, parts: int = 1, most_parts: int = 0, batches: int = 0) -> float:
        """Lower bound on load plus all groups, for every number of groups in first .. last, and of prefill's parts from parts to
        most_parts (0: any); of so many batches, more than ``MOST_BATCHES`` standing for all that are more, or (0) of any number; infinite
        if nothing fits."""
        prompt, (low, high) = self.workload.prompt_len, self.sequences(first, last)
        room = self.room(low)
        if most_parts:
            decoding = low if self.passes else 0
            states = [max(decoding, n * prompt) for n in (1, -(-low // most_parts))]
            room -= state_bytes(self.cost.spec, states[1] - states[0], self.cost.dtype)
        if room < 0:
            return inf
        places = (1, 2) if self.tier == "gpu" and self.budget["host"] < self.expert_bytes else (0,)
        answers = [
            Solver(self.program(first, low, high, room, staging, parts, batches)).relaxed() for staging in places
        ]
        found = [answer.objective for answer in answers if answer.status != "infeasible"]
        return SCALE_US * min(found) * (1 - TOLERANCE) if found else inf

    @property
    def sizes(self) -> tuple[int, int]:
        """Least and most of what ``least_us`` takes intervals of: the number of groups."""
        return 1, self.workload.num_sequences

    def sequences(self, first: int, last: int) -> tuple[int, int]:
        """Least sequences of a group if there are ``last`` groups, and if there are ``first``."""
        total = self.workload.num_sequences
        return -(-total // last), -(-total // first)

    def program(
        self, first: int, low: int, high: int, room: float, staging: int = 0, parts: int = 1, batches: int = 0
    ) -> Model:
        """min load + sum over phases of T, subject to T >= the work of each resource, and to the memory of each tier.

        Variables, all shares of a weight i or of the KV cache: kept[i] in the compute tier, near[i] in host memory before a GPU
        (the rest lives on disk), cpu[i] computed there in decode; kept[kv], cpu[kv]. T of decode's spans: decode[j].
        staging: places of an expert in host memory on its way to a GPU; 0 where none is needed for sure. parts: of prefill, at least.
        """
        model = Model()
        links, on_gpu = self.cost.hardware.links, self.tier == "gpu"
        weights = self.weights(first, low, high, parts, batches)
        kv_bytes = low * self.positions * self.kv_position
        helped = [min(weight.cpu_us) < inf for weight in weights]

        def share(name: str, most: float = 1.0) -> str:
            model.variables[name] = Variable(name, 0.0, most, False)
            return name

        def row(name: str, terms: Terms, lower: float = -inf, upper: float = inf) -> None:
            constant = terms.pop("", 0.0)
            model.rows.append(Row(name, terms, lower - constant, upper - constant))

        for name in self.phases:
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
                row(f"once[{i}]", {kept: 1.0, share(f"cpu[{i}]"): 1.0}, upper=1.0)
                split = share(f"split[{i}]", 0.0 if batches == 1 else 1.0)
                row(f"split[{i}]", {share(f"most[{i}]"): 1.0, split: 1.0, f"cpu[{i}]": 1.0}, lower=1.0)
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
            experts = [layer.expert.nbytes for layer in self.cost.spec.layers if layer.expert]
            passing = min(nbytes / most_pages(nbytes) for nbytes in experts) * staging
            row("host", host, upper=(self.budget["host"] - passing) / GIB)
        for j in range(self.spans):
            share(f"decode[{j}]", inf)
        if batches:
            for run in range(1, RUNS + 1):
                for phase in ("decode", *(f"decode[{j}]" for j in range(self.spans))):
                    share(f"attention[{phase}.{run}]", inf)
                share(f"run[{run}]", 1.0 if run == 1 or batches > 1 else 0.0)
                row(f"run[{run}]", {f"run[{run}]": 1.0, share(f"cpu[run.{run}]"): -1.0}, lower=0.0)
            row("runs", {f"run[{run}]": 1.0 for run in range(1, RUNS + 1)}, 1.0, 1.0)
            row("cpu[runs]", {f"cpu[run.{run}]": 1.0 for run in range(1, RUNS + 1)} | {"cpu[kv]": -1.0}, 0.0, 0.0)
            row("barriers", self.barriers(weights), lower=0.0)
        if self.spans:  # what grows little is simulated at its middle only, which may take this much less
            least = {f"decode[{j}]": NEGLIGIBLE / 8 - 1 for j in range(self.spans)}
            row("spans", {"decode": 1.0, **least}, lower=0.0)
        row("work[load]", {"load": 1.0} | times(-1.0, load), lower=0.0)
        for family, (phases, resources) in enumerate(self.demands(first, low, high, weights, staging, batches)):
            for number, terms in enumerate(resources):
                row(
                    f"work[{phases}.{family}.{number}]",
                    dict.fromkeys(phases.split(), 1.0) | times(-1.0, terms),
                    lower=0.0,
                )
        return model

    def demands(
        self, first: int, low: int, high: int, weights: list[Weight], staging: int, batches: int
    ) -> Iterator[tuple[str, list[Terms]]]:
        """What each resource must do in a phase, or in several together, by what is kept."""
        prefill, decode = self.compute_us(first, low, high)
        layers = self.passes * self._least(self._layers_us, 1, first, low, high)
        ends = decode - layers - self.passes * first * len(self.routed) * self.cost.processor.op_us
        if batches:  # of equal size they take least
            ops = self.passes * self._least(lambda n: batches * self._layers_us(n / batches), 1, first, low, high)
            decode, layers = decode + ops - layers, ops
        most = 1.0 if batches else self.most(high)
        yield "prefill", self.work(PREFILL, prefill, (0.0, inf), 0.0, weights, staging)
        cores, middle = self.cores_us(high), sum(self.contexts) / 2
        yield "decode", self.work(DECODE, decode, cores, self.passes, weights, staging, middle)
        yield "decode", self.beside(layers, cores, weights, most)
        if batches:
            yield from self.attention("decode", first, low, batches, cores, ends, weights)
        for j in range(self.spans):
            begin, end, part = j / self.spans, (j + 1) / self.spans, 1 / self.spans
            context = (begin + end) / 2 * (self.contexts[1] - self.contexts[0]) + self.contexts[0]
            passes, cores = self.passes * part, self.cores_us(high, (begin, end))
            yield f"decode[{j}]", self.work(DECODE, decode * part, cores, passes, weights, staging, context, part)
            yield f"decode[{j}]", self.beside(layers * part, cores, weights, most, part)
            if batches:
                yield from self.attention(f"decode[{j}]", first, low, batches, cores, ends * part, weights, part)

    def most(self, high: int) -> float:
        """The share of sequences that all but a few are."""
        return max(0.75, 1 - FEW / high)

    def beside(
        self,
        layers_us: float,
        cores_us: tuple[float, float],
        weights: list[Weight],
        most: float,
        part: float = 1.0,
    ) -> list[Terms]:
        """What cannot be done at the same time in decode: the GPU's attention and the CPU's experts; the CPU's attention and the GPU's
        experts. layers_us: of the GPU around attention. most: see ``most``."""
        core_here, core_cpu = cores_us
        gpu: Terms = {"": (layers_us + core_here) / SCALE_US}
        cpu: Terms = {"": 0.0}
        if core_cpu < inf:
            gpu["cpu[kv]"] = -core_here / SCALE_US
            cpu = {"": -(1 - most) * core_cpu / SCALE_US, "cpu[kv]": core_cpu / SCALE_US}
        for i, weight in enumerate(weights):
            if weight.cpu_us[DECODE] < inf:
                gpu[f"cpu[{i}]"] = weight.alone_us * part / SCALE_US
                cpu[f"most[{i}]"] = weight.most_us * part / SCALE_US
        return [gpu, cpu]

    def attention(
        self,
        phase: str,
        first: int,
        low: int,
        batches: int,
        cores_us: tuple[float, float],
        ends_us: float,
        weights: list[Weight],
        part: float = 1.0,
    ) -> Iterator[tuple[str, list[Terms]]]:
        """Decode by layers, of n batches: an op of attention works on one, an op of experts on one or on all of them.

        What is not full is priced as if it were, so batches are equal and the CPU's share of a layer is m / n. An op of experts on all
        is a *barrier*: attention and router of its layer come before it, those of the next layer after it. So are the ends of a pass.
        Between two barriers lies a *run* of r layers; in all of them but the last, the GPU computes all experts batch by batch. With M
        batches of its layers on the CPU, a run takes at least

            A(M) = max(what the GPU does; for M > 0: first part of a block, M batches on the CPU, last part of one and its router),

        since the CPU begins after a first part, and a last part needs what it did last. Over all runs of a length, shares and times
        average to a point not below the lower envelope of (M / (r n), A(M)).

        Barriers, runs and ends do not overlap, so T >= runs + ends + what barriers take. Of a layer's, let G be the GPU's experts on
        all, C the CPU's, of which there are c, and w their exchange; E the GPU's if it computed all of them, F those by batches. Then
        max(G, C + w (c > 0)) is no less than

            G
            C + min(w, E) (1 - F / E)                 for c = 0, G = E - F
            G + C + sum on the CPU of (E_i - E + w)   for w <= E: C + w + (c - 1) (w - E), or less, for c > 0
        """
        split_us = min(self._layer_sums([weight.split_us for weight in weights[1:]]), default=0.0)
        both: Terms = {"": ends_us / SCALE_US}
        for run in range(1, RUNS + 1):
            lines = self._attention_us(first, low, batches, run, cores_us, split_us, part)
            both[time := f"attention[{phase}.{run}]"] = 1.0
            yield time, [{f"run[{run}]": at_0, f"cpu[run.{run}]": slope} for slope, at_0 in lines]
        here = [weight.compute_us[DECODE] * part / SCALE_US for weight in weights[1:]]
        layers = self._layer_sums(here)
        least, greatest = min(layers, default=0.0), max(layers, default=0.0)
        exchange = first * self.passes * part * self._exchange_us(low) / SCALE_US
        waits = min(exchange, least)
        gpu, cpu, either = dict(both), plus(both, {"": waits * len(layers)}), dict(both)
        for i, us in enumerate(here, 1):
            alone, count = weights[i].alone_us * part / SCALE_US, self.experts[i - 1][2]
            gpu[f"most[{i}]"] = us
            cpu |= {f"cpu[{i}]": alone, f"split[{i}]": -waits * us / least}
            either |= {f"most[{i}]": us, f"cpu[{i}]": us + alone + (min(exchange, greatest) - greatest) * count}
        yield phase, [gpu, cpu, either]

    def _attention_us(
        self,
        first: int,
        low: int,
        batches: int,
        run: int,
        cores_us: tuple[float, float],
        split_us: float,
        part: float,
    ) -> list[tuple[float, float]]:
        """Lines (slope, value at 0) below what attention would take, were all runs of a length (the last one standing for all that are
        longer), as a function of the CPU's share. split_us: of a layer's experts, batch by batch."""
        cost, size, layers = self.cost, low / batches, len(self.cost.spec.layers)
        times = first * self.passes * part * layers / SCALE_US
        layer_us = min(self._layer_us(layer, size) for layer, _ in self.layers)
        inside = (1 - 1 / run) * split_us * part * layers / SCALE_US if len(self.routed) == layers else 0.0
        core_here, core_cpu = cores_us[0] / SCALE_US, cores_us[1] / SCALE_US
        core_cpu += times * batches * cost.hardware.processors[CPU].op_us
        here = times * batches * layer_us + core_here + inside
        alike = len({(layer.kv_elements, layer.sliding_window) for layer, _ in self.layers}) == 1
        if batches == 1 and not alike:  # processors take turns
            return [(core_cpu - core_here, here)]
        if batches > MOST_BATCHES or run == RUNS or not alike:
            return [(-core_here, here), (core_cpu, 0.0)]
        there = max(1, int(size))
        mixed_bytes = there * max(layer.attention_flops // 4 for layer, _ in self.layers) * cost.compute_bytes
        around_us = cost.transfer_us(cost.links[1], query_bytes(cost.spec, there, cost.dtype))
        around_us += cost.transfer_us(cost.links[0], mixed_bytes)
        if run == 1 or len(self.layers) == 1:  # first and last part of layers that differ may take less
            around_us += layer_us
        shares = [m / (run * batches) for m in range(run * batches + 1)]
        return below(
            [(x, max(here - x * core_here, times / run * around_us + x * core_cpu if x else 0.0)) for x in shares]
        )

    def barriers(self, weights: list[Weight]) -> Terms:
        """Of a run of r layers, r - 1 or more are no barriers: layers that do not route, or whose experts are all computed batch by batch.
        For an expert, that takes a known time more than at once; layers are as many as what is spent in all of them pays for."""
        layers, more = len(self.cost.spec.layers), [w.split_us - w.compute_us[DECODE] for w in weights[1:]]
        least = min(self._layer_sums(more), default=0.0)
        if least <= 0:
            return {}
        terms: Terms = {f"run[{run}]": -(1 - 1 / run) * layers for run in range(1, RUNS + 1)}
        terms |= {f"split[{i}]": us / least for i, us in enumerate(more, 1)}
        return terms | {"": float(layers - len(self.routed))}

    def _layer_sums(self, totals: list[float]) -> list[float]:
        """Of each layer that routes, its part of what ``experts`` take in all layers."""
        each = [total / count for total, (_, _, count) in zip(totals, self.experts, strict=True)]
        return [sum(n * each[number] for number, n in members.items()) for members in self.routed]

    def work(
        self,
        kind: int,
        other_us: float,
        cores_us: tuple[float, float],
        passes: float,
        weights: list[Weight],
        staging: int,
        context: float = 0.0,
        part: float = 1.0,
    ) -> list[Terms]:
        """What link, processor, CPU, link back and disk do in passes of a kind, by what is kept.

        other_us: of the processor, beside experts and cached keys and values. cores_us: reading those, here and on the CPU. passes: in
        which a sequence decodes, 0 for prefill. context: positions seen then. part: of the kind's passes; a part leaves out what
        sharing a memory costs, which is a matter of whole phases.
        """
        total, links = self.workload.num_sequences, self.cost.hardware.links
        read = total * passes * (context - 1) * self.kv_position if passes else 0.0  # the new position is not sent
        new = total * self.kv_position * (self.workload.prompt_len if kind == PREFILL else passes)
        link_us, back_us = (
            1e6 / links[n].bandwidth_bytes_per_s / SCALE_US if n in links else 0.0 for n in self.cost.links
        )
        disk_us = 1e6 / links["disk>host"].bandwidth_bytes_per_s / SCALE_US
        core_here, core_cpu = cores_us
        compute: Terms = {"": (other_us + core_here) / SCALE_US}
        enter: Terms = {"": read * link_us, "kept[kv]": -read * link_us, "cpu[kv]": -read * link_us}
        leave: Terms = {"": new * back_us, "kept[kv]": -new * back_us}
        cpu: Terms = {"": 0.0}
        far: Terms = {"": 0.0}
        if passes and core_cpu < inf:
            enter["cpu[kv]"] += total * passes * self.mixed_position * link_us
            leave["cpu[kv]"] = total * passes * self.mixed_position * back_us
            compute["cpu[kv]"] = -core_here / SCALE_US
            cpu["cpu[kv]"] = core_cpu / SCALE_US
        for i, weight in enumerate(weights):
            moved_us = weight.moved_bytes[kind] * part * link_us
            compute_us = weight.compute_us[kind] * part / SCALE_US
            enter[""] += moved_us
            enter[f"kept[{i}]"] = -moved_us
            if weight.cpu_us[kind] < inf:
                enter[f"cpu[{i}]"] = -moved_us
                cpu[f"cpu[{i}]"] = weight.cpu_us[kind] * part / SCALE_US
            if kind == DECODE and weight.cpu_us[kind] < inf:
                compute |= {f"most[{i}]": compute_us, f"split[{i}]": weight.split_us * part / SCALE_US}
            else:
                compute[""] += compute_us
                compute |= {f"cpu[{i}]": -compute_us} if weight.cpu_us[kind] < inf else {}
            if self.tier == "gpu" and weight.far_bytes:
                far_us = weight.far_bytes[kind] * part * (disk_us + (link_us if staging == 1 else 0.0))
                far[""] += far_us
                far |= {f"kept[{i}]": -far_us, f"near[{i}]": -far_us}
        shared = (enter, compute, cpu) if part < 1 else self._shared(enter, compute, cpu)
        return [*shared, leave, far]

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

    def weights(self, first: int, low: int, high: int, parts: int = 1, batches: int = 0) -> list[Weight]:
        """Every weight, by kind: modules and head cross in every pass, of which prefill has ``parts`` or more; an expert if it is
        touched: in all parts together, with more of them, more often."""
        modules, prompt = float(self.module_bytes), low * self.workload.prompt_len / parts
        passes = first * parts, first * self.passes
        out = [Weight(modules, (passes[0] * modules, passes[1] * modules), (0.0, 0.0))]
        for layer, q, count in self.experts:
            assert layer.expert is not None
            nbytes = float(count * layer.expert.nbytes)
            moved = passes[0] * (1 - (1 - q) ** prompt) * nbytes, passes[1] * (1 - (1 - q) ** low) * nbytes
            per_pass = partial(self._expert_us, layer, q, count, "")
            compute = (
                self._least(per_pass, self.workload.prompt_len, first, low, high),
                self.passes * self._least(per_pass, 1, first, low, high),
            )
            far = passes[0] * nbytes, passes[1] * nbytes
            if not self.cost.cpu_helps:
                out.append(Weight(nbytes, moved, compute, far_bytes=far))
                continue
            cpu, *beside = (
                self.passes * self._least(one, 1, first, low, high)
                for one in self._shared_us(layer, q, count, self.most(high), batches)
            )
            out.append(Weight(nbytes, moved, compute, (inf, cpu), far, *beside))
        return out

    def _shared_us(
        self, layer: Layer, q: float, count: int, most: float, batches: int = 0
    ) -> Iterator[Callable[[float], float]]:
        """Experts of a decode pass over so many tokens where a CPU may help: on the CPU; by parts, in an op that covers most, and on the
        CPU without waiting (with a number of batches, also without exchange, see ``attention``; parts are batches then, and an op covers
        one or all)."""
        here, there = (partial(self._expert_us, layer, q, count, name) for name in ("", CPU))
        shares = [0.5 + (most - 0.5) * i / SPLITS for i in range(SPLITS + 1)]

        def split(tokens: float) -> float:
            if batches:
                return batches * here(tokens / batches)
            return min(here(least * tokens) + here((1 - greatest) * tokens) for least, greatest in pairwise(shares))

        yield partial(self._on_cpu_us, layer, q, count)
        yield split
        yield here if batches else lambda tokens: here(most * tokens)
        yield there if batches else partial(self._on_cpu_us, layer, q, count, waiting=False)

    # ------------------------------------------------------------------------------------------------------- compute

    def _least(self, per_pass: Callable[[int], float], tokens: int, first: int, low: int, high: int) -> float:
        """Of what every group does on all its sequences, ``tokens`` of each."""
        return max(first * per_pass(low * tokens), self.workload.num_sequences * per_pass(high * tokens) / high)

    def compute_us(self, first: int, low: int, high: int) -> tuple[float, float]:
        """Least work of the processor beside experts and cached keys and values, in all prefills and in all decodes."""
        head = self._least(partial(self.cost.module_us, self.cost.spec.head), 1, first, low, high)
        prefill = self._least(self._pass_us, self.workload.prompt_len, first, low, high) + head + self.pairs_us()
        return prefill, self.passes * (self._least(self._pass_us, 1, first, low, high) + head)

    def cores_us(self, high: int, span: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
        """What reading keys and values takes the processor in decode or a span of it, and what it takes the CPU; infinite where it
        cannot."""
        cost, cpu = self.cost, self.cost.hardware.processors.get(CPU)
        here = sum(n * self._core_us(layer, high, cost.processor, span) for layer, n in self.layers)
        if not cpu or not cost.cpu_attends:
            return here, inf
        return here, sum(n * self._core_us(layer, high, cpu, span) for layer, n in self.layers)

    def pairs_us(self) -> float:
        """Attention of all prompts to themselves."""
        total, prompt = self.workload.num_sequences, self.workload.prompt_len
        flops = total * prompt * prompt * sum(count * layer.attention_flops for layer, count in self.layers)
        return 1e6 * flops / self.cost.processor.prefill_attention_flops_per_s

    def _pass_us(self, tokens: int) -> float:
        """A pass over so many tokens, without experts, head and what attention does with keys and values."""
        return self._once_us(tokens) + self._layers_us(tokens)

    def _once_us(self, tokens: int) -> float:
        """Of that, what need not be done for each batch: the fixed cost of an op of experts, or of adding what the CPU computed, too."""
        return self._ends_us(tokens) + len(self.routed) * self.cost.processor.op_us

    def _ends_us(self, tokens: int) -> float:
        """Of that, what is outside the layers."""
        return 4 * self.cost.processor.op_us + self.cost.embed_us(tokens, True)

    def _layers_us(self, tokens: float) -> float:
        """Of that, what is before the experts of all layers."""
        return sum(count * self._layer_us(layer, tokens) for layer, count in self.layers)

    def _layer_us(self, layer: Layer, tokens: float) -> float:
        """Projections of attention, then router and shared expert, or the dense MLP."""
        mlp_us = self.cost.router_us if layer.expert else self.cost.dense_us
        return self.cost.processor.attention_op_us + self.cost.projections_us(layer, tokens) + mlp_us(layer, tokens)

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

    def _on_cpu_us(self, layer: Layer, q: float, count: int, tokens: float, waiting: bool = True) -> float:
        """Experts on the CPU, and their share of the time for which it has nothing to do in a layer where it computes any: until their
        input has come, and from their last sum until that is added; if ``waiting``, also what is around attention."""
        processor = self.cost.processor
        waits = self._exchange_us(tokens) + (processor.attention_op_us + processor.router_op_us if waiting else 0.0)
        return self._expert_us(layer, q, count, CPU, tokens) + waits * count / layer.num_experts

    def _exchange_us(self, tokens: float) -> float:
        """The CPU's experts' input on its way there, then the way back of their sums, and adding them."""
        cost, (into, back) = self.cost, self.cost.links
        there_us = cost.transfer_us(back, rows_bytes(cost.spec, int(tokens), cost.dtype))
        back_us = cost.transfer_us(into, sums_bytes(cost.spec, int(tokens), cost.dtype))
        return there_us + back_us + cost.sums_us(tokens) + cost.processor.op_us

    def _expert_us(self, layer: Layer, q: float, count: int, processor: str, tokens: float) -> float:
        return count * self.cost._expert_us(layer, tokens * q, 1.0 - (1.0 - q) ** tokens, processor)


def below(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lines (slope, value at 0) of the lower envelope of points, which are given from left to right."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    lines = [((y1 - y0) / (x1 - x0), x0, y0) for (x0, y0), (x1, y1) in pairwise(hull)]
    return [(slope, y - slope * x) for slope, x, y in lines]
