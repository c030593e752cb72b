"""Phases apart: a lower bound on time over all decisions (design 7.2), as a relaxation in which only work and memory count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from heapq import heapify, heapreplace
from itertools import pairwise
from math import inf, isinf

from klotski_compiler.bounds.least import DECODE, PREFILL, SCALE_US, Cores, Weight
from klotski_compiler.bounds.runs import MOST_BATCHES, UNKNOWN, Division, Runs
from klotski_compiler.decision import Decision
from klotski_compiler.layout import most_pages
from klotski_compiler.milp.linear import Model, Row, Terms, Variable, plus, times
from klotski_compiler.milp.solver import Solver
from klotski_compiler.model import Layer
from klotski_compiler.ops import CPU
from klotski_compiler.simulate import NEGLIGIBLE
from klotski_compiler.tensors import state_bytes
from klotski_compiler.workspace import workspace

GIB = 1 << 30  # of memory in the linear program
TOLERANCE = 1e-6  # of its solver
CLOSE = 1e-4  # bounds that differ by less are equal
FEW = 8  # sequences of a group: an op of an expert on all but so many leaves little to attend to beside it
SPLITS = 5  # intervals of the share of sequences in the larger of two parts, in each of which costs are bounded


class Relaxation(Runs):
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
    beside the CPU's attention, but for what that has to do for a few when an op covers all others, in its layer and in the next; or an
    expert is computed by parts, which reads it more than once. In every layer a whole number of batches is attended to by the CPU, each
    with its ops (``refined_us``, ``attention``).
    *Links.* What is not kept in the tier crosses its link in every pass: weights whole, experts at least if they are
    touched, which is least likely at low; KV as written and read back. Latencies are left out.
    *Spans.* What is decided is decided for all of decode: while contexts grow, no share can follow what is busiest. Decode takes
    at least what the busiest resource of each of its spans does (op times are affine in the position).
    *Disk.* Before a GPU only experts may live on disk, and those travel by name, in every pass.
    *Parts.* Prefill in p parts keeps the states of a p-th of the prompts, and reads what is not kept p times (``refined_us``).
    *Memory* at S = low: states, least workspace, one expert slot, KV. Keeping is relaxed to fractions. Where host memory cannot hold
    all experts, some pass through it, to be kept on the GPU or to be streamed: one place in it is theirs, or two, of a page; with one,
    disk and link take turns.
    *Load.* What memory keeps is read from disk once, before all else.
    """

    phases: tuple[str, ...] = ("load", "prefill", "decode")
    strides: tuple[int, int] = (1, 1)  # in mixed passes: of an interval, the least and the most

    def refined_us(self, groups: int) -> float:
        """``least_us`` of one number of groups, whatever the number of batches and of prefill's parts, each of which has a batch at least:
        few parts keep the states of many prompts at once, many read the weights as often. Of parts, intervals are bounded. Then with what
        sharing a memory costs in each of decode's spans: what takes no longer than some time takes no less than what is found for that."""
        least, low = self.least_us(groups, groups), -(-self.workload.num_sequences // groups)
        if isinf(least):
            return least
        batches = {
            n: self.least_us(groups, groups, Division(batches=n)) for n in range(1, min(low, MOST_BATCHES + 1) + 1)
        }
        doubling = (Division(2**i, 2 ** (i + 1) - 1) for i in range(low.bit_length()))
        parts = {known.parts: self.least_us(groups, groups, known) for known in doubling}
        pairs = {(n, p): max(batches[n], parts[p]) for n in batches for p in parts if p <= n or n > MOST_BATCHES}
        least = self._least_pair(groups, pairs, least * (1 + CLOSE))
        if self.spans and self.dragged:
            most = least * (1 + self.dragged / 2)
            least = max(least, min(most, self._least_pair(groups, pairs, least, self._shares(groups, most))))
        return least

    def _least_pair(
        self, groups: int, known: dict[tuple[int, int], float], enough: float, shares: Sequence[float] = ()
    ) -> float:
        """The least over numbers of batches and of parts, of which lower bounds are known: no more looks than needed, nor if one is no
        more than ``enough``. shares: see ``Division``."""
        queue = [(us, False, *pair) for pair, us in known.items()]
        heapify(queue)
        while not queue[0][1] and (shares or queue[0][0] > enough):
            us, _, n, p = queue[0]
            most = 2 * p - 1 if n > MOST_BATCHES else min(n, 2 * p - 1)
            known_us = self.least_us(groups, groups, Division(p, most, n, shares))
            heapreplace(queue, (max(us, known_us), True, n, p))
        return queue[0][0]

    def _shares(self, groups: int, most_us: float) -> list[float]:
        """The least share of decode that each of its spans may take in so many groups, where all takes no more than ``most_us``."""
        low, high = self.sequences(groups, groups)
        model = self.program(groups, low, high, self.room(low))
        rows = [*model.rows, Row("most", dict(model.objective), -inf, most_us / SCALE_US)]

        def extreme(name: str, sign: float) -> float:
            answer = Solver(Model(model.variables, rows, {name: sign})).relaxed()
            return abs(answer.objective) if answer.status != "infeasible" else 0.0

        whole = extreme("decode", -1.0) * (1 + TOLERANCE)
        return [extreme(f"decode[{j}]", 1.0) / whole if whole else 0.0 for j in range(self.spans)]

    def least_us(self, first: int, last: int, known: Division = UNKNOWN) -> float:
        """Lower bound on load plus all groups, for every number of groups in first .. last, each divided so; infinite if nothing fits."""
        low, high = self.sequences(first, last)
        # The states of a largest part are there at once; it has a batch at least.
        several = [n for n in (known.most_parts, known.batches if known.batches <= MOST_BATCHES else 0) if n]
        prompts, decoding = -(-low // min(several)) if several else 1, low if self.passes else 0
        states = [max(decoding, n * self.workload.prompt_len) for n in (1, prompts)]
        room = self.room(low) - state_bytes(self.cost.spec, states[1] - states[0], self.cost.dtype)
        if room < 0:
            return inf
        places = (1, 2) if self.tier == "gpu" and self.budget["host"] < self.expert_bytes else (0,)
        models = (self.program(first, low, high, room, staging, known) for staging in places)
        answers = [Solver(model).least() for model in models]
        found = [answer.objective for answer in answers if answer.status != "infeasible"]
        return SCALE_US * min(found) * (1 - TOLERANCE) if found else inf

    def attends(self, batches: int) -> bool:
        """Whether the CPU may attend to some of a known number of batches."""
        return bool(batches and self.passes and self.cost.cpu_attends)

    @property
    def sizes(self) -> tuple[int, int]:
        """Least and most of what ``least_us`` takes intervals of: the number of groups."""
        return 1, self.workload.num_sequences

    def sequences(self, first: int, last: int) -> tuple[int, int]:
        """Least sequences of a group if there are ``last`` groups, and if there are ``first``."""
        total = self.workload.num_sequences
        return -(-total // last), -(-total // first)

    def program(
        self,
        first: int,
        low: int,
        high: int,
        room: float,
        staging: int = 0,
        known: Division = UNKNOWN,
    ) -> Model:
        """min load + sum over phases of T, subject to T >= the work of each resource, and to the memory of each tier.

        Variables, all shares of a weight i or of the KV cache of layers that attend alike (k): kept[i] in the compute tier, near[i] in
        host memory before a GPU (the rest lives on disk), cpu[i] computed there in decode, most[i] in ops that cover all sequences but a
        few, split[i] by parts; kept[kv.k], cpu[kv.k]. Of a known number of batches (``attention``) run[r.k], layers in runs of a length,
        and cpu[run.r.k] of those. T of decode's spans: decode[j]; of attention between barriers: attention[decode.n].
        staging: places of an expert in host memory on its way to a GPU; 0 where none is needed for sure.
        """
        model, batches = Model(), known.batches
        links, on_gpu = self.cost.hardware.links, self.tier == "gpu"
        weights = self.weights(first, low, high, known)
        kv_bytes = [low * self.positions * kind.position_bytes for kind in self.attentions]
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
        for kind in range(len(kv_bytes)):
            kept = share(f"kept[kv.{kind}]")
            row(f"kv[{kind}]", {kept: 1.0, share(f"cpu[kv.{kind}]", float(self.cost.cpu_attends)): 1.0}, upper=1.0)
            if self.cost.links[1] not in links:
                row(f"kv_stays[{kind}]", {kept: 1.0}, lower=1.0)

        # A batch whose keys and values are kept elsewhere has a place for those of one layer while its prompts are there. The largest such
        # batch is no smaller than all of them are on average, over batches and layers.
        passing = 1 / len(self.cost.spec.layers) / batches if 0 < batches <= MOST_BATCHES else 0.0
        here: Terms = {"": passing * sum(kv_bytes) / GIB}
        here |= {f"kept[kv.{kind}]": (1 - passing) * nbytes / GIB for kind, nbytes in enumerate(kv_bytes)}
        beside = self.cost.spec.embedding.nbytes if on_gpu else 0  # in host memory
        host: Terms = {"": (sum(kv_bytes) + beside) / GIB}
        host |= {f"kept[kv.{kind}]": -nbytes / GIB for kind, nbytes in enumerate(kv_bytes)}
        disk_us = 1e6 / links["disk>host"].bandwidth_bytes_per_s / SCALE_US
        load: Terms = {"": beside * disk_us}
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
            staged = min(nbytes / most_pages(nbytes) for nbytes in experts) * staging
            row("host", host, upper=(self.budget["host"] - staged) / GIB)
        for j in range(self.spans):
            share(f"decode[{j}]", inf)
        if self.attends(batches):
            for number in range(len(self.runs)):
                for phase in ("decode", *(f"decode[{j}]" for j in range(self.spans))):
                    share(f"attention[{phase}.{number}]", inf)
            for kind in range(len(kv_bytes)):
                own = {f"{run}.{kind}": run for run, among in self.runs if kind in among}
                for name, run in own.items():
                    share(f"run[{name}]", 1.0 if run == 1 or batches > 1 else 0.0)
                    row(f"run[{name}]", {f"run[{name}]": 1.0, share(f"cpu[run.{name}]"): -1.0}, lower=0.0)
                row(f"runs[{kind}]", {f"run[{name}]": 1.0 for name in own}, 1.0, 1.0)
                row(
                    f"cpu[runs.{kind}]", {f"cpu[run.{name}]": 1.0 for name in own} | {f"cpu[kv.{kind}]": -1.0}, 0.0, 0.0
                )
            row("barriers", self.barriers(weights), lower=0.0)
        if self.spans:  # what grows little is simulated at its middle only, which may take this much less
            least = {f"decode[{j}]": NEGLIGIBLE / 8 - 1 for j in range(self.spans)}
            row("spans", {"decode": 1.0, **least}, lower=0.0)
        row("work[load]", {"load": 1.0} | times(-1.0, load), lower=0.0)
        for family, (phases, resources) in enumerate(self.demands(first, low, high, weights, staging, known)):
            for number, terms in enumerate(resources):
                row(
                    f"work[{phases}.{family}.{number}]",
                    dict.fromkeys(phases.split(), 1.0) | times(-1.0, terms),
                    lower=0.0,
                )
        return model

    def demands(
        self,
        first: int,
        low: int,
        high: int,
        weights: list[Weight],
        staging: int,
        known: Division,
    ) -> Iterator[tuple[str, list[Terms]]]:
        """What each resource must do in a phase, or in several together, by what is kept."""
        batches, shares = known.batches, known.shares
        prefill, decode = self.compute_us(first, low, high)
        layers = self.passes * self._least(self._layers_us, 1, first, low, high)
        before = self.passes * self._least(partial(self._before_us, max(1, batches)), 1, first, low, high)
        ends = decode - layers - self.passes * first * len(self.routed) * self.cost.processor.op_us
        if batches:  # of equal size they take least
            ops = partial(self._batched_us, self._mlps_us, batches)
            decode += self.passes * self._least(ops, 1, first, low, high) - layers
            prompt = self.workload.prompt_len
            prefill -= self._least(self._prompts_us, prompt, first, low, high)
            prefill += self._least(partial(self._parted_us, batches), prompt, first, low, high)
        most = 1.0 if batches else self.most(high)
        joined = self.work(PREFILL, prefill, self.nothing, 0.0, weights, staging)
        yield "prefill", self.shared(joined, joined)
        cores, middle = self.cores_us(high), sum(self.contexts) / 2
        whole = self.work(DECODE, decode, cores, self.passes, weights, staging, middle)
        yield "decode", self.shared(whole, whole)
        yield "decode", self.beside(before, cores, weights, most)
        if self.attends(batches):
            yield from self.attention("decode", first, low, batches, cores, ends, weights)
        for j in range(self.spans):
            begin, end, part = j / self.spans, (j + 1) / self.spans, 1 / self.spans
            context = (begin + end) / 2 * (self.contexts[1] - self.contexts[0]) + self.contexts[0]
            passes, cores = self.passes * part, self.cores_us(high, (begin, end))
            own = self.work(DECODE, decode * part, cores, passes, weights, staging, context, part)
            yield f"decode[{j}]", self.shared(own, whole, shares[j] if shares else 0.0)
            yield f"decode[{j}]", self.beside(before * part, cores, weights, most, part)
            if self.attends(batches):
                yield from self.attention(f"decode[{j}]", first, low, batches, cores, ends * part, weights, part)

    def _parted_us(self, batches: int, tokens: float) -> float:
        """``_prompts_us`` in so many batches: of equal size they take least, if they are of equal size; where one is the CPU's own, of
        another size, their ops take no less than one op on all and what it costs to begin the others."""
        if self.cost.cpu_attends:
            return self._prompts_us(tokens) + (batches - 1) * self._prompts_us(0)
        return batches * self._prompts_us(tokens / batches)

    @property
    def nothing(self) -> Cores:
        """Where no keys and values of others are read."""
        return [(0.0, 0.0)] * len(self.attentions)

    def _before_us(self, batches: int, tokens: float) -> float:
        """What is before all experts, with attention in so many batches."""
        return self._batched_us(self._choices_us, batches, tokens)

    def _batched_us(self, mlps_us: Callable[[float], float], batches: int, tokens: float) -> float:
        """What attention in so many batches takes in all layers, and what comes after it."""
        attention = sum(count * self._batches_us(layer, tokens, batches) for layer, count in self.layers)
        return attention + mlps_us(tokens)

    def most(self, high: int) -> float:
        """The share of sequences that all but a few are."""
        return max(0.75, 1 - FEW / high)

    def beside(
        self,
        layers_us: float,
        cores_us: Cores,
        weights: list[Weight],
        most: float,
        part: float = 1.0,
    ) -> list[Terms]:
        """What cannot be done at the same time in decode: the GPU's attention and the CPU's experts; the CPU's attention and the GPU's
        experts. layers_us: of the GPU around attention. most: see ``most``."""
        gpu: Terms = {"": layers_us / SCALE_US}
        cpu: Terms = {"": 0.0}
        for kind, (core_here, core_cpu) in enumerate(cores_us):
            gpu[""] += core_here / SCALE_US
            if self.cost.cpu_attends:
                gpu[f"cpu[kv.{kind}]"] = -core_here / SCALE_US
                cpu[""] -= 2 * (1 - most) * core_cpu / SCALE_US
                cpu[f"cpu[kv.{kind}]"] = core_cpu / SCALE_US
        for i, weight in enumerate(weights):
            if weight.cpu_us[DECODE] < inf:
                gpu[f"cpu[{i}]"] = weight.alone_us * part / SCALE_US
                cpu[f"most[{i}]"] = weight.most_us * part / SCALE_US
        return [gpu, cpu]

    def work(
        self,
        kind: int,
        other_us: float,
        cores_us: Cores,
        passes: float,
        weights: list[Weight],
        staging: int,
        context: float = 0.0,
        part: float = 1.0,
    ) -> list[Terms]:
        """What link, processor, CPU, link back and disk do in passes of a kind, by what is kept.

        other_us: of the processor, beside experts and cached keys and values. cores_us: reading those, here and on the CPU. passes: in
        which a sequence decodes, 0 for prefill. context: positions seen then. part: of the kind's passes.
        """
        total, links = self.workload.num_sequences, self.cost.hardware.links
        read = total * passes * (context - 1) if passes else 0.0  # the new position is not sent
        new = total * (self.workload.prompt_len if kind == PREFILL else passes)
        link_us, back_us = (
            1e6 / links[n].bandwidth_bytes_per_s / SCALE_US if n in links else 0.0 for n in self.cost.links
        )
        disk_us = 1e6 / links["disk>host"].bandwidth_bytes_per_s / SCALE_US
        compute: Terms = {"": other_us / SCALE_US}
        enter: Terms = {"": 0.0}
        leave: Terms = {"": 0.0}
        cpu: Terms = {"": 0.0}
        far: Terms = {"": 0.0}
        for each, (own, (core_here, core_cpu)) in enumerate(zip(self.attentions, cores_us, strict=True)):
            kept, helped = f"kept[kv.{each}]", f"cpu[kv.{each}]"
            read_us, new_us = read * own.position_bytes * link_us, new * own.position_bytes * back_us
            compute[""] += core_here / SCALE_US
            enter[""] += read_us
            enter |= {kept: -read_us, helped: -read_us}
            leave[""] += new_us
            leave[kept] = -new_us
            if passes and self.cost.cpu_attends:
                enter[helped] += total * passes * own.mixed_bytes * link_us
                leave[helped] = total * passes * own.mixed_bytes * back_us
                compute[helped] = -core_here / SCALE_US
                cpu[helped] = core_cpu / SCALE_US
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
        return [enter, compute, cpu, leave, far]

    @property
    def dragged(self) -> float:
        """The most that sharing host memory may cost (``Cost.drag``)."""
        into, cost = self.cost.links[0], self.cost
        return max(cost.drag(CPU, into), cost.drag(into, CPU)) if CPU in cost.hardware.processors else 0.0

    def shared(self, own: Sequence[Terms], whole: Sequence[Terms], share: float = 1.0) -> list[Terms]:
        """What a part of a phase takes of the link into the compute tier, of its processor and of the CPU, each with what sharing host
        memory costs it, and of the others.

        whole: all of the phase, of which the part takes at least ``share``. With C in the part and L in the phase busy alone, t and T the
        times of both, and s the slowdown: t >= C (1 + s L / T), which for L <= T implies t >= C + s / (1 + s) L t / T (``Cost.drag``)."""
        into, cost = self.cost.links[0], self.cost
        enter, compute, cpu, *others = own
        if CPU not in cost.hardware.processors:
            return [*own]
        here = 1 if cost.processor_name == CPU else 2
        link = plus(enter, times(share * cost.drag(into, CPU), whole[here]))
        slower = plus(own[here], times(share * cost.drag(CPU, into), whole[0]))
        return [link, *((slower, cpu) if here == 1 else (compute, slower)), *others]

    # -------------------------------------------------------------------------------------------------------- memory

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
        taken += state_bytes(spec, self.tokens(sequences), cost.dtype)
        free = self.budget[self.tier] - taken
        if self.expert_bytes > free:
            free -= max(layer.expert.nbytes for layer in spec.layers if layer.expert)
        return free

    def tokens(self, sequences: int) -> int:
        """Tokens whose hidden states are there at once, at least: a prompt's, or one of each sequence's."""
        return max(sequences if self.passes else 0, self.workload.prompt_len)

    # --------------------------------------------------------------------------------------------------------- links

    def weights(self, first: int, low: int, high: int, known: Division = UNKNOWN) -> list[Weight]:
        """Every weight, by kind: modules and head cross in every pass, of which prefill has as many as parts at least; an expert if it is
        touched: in all parts together, with more of them, more often."""
        modules, parts = float(self.module_bytes), known.parts
        passes = first * parts, first * self.passes
        out = [Weight(modules, (passes[0] * modules, passes[1] * modules), (0.0, 0.0))]
        for layer, q, count in self.experts:
            assert layer.expert is not None
            nbytes, prompt = float(count * layer.expert.nbytes), low * self._fed(layer) / parts
            moved = passes[0] * (1 - (1 - q) ** prompt) * nbytes, passes[1] * (1 - (1 - q) ** low) * nbytes
            per_pass = partial(self._expert_us, layer, q, count, "")
            compute = (
                self._least(per_pass, self._fed(layer), first, low, high),
                self.passes * self._least(per_pass, 1, first, low, high),
            )
            far = passes[0] * nbytes, passes[1] * nbytes
            if not self.cost.cpu_helps:
                out.append(Weight(nbytes, moved, compute, far_bytes=far))
                continue
            at_once, evened = (
                self._shared_us(layer, q, count, self.most(high), known.batches, even) for even in (False, True)
            )
            cpu, *beside = (
                self.passes * self._least(one, 1, first, low, high, per_token)
                for one, per_token in zip(at_once, evened, strict=True)
            )
            out.append(Weight(nbytes, moved, compute, (inf, cpu), far, *beside))
        return out

    def _shared_us(
        self, layer: Layer, q: float, count: int, most: float, batches: int = 0, even: bool = True
    ) -> Iterator[Callable[[float], float]]:
        """Experts of a decode pass over so many tokens where a CPU may help: on the CPU; by parts, in an op that covers most, and on the
        CPU without waiting (with a number of batches, also without exchange, see ``attention``; parts are batches then, and an op covers
        one or all). even: of the CPU, which computes over all tokens at once, see ``_expert_us``."""
        here = partial(self._expert_us, layer, q, count, "")
        there = partial(self._expert_us, layer, q, count, CPU, even=even)
        shares = [0.5 + (most - 0.5) * i / SPLITS for i in range(SPLITS + 1)]

        def split(tokens: float) -> float:
            if batches:
                return batches * here(tokens / batches)
            return min(here(least * tokens) + here((1 - greatest) * tokens) for least, greatest in pairwise(shares))

        yield partial(self._on_cpu_us, layer, q, count, even=even)
        yield split
        yield here if batches else lambda tokens: here(most * tokens)
        yield there if batches else partial(self._on_cpu_us, layer, q, count, waiting=False, even=even)
