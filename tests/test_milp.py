"""The residency MILP against brute force, another formulation in another solver, and the schedules that come of it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import pulp
import pytest
from ortools.math_opt.python import mathopt

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.errors import Infeasible
from klotski_compiler.hardware import Hardware, read_hardware
from klotski_compiler.milp.formulation import Formulation
from klotski_compiler.milp.problem import MAX_CLASSES, Group, Problem, build
from klotski_compiler.milp.solve import Solved, johnson, relaxed_us, residency, spread
from klotski_compiler.milp.solver import RELATIVE_GAP
from klotski_compiler.model import read_model
from klotski_compiler.pipeline import lower
from klotski_compiler.program import HEAD_SLOTS
from klotski_compiler.routing import Routing, uniform
from plans import tiny_hardware, tiny_spec

SEEDS = range(10)
Case = tuple[Cost, Workload, Decision, dict[str, int]]
State = tuple[frozenset[str], int, int]


def alone(hardware: Hardware) -> Hardware:
    """The machine without a CPU that helps a GPU: what the formulations that are written out here cover."""
    kept = {name: p for name, p in hardware.processors.items() if p.tier == hardware.compute_tier}
    return hardware.model_copy(update={"processors": kept})


def base_decision(layers: int, **sizes: Any) -> Decision:
    """A decision in which nothing is decided but the sizes."""
    fixed: dict[str, Any] = {
        "head_pages": 3,
        "prefill_groups": 1,
        "attention_batch": 32,
        "decode_batch": 32,
        "expert_rows": 64,
        "hot": 0,
    }
    return Decision(embedding=False, layers=tuple(LayerDecision() for _ in range(layers)), **{**fixed, **sizes})


def skewed(cost_spec: object, rng: random.Random) -> tuple[tuple[float, ...], ...]:
    """Popularity that differs from layer to layer."""
    out = []
    for layer in cost_spec.layers:  # type: ignore[attr-defined]
        weights = [rng.lognormvariate(0, 1.5) for _ in range(layer.num_experts)]
        out.append(tuple(w / sum(weights) for w in weights))
    return tuple(out)


def weights_bytes(problem: Problem) -> int:
    """Room for every weight and all KV."""
    groups = sum(
        g.count
        * (
            sum(m.slot_bytes for m in g.modules.values())
            + sum(g.sizes) * g.expert.slot_bytes
            + problem.batches * g.kv_slot_bytes
        )
        for g in problem.groups
    )
    return groups + problem.head.slot_bytes + problem.embedding.slot_bytes + problem.norm_bytes


def slots_bytes(problem: Problem) -> int:
    """Slots of everything but experts and KV."""
    return sum(problem.module_slots.values()) + problem.head_slots[0]


def random_case(seed: int) -> Case:
    """A tiny model on a machine with or without GPU; capacity from just enough to stream up to nearly all."""
    rng = random.Random(seed)
    gpu = seed % 2 == 1
    spec = tiny_spec(layers=rng.choice([2, 3]), experts=rng.choice([2, 3, 4]))
    hardware = alone(tiny_hardware(gpu))
    routing = (
        uniform(spec) if rng.random() < 0.4 else uniform(spec).model_copy(update={"popularity": skewed(spec, rng)})
    )
    cost = Cost(spec, hardware, routing, "bf16")
    workload = Workload(prompt_len=rng.choice([4, 16, 64]), gen_len=rng.choice([1, 4, 16]), num_sequences=12)
    unit = rng.choice([1, 1, 2])
    decision = base_decision(
        len(spec.layers),
        num_batches=rng.choice([1, 3]),
        batch_size=rng.choice([1, 4]),
        lead=unit * rng.choice([1, 2, 3]),
        unit=unit,
    )
    problem = build(cost, workload, decision, {hardware.compute_tier: 1 << 40, "host": 1 << 40})
    whole, slots = weights_bytes(problem), slots_bytes(problem)
    if not gpu:
        return cost, workload, decision, {"host": slots + int(whole * rng.uniform(0.25, 0.9))}
    share = rng.uniform(0.25, 0.8)
    return (
        cost,
        workload,
        decision,
        {"gpu": slots + int(whole * share), "host": int(whole * (1 - share) * rng.uniform(0.8, 1.5))},
    )


def loading_us(problem: Problem) -> float:
    """Reading every weight from disk, which before a GPU is done once, but for experts that stay there."""
    layers = sum(
        g.count * (sum(m.disk_us for m in g.modules.values()) + sum(g.sizes) * g.expert.disk_us) for g in problem.groups
    )
    return layers + problem.head.disk_us + problem.embedding.disk_us


def solve(case: Case) -> Solved | None:
    """The residency, or None where nothing fits."""
    try:
        return residency(*case)
    except Infeasible:
        return None


# ------------------------------------------------------------------------------------------------------- brute force


def least_period(
    problem: Problem, g: Group, phase: str, kv: int, modules: dict[str, int], experts: list[tuple[int, int, int, int]]
) -> float:
    """T of one layer, from averages over the group's layers; ``experts``: (resident, static, late, disk) per class.

    Paths without the prefetch credit, paths that it shortens (``eager``) and paths that it prolongs (``held``).
    """
    w, n, load, unit = g.work[phase], g.count, g.expert.load_us, problem.unit
    attention, router = w.attention_us, w.router_us + (w.bind_us if any(x[2] for x in experts) else 0.0)
    work = list(zip(experts, w.classes, g.sizes, strict=True))
    all_experts = sum(c.compute_us * size for _, c, size in work)
    residents = sum(c.compute_us * x[0] / n for x, c, _ in work)
    chain = [(x[1] / n * load, x[1] / n * c.compute_us, min(1.0, unit / size)) for x, c, size in work]
    late = [(x[2] / n * c.late_us, x[2] / n * c.compute_us, min(1.0, unit / size)) for x, c, size in work]
    moved = {k: (1 - modules[k] / n) * item.load_us for k, item in g.modules.items()}
    spilled = problem.batches - kv / n
    loads = sum(moved.values()) + sum(step[0] for step in chain + late)
    plain = [attention + router + all_experts, loads + spilled * w.row.kv_load_us, spilled * w.row.kv_store_us]
    plain.append(sum(x[3] for x, _, _ in work) / n * far_us(problem, g))
    plain.append(spilled * w.row.kv_load_us * (1 - w.kv_ahead) + router + all_experts)
    plain.append(unit / problem.leads[phase] * sum(a + b for a, b, _ in chain + late))
    plain += [attention + router - w.shared_us + path for path in paths(late)]
    eager = [moved.get("attention", 0.0) + attention + router + all_experts, sum(moved.values()) + router + all_experts]
    eager += [sum(moved.values()) + path for path in paths(chain + late)]
    held = [-1e18]
    for i in range(len(chain + late)):
        path = sum(s[1] for s in (chain + late)[:i]) + sum(s[0] for s in (chain + late)[i:])
        held.append(attention + router + residents + path - problem.leads[phase] * load - sum(moved.values()))
    most = sum(moved.values()) + min(problem.leads[phase] * load, sum(step[0] for step in chain))
    credit = min(max(0.0, (max(eager) - max(held)) / 2), most)
    return max(*plain, max(eager) - credit, max(held) + credit)


def far_us(problem: Problem, g: Group) -> float:
    """What an expert on disk takes the disk; with one staging slot, which the link behind has to empty first, that too."""
    return g.expert.disk_us + (g.expert.load_us if max(problem.leads.values()) < 2 * problem.unit else 0.0)


def paths(steps: list[tuple[float, float, float]]) -> list[float]:
    """Both ends of every class in a flow shop: (load, compute, share of the first unit) in order."""
    out = []
    for i, (load, compute, first) in enumerate(steps):
        before, after = sum(s[0] for s in steps[:i]), sum(s[1] for s in steps[i + 1 :])
        out += [before + first * load + compute + after, before + load + first * compute + after]
    return out


def splits(size: int, late: bool, disk: bool) -> list[tuple[int, int, int, int]]:
    """(resident, static, late, disk) of a class."""
    return [
        (r, s, size - r - s, d)
        for r in range(size + 1)
        for s in range(size - r + 1)
        if late or r + s == size
        for d in (range(s + 1) if disk else (0,))
    ]


def brute_force(problem: Problem) -> float:
    """The least makespan plus load over all counts; infinite if none fits."""
    near, far = problem.compute_tier, problem.home_tier
    disk = bool(far)
    # (what takes slots, bytes near, bytes far) -> least time, group by group; dominated states are dropped.
    slots = problem.module_slots | {"kv": problem.spill_bytes}
    states: dict[State, float] = {(frozenset(), problem.norm_bytes, 0): 0.0}
    for g in problem.groups:
        kinds = list(g.modules)
        options: dict[State, float] = {}
        blocks = g.count * problem.batches
        for kv in range(0 if problem.may_spill else blocks, blocks + 1):
            for chosen in product(*(range(g.count + 1) for _ in kinds)):
                for experts in product(
                    *(splits(m * g.count, late, disk) for m, late in zip(g.sizes, g.late, strict=True))
                ):
                    modules = dict(zip(kinds, chosen, strict=True))
                    time = sum(
                        passes * g.count * least_period(problem, g, phase, kv, modules, list(experts))
                        for phase, passes in problem.passes.items()
                    )
                    kept = sum(x[0] for x in experts)
                    time -= sum(x[3] for x in experts) * g.expert.disk_us
                    if not far:
                        time += kept * g.expert.load_us + sum(modules[k] * g.modules[k].load_us for k in kinds)
                    here = (
                        kept * g.expert.slot_bytes
                        + kv * g.kv_slot_bytes
                        + sum(modules[k] * g.modules[k].slot_bytes for k in kinds)
                    )
                    there = (
                        sum(x[1] + x[2] - x[3] for x in experts) * g.expert.slot_bytes + (blocks - kv) * g.kv_slot_bytes
                    )
                    there += sum((g.count - modules[k]) * g.modules[k].slot_bytes for k in kinds)
                    travelling = [*(["kv"] if kv < blocks else []), *(k for k in kinds if modules[k] < g.count)]
                    key = (frozenset(travelling), here, there if far else 0)
                    options[key] = min(time, options.get(key, float("inf")))
        merged: dict[State, float] = {}
        for (s1, a1, b1), t1 in states.items():
            for (s2, a2, b2), t2 in undominated(options).items():
                if a1 + a2 <= problem.capacity[near]:
                    key = (s1 | s2, a1 + a2, b1 + b2)
                    merged[key] = min(t1 + t2, merged.get(key, float("inf")))
        states = undominated(merged)
    best = float("inf")
    for head in (0, 1) if problem.head_pages else (1,):
        for embedding in (0,) if far else (0, 1):
            time = loading_us(problem) if far else head * problem.head.load_us + embedding * problem.embedding.load_us
            for phase, passes in problem.passes.items():
                end, streamed = problem.end[phase], (1 - head) * problem.head.load_us
                rest = max(0.0, 1 - HEAD_SLOTS / max(1, problem.head_pages)) * streamed + end.page_us
                time += passes * max(end.compute_us + (1 - embedding) * end.gather_us, streamed, rest)
            for (moving, here, there), others in states.items():
                used = (
                    here
                    + sum(slots[kind] for kind in moving)
                    + problem.head_slots[head]
                    + head * problem.head.slot_bytes
                    + embedding * problem.embedding.slot_bytes
                )
                there += problem.embedding.slot_bytes + (1 - head) * problem.head.slot_bytes
                fits = not far or there <= problem.capacity[far]
                if used <= problem.capacity[near] and fits:
                    best = min(best, time + others)
    return best


def undominated(states: dict[State, float]) -> dict[State, float]:
    """States than which no other is at least as good in everything."""
    kept: list[tuple[frozenset[str], int, int, float]] = []
    for (spills, here, there), time in sorted(
        states.items(), key=lambda entry: (len(entry[0][0]), *entry[0][1:], entry[1])
    ):
        if not any(s <= spills and a <= here and b <= there and t <= time for s, a, b, t in kept):
            kept.append((spills, here, there, time))
    return {(s, a, b): t for s, a, b, t in kept}


def small(problem: Problem) -> bool:
    """Whether brute force is a matter of seconds."""
    total = 0
    disk = bool(problem.home_tier)
    for g in problem.groups:
        options = (g.count * problem.batches + 1) * (g.count + 1) ** len(g.modules)
        for size, late in zip(g.sizes, g.late, strict=True):
            options *= len(splits(size * g.count, late, disk))
        total += options
    return total < 20_000


@pytest.mark.parametrize("seed", range(16))
def test_equals_brute_force(seed: int) -> None:
    """Over all counts, by an evaluation of the same inequalities that shares no code with them."""
    cost, workload, decision, capacity = random_case(seed)
    problem = build(cost, workload, decision, capacity, spans=True)
    if not small(problem):
        problem_spec = replace(cost.spec, layers=cost.spec.layers[:2])
        cost = Cost(problem_spec, cost.hardware, uniform(problem_spec), cost.dtype)
        decision = decision.model_copy(update={"layers": decision.layers[:2]})
        problem = build(cost, workload, decision, capacity, spans=True)
    assert small(problem)
    expected = brute_force(problem)
    solved = solve((cost, workload, decision, capacity))
    if solved is None:
        assert expected == float("inf")
        return
    assert solved.objective_us + solved.load_us == pytest.approx(expected, rel=2 * RELATIVE_GAP)
    assert solved.bound_us <= expected * (1 + 1e-6)


# ---------------------------------------------------------------------------------------- another formulation and solver


def by_cbc(problem: Problem) -> float | None:
    """The same problem stated by clocks instead of paths (when a class is loaded, when it is computed), solved by CBC."""
    near, far = problem.compute_tier, problem.home_tier
    model = pulp.LpProblem("residency", pulp.LpMinimize)

    def integer(name: str, most: int, least: int = 0) -> pulp.LpVariable:
        return pulp.LpVariable(name, least, most, "Integer")

    spilling, embedding = integer("spilling", 1), integer("embedding", 0 if far else 1)
    head = integer("head", 1, 0 if problem.head_pages else 1)
    disk = bool(far)
    here = [
        problem.norm_bytes,
        spilling * problem.spill_bytes,
        head * problem.head.slot_bytes,
        embedding * problem.embedding.slot_bytes,
        (1 - head) * problem.head_slots[0] + head * problem.head_slots[1],
    ]
    moving = {kind: integer(f"moving_{kind}", 1) for kind in problem.module_slots}
    here += [moving[kind] * nbytes for kind, nbytes in problem.module_slots.items()]
    there = [(1 - head) * problem.head.slot_bytes, problem.embedding.slot_bytes]
    goal = [loading_us(problem)] if far else [head * problem.head.load_us, embedding * problem.embedding.load_us]
    for g in problem.groups:
        n, load = g.count, g.expert.load_us
        blocks = n * problem.batches
        kv = integer(f"kv_{g.name}", blocks, 0 if problem.may_spill else blocks)
        model += blocks - kv <= blocks * spilling
        kept = {k: integer(f"{g.name}_{k}", n) for k in g.modules}
        for k, v in kept.items():
            model += n - v <= n * moving[k]
        r = [integer(f"{g.name}_r{c}", m * n) for c, m in enumerate(g.sizes)]
        s = [integer(f"{g.name}_s{c}", m * n) for c, m in enumerate(g.sizes)]
        d = [integer(f"{g.name}_d{c}", m * n if disk else 0) for c, m in enumerate(g.sizes)]
        x = [m * n - a - b for m, a, b in zip(g.sizes, r, s, strict=True)]
        binding = integer(f"binding_{g.name}", 1)
        model += pulp.lpSum(x) <= n * sum(g.sizes) * binding
        for c, late in enumerate(g.late):
            model += x[c] >= 0
            model += d[c] <= s[c]
            if not late:
                model += x[c] <= 0
        here += [
            kv * g.kv_slot_bytes,
            *(v * g.modules[k].slot_bytes for k, v in kept.items()),
            *(v * g.expert.slot_bytes for v in r),
        ]
        there += [(blocks - kv) * g.kv_slot_bytes, *((n - v) * g.modules[k].slot_bytes for k, v in kept.items())]
        there += [(m * n - a - b) * g.expert.slot_bytes for m, a, b in zip(g.sizes, r, d, strict=True)]
        goal += [] if far else [v * g.modules[k].load_us for k, v in kept.items()] + [v * load for v in r]
        goal += [v * -g.expert.disk_us for v in d]
        moved = {k: (n - v) * g.modules[k].load_us for k, v in kept.items()}
        modules = pulp.lpSum(moved.values())
        for phase, work in g.work.items():
            t = pulp.LpVariable(f"t_{g.name}_{phase}", 0)  # of all layers of the group
            ahead = pulp.LpVariable(f"ahead_{g.name}_{phase}", 0)
            goal.append(problem.passes[phase] * t)
            experts = n * sum(m * c.compute_us for m, c in zip(g.sizes, work.classes, strict=True))
            router = n * work.router_us + n * work.bind_us * binding
            before = n * work.attention_us + router
            classes = list(zip(g.sizes, work.classes, strict=True))
            chain = [
                (load * v, c.compute_us * v, min(1.0, problem.unit / m)) for v, (m, c) in zip(s, classes, strict=True)
            ]
            late_chain = [
                (c.late_us * v, c.compute_us * v, min(1.0, problem.unit / m))
                for v, (m, c) in zip(x, classes, strict=True)
            ]
            streamed = pulp.lpSum(a for a, _, _ in chain + late_chain)
            model += ahead <= modules + pulp.lpSum(a for a, _, _ in chain)
            model += ahead <= modules + n * problem.leads[phase] * load
            model += t >= before + experts
            model += t >= modules + streamed + (blocks - kv) * work.row.kv_load_us
            model += t >= (blocks - kv) * work.row.kv_store_us
            model += t >= (blocks - kv) * work.row.kv_load_us * (1 - work.kv_ahead) + router + experts
            model += t >= pulp.lpSum(d) * far_us(problem, g)
            model += t >= moved.get("attention", 0) - ahead + before + experts
            model += t >= modules - ahead + router + experts
            model += problem.leads[phase] * t >= problem.unit * (
                streamed + pulp.lpSum(b for _, b, _ in chain + late_chain)
            )
            clock(model, f"{g.name}_{phase}_all", chain + late_chain, modules - ahead, t)
            clock(model, f"{g.name}_{phase}_late", late_chain, before - n * work.shared_us, t)
            done = before + pulp.lpSum(v * c.compute_us for v, (_, c) in zip(r, classes, strict=True))
            left = streamed + ahead - modules - n * problem.leads[phase] * load
            for link_us, compute_us, _ in chain + late_chain:
                model += t >= done + left
                done, left = done + compute_us, left - link_us
    model += pulp.lpSum(here) <= problem.capacity[near]
    if far:
        model += pulp.lpSum(there) <= problem.capacity[far]
    for phase, passes in problem.passes.items():
        t, end = pulp.LpVariable(f"end_{phase}", 0), problem.end[phase]
        goal.append(passes * t)
        model += t >= end.compute_us + (1 - embedding) * end.gather_us
        model += t >= (1 - head) * problem.head.load_us
        model += (
            t >= max(0.0, 1 - HEAD_SLOTS / max(1, problem.head_pages)) * (1 - head) * problem.head.load_us + end.page_us
        )
    model += pulp.lpSum(goal)
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=1e-6, threads=1))
    return float(pulp.value(model.objective)) if model.sol_status == pulp.LpSolutionOptimal else None


def clock(
    model: pulp.LpProblem, name: str, steps: list[tuple[object, object, float]], start: object, end: object
) -> None:
    """Two clocks through a flow shop: what has been loaded, and when each class is computed at the earliest."""
    loaded, done = start, None
    for i, (load, compute, first) in enumerate(steps):
        now = pulp.LpVariable(f"{name}_{i}")
        model += now >= loaded + first * load + compute  # type: ignore[operator]
        loaded = loaded + load  # type: ignore[operator]
        model += now >= loaded + first * compute  # type: ignore[operator]
        if done is not None:
            model += now >= done + compute
        done = now
    if done is not None:
        model += end >= done


@pytest.mark.parametrize("seed", range(30, 50))
def test_equals_cbc_on_another_formulation(seed: int) -> None:
    """Clocks instead of paths, CBC instead of SCIP."""
    case = random_case(seed)
    expected, solved = by_cbc(build(*case, spans=True)), solve(case)
    assert (expected is None) == (solved is None)
    if solved:
        assert solved.objective_us + solved.load_us == pytest.approx(expected, rel=2 * RELATIVE_GAP)


# ------------------------------------------------------------------------------------------------ what comes of it


def whole_case(model: str, machine: str, gpu_bytes: int, **sizes: int) -> Case:
    """A shipped model on a shipped machine, uniformly routed."""
    spec, hardware = read_model(model), alone(read_hardware(machine))
    cost = Cost(spec, hardware, uniform(spec), spec.compute_dtype)
    decision = base_decision(len(spec.layers), **sizes)
    workload = Workload(prompt_len=512, gen_len=32, num_sequences=decision.sequences)
    return cost, workload, decision, {"gpu": gpu_bytes, "host": hardware.tiers["host"].capacity_bytes}


@pytest.mark.parametrize("seed", SEEDS)
def test_capacity_holds_and_every_expert_has_one_place(seed: int) -> None:
    """In the slots of the lowered schedule, spill slots included."""
    cost, workload, decision, capacity = case = random_case(seed)
    solved = solve(case)
    if solved is None:
        pytest.skip("nothing fits")
    for layer, chosen in zip(cost.spec.layers, solved.layers, strict=True):
        places = [*chosen.resident_experts, *chosen.static, *chosen.late]
        assert sorted(places) == list(range(layer.num_experts))
        assert set(chosen.on_disk) <= set(chosen.static)
        assert all(getattr(layer, kind) for kind in chosen.resident)
    lowered = lower(cost, "joint", solved.decide(decision), workload)
    spilled = [
        slot for p in lowered.phases.values() for t, slot in pools(p, lowered) if lowered.tensors[t].kind == "kv"
    ]
    for tier, free in capacity.items():
        permanent = {slot for _, slot in lowered.placed}
        used = sum(lowered.slots[slot].nbytes for slot in {*permanent, *spilled} if lowered.slots[slot].tier == tier)
        assert used <= free


def pools(phase: object, lowered: object) -> set[tuple[int, int]]:
    """(tensor, slot) of everything that a phase moves."""
    out = set()
    for step in phase.steps:  # type: ignore[attr-defined]
        if hasattr(step.op, "tensors") and phase.shape.name == "decode":  # type: ignore[attr-defined]
            out |= set(zip(step.op.tensors, step.slots, strict=True))
    return out


def test_simulation_agrees_with_the_objective() -> None:
    """The model gap: 2 % where one layer is like another."""
    cost, workload, decision, _ = case = whole_case(
        "mixtral-8x7b", "rtx3090", 21 << 30, num_batches=10, batch_size=32, lead=4, unit=1, prefill_groups=10
    )
    solved = residency(*case)
    lowered = lower(cost, "joint", solved.decide(decision), workload)
    assert lowered.groups * lowered.group_us == pytest.approx(solved.objective_us, rel=0.02)
    assert solved.status == "optimal" and not solved.truncated
    assert solved.binding["gpu"] > 0 and solved.binding["host"] == 0
    assert residency(*case).layers == solved.layers, "equal inputs, equal decisions"
    assert by_cbc(build(*case, spans=True)) == pytest.approx(solved.objective_us + solved.load_us, rel=2 * RELATIVE_GAP)


def test_shadow_price_is_the_finite_difference() -> None:
    """A little more capacity saves what its dual says."""
    cost, workload, decision, capacity = whole_case(
        "deepseek-v3", "h800", 40 << 30, num_batches=10, batch_size=8, lead=8, unit=1, prefill_groups=10
    )
    more = {**capacity, "gpu": capacity["gpu"] + (4 << 30)}
    one, two = residency(cost, workload, decision, capacity), residency(cost, workload, decision, more)
    saved = (one.objective_us + one.load_us) - (two.objective_us + two.load_us)
    assert saved / (4 << 30) == pytest.approx(one.binding["gpu"], rel=0.05)


@pytest.mark.parametrize("gpu", [False, True])
def test_shortfall_is_what_is_missing(gpu: bool) -> None:
    """To the byte: so much more is enough, one byte less is not."""
    spec, hardware = tiny_spec(), alone(tiny_hardware(gpu))
    cost = Cost(spec, hardware, uniform(spec), "bf16")
    decision = base_decision(len(spec.layers), num_batches=3, batch_size=2, lead=2, unit=1)
    workload = Workload(prompt_len=16, gen_len=8, num_sequences=12)
    tier = hardware.compute_tier
    capacity = {tier: 4096, "host": 1 << 30} if gpu else {tier: 4096}
    with pytest.raises(Infeasible) as refused:
        residency(cost, workload, decision, capacity)
    assert list(refused.value.shortfalls) == [tier] and tier in str(refused.value)
    enough = capacity[tier] + refused.value.shortfalls[tier]
    residency(cost, workload, decision, {**capacity, tier: enough})
    with pytest.raises(Infeasible):
        residency(cost, workload, decision, {**capacity, tier: enough - 1})


def test_experts_stay_on_disk_where_host_memory_ends() -> None:
    """A GPU machine whose host cannot hold the rest."""
    cost, workload, decision, _ = random_case(1)
    problem = build(cost, workload, decision, {"gpu": 1 << 30, "host": 1 << 30})
    whole = weights_bytes(problem)
    tight = {"gpu": whole * 3 // 5, "host": whole // 3}
    solved = residency(cost, workload, decision, tight)
    assert sum(len(layer.on_disk) for layer in solved.layers) > 0


def many_layers() -> tuple[Cost, Workload, Decision, dict[str, int]]:
    """22 layers of 256 experts, no two alike, and 3 dense ones."""
    whole, hardware = read_model("deepseek-v3"), alone(read_hardware("h800"))
    spec = replace(whole, layers=whole.layers[:25])
    routing = Routing(model=spec.name, source="random", tokens=0, popularity=skewed(spec, random.Random(0)))
    decision = base_decision(len(spec.layers), num_batches=4, batch_size=8, lead=8, unit=1)
    cost, workload = Cost(spec, hardware, routing, "bf16"), Workload(prompt_len=64, gen_len=32, num_sequences=32)
    return cost, workload, decision, {"gpu": 25 << 30, "host": 1 << 40}


def test_many_different_layers_stay_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is just now."""
    monkeypatch.setattr("klotski_compiler.milp.solver.SAFETY_SECONDS", 600.0)
    solved, model = residency(*many_layers()), Formulation(build(*many_layers(), spans=True)).add_all()
    assert model.statistics()["integers"] <= len(solved.layers) * (4 * MAX_CLASSES + 7) + 3
    # Its nodes are limited, so that the gap may stay a little above the one that is asked for.
    assert solved.objective_us + solved.load_us <= solved.bound_us * (1 + 2 * RELATIVE_GAP)


