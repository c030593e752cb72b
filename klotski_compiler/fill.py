"""What is resident once sizes are chosen: solved for (``milp``) for ``joint``, filled greedily for the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from klotski_compiler.candidates import Candidates, Request
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.errors import Infeasible
from klotski_compiler.layout import LOAD_BYTES
from klotski_compiler.milp.solve import residency
from klotski_compiler.ops import ALL, NOWHERE, Bind, align_up
from klotski_compiler.pipeline import lower
from klotski_compiler.policies import OURS, policy
from klotski_compiler.program import staging_slots
from klotski_compiler.shape import Shape, shapes
from klotski_compiler.tensors import BEHIND, MODULES, kv_bytes, query_bytes, state_bytes
from klotski_compiler.workspace import workspace

SPILLED_BATCHES = 3  # of one layer's KV in flight where KV does not live in the compute tier
SAMPLED = 2  # layers of the short model on which candidates are timed; a second one has twice as many
STRETCH = 1.1  # how many times as long as they are a fill takes loads for
NOTHING: Mapping[str, int] = MappingProxyType({})


class Fill(NamedTuple):
    """A way to fill sizes. everything: resident, where that fits. Else as ``residency`` has it: may_spill, uniform, stretch."""

    everything: bool = False
    may_spill: bool = True
    uniform: bool = False
    stretch: float = 1.0

    @property
    def stretched(self) -> Fill:
        """The same as if loads took longer than they do."""
        return self._replace(stretch=STRETCH)


EVERYTHING, ALIKE, ANY, NO_SPILL = Fill(everything=True), Fill(uniform=True), Fill(), Fill(may_spill=False)
FILLS = (EVERYTHING, ALIKE, ANY, NO_SPILL)  # of those that look the same, the simplest


class Fills(Candidates):
    """Candidates with what is resident. truncated: whether a time limit struck."""

    def __init__(self, request: Request) -> None:
        """Nothing solved yet."""
        super().__init__(request)
        self.truncated = False

    def fills(self, name: str, base: Decision) -> Iterator[tuple[Fill, Decision]]:
        """What ``fill`` finds; of the residency problem, which averages over layers and takes a spill for a matter of link time, also
        what it finds with all layers alike and without a spill; and everything resident, where that fits. Nothing where only shares
        of experts fit. With the way in which it is filled."""
        found: list[Decision] = []
        for way in FILLS if policy(name).solved else (ANY,):
            with suppress(Infeasible):
                decision = self.filled(name, base, way)
                if decision and decision not in found:
                    found.append(decision)
                    yield way, decision

    def filled(self, name: str, base: Decision, way: Fill, reserve: Mapping[str, int] = NOTHING) -> Decision | None:
        """Sizes filled in one way; None where everything resident does not fit. Raises Infeasible."""
        return self.all_kept(base, reserve) if way.everything else self.fill(name, base, reserve, way)

    def fill(self, name: str, base: Decision, reserve: Mapping[str, int] = NOTHING, way: Fill = ANY) -> Decision:
        """What is resident. Raises Infeasible where not even streaming everything fits.

        reserve: bytes per tier to leave free beyond what the slots of a short model showed.
        """
        capacity = self.capacity(name, base, reserve)
        if policy(name).solved:
            solved = residency(
                self.cost, self.request.workload, base, capacity, way.may_spill, way.uniform, way.stretch
            )
            self.truncated |= solved.truncated
            return solved.decide(base)
        return policy(name).decide(self.cost, self.greedy(name, base, capacity))

    def all_kept(self, base: Decision, reserve: Mapping[str, int] = NOTHING) -> Decision | None:
        """Everything resident, where a GPU has room for all of it: the residency problem, to which a transfer that hides is free, sees
        no reason to prefer that."""
        spec, room = self.request.spec, self.capacity(OURS, base, reserve)[self.tier]
        modules = [getattr(layer, kind) for layer in spec.layers for kind in MODULES]
        experts = sum(layer.num_experts * layer.expert.slot_bytes for layer in spec.layers if layer.expert)
        need = experts + sum(module.slot_bytes for module in modules if module) + sum(self.kv_bytes_of(base))
        need += spec.head.slot_bytes + spec.norm.slot_bytes
        if self.tier != "gpu" or need > room or base.last_batch:
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

    def _stream_all(self, name: str, base: Decision) -> Decision:
        """Nothing resident, KV where it takes the least of the compute tier, experts on disk where that is possible."""
        spilled = self.least_kv_bytes(base) < sum(self.kv_bytes_of(base))
        kv = BEHIND[self.tier] if spilled else self.tier
        far = self.tier == "gpu" and policy(name).experts != "picks"
        layers = (
            layer.model_copy(update={"kv": kv, "on_disk": tuple(sorted(layer.static)) if far else ()})
            for layer in base.layers
        )
        return base.model_copy(update={"layers": tuple(layers), "pages": 1})

    # --------------------------------------------------------------------------------------------------------- memory

    def capacity(self, name: str, base: Decision, reserve: Mapping[str, int]) -> dict[str, int]:
        """Bytes of each tier for residents and KV: the budget without slots, hidden states, workspace and fixed residents."""
        spec, workload = self.request.spec, self.request.workload
        fixed = 0
        if not policy(name).solved:  # the residency problem counts these itself
            fixed += spec.norm.slot_bytes
            fixed += 0 if base.head_pages else spec.head.slot_bytes
            fixed += spec.embedding.slot_bytes if base.embedding else 0
            fixed += self.least_kv_bytes(base)
        free, working = dict[str, int](), workspace(self.cost, base, workload)
        for tier, budget in self.request.budgets.items():
            taken = max(self._phase_bytes(name, base, tier, shape) for shape in shapes(base, workload))
            if base.cpu_batches:
                taken += base.cpu_batches * align_up(query_bytes(spec, base.batch_size, self.request.dtype))
            free[tier] = budget - reserve.get(tier, 0) - taken - sum(working.get(tier, {}).values())
        free[self.tier] -= fixed
        if self.tier == "gpu" and not policy(name).solved:
            free["host"] -= spec.embedding.slot_bytes
        if short := {tier: -nbytes for tier, nbytes in free.items() if nbytes < 0}:
            raise self._shortfall(short)
        if not policy(name).solved:
            free[self.tier] += self.least_kv_bytes(base)
        return free

    def _phase_bytes(self, name: str, base: Decision, tier: str, shape: Shape) -> int:
        """What a phase takes of a tier whatever is resident: slots of what streams, and hidden states."""
        lead = base.lead_of(shape.decoding)
        taken = self.streaming(name, lead, base.unit, base.head_pages)[shape.decoding].get(tier, 0)
        if self.tier == "gpu" and tier == "host" and policy(name).solved:
            taken = max(taken, self._staging_bytes(base))
        if tier == self.tier:
            taken += align_up(state_bytes(self.request.spec, shape.scope_tokens(ALL), self.request.dtype))
        return taken

    def least_kv_bytes(self, base: Decision) -> int:
        """KV of one layer's batches in flight, or all of it where that is less."""
        cache = self.kv_bytes_of(base)
        in_flight = SPILLED_BATCHES * max(cache) * base.batch_size // base.sequences
        return min(sum(cache), in_flight)

    def _staging_bytes(self, base: Decision) -> int:
        """Host memory through which weights pass on their way from disk to a GPU: transfer units of experts, or pages of them, in a pass;
        before the first, the largest tensors, or pages of them, and groups of the small ones of each kind (``pipeline``)."""
        spec, count = self.request.spec, staging_slots(base)
        parts = {kind: [m for layer in spec.layers if (m := getattr(layer, kind))] for kind in (*MODULES, "expert")}
        parts |= {"head": [spec.head], "norm": [spec.norm]}
        sizes: dict[str, list[int]] = {kind: [m.slot_bytes for m in each] for kind, each in parts.items() if each}
        small = sum(min(sum(each), LOAD_BYTES + max(each)) for each in sizes.values() if max(each) <= LOAD_BYTES)
        if base.pages > 1:
            return count * (small + align_up(-(-max(sizes["expert"]) // base.pages)))
        unit, large = base.unit * max(sizes["expert"]), max(map(max, sizes.values()))
        return count * max(unit, small + (min(large, max(unit, LOAD_BYTES)) if large > LOAD_BYTES else 0))

    def kv_bytes_of(self, base: Decision) -> list[int]:
        """KV of the whole group in each layer."""
        workload, dtype = self.request.workload, self.request.dtype
        positions, spec = workload.prompt_len + workload.gen_len, self.request.spec
        return [kv_bytes(spec, n, base.sequences, positions, dtype) for n in range(len(spec.layers))]

    @lru_cache  # noqa: B019 - a Search lives as long as its compilation
    def streaming(self, name: str, lead: int, unit: int, head_pages: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of every tier's slots when nothing is resident, in prefill and in decode, found by lowering a short model: independent of
        the group's size. Of a policy whose residency is solved, without those of modules and head, which the problem counts where it
        streams them."""
        base = self.base(policy(name).experts, 1 if policy(name).one_batch else 2, 1, lead, unit, 1)
        cut, cost = self.short(base.model_copy(update={"head_pages": head_pages, "embedding": False}), SAMPLED)
        trial = lower(cost, name, cut, Workload(prompt_len=2, gen_len=4, num_sequences=2), timed=False)
        apart = (*MODULES, "head") if policy(name).solved else ()
        most = Counter[str](), Counter[str]()
        for phase in trial.phases.values():
            placed = {slot for _, slot in (*trial.placed, *phase.placed)}
            used = {
                slot: trial.tensors[tensor].kind
                for step in phase.steps
                if not isinstance(step.op, Bind)
                for tensor, slot in zip(step.op.tensors, step.slots, strict=False)
                if slot not in placed and slot != NOWHERE
            }
            taken = Counter[str]()
            for slot, kind in used.items():
                tier = trial.slots[slot].tier
                taken[tier] += 0 if kind in apart and tier == self.tier else trial.slots[slot].nbytes
            for decoding in (False, True):
                if phase.shape.decoding == decoding or phase.shape.name == "load":
                    most[decoding].update(taken - most[decoding])
        return most

    def short(self, decision: Decision, count: int) -> tuple[Decision, Cost]:
        """The model cut to its dense layers' first and ``count`` MoE layers, evenly spaced once they are sorted by what differs in them
        and in their decisions."""
        spec = self.request.spec
        moe = [n for n, layer in enumerate(spec.layers) if layer.expert]
        dense = [n for n, layer in enumerate(spec.layers) if not layer.expert][:1]
        count, kinds = min(count, len(moe)), list(dict.fromkeys(spec.layers))

        def kind(number: int) -> tuple[object, ...]:
            d, same = decision.layers[number], kinds.index(spec.layers[number])
            if d.cpu_batches is None:  # filled alike but for rounding
                return same, number
            counts = len(d.cpu), len(d.on_disk), len(d.resident_experts), len(d.resident)
            return same, d.kv, d.kv_batches, d.cpu_batches, *counts, number

        moe.sort(key=kind)
        kept = dense + sorted(moe[(2 * i + 1) * len(moe) // (2 * count)] for i in range(count))
        routing = self.request.routing.model_copy(
            update={"popularity": tuple(self.request.routing.popularity[n] for n in kept), "successors": ()}
        )
        cut = replace(spec, layers=tuple(spec.layers[n] for n in kept))
        cost = Cost(cut, self.request.hardware, routing, self.request.dtype)
        return decision.model_copy(update={"layers": tuple(decision.layers[n] for n in kept)}), cost

    # --------------------------------------------------------------------------------------------------------- greedy

    def greedy(self, name: str, base: Decision, capacity: dict[str, int]) -> Decision:
        """Ours for policies whose paper states no fill: KV, then routers, attention, shared experts, then popular experts."""
        spec, free = self.request.spec, capacity[self.tier]
        cache, kv_tier = self.kv_bytes_of(base), self.tier
        if sum(cache) > free or (self.tier == "gpu" and (base.cpu_batches or policy(name).kv == "host")):
            kv_tier = BEHIND[self.tier]
            free -= self.least_kv_bytes(base)
        else:
            free -= sum(cache)
        resident: list[list[str]] = [[] for _ in spec.layers]
        for kind in ("router", "attention", "shared", "dense"):
            for number, layer in enumerate(spec.layers):
                module = getattr(layer, kind)
                if module and module.slot_bytes <= free:
                    resident[number].append(kind)
                    free -= module.slot_bytes
        moe = [n for n, layer in enumerate(spec.layers) if layer.expert]
        expert = spec.layers[moe[0]].expert
        assert expert is not None
        total = max(0, free) // expert.slot_bytes
        share = {
            n: min(spec.layers[n].num_experts, total // len(moe) + (i < total % len(moe))) for i, n in enumerate(moe)
        }
        if policy(name).first_layers:
            for n in moe:
                share[n] = min(spec.layers[n].num_experts, total)
                total -= share[n]
        kept = [frozenset(self.cost.popular(n)[: share.get(n, 0)]) for n in range(len(spec.layers))]
        layers = tuple(
            LayerDecision(
                resident=tuple(sorted(kinds, key=MODULES.index)),
                resident_experts=tuple(sorted(here)),
                static=tuple([e for e in old.static if e not in here]) if here else old.static,
                late=tuple([e for e in old.late if e not in here]) if here else old.late,
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
            free -= sum(module.slot_bytes for module in modules.values() if module)
        streamed = [(n, layer.expert) for n, layer in enumerate(spec.layers) if layer.expert]
        moving = {n: [*layers[n].static, *layers[n].late] for n, _ in streamed}
        each = max(expert.slot_bytes for _, expert in streamed)
        kept = max(0, free) // each
        total = sum(map(len, moving.values()))
        if free < 0 or (kept < total and policy(name).experts == "picks"):
            raise self._shortfall({"host": total * each - free if policy(name).experts == "picks" else -free})
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
