"""Residency as inequalities. This docstring is the paper page; a family of constraints is the method of the same name.

Sets         g layer groups (of N_g equal layers), c expert classes of a group in compute order (of m_c experts per
             layer), p phases (prefill, decode), k modules (attention, router, shared, dense), t tiers.
Parameters   of one layer and pass: A attention, R router or dense MLP, Z of that a shared expert, B binding what is late
             (0 where nothing is), C_c one expert's compute, L one expert's link time, l_c its expected link time after
             the router, M_k a module's link time, V and W link time of one batch's KV in and out; in decode beside a
             GPU also P_c one expert's compute on the CPU and, of one batch that the CPU attends to, H its time there
             (with what the GPU does around it) and K the time it spares the GPU (W', H', K': of a last batch that is
             the CPU's in all layers); n = batches of the group without that one, b = expert slots of the phase, u = unit
             (experts per load), s slot bytes.
Variables    resident[g.c], static[g.c], late[g.c]: experts that never move, are streamed by name, are bound after the
             router; cpu[g.c]: experts that the CPU computes in decode (in prefill they are streamed by name);
             disk[g.c]: of the static ones, those that live on disk although the machine has host memory between: it
             is too small, or reading them in every pass hides and loading them once does not; resident[g.k],
             resident[head], resident[embedding]: modules; kv[g]: batches whose KV stays in the compute tier;
             spilling: whether any does not; streaming[k]: whether any module of a kind is not resident; attended[g]:
             batches, of those whose KV does not, that the CPU attends to; helping[g]: whether it computes experts;
             binding[g]: whether any are bound late. All these are integer, and totals over the layers of g. If all layers
             are to be alike: each[v], the same per layer, for v the KV and the CPU's shares (of experts where those
             are few and large). begun[g.c]: residents that compute over prompts while the CPU attends to what decodes
             beside them, for E_c more, of which S_c less is left to do then; it may be divided. prefetched_us[g.p]:
             link time already done when a layer begins; period_us[g.p], period_us[end.p]: T.
Objective    sum_p passes_p (sum_g N_g T[g.p] + T[end.p]) + time to load what is resident, once.

Where experts live does not change compute times, so all of this is linear. Inequalities are written per layer; a row is
N_g times that. A class counts its first load or last compute as the share min(1, u / m_c) of what the class streams:
exact where it is streamed whole or not at all, a relaxation between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from klotski_compiler.milp.linear import Model, Row, Terms, Variable, plus, times
from klotski_compiler.milp.problem import EXACT_EXPERTS, Group, LayerWork, Problem
from klotski_compiler.program import HEAD_SLOTS

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Streamed:
    """A class of streamed experts in compute order, as totals over the group. first: the share of the loads (computes)
    that the class's first (last) transfer unit is."""

    name: str
    load: Terms
    compute: Terms
    first: float
    late: bool