def test_where_the_simplex_method_gives_up_another_solver_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GLOP did on some of many models, with an internal error."""
    case = whole_case("mixtral-8x7b", "rtx3090", 16 << 30, num_batches=4, batch_size=8, lead=2, unit=1)
    expected, solve_model = relaxed_us(*case), mathopt.solve

    def gives_up(model: mathopt.Model, solver: mathopt.SolverType, **options: Any) -> mathopt.SolveResult:
        if solver == mathopt.SolverType.GLOP:
            raise RuntimeError("Unexpected GLOP termination reason: ABNORMAL")
        return solve_model(model, solver, **options)

    monkeypatch.setattr(mathopt, "solve", gives_up)
    assert relaxed_us(*case) == pytest.approx(expected, rel=1e-6)


def test_sizes_for_which_the_solver_finds_no_residency_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klotski_compiler.milp.solver.NODE_LIMIT", 0)
    with pytest.raises(Infeasible, match="within its limits") as refused:
        residency(*many_layers())
    assert not refused.value.shortfalls


def test_rows_read_like_text() -> None:
    """Names of rows are unique and say what they limit."""
    model = Formulation(build(*random_case(0))).add_all()
    names = [row.name for row in model.rows]
    assert len(set(names)) == len(names)
    assert "capacity[host]" in names and "link[g1.prefill]" in names and "assign[g1.c0]" in names


def test_johnson_is_optimal_on_two_machines() -> None:
    """Against every permutation."""
    rng = random.Random(3)
    for _ in range(50):
        jobs = list(range(5))
        load = {j: rng.uniform(1, 10) for j in jobs}
        compute = {j: rng.uniform(1, 10) for j in jobs}
        best = min(flow_shop(list(order), load, compute) for order in permutations(jobs))
        assert flow_shop(johnson(jobs, load, compute), load, compute) == pytest.approx(best)


def flow_shop(order: list[int], load: dict[int, float], compute: dict[int, float]) -> float:
    """Makespan of loads then computes in this order."""
    loaded = done = 0.0
    for job in order:
        loaded += load[job]
        done = max(done, loaded) + compute[job]
    return done


def test_spread_is_even_and_relieves_the_busiest() -> None:
    """Nobody gets two before everyone with room has one."""
    rng = random.Random(5)
    for _ in range(200):
        rooms = [rng.randint(0, 6) for _ in range(rng.randint(1, 9))]
        total = rng.randint(0, sum(rooms))
        given = spread(total, rooms, [0.0] * len(rooms), 1.0)
        assert sum(given) == total and all(0 <= g <= room for g, room in zip(given, rooms, strict=True))
        open_ = [g for g, room in zip(given, rooms, strict=True) if g < room]
        assert not open_ or max(given) - min(open_) <= 1
    assert spread(1, [1, 1, 1], [5.0, 9.0, 5.0], 1.0) == [0, 1, 0]
