"""The search: for every policy the best (n, batch size) that fits.

Sizes are enumerated outside, residency is solved inside (``milp``) for ``joint`` and filled greedily for the others; each candidate is
timed by the same simulator on its distinct layer periods, and each policy's best is lowered whole. Nobody is handicapped: all
policies see the same grid, the same readers, the same memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import count
from math import inf
from types import MappingProxyType, ModuleType

from klotski_compiler.bounds import Relaxation
from klotski_compiler.cost import Cost
from klotski_compiler.errors import Infeasible
from klotski_compiler.hardware import Hardware
from klotski_compiler.milp.solve import relaxed_us, residency
from klotski_compiler.model import ModelSpec, Module
from klotski_compiler.pipeline import LOAD_BYTES, Lowered, lower, shapes
from klotski_compiler.plan import (
    PAGE_BYTES,
    Decision,
    LayerDecision,
    Workload,
    align_up,
)
from klotski_compiler.policies import OURS, policy
from klotski_compiler.rough import busiest_us, load_us, rough_us
from klotski_compiler.routing import Routing
from klotski_compiler.tensors import MODULES, kv_bytes, query_bytes, state_bytes
from klotski_compiler.workspace import decode_attention_bytes, prefill_attention_bytes, spill_bytes, workspace

SMALL_SHARE = 0.03  # head and embedding stay resident where they take less than this of the budget
ATTENTION_SHARE = 0.08  # of the budget for what one attention call allocates
EXPERT_ROWS = {"host": 512, "gpu": 8192}  # tokens per matmul: where its rate has long stopped growing
SPILLED_BATCHES = 3  # of one layer's KV in flight where KV does not live in the compute tier
COARSE = 16  # experts of a layer up to which one more or less of them makes layers differ much
SAMPLED = 2  # layers of the short model on which candidates are timed; a second one has twice as many
LEAST_ROWS = 2048  # tokens per matmul that joint may go down to: its rate has stopped growing
WORTH = 0.002  # what another micro-batch must save
FILLS = ("any", "no spill", "alike", "resident")
NOTHING: Mapping[str, int] = MappingProxyType({})
KEPT_FITTED = 3  # decisions per size whose micro-batches are fitted to the memory that they leave
IMPROVEMENTS = 8  # decisions near the best one that are tried
KEPT_SCORED = 2  # sizes per policy that are timed on short models
KEPT_SOLVED = 5  # and of the policy whose residency is solved
KEPT_WHOLE = 3  # and of those, that may be lowered whole
ESTIMATE_ERROR = 0.05  # how far a short model's time may be off
MANY_EXPERTS = 8000  # a model of more: loads bring twice as much, for the sake of the plan's length
MOST_WHOLE = {2000: 2, MANY_EXPERTS: 1}  # schedules that are lowered whole of a model of more than so many experts
WHOLE_EXPERTS, WHOLE_LAYERS = 2000, 28  # a model of so few experts and layers is timed whole at once


@dataclass(frozen=True)
class Request:
    """What to compile. ``batch_size``, ``num_batches``: fixed, or None to be solved. ``max_latency_s``: of one decode pass."""

    spec: ModelSpec
    hardware: Hardware
    routing: Routing
    workload: Workload
    budgets: dict[str, int]
    dtype: str
    policy: str = "auto"
    batch_size: int | None = None
    num_batches: int | None = None
    max_latency_s: float | None = None
    time_limit_s: float = 60.0
    model_digest: str = ""


@dataclass(frozen=True, slots=True)
class Rated:
    """A decision with its estimated speed. kind: of its fill, see ``Search.fills``."""

    tokens_per_s: float
    policy: str
    decision: Decision
    kind: str


@dataclass(slots=True)
class Best:
    """A policy's best schedule so far."""

    policy: str
    decision: Decision
    tokens_per_s: float
    lowered: Lowered