class Formulation:
    """Builds the model of one problem. ``elastic``: capacities may be exceeded, and the excess is what is minimised."""

    def __init__(self, problem: Problem, elastic: bool = False) -> None:
        """An empty model; see ``add_all``."""
        self.problem, self.elastic, self.model = problem, elastic, Model()
        self.homes_on_disk = bool(problem.home_tier)

    def add_all(self) -> Model:
        """The table of contents."""
        self.variables()
        self.assign()
        self.helping()
        self.beginning()
        self.binding()
        self.alike()
        self.spill()
        self.streaming()
        for tier in filter(None, (self.problem.compute_tier, self.problem.home_tier)):
            self.capacity(tier)
        if self.elastic:
            return self.model
        for group, phase, work in self.periods():
            self.prefetch(group, phase)
            self.processor(group, phase, work)
            self.cpu_processor(group, phase, work)
            self.link(group, phase, work)
            self.disk_link(group, phase)
            self.store_link(group, phase, work)
            self.weights_first(group, phase, work)
            self.deadlines(group, phase, work)
            self.late_deadlines(group, phase, work)
            self.kv_deadline(group, phase, work)
            self.slot_order(group, phase, work)
            self.slot_time(group, phase, work)
        for phase in self.problem.passes:
            self.end_of_pass(phase)
        self.objective()
        return self.model

    # ---------------------------------------------------------------------------------------------- variables

    def variables(self) -> None:
        """Counts over a group, in 0 .. N_g or 0 .. N_g m_c; a class that the router's word does not help is never
        late."""
        problem = self.problem
        for g in problem.groups:
            for kind in g.modules:
                self._count(f"resident[{g.name}.{kind}]", g.count)
            blocks = g.count * problem.batches
            self._count(f"kv[{g.name}]", blocks, at_least=0 if problem.may_spill else blocks)
            self._count(f"attended[{g.name}]", blocks if problem.attends else 0)
            self._count(f"helping[{g.name}]", 1 if problem.cpu and g.sizes else 0)
            self._count(f"binding[{g.name}]", 1 if any(g.late) else 0)
            for c, size in enumerate(g.sizes):
                whole = size * g.count
                self._count(f"resident[{g.name}.c{c}]", whole)
                self._count(f"static[{g.name}.c{c}]", whole)
                self._count(f"late[{g.name}.c{c}]", whole if g.late[c] else 0)
                if problem.cpu:
                    self._count(f"cpu[{g.name}.c{c}]", whole)
                if self.homes_on_disk:
                    self._count(f"disk[{g.name}.c{c}]", whole)
                if any(work.classes[c].begun_us for work in g.work.values()):
                    self.model.variables[f"begun[{g.name}.c{c}]"] = Variable(f"begun[{g.name}.c{c}]", 0.0, whole, False)
            for name in self.uniform(g):
                each = self.model.variables[name].upper / g.count
                self._count(f"each[{name}]", int(each))
            for phase, work in {} if self.elastic else g.work.items():
                unit_us = _streaming_us(g, work)
                self._time(f"prefetched_us[{g.name}.{phase}]", unit_us)
                self._time(f"period_us[{g.name}.{phase}]", unit_us)
        self._count("resident[head]", 1, at_least=0 if problem.head_pages else 1)
        self._count("resident[embedding]", 0 if problem.home_tier else 1)  # a GPU reads its rows from host memory
        self._count("spilling", 1)
        for kind in self.problem.module_slots:
            self._count(f"streaming[{kind}]", 1)
        for phase, end in {} if self.elastic else problem.end.items():
            self._time(f"period_us[end.{phase}]", end.compute_us + problem.head.load_us)

    def periods(self) -> Iterator[tuple[Group, str, LayerWork]]:
        """Every group in every phase."""
        for g in self.problem.groups:
            for phase, work in g.work.items():
                yield g, phase, work

    # ----------------------------------------------------------------------------------------------- expressions

    def modules_us(self, g: Group, *kinds: str) -> Terms:
        """sum_k M_k (N_g - resident[g.k]): link time of the streamed modules (all, or those named)."""
        return plus(
            *(
                {"": g.count * item.load_us, f"resident[{g.name}.{kind}]": -item.load_us}
                for kind, item in g.modules.items()
                if not kinds or kind in kinds
            )
        )

    def steps(self, g: Group, phase: str, work: LayerWork) -> list[Streamed]:
        """Streamed experts in compute order: static, then late, each in class order (Johnson's, see
        ``solve.johnson``)."""
        out = []
        for late in (False, True):
            for c, (size, cost) in enumerate(zip(g.sizes, work.classes, strict=True)):
                if late and not g.late[c]:
                    continue
                name = f"{'late' if late else 'static'}[{g.name}.c{c}]"
                names = [name] if late else self.named(g, c, phase)
                load = dict.fromkeys(names, cost.late_us if late else g.expert.load_us)
                compute = dict.fromkeys(names, cost.compute_us)
                out.append(Streamed(name, load, compute, min(1.0, self.problem.unit / size), late))
        return out

    def named(self, g: Group, c: int, phase: str) -> list[str]:
        """The variables that count the experts of a class that are streamed by name."""
        both = [f"static[{g.name}.c{c}]", f"cpu[{g.name}.c{c}]"]
        return both if self.problem.cpu and not self.helped(phase) else both[:1]

    def residents_us(self, g: Group, work: LayerWork) -> Terms:
        """sum_c C_c resident[g.c]."""
        return {f"resident[{g.name}.c{c}]": cost.compute_us for c, cost in enumerate(work.classes)}

    def experts_us(self, g: Group, phase: str, work: LayerWork) -> Terms:
        """sum_c C_c (m_c - cpu[g.c]): the experts of the compute tier's processor."""
        whole = sum(size * cost.compute_us for size, cost in zip(g.sizes, work.classes, strict=True))
        spared = {f"cpu[{g.name}.c{c}]": -cost.compute_us for c, cost in enumerate(work.classes)}
        return plus({"": g.count * whole}, spared if self.helped(phase) else {})

    def begun_us(self, g: Group, work: LayerWork) -> Terms:
        """sum_c S_c begun[g.c]: what is done of experts when the CPU has attended to all."""
        return {f"begun[{g.name}.c{c}]": cost.begun_us for c, cost in enumerate(work.classes) if cost.begun_us}

    def binds_us(self, g: Group, work: LayerWork) -> Terms:
        """B."""
        return {f"binding[{g.name}]": g.count * work.bind_us}

    def routed_us(self, g: Group, work: LayerWork) -> Terms:
        """R + B: what the GPU does between attention and experts."""
        return plus({"": g.count * work.router_us}, self.binds_us(g, work))

    def shared_us(self, g: Group, work: LayerWork) -> Terms:
        """Z, which is part of R: the shared expert."""
        return {"": g.count * work.shared_us}

    def cpu_us(self, g: Group, work: LayerWork) -> Terms:
        """sum_c P_c cpu[g.c] and, if there is any, the exchange."""
        experts = {f"cpu[{g.name}.c{c}]": cost.cpu_us for c, cost in enumerate(work.classes)}
        return experts | {f"helping[{g.name}]": g.count * work.exchange_us}

    def linked_us(self, g: Group, phase: str, work: LayerWork) -> Terms:
        """What the link into the compute tier carries."""
        loads = [step.load for step in self.steps(g, phase, work)]
        return plus(self.modules_us(g), *loads, self.sent_us(g, work.row.kv_load_us))

    def attention_us(self, g: Group, work: LayerWork) -> Terms:
        """A - K' - K for every batch that the CPU attends to."""
        here = work.attention_us - work.last.spared_us
        return {"": g.count * here, f"attended[{g.name}]": -work.row.spared_us}

    def attentions(self, g: Group, phase: str, work: LayerWork) -> Iterator[tuple[str, Terms]]:
        """What the experts wait for, but for a shared one: A + R on the GPU and, where KV is spilled and the CPU attends, H and what the
        GPU does around it."""
        yield "", plus(self.attention_us(g, work), {"": g.count * (work.router_us - work.shared_us)})
        if work.row.cpu_attend_us:
            around = {"": g.count * work.around_us} if self.problem.last else {}
            each = work.around_us / self.problem.batches if not around else 0.0
            yield ".cpu", plus(self.attend_us(g, work, each), around)

    def uniform(self, g: Group) -> list[str]:
        """What must be the same in all layers of the group, if asked for."""
        if not self.problem.uniform:
            return []
        few = self.problem.cpu and sum(g.sizes) <= EXACT_EXPERTS
        experts = [f"cpu[{g.name}.c{c}]" for c in range(len(g.sizes))] if few else []
        return [f"kv[{g.name}]", f"attended[{g.name}]", *experts]

    def helped(self, phase: str) -> bool:
        """Whether the CPU may compute beside the GPU: in decode."""
        return self.problem.cpu and phase.startswith("decode")

    def kv_us(self, g: Group, us: float) -> Terms:
        """us (N_g n - kv[g])."""
        return {"": g.count * self.problem.batches * us, f"kv[{g.name}]": -us}

    def attend_us(self, g: Group, work: LayerWork, around_us: float = 0.0) -> Terms:
        """H' + H attended[g]."""
        each = work.row.cpu_attend_us + around_us
        return {"": g.count * work.last.cpu_attend_us, f"attended[{g.name}]": each}

    def sent_us(self, g: Group, us: float) -> Terms:
        """us (N_g n - kv[g] - attended[g]): KV that the link brings."""
        return plus(self.kv_us(g, us), {f"attended[{g.name}]": -us})

    # --------------------------------------------------------------------------------------------------- families

    def assign(self) -> None:
        """resident + static + late + cpu = m_c N_g;  disk <= static: what the router names late is read from the nearer
        tier."""
        kinds = ("resident", "static", "late", *(("cpu",) if self.problem.cpu else ()))
        for g in self.problem.groups:
            for c, size in enumerate(g.sizes):
                where = f"{g.name}.c{c}"
                whole = float(size * g.count)
                self._row(f"assign[{where}]", {f"{v}[{where}]": 1.0 for v in kinds}, whole, whole)
                if self.homes_on_disk:
                    self._row(f"disk_is_static[{where}]", {f"static[{where}]": 1.0, f"disk[{where}]": -1.0}, 0.0)

    def helping(self) -> None:
        """sum_c cpu[g.c] <= N_g m helping[g]."""
        for g in self.problem.groups:
            if self.problem.cpu and g.sizes:
                cpu = {f"cpu[{g.name}.c{c}]": 1.0 for c in range(len(g.sizes))}
                most = -float(sum(g.sizes) * g.count)
                self._row(f"helping[{g.name}]", {**cpu, f"helping[{g.name}]": most}, -float("inf"), 0.0)

    def beginning(self) -> None:
        """begun <= resident."""
        for g in self.problem.groups:
            for c in range(len(g.sizes)):
                if (begun := f"begun[{g.name}.c{c}]") in self.model.variables:
                    self._row(begun, {f"resident[{g.name}.c{c}]": 1.0, begun: -1.0}, 0.0)

    def binding(self) -> None:
        """sum_c late[g.c] <= N_g m binding[g]."""
        for g in self.problem.groups:
            late = {f"late[{g.name}.c{c}]": 1.0 for c in range(len(g.sizes)) if g.late[c]}
            if late:
                most = -float(sum(g.sizes) * g.count)
                self._row(f"binding[{g.name}]", {**late, f"binding[{g.name}]": most}, -float("inf"), 0.0)

    def alike(self) -> None:
        """v[g] = N_g each[v[g]] for what one more of would make a layer wait."""
        for g in self.problem.groups:
            for name in self.uniform(g):
                self._row(f"alike[{name}]", {name: 1.0, f"each[{name}]": -float(g.count)}, 0.0, 0.0)

    def spill(self) -> None:
        """N_g n - kv[g] <= N_g n spilling;  kv[g] + attended[g] <= N_g n."""
        for g in self.problem.groups:
            blocks = float(g.count * self.problem.batches)
            self._row(f"spill[{g.name}]", {f"kv[{g.name}]": 1.0, "spilling": blocks}, blocks)
            if self.problem.attends:
                where = {f"kv[{g.name}]": 1.0, f"attended[{g.name}]": 1.0}
                self._row(f"attended[{g.name}]", where, -float("inf"), blocks)

    def streaming(self) -> None:
        """N_g - resident[g.k] <= N_g streaming[k]."""
        for g in self.problem.groups:
            for kind in g.modules:
                where = {f"resident[{g.name}.{kind}]": 1.0, f"streaming[{kind}]": float(g.count)}
                self._row(f"streaming[{g.name}.{kind}]", where, float(g.count))

    def capacity(self, tier: str) -> None:
        """sum of slot bytes in the tier <= its capacity: residents, KV and its spill slots, slots of what streams; in the home tier
        the rest."""
        problem = self.problem
        here = tier == problem.compute_tier
        sign = 1.0 if here else -1.0  # the home tier holds what is not resident
        used: Terms = {"": float(problem.norm_bytes) if here else 0.0}
        fixed = 0.0
        for g in problem.groups:
            used = plus(used, {f"resident[{g.name}.{k}]": sign * m.slot_bytes for k, m in g.modules.items()})
            used = plus(used, {f"resident[{g.name}.c{c}]": sign * g.expert.slot_bytes for c in range(len(g.sizes))})
            used = plus(used, {f"kv[{g.name}]": sign * g.kv_slot_bytes, "": 0.0 if here else g.count * g.last_kv_bytes})
            fixed += g.count * (sum(m.slot_bytes for m in g.modules.values()) + sum(g.sizes) * g.expert.slot_bytes)
            fixed += g.count * problem.batches * g.kv_slot_bytes
            if not here and self.homes_on_disk:
                used = plus(used, {f"disk[{g.name}.c{c}]": -g.page.slot_bytes for c in range(len(g.sizes))})
        used = plus(used, {"resident[head]": sign * problem.head.slot_bytes})
        if here and problem.together:
            used[""] += problem.batches * problem.query_bytes + problem.last_query_bytes
        # else as much as the layer that attends to most batches
        for g in problem.groups if problem.attends and not (here and problem.together) else ():
            share = sum(other.count for other in problem.groups)
            used = plus(used, {f"attended[{g.name}]": problem.query_bytes / share})
            used[""] += g.count * problem.last_query_bytes / share
        if here:
            spill_bytes = max(0, problem.spill_bytes - problem.last_spill_bytes)
            used = plus(used, {"resident[embedding]": problem.embedding.slot_bytes, "spilling": spill_bytes})
            used[""] += problem.last_spill_bytes
            streamed, kept = problem.head_slots
            used = plus(used, {"": streamed, "resident[head]": kept - streamed})
            used = plus(used, {f"streaming[{kind}]": nbytes for kind, nbytes in problem.module_slots.items()})
        else:
            used[""] += fixed + problem.head.slot_bytes + problem.embedding.slot_bytes
        if self.elastic:
            self.model.variables[f"excess[{tier}]"] = Variable(f"excess[{tier}]", 0.0, float("inf"), False)
            self.model.objective[f"excess[{tier}]"] = 1.0
            used[f"excess[{tier}]"] = -float(MIB)
        scaled = times(1.0 / MIB, used)
        self._row(f"capacity[{tier}]", scaled, -float("inf"), problem.capacity[tier] / MIB)

    def prefetch(self, g: Group, phase: str) -> None:
        """prefetched <= streamed modules + static loads;  prefetched <= streamed modules + b L: what the slots hold."""
        credit = times(-1.0, self._prefetched(g, phase))
        statics = {name: g.expert.load_us for c in range(len(g.sizes)) for name in self.named(g, c, phase)}
        self._row(f"prefetch_named[{g.name}.{phase}]", plus(self.modules_us(g), statics, credit), 0.0)
        slots = {"": g.count * self.problem.leads[phase] * g.expert.load_us}
        self._row(f"prefetch_slots[{g.name}.{phase}]", plus(self.modules_us(g), slots, credit), 0.0)

    def processor(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= A + R + B + experts: all of the layer's compute, wherever its experts live;  + sum_c E_c begun[g.c]."""
        terms = [self.attention_us(g, work), self.routed_us(g, work), self.experts_us(g, phase, work)]
        terms.append({f"begun[{g.name}.c{c}]": cost.more_us for c, cost in enumerate(work.classes) if cost.more_us})
        if not self.problem.cpu:
            terms.append(times(self.problem.drag[0], self.linked_us(g, phase, work)))
        self._period("processor", g, phase, plus(*terms))

    def cpu_processor(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= A + R - Z + sum_c P_c cpu[g.c]: the router speaks first;  with H in the place of A + R - Z, and then also  T >= H + B + Z +
        experts - sum_c S_c begun[g.c]: the router waits for what the CPU attends to;  and  T >= H + sum_c P_c cpu[g.c] + what the link
        slows that down."""
        if not self.helped(phase) and not work.row.cpu_attend_us:
            return
        computes = self.cpu_us(g, work) if self.helped(phase) else {}
        for part, attention in self.attentions(g, phase, work):
            self._period(f"cpu.experts{part}", g, phase, plus(attention, computes))
            if part:
                done = times(-1.0, self.begun_us(g, work))
                after = plus(self.binds_us(g, work), self.shared_us(g, work), self.experts_us(g, phase, work), done)
                self._period("cpu.attention", g, phase, plus(attention, after))
        slowed = times(self.problem.drag[0], self.linked_us(g, phase, work))
        self._period("cpu", g, phase, plus(self.attend_us(g, work), computes, slowed))

    def link(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= streamed modules + static loads + late loads + spilled KV, slowed by the CPU: a layer prefetches for the next what it
        was spared."""
        slowed: Terms = {}
        if self.problem.cpu:
            experts = self.cpu_us(g, work) if self.helped(phase) else {}
            slowed = times(self.problem.drag[1], plus(self.attend_us(g, work), experts))
        else:
            rest = plus(self.attention_us(g, work), self.routed_us(g, work), self.experts_us(g, phase, work))
            slowed = times(self.problem.drag[1], rest)
        self._period("link", g, phase, plus(self.linked_us(g, phase, work), slowed))

    def disk_link(self, g: Group, phase: str) -> None:
        """T >= disk loads of the experts, or their last pages, that live there; with one staging slot, which the link behind must empty
        first, that too."""
        if self.homes_on_disk:
            each = g.page.disk_us + (g.page.load_us if self.problem.staging == 1 else 0.0)
            self._period("disk_link", g, phase, {f"disk[{g.name}.c{c}]": each for c in range(len(g.sizes))})

    def store_link(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= spilled KV on its way back, W'."""
        if work.row.kv_store_us:
            back = plus(self.kv_us(g, work.row.kv_store_us), {"": g.count * work.last.kv_store_us})
            self._period("store_link", g, phase, back)

    def weights_first(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= M_attention - prefetched + all compute;  T >= M - prefetched + R + B + experts: modules before what needs
        them."""
        credit = times(-1.0, self._prefetched(g, phase))
        rest = plus(self.routed_us(g, work), self.experts_us(g, phase, work))
        whole = plus(self.attention_us(g, work), rest)
        self._period("weights_first.attention", g, phase, plus(self.modules_us(g, "attention"), whole, credit))
        self._period("weights_first.router", g, phase, plus(self.modules_us(g), rest, credit))

    def deadlines(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= M + loads up to i - prefetched + computes from i on, for every class i and both ends of it.

        The paths of a two-machine flow shop, with the link's head start: a soft deadline for every expert.
        """
        start = plus(self.modules_us(g), times(-1.0, self._prefetched(g, phase)))
        for name, path in _paths(self.steps(g, phase, work)):
            self._period(f"deadlines.{name}", g, phase, plus(start, path))

    def late_deadlines(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= A + R - Z + B + late loads up to i + computes from i on, for every late class i: the router speaks first. With A + R - Z,
        and where the CPU attends with H in their place."""
        for part, start in self.attentions(g, phase, work):
            for name, path in _paths([step for step in self.steps(g, phase, work) if step.late]):
                self._period(f"late_deadlines.{name}{part}", g, phase, plus(start, self.binds_us(g, work), path))

    def kv_deadline(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= V (1 - what the spill slots hold) + R + B + experts: the last batch's KV arrives before its attention."""
        if ahead := work.row.kv_load_us * (1.0 - work.kv_ahead):
            after = plus(self.routed_us(g, work), self.experts_us(g, phase, work))
            self._period("kv_deadline", g, phase, plus(self.sent_us(g, ahead), after))

    def slot_order(self, g: Group, phase: str, work: LayerWork) -> None:
        """T >= A + R + B + residents + computes up to i + loads from i on - b L + prefetched - M, for every class i.

        Until class i is computed at most b further experts fit; what is left, and what the next layer wants to find,
        comes after. With A + R, and where the CPU attends with H + Z in their place.
        """
        steps = self.steps(g, phase, work)
        held = {"": -g.count * self.problem.leads[phase] * g.expert.load_us}
        found = plus(held, self.residents_us(g, work), self._prefetched(g, phase), times(-1.0, self.modules_us(g)))
        for part, attention in self.attentions(g, phase, work):
            for i in range(len(steps)):
                path = plus(*(s.compute for s in steps[:i]), *(s.load for s in steps[i:]))
                done = times(-1.0, self.begun_us(g, work)) if part else {}
                before = plus(attention, self.binds_us(g, work), self.shared_us(g, work), done)
                self._period(f"slot_order.{steps[i].name}{part}", g, phase, plus(found, before, path))

    def slot_time(self, g: Group, phase: str, work: LayerWork) -> None:
        """b T >= u sum over streamed experts of (load + compute): each holds its slot while its unit loads and
        computes."""
        if steps := self.steps(g, phase, work):
            held = plus(*(s.load for s in steps), *(s.compute for s in steps))
            self._period("slot_time", g, phase, times(self.problem.unit / self.problem.leads[phase], held))

    def end_of_pass(self, phase: str) -> None:
        """T[end] >= embedding + norm + head;  T[end] >= head's loads;  T[end] >= its loads but 2 pages + its last
        page."""
        end, head, pages = self.problem.end[phase], self.problem.head, max(1, self.problem.head_pages)
        gathered = {"": end.compute_us + end.gather_us, "resident[embedding]": -end.gather_us}
        self._row(f"end_of_pass.processor[{phase}]", *_at_least({f"period_us[end.{phase}]": 1.0}, gathered))
        load = {"": head.load_us, "resident[head]": -head.load_us}
        self._row(f"end_of_pass.link[{phase}]", *_at_least({f"period_us[end.{phase}]": 1.0}, load))
        rest = plus(times(max(0.0, 1 - HEAD_SLOTS / pages), load), {"": end.page_us})
        self._row(f"end_of_pass.head[{phase}]", *_at_least({f"period_us[end.{phase}]": 1.0}, rest))

    def objective(self) -> None:
        """Whole workload, then the time to load what is resident (read from disk once, also if it passes through the
        host)."""
        problem, out = self.problem, self.model.objective
        for phase, passes in problem.passes.items():
            out[f"period_us[end.{phase}]"] = float(passes)
            for g in problem.groups:
                out[f"period_us[{g.name}.{phase}]"] = float(passes * g.count)
        out.update(self.load_terms())

    def load_terms(self) -> Terms:
        """Time to read what memory keeps from disk: what is resident or, before a GPU, all but what stays on disk."""
        problem = self.problem
        terms: Terms = {"": 0.0}
        if problem.home_tier:
            terms[""] = problem.head.disk_us + problem.embedding.disk_us
            for g in problem.groups:
                modules = sum(item.disk_us for item in g.modules.values())
                terms[""] += g.count * (modules + sum(g.sizes) * g.expert.disk_us)
                if self.homes_on_disk:
                    terms |= {f"disk[{g.name}.c{c}]": -g.page.disk_us for c in range(len(g.sizes))}
            return terms
        terms |= {"resident[head]": problem.head.load_us, "resident[embedding]": problem.embedding.load_us}
        for g in problem.groups:
            terms |= {f"resident[{g.name}.{kind}]": item.load_us for kind, item in g.modules.items()}
            terms |= {f"resident[{g.name}.c{c}]": g.expert.load_us for c in range(len(g.sizes))}
        return terms

    # ---------------------------------------------------------------------------------------------------- helpers

    def _prefetched(self, g: Group, phase: str) -> Terms:
        return {f"prefetched_us[{g.name}.{phase}]": float(g.count)}

    def _count(self, name: str, most: int, at_least: int = 0) -> None:
        self.model.variables[name] = Variable(name, at_least, most, True)

    def _time(self, name: str, unit_us: float) -> None:
        self.model.variables[name] = Variable(name, 0.0, float("inf"), False, max(1.0, unit_us))

    def _period(self, family: str, g: Group, phase: str, least: Terms) -> None:
        """N_g T >= least."""
        terms, lower = _at_least({f"period_us[{g.name}.{phase}]": float(g.count)}, least)
        self._row(f"{family}[{g.name}.{phase}]" if "[" not in family else f"{family}.{phase}", terms, lower)

    def _row(self, name: str, terms: Terms, lower: float, upper: float = float("inf")) -> None:
        constant = terms.get("", 0.0)
        kept = {variable: value for variable, value in terms.items() if variable and value}
        self.model.rows.append(Row(name, kept, lower - constant, upper - constant))


def _streaming_us(g: Group, work: LayerWork) -> float:
    """About what a layer takes where nothing is resident: a solver's tolerance is relative to that."""
    experts = sum(n * max(g.expert.load_us, c.compute_us) for n, c in zip(g.sizes, work.classes, strict=True))
    return work.attention_us + work.router_us + experts + sum(item.load_us for item in g.modules.values())


def _at_least(left: Terms, right: Terms) -> tuple[Terms, float]:
    """left >= right, as terms and a lower limit."""
    return plus(left, times(-1.0, right)), 0.0


def _paths(steps: list[Streamed]) -> Iterator[tuple[str, Terms]]:
    """For every class: loads before it, then (its first load and all its computes) or (all its loads and its last
    compute), then the computes after it."""
    for i, step in enumerate(steps):
        around = plus(*(s.load for s in steps[:i]), *(s.compute for s in steps[i + 1 :]))
        yield f"first.{step.name}", plus(around, times(step.first, step.load), step.compute)
        yield f"last.{step.name}", plus(around, step.load, times(step.first, step.compute))
