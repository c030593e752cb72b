"""Mixed passes: a lower bound on time over all decisions in rolling order (design 7.2, 7.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise, zip_longest
from math import inf

from klotski_compiler.bounds.apart import Relaxation
from klotski_compiler.bounds.least import DECODE, PREFILL, SCALE_US, Cores, Weight
from klotski_compiler.bounds.runs import UNKNOWN, Division
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Workload
from klotski_compiler.milp.linear import Model, Row, Terms, Variable, plus
from klotski_compiler.model import Layer
from klotski_compiler.simulate import Rounds

BESIDE = 2  # a further kind of passes: those in which others join, for what decodes in them
AFTER = 3  # and those in which no more join
LATE = 4  # only of compute: experts in those


def added(work: Iterable[Terms], more: Iterable[Terms]) -> list[Terms]:
    """The work of each resource, with more of the first ones."""
    nothing: Terms = {}
    return [plus(*both) for both in zip_longest(work, more, fillvalue=nothing)]


class Mixed(Relaxation):
    """The least work on every resource in rolling order, where S sequences, in A >= 2 cohorts of S / A, are there at once, and one
    cohort joins every s = ceil(gen_len / A) passes, s in an interval [a, b]; there are at least A cohorts.

    *Joining passes*, "prefill" here, are at least N A / S, and after them come A - 1 of the same ops until the last cohort is done, in
    which ever fewer decode. In both the CPU computes no experts, since it would have to for prompts; and nobody attends to a sequence
    while an expert computes over it, so that the CPU's attention takes its time beside the experts' ops that cover nearly all that
    decodes, or an expert is computed by parts, in more time (``apart``). *Passes between*, "decode", follow them after a drain: s - 1
    after each of either kind, in which those decode that are there. A sequence decodes in gen_len - 1 passes, A - 1 of which are joining
    ones or of those after them: beside what joins, or late. The CPU attends to the same share of every cohort (``Decision.attended``),
    so that one share stands for either kind. All of them together take what the one busiest resource does; for that, the CPU may help
    with whatever decodes. Of an interval of strides, each kind counts at the stride that has least of it.

    *Late.* In the r-th pass after the last cohort has joined, A - r cohorts are left, the last of which may be small. So of the
    N (A - 1) sequences that decode beside what joins or late, a share between (A - 2) S / 2 A N and S / 2 N is late: where no prompts
    keep a processor busy, in ops on ever fewer tokens. Those are the last passes of every sequence, so they see no fewer positions than
    the others, on average, and no more than the last pass does. What is late may be sent in other shares than the rest. All cohorts keep
    the same batches, so that of a small one a larger share is kept, but not more.

    *Memory.* A joining pass holds the states of all that joins: prompts of S / A sequences, and one token of each other.

    An op of router or experts works on the prompts of one cohort and on one token of each other sequence at most; attention on one
    cohort. With x <= S sequences in a pass, an expert is touched with at least x / S of the probability for S.
    """

    phases = ("load", "prefill", "decode", "after")

    def __init__(self, cost: Cost, workload: Workload, budgets: dict[str, int], strides: tuple[int, int]) -> None:
        """budgets: as before. strides: the interval of s."""
        super().__init__(cost, workload, budgets)
        self.spans, self.strides = 0, strides
        self.ages = -(-workload.gen_len // strides[1]), -(-workload.gen_len // strides[0])  # least and most
        # Decode passes of a sequence in which others join, by the stride; positions that attention sees in all of them.
        beside = [self.passes // s for s in range(strides[0], strides[1] + 1)]
        joined = [m * workload.prompt_len + s * m * (m + 1) / 2 for s, m in enumerate(beside, strides[0])]
        self.between = self.passes - max(beside)  # decode passes of a sequence in which none joins
        self.seen = (
            self.passes * sum(self.contexts) / 2 - max(joined),
            max(joined),
        )  # positions in those, and in the others
        self.fewest = min(beside), min(joined)  # the others, and positions in them, at least
        middles = (workload.prompt_len + s * (m + 1) / 2 for s, m in enumerate(beside, strides[0]) if m)
        self.later = max((self.contexts[1] / middle for middle in middles), default=1.0)

    @property
    def sizes(self) -> tuple[int, int]:
        """Least and most sequences that are there at once: all ages are, if only for a pass."""
        total, least = self.workload.num_sequences, self.ages[0]
        return least, max(least, -(-total * least // (least - 1)))

    def sequences(self, first: int, last: int) -> tuple[int, int]:
        """The same numbers: cohorts follow one another, so that S need not divide N."""
        return first, last

    def refined_us(self, size: int) -> float:
        """Prefill's parts are the cohorts."""
        return self.least_us(size, size)

    def tokens(self, sequences: int) -> int:
        """The prompts of one cohort, of the most that there may be, and one token of each other sequence."""
        cohort = -(-sequences // self.ages[1])
        return cohort * self.workload.prompt_len + sequences - cohort

    def least_us(self, first: int, last: int, known: Division = UNKNOWN) -> float:
        """Lower bound on everything, for ``first`` to ``last`` sequences at once; infinite where cohorts would be less than one."""
        return super().least_us(first, last) if self.ages[0] <= last else inf

    def program(
        self,
        first: int,
        low: int,
        high: int,
        room: float,
        staging: int = 0,
        known: Division = UNKNOWN,
    ) -> Model:
        """With late: the share, by sequences, of what decodes beside what joins or late that is late; late[kept.k], late[cpu.k]: of all
        positions that layers of a kind see so, those that are seen late and kept, or late by the CPU."""
        model = super().program(first, low, high, room, staging, known)
        twice, least = 2 * self.workload.num_sequences, self.ages[0]
        shares = ((least - 2) / least * low / twice, high / twice)
        model.variables["late"] = Variable("late", min(1.0, shares[0]), min(1.0, shares[1]), False)
        for i in range(len(self.experts) if self.cost.cpu_attends else 0):
            for phase in ("prefill", "after"):
                model.variables[f"parts[{phase}.{i}]"] = Variable(f"parts[{phase}.{i}]", 0.0, 1.0, False)
        as_many = self.later * min(1.0, shares[1])
        for k in range(len(self.attentions)):
            among = {f"late[{share}.{k}]": f"{share}[kv.{k}]" for share in ("kept", "cpu")}
            for late, whole in among.items():
                model.variables[late] = Variable(late, 0.0, 1.0, False)
                model.rows.append(Row(late, {late: 1.0, whole: -1.0}, -inf, 0.0))
            model.rows.append(Row(f"late[{k}]", dict.fromkeys(among, 1.0) | {"late": -self.later}, -inf, 0.0))
            model.rows.append(Row(f"late[places.{k}]", {f"late[kept.{k}]": 1.0, f"kept[kv.{k}]": -as_many}, -inf, 0.0))
            early = dict.fromkeys(among.values(), 1.0) | dict.fromkeys(among, -1.0) | {"late": 1.0}
            model.rows.append(Row(f"early[{k}]", early, -inf, 1.0))
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
        """Joining passes with what decodes beside them, those between, those after with what is late, and all of them together."""
        other_us, cores_us = (*self._passes_us(high), 0.0), (self.nothing, *self._cores_us(high), self.nothing)
        passes, seen = (0, self.between, self.passes - self.between, 0), (0.0, *self.seen, 0.0)
        work = [
            self.work(kind, other_us[kind], cores_us[kind], n, weights, staging, seen[kind] / n if n else 0.0)
            for kind, n in enumerate(passes)
        ]
        work = [self.shared(own, own) for own in work]
        share = self.fewest[0] / (self.passes - self.between) if self.passes > self.between else 0.0
        fewest_us = self._shared_out(self.cores_us(high), *self.fewest)
        early, late = self.early_and_late(share * other_us[BESIDE], fewest_us, weights, share)
        beside = self.experts_beside(fewest_us, low, high) if self.cost.cpu_attends else []
        for phase, attends, _ in beside:
            yield phase, [attends]
        more = [[{}, parts] for _, _, parts in beside] or [[], []]
        yield "prefill", added(added(work[PREFILL], early), more[0])
        yield "decode", work[DECODE]
        before = self._layered_us(high, self.cost.choice_us)[DECODE]
        few = self.later * (1 - self.most(high))  # those that are left may be the oldest
        yield "decode", self.beside(before, cores_us[DECODE], weights, 1 - few)
        yield "after", added(added(work[AFTER], late), more[1])
        yield "prefill decode after", [plus(*resource) for resource in zip(*work, strict=True)]

    def early_and_late(
        self, other_us: float, cores_us: Cores, weights: list[Weight], share: float
    ) -> tuple[Iterable[Terms], Iterable[Terms]]:
        """What link, processor and CPU do at least for what decodes beside what joins, and for what is late: at the stride of the fewest
        such passes, which are a ``share`` of the most. What is written back or crosses with queries counts only in all passes together."""
        link, other = self.cost.hardware.links[self.cost.links[0]], other_us / SCALE_US
        positions = max(0.0, self.workload.num_sequences * (self.fewest[1] - self.fewest[0]))
        experts = share * sum(weight.compute_us[BESIDE] for weight in weights) / SCALE_US
        left = sum(weight.compute_us[LATE] for weight in weights) / SCALE_US
        early: list[Terms] = [{}, {"": other + experts, "late": -other - experts}, {}]
        late: list[Terms] = [{}, {"": left, "late": other}, {}]
        for k, (core_here, core_cpu) in enumerate(cores_us):
            here, cpu = core_here / SCALE_US, core_cpu / SCALE_US
            read = 1e6 * positions * self.attentions[k].position_bytes / link.bandwidth_bytes_per_s / SCALE_US
            kept, helped, late_kept, late_helped = f"kept[kv.{k}]", f"cpu[kv.{k}]", f"late[kept.{k}]", f"late[cpu.{k}]"
            reads = {"": read, "late": -self.later * read, kept: -read, helped: -read}
            early[0] = plus(early[0], reads | {late_kept: read, late_helped: read})
            early[1] = plus(early[1], {"": here, "late": -self.later * here, helped: -here, late_helped: here})
            early[2] |= {helped: cpu, late_helped: -cpu}
            late[0] = plus(late[0], {"late": read, late_kept: -read, late_helped: -read})
            late[1] = plus(late[1], {"late": here, late_helped: -here})
            late[2] |= {late_helped: cpu}
        return self.shared(early, early), self.shared(late, late)

    def experts_beside(self, cores_us: Cores, low: int, high: int) -> list[tuple[str, Terms, Terms]]:
        """Of joining passes and of those after them: the CPU's attention together with the GPU's experts that cover nearly all that
        decodes, and what the processor does more where they do not. cores_us: all attention in both."""
        cpu, most = [us / SCALE_US for _, us in cores_us], self.most(max(1, low - self._cohort(high)))
        few = 2 * (1 - most) * self.later * sum(cpu)
        late = min(1.0, self.later * high / (2 * self.workload.num_sequences))
        attends: list[Terms] = [{"": -few}, {"": -few * late}]
        for k, us in enumerate(cpu):
            attends[0] |= {f"cpu[kv.{k}]": us, f"late[cpu.{k}]": -us}
            attends[1] |= {f"late[cpu.{k}]": us}
        found = []
        for phase, terms, passes in zip(("prefill", "after"), attends, self._passes(low, high), strict=True):
            parts: Terms = {}
            for i, (layer, q, count) in enumerate(self.experts):
                here = partial(self._expert_us, layer, q, count, "")
                prompts = self._fed(layer) if phase == "prefill" else 0
                covering = sum(times * here(most * n) for times, n, _ in passes) / SCALE_US
                more = sum(times * self._more_us(here, most, joining * prompts, n) for times, n, joining in passes if n)
                terms[""] += covering
                terms[f"parts[{phase}.{i}]"] = -covering
                parts[f"parts[{phase}.{i}]"] = more / SCALE_US
            found.append((phase, terms, parts))
        return found

    def _passes(self, low: int, high: int) -> list[list[tuple[float, int, int]]]:
        """Of joining passes and of those after them, at least: (how many, sequences that decode, those that join)."""
        least, most = self.ages
        cohort = max(1, low // most)
        joins = max(least, self.workload.num_sequences * least / high)
        rising, falling = self._rounds()
        joining = [(count, (there - 1) * cohort, cohort) for there, count in rising]
        joining.append((joins - least, (least - 1) * cohort, cohort))
        return [joining, [(count, there * cohort, 0) for there, count in falling]]

    def _rounds(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """While cohorts come one by one, until the least number of all ages is there, and while they go: (cohorts there, rounds). They are
        those that ``simulate`` times, each for the ones that it interpolates."""
        rounds = Rounds(self.ages[0], self.ages[0])
        counts = rounds.weights(rounds.samples())
        return (
            [(len(rounds.there(k)), count) for k, count in counts.items() if k < rounds.cohorts],
            [(len(rounds.there(k)), count) for k, count in counts.items() if k >= rounds.cohorts],
        )

    def _more_us(self, here: Callable[[float], float], most: float, prompts: int, decoding: int) -> float:
        """What an expert takes more than at once where none of its ops covers more than ``most`` of what decodes."""
        halves = pairwise((1 - most, 0.5, most))
        split = (here(prompts + low * decoding) + here((1 - up) * decoding) for low, up in halves)
        return max(0.0, min(split) - here(prompts + decoding))

    def weights(self, first: int, low: int, high: int, known: Division = UNKNOWN) -> list[Weight]:
        """Every weight, by kind: modules and head cross in every pass; an expert if it is touched."""
        total, (least, most) = self.workload.num_sequences, self.ages
        cohort, joins, after = max(1, low // most), max(least, total * least / high), least - 1
        gaps = self.strides[0] - 1  # passes between two in which others join
        between = max(total * self.between, gaps * total * least) / high
        modules = float(self.module_bytes)
        passes = joins, between + gaps * after, 0.0, after
        out = [Weight(modules, tuple(n * modules for n in passes), (0.0,) * 5)]
        rising, falling = self._rounds()
        for layer, q, count in self.experts:
            assert layer.expert is not None
            nbytes = float(count * layer.expert.nbytes)
            missed = (1 - q) ** cohort  # by one cohort's tokens
            come, left = (sum(times * (1 - missed**there) for there, times in some) for some in (rising, falling))
            # Beyond what is counted as if all were there.
            partly = gaps * max(0.0, come + left - least * (1 - missed**least))
            touched = (
                joins * (1 - (1 - q) ** (cohort * self._fed(layer))),
                between * (1 - (1 - q) ** high) + partly,
                0.0,
                left,
            )
            per_pass = partial(self._expert_us, layer, q, count, "")
            each = (
                *self._each_us(per_pass, high, self._fed(layer)),
                0.0,
                sum(times * per_pass(cohort * there) for there, times in falling),
            )
            moved, far = (tuple(n * nbytes for n in times) for times in (touched, passes))
            if not self.cost.cpu_helps:
                out.append(Weight(nbytes, moved, each, far_bytes=far))
                continue
            cpu, *beside = (total * one(high) / high for one in self._shared_us(layer, q, count, self.most(high)))
            helped = (n * cpu if n else inf for n in (self.between, self.between and self.passes - self.between))
            out.append(Weight(nbytes, moved, each, (inf, *helped, inf), far, *(self.between * us for us in beside)))
        return out

    def _each_us(self, per_pass: Callable[[int], float], high: int, prompt: int) -> tuple[float, float, float]:
        """Least time of what joins with so many tokens of each prompt, of what decodes between, and of what decodes beside what joins: of
        ops on all that is there."""
        total = self.workload.num_sequences
        most = self._cohort(high) * prompt + high
        joining, alone = total * per_pass(most) / most, total * per_pass(high) / high
        return prompt * joining, self.between * alone, (self.passes - self.between) * joining

    def _cohort(self, high: int) -> int:
        """Most sequences of a cohort."""
        return -(-high // self.ages[0])

    def _layered_us(self, high: int, mlp_us: Callable[[Layer, float], float]) -> tuple[float, float, float]:
        """The same of attention and of what comes after it: no op of attention works on sequences of two ages, but in decode one may do
        what surrounds it for all."""
        total, prompt, cohort = self.workload.num_sequences, self.workload.prompt_len, self._cohort(high)
        alone = total * self._projections_us(cohort) / cohort
        if self.cost.cpu_attends:
            alone = min(alone, total * self._projections_us(high) / high)
        joining = total * self._prompts_us(cohort * prompt) / cohort
        attention = joining, self.between * alone, (self.passes - self.between) * alone
        fed = (
            tuple(count * us for us in self._each_us(partial(mlp_us, layer), high, self._fed(layer)))
            for layer, count in self.layers
        )
        join, between, beside = map(sum, zip(attention, *fed, strict=True))
        return join, between, beside

    def _passes_us(self, high: int) -> tuple[float, float, float]:
        """Least work of the processor beside experts and cached keys and values."""
        head = self.workload.num_sequences * self.cost.head_us(high) / high
        ends = self._each_us(self._once_us, high, self.workload.prompt_len)
        layers = self._layered_us(high, self.cost.mlp_us)
        times = head + self.pairs_us(), self.between * head, (self.passes - self.between) * head
        join, between, beside = (sum(parts) for parts in zip(ends, layers, times, strict=True))
        return join, between, beside

    def _cores_us(self, high: int) -> Iterator[Cores]:
        """Reading keys and values between and beside, of the processor and of the CPU."""
        cores, passes = self.cores_us(high), self.passes - self.between
        beside = self._shared_out(cores, passes, self.seen[1])
        yield [(here - less, cpu - same) for (here, cpu), (less, same) in zip(cores, beside, strict=True)]
        yield beside

    def _shared_out(self, cores: Cores, passes: int, seen: float) -> Cores:
        """What so many passes take of all of decode, in which attention sees so many positions: they come late in the life of a sequence,
        which a window does not feel."""
        if not passes:
            return self.nothing
        (first, last), shares = self.contexts, list[float]()
        for kind in self.attentions:  # counted as ``_core_us`` does
            window = kind.layers[0][0].sliding_window
            begin, end = (min(context, window or context) for context in (first, last))
            more = (seen - passes * first) * (end - begin) / max(1, last - first)
            shares.append((passes * begin + more) / (self.passes * (begin + end) / 2))
        return [(here * share, cpu * share) for (here, cpu), share in zip(cores, shares, strict=True)]