class Search:
    """One request under search."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cost = Cost(request.spec, request.hardware, request.routing, request.dtype)
        self.tier = request.hardware.compute_tier
        self.deadline = time.monotonic() + request.time_limit_s
        self.truncated = False
        self._experts = sum(layer.num_experts for layer in request.spec.layers)
        self._most = request.workload.num_sequences
        self._least: dict[int, float] = {}

    @property
    def is_large(self) -> bool:
        """Whether the model has so many experts that compiling it takes long."""
        return self._experts > MANY_EXPERTS

    @property
    def _finest(self) -> int:
        """Experts of a layer."""
        return max(layer.num_experts for layer in self.request.spec.layers)

    # ---------------------------------------------------------------------------------------------------- candidates

    def timed(self, name: str) -> list[Rated]:
        """A policy's best candidates by estimated speed. Raises Infeasible."""
        if policy(name).ONE_BATCH and (self.request.num_batches or 1) > 1:
            raise Infeasible(
                {}, f"{name} computes one batch at a time; leave out --num-batches, or choose another --policy"
            )
        scored: list[tuple[float, Decision]] = []
        module, refusal = policy(name), None
        for bound_us, size in self.sizes():
            # In order of their bounds: what follows cannot be faster than the best so far.
            if scored and bound_us > min(us for us, _ in scored) * (1 + ESTIMATE_ERROR):
                break
            if scored and time.monotonic() > self.deadline:
                self.truncated = True
                break
            fitting: list[tuple[float, Decision]] = []
            for base in self.bases_of(name, [size]):
                try:
                    fitting.append((self.score(name, base), base))
                except Infeasible as fault:
                    if refusal is None or sum(fault.shortfalls.values()) < sum(refusal.shortfalls.values()):
                        refusal = fault
            fitting.sort(key=lambda entry: entry[0])
            scored += self.fitted(name, fitting[:KEPT_FITTED]) if module.EXPERTS == "solved" else fitting
        scored.sort(key=lambda entry: entry[0])
        if module.EXPERTS == "solved":  # one of each shape: what a score cannot tell is how finely work is divided
            scored = list({(base.num_batches, base.batch_size): (us, base) for us, base in reversed(scored)}.values())
            scored.sort(key=lambda entry: entry[0])
        tried = KEPT_SOLVED if module.EXPERTS == "solved" else KEPT_SCORED
        rated = [
            Rated(self.estimate(name, decision), name, decision, kind)
            for _, base in scored[:tried]
            for kind, decision in self.fills(name, base)
        ]
        if module.EXPERTS == "solved" and rated:
            best = max(rated, key=lambda r: r.tokens_per_s)
            if (better := self.improved(best)) is not best:
                rated.append(better)
        kept = sorted((r for r in rated if r.tokens_per_s > 0), key=lambda r: -r.tokens_per_s)[:KEPT_WHOLE]
        if not kept:
            raise self._too_slow() if scored or refusal is None else refusal
        return kept

    def whole_best(self, timed: list[Rated], refusals: dict[str, Infeasible]) -> list[Best]:
        """Candidates lowered whole, fastest first: all that may win given how far an estimate can be off. Raises Infeasible."""
        whole: list[Best] = []
        for rated in sorted(timed, key=lambda r: -r.tokens_per_s):
            enough = any(self._experts > size and len(whole) >= most for size, most in MOST_WHOLE.items())
            if whole and (enough or rated.tokens_per_s < max(b.tokens_per_s for b in whole) * (1 - ESTIMATE_ERROR)):
                break
            try:
                lowered, fitted = self.whole(rated)
                whole.append(Best(rated.policy, fitted, self.rate(lowered), lowered))
            except Infeasible as refusal:
                refusals[rated.policy] = refusal
        if not whole:
            raise min(refusals.values(), key=lambda r: sum(r.shortfalls.values()))
        return sorted(whole, key=lambda best: -best.tokens_per_s)

    def narrow(self, timed: list[Rated]) -> bool:
        """After all these turned out not to fit when lowered whole: go on with smaller groups; False where there are none."""
        tried = min((rated.decision.sequences for rated in timed), default=1)
        self._most = tried - 1
        return tried > 1 and not (self.request.batch_size and self.request.num_batches)

    def leanest(self, names: Sequence[str], refusals: dict[str, Infeasible]) -> list[Best]:
        """One sequence at a time and nothing resident: what fits if anything does. Raises Infeasible with what even that lacks."""
        found: list[Best] = []
        for name in names:
            if name in refusals and not refusals[name].shortfalls:  # for another reason than memory
                continue
            if not (bases := list(self.bases_of(name, [self.request.batch_size or 1]))):
                continue
            decision = self._stream_all(name, min(bases, key=lambda base: base.lead))
            lowered = lower(self.cost, name, decision, self.request.workload)
            if over := self._over(lowered):
                refusals[name] = self._shortfall(over)
            elif rate := self.rate(lowered):
                found.append(Best(name, decision, rate, lowered))
        if not found:
            raise min(refusals.values(), key=lambda r: sum(r.shortfalls.values()) or inf)
        return sorted(found, key=lambda best: -best.tokens_per_s)

    def _stream_all(self, name: str, base: Decision) -> Decision:
        """Nothing resident, KV where it takes the least of the compute tier, experts on disk where that is possible."""
        spilled = self.least_kv_bytes(base) < sum(self._kv_bytes(base))
        kv = {"gpu": "host", "host": "disk"}[self.tier] if spilled else self.tier
        far = self.tier == "gpu" and policy(name).EXPERTS != "picks"
        layers = (
            layer.model_copy(update={"kv": kv, "on_disk": tuple(sorted(layer.static)) if far else ()})
            for layer in base.layers
        )
        return base.model_copy(update={"layers": tuple(layers)})

    def _over(self, lowered: Lowered) -> dict[str, int]:
        """By how much a schedule exceeds each budget that it does."""
        budgets = self.request.budgets.items()
        return {
            tier: lowered.peak_bytes[tier] - budget
            for tier, budget in budgets
            if lowered.peak_bytes.get(tier, 0) > budget
        }

    def bases(self, name: str) -> Iterator[Decision]:
        """Sizes and leads to try, largest groups first; nothing resident yet."""
        return self.bases_of(name, self.group_sizes())

    def bases_of(self, name: str, sizes: Sequence[int]) -> Iterator[Decision]:
        """The same for given sizes of the group."""
        module, request = policy(name), self.request
        for sequences in sizes:
            for num_batches in (1,) if module.ONE_BATCH else self.batch_counts(sequences):
                batch_size = request.batch_size or -(-sequences // num_batches)
                if module.ONE_BATCH and request.batch_size is None and num_batches * batch_size > sequences:
                    continue
                for lead, unit in self.leads(module.EXPERTS):
                    for parts in self.prefill_parts(num_batches, batch_size):
                        base = self.base(module.EXPERTS, num_batches, batch_size, lead, unit, parts)
                        for cpu_batches in self.cpu_batches(module, num_batches):
                            yield base.model_copy(update={"cpu_batches": cpu_batches})

    @cached_property
    def _bounds(self) -> Relaxation:
        return Relaxation(self.cost, self.request.workload, self.request.budgets)

    def sizes(self) -> list[tuple[float, int]]:
        """Sequences per group with the least time that any schedule in such groups takes, most promising first."""
        total, found = self.request.workload.num_sequences, []
        for size in self.group_sizes():
            groups = -(-total // size)
            if size not in self._least:
                self._least[size] = self._bounds.least_us(groups, groups)
            found.append((self._least[size], size))
        return sorted(found, key=lambda entry: (entry[0], -entry[1]))

    def fitted(self, name: str, scored: list[tuple[float, Decision]]) -> list[tuple[float, Decision]]:
        """The same sizes with the micro-batches of each module as large, and prefill in as few parts, as pays: what their buffers take,
        weights and KV do not."""
        found: list[tuple[float, Decision]] = []
        for us, base in scored:
            best, improved = (us, base), True
            while improved:
                improved = False
                for other in micro_batches(best[1]):
                    try:
                        tried = self.score(name, other)
                    except Infeasible:
                        continue
                    if tried < best[0] * (1 - WORTH):
                        best, improved = (tried, other), True
            if best[1] not in [base for _, base in found]:
                found.append(best)
        return sorted(found, key=lambda entry: entry[0])

    def improved(self, best: Rated) -> Rated:
        """The best of a decision and what is near it, by hill climbing on simulated time: how far ahead, in which units and in how many
        batches pays is a matter of bubbles, which the residency problem does not see."""
        tried, left = {_shape(best.decision)}, IMPROVEMENTS
        climbing = True
        while climbing:
            climbing = False
            for base in self.neighbours(best.policy, best.decision):
                if not left or time.monotonic() > self.deadline:
                    return best
                if _shape(base) in tried:
                    continue
                tried.add(_shape(base))
                left -= 1
                with suppress(Infeasible):
                    if not (decision := self.filled(best.policy, base, best.kind)):
                        continue
                    rate = self.estimate(best.policy, decision)
                    if rate > best.tokens_per_s * (1 + WORTH):
                        best, climbing = replace(best, tokens_per_s=rate, decision=decision), True
                        break
        return best

    def neighbours(self, name: str, d: Decision) -> Iterator[Decision]:
        """The same sizes with twice or half as many slots, with twice or half as many batches, in units of twice or half the size."""
        base = self.bare(name, d, d.num_batches)
        most = 2 * self._finest
        for lead in (2 * d.lead, d.lead // 2):
            if 2 * d.unit <= lead <= most:
                yield base.model_copy(update={"lead": lead})
        for num_batches in (2 * d.num_batches, d.num_batches // 2):
            if num_batches and not self.request.num_batches and not self.request.batch_size:
                size = -(-d.sequences // num_batches)
                small = {part: min(getattr(base, part), size) for part in ("attention_batch", "decode_batch")}
                parts = min(base.prefill_groups, num_batches)
                shape = {"num_batches": num_batches, "batch_size": size, "prefill_groups": parts, **small}
                if num_batches * size <= self._most:
                    yield base.model_copy(update=shape)
        for unit in (d.unit // 2, 2 * d.unit):
            if 1 <= unit <= d.lead // 2:
                yield base.model_copy(update={"unit": unit})

    def group_sizes(self) -> list[int]:
        """Sequences per group: the workload in 1, 2, 3, ... equal groups, thinned out geometrically."""
        request, total = self.request, self.request.workload.num_sequences
        if request.batch_size and request.num_batches:
            return [request.batch_size * request.num_batches]
        sizes, groups = list[int](), 1
        while groups <= total:
            size = -(-total // groups)
            if not sizes or size < sizes[-1]:
                sizes.append(size)
            groups = max(groups + 1, int(groups * 1.5))
        return [size for size in ([*sizes, 1] if sizes[-1] > 1 else sizes) if size <= self._most]

    def batch_counts(self, sequences: int) -> list[int]:
        """Batches of a group: few large ones cost least, more of them overlap KV and bound workspace."""
        request = self.request
        if request.num_batches:
            return [request.num_batches]
        if request.batch_size:
            return [max(1, sequences // request.batch_size)]
        return [n for n in (1, 2, 4, 8, 16) if n == 1 or sequences // n >= 8]

    def cpu_batches(self, module: ModuleType, num_batches: int) -> list[int]:
        """Batches whose decode attention the CPU computes: the shares that the policy may choose from."""
        solved = module.EXPERTS == "solved"  # and so is this share
        shares = getattr(module, "CPU_ATTENTION", (0.0,)) if self.cost.cpu_attends and not solved else (0.0,)
        return sorted({round(share * num_batches) for share in shares})

    def leads(self, experts: str) -> list[tuple[int, int]]:
        """(expert slots, experts per load)."""
        layer = next(layer for layer in self.request.spec.layers if layer.expert)
        assert layer.expert is not None
        aim = LOAD_BYTES * (2 if self.is_large else 1)
        unit = max(1, min(layer.num_experts, round(aim / layer.expert.nbytes)))
        if experts == "static":
            return [(layer.num_experts, unit)]
        if experts == "picks":
            return [(layer.num_experts, unit), (max(layer.top_k + unit, layer.num_experts // 4), unit)]
        return [(ahead * unit, unit) for ahead in (2, 4, 8, 16) if ahead * unit <= 2 * layer.num_experts]

    def prefill_parts(self, num_batches: int, batch_size: int) -> list[int]:
        """Sub-groups of prefill: whole, and split until the hidden states take a sixth of the budget."""
        workload, parts = self.request.workload, [1]
        tokens = num_batches * batch_size * workload.prompt_len
        budget = self.request.budgets[self.tier]
        while (
            parts[-1] < num_batches
            and state_bytes(self.request.spec, tokens // parts[-1], self.request.dtype) > budget / 6
        ):
            parts.append(min(num_batches, parts[-1] * 2))
        return parts

    def base(self, experts: str, num_batches: int, batch_size: int, lead: int, unit: int, parts: int) -> Decision:
        """A decision in which nothing is resident and KV lives in the compute tier."""
        spec, budget = self.request.spec, self.request.budgets[self.tier]
        small, solved = SMALL_SHARE * budget, experts == "solved"
        layers = []
        for number, layer in enumerate(spec.layers):
            order = tuple(self.cost.popular(number)) if layer.expert else ()
            static = order if experts != "picks" else ()
            layers.append(LayerDecision(static=static, late=() if static else order, kv=self.tier))
        top_k = max(layer.top_k for layer in spec.layers)
        workload = self.request.workload
        context = workload.prompt_len + workload.gen_len
        room = ATTENTION_SHARE * budget
        rows = EXPERT_ROWS[self.tier]
        return Decision(
            num_batches=num_batches,
            batch_size=batch_size,
            lead=lead,
            unit=unit,
            head_pages=0
            if spec.head.nbytes <= small and not solved
            else max(1, -(-spec.head.nbytes // (2 * LOAD_BYTES))),
            prefill_groups=parts,
            attention_batch=largest(
                batch_size, lambda a: prefill_attention_bytes(self.cost, a, workload.prompt_len) <= room
            ),
            decode_batch=largest(batch_size, lambda a: decode_attention_bytes(self.cost, a, context) <= room),
            expert_rows=min(rows, num_batches * batch_size * workload.prompt_len),
            hot=top_k if experts == "picks" else 0,
            embedding=self.tier == "host" and spec.embedding.nbytes <= small and not solved,
            layers=tuple(layers),
        )

    def bare(self, name: str, d: Decision, num_batches: int) -> Decision:
        """The sizes of a decision, in so many batches, with nothing resident."""
        base = self.base(policy(name).EXPERTS, num_batches, d.batch_size, d.lead, d.unit, d.prefill_groups)
        kept = {size: getattr(d, size) for size in ("attention_batch", "decode_batch", "expert_rows")}
        shared = 0 if policy(name).EXPERTS == "solved" else min(d.cpu_batches, num_batches)
        return base.model_copy(update={**kept, "cpu_batches": shared})

    # ------------------------------------------------------------------------------------------------------ residency

    def score(self, name: str, base: Decision) -> float:
        """About how many microseconds the workload takes with the best residency, by which the sizes of one policy compare. Raises
        Infeasible where not even streaming everything fits."""
        if policy(name).EXPERTS == "solved":
            return relaxed_us(self.cost, self.request.workload, base, self.capacity(name, base, {}))
        return rough_us(self.cost, policy(name), self.fill(name, base), self.request.workload)

    def fills(self, name: str, base: Decision) -> Iterator[tuple[str, Decision]]:
        """What ``fill`` finds; of the residency problem, which averages over layers and takes a spill for a matter of link time, also
        what it finds with all layers alike and without a spill; and everything resident, where that fits. Nothing where only shares
        of experts fit. With the kind of fill that it is."""
        found: list[Decision] = []
        for kind in FILLS if policy(name).EXPERTS == "solved" else FILLS[:1]:
            with suppress(Infeasible):
                decision = self.filled(name, base, kind)
                if decision and decision not in found:
                    found.append(decision)
                    yield kind, decision

    def filled(self, name: str, base: Decision, kind: str, reserve: Mapping[str, int] = NOTHING) -> Decision | None:
        """One kind of fill; None where everything resident does not fit. Raises Infeasible."""
        if kind == "resident":
            return self.all_kept(base)
        return self.fill(name, base, reserve, may_spill=kind != "no spill", uniform=kind == "alike")

    def fill(
        self,
        name: str,
        base: Decision,
        reserve: Mapping[str, int] = NOTHING,
        may_spill: bool = True,
        uniform: bool = False,
    ) -> Decision:
        """What is resident. Raises Infeasible where not even streaming everything fits.

        reserve: bytes per tier to leave free beyond what the slots of a short model showed. may_spill, uniform: see ``residency``.
        """
        capacity = self.capacity(name, base, reserve)
        if policy(name).EXPERTS == "solved":
            solved = residency(self.cost, self.request.workload, base, capacity, may_spill, uniform)
            self.truncated |= solved.truncated
            return solved.decide(base)
        filled = self.greedy(name, base, capacity)
        if decide := getattr(policy(name), "decide", None):
            filled = decide(self.cost, filled)
        return filled

    def all_kept(self, base: Decision) -> Decision | None:
        """Everything resident, where a GPU has room for all of it: the residency problem, to which a transfer that hides is free, sees
        no reason to prefer that."""
        spec, room = self.request.spec, self.capacity(OURS, base, {})[self.tier]
        modules = [getattr(layer, kind) for layer in spec.layers for kind in MODULES]
        experts = sum(layer.num_experts * _slot_bytes(layer.expert) for layer in spec.layers if layer.expert)
        need = experts + sum(map(_slot_bytes, filter(None, modules))) + sum(self._kv_bytes(base))
        need += _slot_bytes(spec.head) + _slot_bytes(spec.norm)
        if self.tier != "gpu" or need > room:
            return None
        layers = tuple(
            LayerDecision(
                resident=tuple(kind for kind in MODULES if getattr(layer, kind)),
                resident_experts=tuple(range(layer.num_experts)),
                kv="gpu",
            )
            for layer in spec.layers
        )
        return base.model_copy(update={"layers": layers, "head_pages": 0, "cpu_batches": 0})

    def capacity(self, name: str, base: Decision, reserve: Mapping[str, int]) -> dict[str, int]:
        """Bytes of each tier for residents and KV: the budget without slots, hidden states, workspace and fixed residents."""
        spec, workload = self.request.spec, self.request.workload
        fixed = 0
        if policy(name).EXPERTS != "solved":  # the residency problem counts these itself
            fixed += spec.norm.nbytes + 4 * PAGE_BYTES
            fixed += 0 if base.head_pages else spec.head.nbytes + 2 * PAGE_BYTES
            fixed += spec.embedding.nbytes + 2 * PAGE_BYTES if base.embedding else 0
            fixed += self.least_kv_bytes(base)
        free = {}
        for tier, budget in self.request.budgets.items():
            slots = self.streaming(name, base.lead, base.unit, base.head_pages).get(tier, 0)
            if self.tier == "gpu" and tier == "host" and policy(name).EXPERTS == "solved":
                slots = max(slots, self._staging_bytes)
            states = 0
            if base.cpu_batches:
                states += base.cpu_batches * align_up(query_bytes(spec, base.batch_size, self.request.dtype))
            if tier == self.tier:
                states += max(
                    align_up(state_bytes(spec, s.sequences * s.tokens, self.request.dtype))
                    for s in shapes(base, workload)
                )
            free[tier] = (
                budget
                - reserve.get(tier, 0)
                - slots
                - states
                - sum(workspace(self.cost, base, workload).get(tier, {}).values())
            )
        free[self.tier] -= fixed
        if short := {tier: -nbytes for tier, nbytes in free.items() if nbytes < 0}:
            raise self._shortfall(short)
        if policy(name).EXPERTS != "solved":
            free[self.tier] += self.least_kv_bytes(base)
        return free

    def least_kv_bytes(self, base: Decision) -> int:
        """KV of one layer's batches in flight and what packs it, or all of it where that is less."""
        cache = self._kv_bytes(base)
        in_flight = SPILLED_BATCHES * max(cache) // base.num_batches
        return min(sum(cache), in_flight + spill_bytes(self.cost, base, self.request.workload))

    @cached_property
    def _staging_bytes(self) -> int:
        """Host memory through which weights pass on their way from disk to a GPU: two of the largest groups, and the head."""
        largest_bytes = max(_slot_bytes(layer.expert) for layer in self.request.spec.layers if layer.expert)
        return 2 * max(largest_bytes, LOAD_BYTES) + _slot_bytes(self.request.spec.head)

    def _kv_bytes(self, base: Decision) -> list[int]:
        """KV of the whole group in each layer."""
        workload, dtype = self.request.workload, self.request.dtype
        positions, spec = workload.prompt_len + workload.gen_len, self.request.spec
        return [
            base.num_batches * kv_bytes(spec, n, base.batch_size, positions, dtype) for n in range(len(spec.layers))
        ]

    @lru_cache  # noqa: B019 - a Search lives as long as its compilation
    def streaming(self, name: str, lead: int, unit: int, head_pages: int) -> dict[str, int]:
        """Bytes of every tier's slots when nothing is resident, found by lowering a short model: independent of the group's size."""
        base = self.base(policy(name).EXPERTS, 1 if policy(name).ONE_BATCH else 2, 1, lead, unit, 1)
        cut, cost = self.short(base.model_copy(update={"head_pages": head_pages, "embedding": False}), SAMPLED)
        trial = lower(cost, name, cut, Workload(prompt_len=2, gen_len=4, num_sequences=2))
        kept = {slot for _, slot in trial.placed}
        states = {slot for phase in trial.phases.values() for _, slot in phase.placed}
        ends: dict[str, list[int]] = {}  # per tier, where what is permanent ends, and where streaming slots do
        for slot in trial.slots:
            if slot.id not in states:
                end = ends.setdefault(slot.tier, [0, 0])
                end[slot.id not in kept] = max(end[slot.id not in kept], slot.offset + slot.nbytes)
        return {tier: max(0, streamed - permanent) for tier, (permanent, streamed) in ends.items()}

    def greedy(self, name: str, base: Decision, capacity: dict[str, int]) -> Decision:
        """Ours for policies whose paper states no fill: KV, then routers, attention, shared experts, then popular experts."""
        spec, free = self.request.spec, capacity[self.tier]
        cache, kv_tier = self._kv_bytes(base), self.tier
        if sum(cache) > free or (
            self.tier == "gpu" and (base.cpu_batches or getattr(policy(name), "KV", "") == "host")
        ):
            kv_tier = "host" if self.tier == "gpu" else "disk"
            free -= self.least_kv_bytes(base)
        else:
            free -= sum(cache)
        resident: list[list[str]] = [[] for _ in spec.layers]
        for kind in ("router", "attention", "shared", "dense"):
            for number, layer in enumerate(spec.layers):
                module = getattr(layer, kind)
                if module and module.nbytes + 8192 * module.segments <= free:
                    resident[number].append(kind)
                    free -= module.nbytes + 8192 * module.segments
        moe = [n for n, layer in enumerate(spec.layers) if layer.expert]
        expert = spec.layers[moe[0]].expert
        assert expert is not None
        total = max(0, free) // (expert.nbytes + 8192 * expert.segments)
        share = {
            n: min(spec.layers[n].num_experts, total // len(moe) + (i < total % len(moe))) for i, n in enumerate(moe)
        }
        if getattr(policy(name), "RESIDENT_EXPERTS", "") == "first layers":
            for n in moe:
                share[n] = min(spec.layers[n].num_experts, total)
                total -= share[n]
        kept = [frozenset(self.cost.popular(n)[: share.get(n, 0)]) for n in range(len(spec.layers))]
        layers = tuple(
            LayerDecision(
                resident=tuple(sorted(kinds, key=MODULES.index)),
                resident_experts=tuple(sorted(here)),
                static=tuple(e for e in old.static if e not in here),
                late=tuple(e for e in old.late if e not in here),
                kv=kv_tier,
            )
            for kinds, old, here in zip(resident, base.layers, kept, strict=True)
        )
        if self.tier == "gpu":
            layers = self._homes(name, layers, capacity["host"] - (sum(cache) if kv_tier == "host" else 0))
        return base.model_copy(update={"layers": layers})

    def _homes(self, name: str, layers: tuple[LayerDecision, ...], free: int) -> tuple[LayerDecision, ...]:
        """What host memory cannot hold lives on disk: the least popular streamed experts of every layer alike.

        Raises Infeasible where even that is not enough, or where experts are bound at run time: those must be in host memory.
        """
        spec = self.request.spec
        for layer, chosen in zip(spec.layers, layers, strict=True):
            modules = {kind: getattr(layer, kind) for kind in MODULES if kind not in chosen.resident}
            free -= sum(_slot_bytes(module) for module in modules.values() if module)
        streamed = [(n, layer.expert) for n, layer in enumerate(spec.layers) if layer.expert]
        moving = {n: [*layers[n].static, *layers[n].late] for n, _ in streamed}
        each = max(_slot_bytes(expert) for _, expert in streamed)
        kept = max(0, free) // each
        total = sum(map(len, moving.values()))
        if free < 0 or (kept < total and policy(name).EXPERTS == "picks"):
            raise self._shortfall({"host": total * each - free if policy(name).EXPERTS == "picks" else -free})
        if kept >= total:
            return layers
        share = {n: kept * len(moving[n]) // total for n in moving}
        return tuple(
            layer.model_copy(update={"on_disk": tuple(sorted(moving[n][share[n] :]))}) if n in moving else layer
            for n, layer in enumerate(layers)
        )

    def _shortfall(self, short: dict[str, int]) -> Infeasible:
        where = " ".join(f"{tier}=..." for tier in short)
        return Infeasible(short, f"give --memory {where} that much more, or fewer or shorter sequences")

    def _too_slow(self) -> Infeasible:
        return Infeasible({}, f"no schedule has a decode pass within --max-latency {self.request.max_latency_s} s")

    # --------------------------------------------------------------------------------------------------------- timing

    def short(self, decision: Decision, count: int) -> tuple[Decision, Cost]:
        """The model cut to its dense layers' first and ``count`` MoE layers, evenly spaced once they are sorted by what differs in them
        and in their decisions."""
        spec = self.request.spec
        moe = [n for n, layer in enumerate(spec.layers) if layer.expert]
        dense = [n for n, layer in enumerate(spec.layers) if not layer.expert][:1]
        count, kinds = min(count, len(moe)), list(dict.fromkeys(spec.layers))

        def kind(number: int) -> tuple[object, ...]:
            d = decision.layers[number]
            counts = len(d.cpu), len(d.on_disk), len(d.resident_experts), len(d.resident)
            return kinds.index(spec.layers[number]), d.kv, d.kv_batches, d.cpu_batches or 0, *counts, number

        moe.sort(key=kind)
        kept = dense + sorted(moe[(2 * i + 1) * len(moe) // (2 * count)] for i in range(count))
        routing = self.request.routing.model_copy(
            update={"popularity": tuple(self.request.routing.popularity[n] for n in kept), "successors": ()}
        )
        cut = replace(spec, layers=tuple(spec.layers[n] for n in kept))
        cost = Cost(cut, self.request.hardware, routing, self.request.dtype)
        return decision.model_copy(update={"layers": tuple(decision.layers[n] for n in kept)}), cost

    def estimate(self, name: str, decision: Decision) -> float:
        """Tokens per second, timed on distinct layer periods: what L layers take from what 2 and 4 of them take."""
        moe = self.request.spec.moe_layers
        if (self._experts <= WHOLE_EXPERTS and len(moe) <= WHOLE_LAYERS) or len(moe) <= 2 * SAMPLED:
            return self.rate(lower(self.cost, name, decision, self.request.workload, quick=True))
        runs, sampled = [], SAMPLED if self._finest > COARSE else 2 * SAMPLED
        for size in (sampled, 2 * sampled):
            cut, cost = self.short(decision, size)
            runs.append(lower(cost, name, cut, self.request.workload, quick=True))
        few, more = runs
        grown = {
            phase: more.phases[phase].times.total_us
            + (len(moe) - 2 * sampled)
            * (more.phases[phase].times.total_us - few.phases[phase].times.total_us)
            / sampled
            for phase in more.phases
            if phase != "load"
        }
        decode = more.phases.get("decode")
        if decode and self._late(grown["decode"] / decode.shape.passes):
            return 0.0
        extrapolated = load_us(self.cost, decision) + more.groups * sum(grown.values())
        # What is rare among the layers a sample may miss, but not the work that it is.
        least = busiest_us(self.cost, decision, self.request.workload)
        return self._rate(max(extrapolated, least))

    def whole(self, rated: Rated) -> tuple[Lowered, Decision]:
        """The whole schedule. Where it needs more slots than the short model showed, residents make room: each time for some more than
        is missing, since what they are exchanged for may take as much."""
        name, decision = rated.policy, rated.decision
        reserve, base = Counter[str](), self.bare(name, decision, decision.num_batches)
        more = max(_slot_bytes(layer.expert) for layer in self.request.spec.layers if layer.expert) // 4
        for tries in count():
            lowered = lower(self.cost, name, decision, self.request.workload)
            over = self._over(lowered)
            if not over:
                break
            reserve.update({tier: nbytes + tries * more for tier, nbytes in over.items()})
            decision = self.filled(name, base, rated.kind, reserve) or self.fill(name, base, reserve)
        if (decode := lowered.phases.get("decode")) and self._late(decode.times.pass_us):
            raise self._too_slow()
        return lowered, decision

    def rate(self, lowered: Lowered) -> float:
        """Generated tokens per second of a whole schedule, from the first weight byte on; 0 beyond the latency ceiling."""
        if (decode := lowered.phases.get("decode")) and self._late(decode.times.pass_us):
            return 0.0
        return self._rate(lowered.load_us + lowered.groups * lowered.group_us)

    def _rate(self, total_us: float) -> float:
        workload = self.request.workload
        return 1e6 * workload.num_sequences * workload.gen_len / total_us

    def _late(self, pass_us: float) -> bool:
        ceiling = self.request.max_latency_s
        return ceiling is not None and pass_us > 1e6 * ceiling


def _slot_bytes(module: Module) -> int:
    """Room that a module takes in an arena."""
    return align_up(module.nbytes + 2 * PAGE_BYTES * module.segments)


def _shape(d: Decision) -> tuple[int, ...]:
    return d.num_batches, d.batch_size, d.lead, d.unit, d.prefill_groups


def micro_batches(d: Decision) -> Iterator[Decision]:
    """A decision with one of its micro-batches, or the number of prefill's parts, half or twice as large."""
    limits = {
        "prefill_groups": (1, d.num_batches),
        "attention_batch": (1, d.batch_size),
        "decode_batch": (1, d.batch_size),
        "expert_rows": (min(LEAST_ROWS, d.expert_rows), d.expert_rows),
    }
    for size, (least, most) in limits.items():
        now = getattr(d, size)
        for other in {max(least, -(-now // 2)), min(most, 2 * now)} - {now}:
            yield d.model_copy(update={size: other})


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest of limit, limit/2, limit/4, ... that fits, at least 1."""
    while limit > 1 and not fits(limit):
        limit = -(-limit // 2)
    return limit
