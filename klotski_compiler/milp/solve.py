"""Solves the residency problem and turns counts into layer decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.errors import Infeasible
from klotski_compiler.milp.formulation import MIB, Formulation
from klotski_compiler.milp.problem import Group, Problem, build, class_members
from klotski_compiler.milp.solver import Answer, Solver
from klotski_compiler.ops import ALL
from klotski_compiler.shape import shapes
from klotski_compiler.tensors import BEHIND

UNDECIDED = "the solver found no residency within its limits; choose other sizes with --batch-size and --num-batches"


@dataclass(frozen=True)
class Solved:
    """The best residency found. Times in microseconds.

    objective_us: whole workload without ``load_us``, the time to load what memory keeps. bound_us: the solver's lower
    bound on objective_us + load_us. binding: microseconds saved per further byte of each tier, from the duals of the
    linear relaxation. period_us: per layer group and phase.
    """

    status: str
    objective_us: float
    load_us: float
    bound_us: float
    truncated: bool
    layers: tuple[LayerDecision, ...]
    embedding: bool
    head_resident: bool
    binding: dict[str, float]
    period_us: dict[str, float] = field(default_factory=dict)

    def decide(self, base: Decision) -> Decision:
        """``base`` with this residency."""
        return base.model_copy(
            update={
                "layers": self.layers,
                "embedding": self.embedding,
                "head_pages": 0 if self.head_resident else base.head_pages,
                "cpu_batches": max(layer.cpu_batches or 0 for layer in self.layers),
            }
        )


def residency(
    cost: Cost,
    workload: Workload,
    decision: Decision,
    capacity: dict[str, int],
    may_spill: bool = True,
    uniform: bool = False,
    stretch: float = 1.0,
) -> Solved:
    """The best residency for policy ``joint`` under the sizes of ``decision``.

    decision: no residents; ``head_pages`` is what the head is streamed in if it is not resident (0: it must be).
    capacity: bytes of the compute tier, and on a machine with a GPU of ``host``, for resident weights and KV: without
    streaming and staging slots, states and workspace. may_spill: KV may live outside the compute tier. uniform: KV and
    the CPU's shares are the same in all layers. stretch: how many times as long as they are loads of experts are taken
    for. Raises Infeasible with the bytes that are short even if everything is streamed and KV spilled, or without any where the
    solver's limits strike before it has found a residency.
    """
    problem = build(cost, workload, decision, capacity, may_spill, uniform, stretch, spans=True)
    formulation = Formulation(problem)
    solver = Solver(formulation.add_all())
    relaxed = solver.relaxed()
    answer = relaxed if relaxed.status == "infeasible" else _decided(solver)
    if answer.status == "infeasible":
        raise _shortfall(problem)
    values = answer.values
    load = sum(factor * (values[name] if name else 1.0) for name, factor in formulation.load_terms().items())
    return Solved(
        status=answer.status,
        objective_us=answer.objective - load,
        load_us=load,
        bound_us=answer.bound,
        truncated=answer.truncated,
        layers=_layers(cost, problem, decision, workload, {name: round(v) for name, v in values.items()}),
        embedding=round(values["resident[embedding]"]) == 1,
        head_resident=round(values["resident[head]"]) == 1,
        binding={tier: max(0.0, -relaxed.duals.get(f"capacity[{tier}]", 0.0)) / MIB for tier in capacity},
        period_us={name: value for name, value in values.items() if name.startswith("period_us")},
    )


def relaxed_us(cost: Cost, workload: Workload, decision: Decision, capacity: dict[str, int]) -> float:
    """What ``residency`` would take if experts and layers could be divided, loading included: within a few percent, in a tenth of
    the time. Raises Infeasible as it does."""
    return _relaxed(build(cost, workload, decision, capacity), values=False).objective


def attended_share(cost: Cost, workload: Workload, decision: Decision, capacity: dict[str, int]) -> float:
    """The share of a group's sequences to which the CPU would attend if batches could be divided. Raises Infeasible as ``residency``
    does."""
    problem = build(cost, workload, decision, capacity)
    values = _relaxed(problem).values
    shares = [values[f"attended[{g.name}]"] / (g.count * problem.batches) for g in problem.groups]
    return sum(g.count * share for g, share in zip(problem.groups, shares, strict=True)) / len(cost.spec.layers)


def _relaxed(problem: Problem, values: bool = True) -> Answer:
    solver = Solver(Formulation(problem).add_all())
    answer = solver.relaxed() if values else solver.least()
    if answer.status == "infeasible":
        raise _shortfall(problem)
    return answer


def _decided(solver: Solver) -> Answer:
    answer = solver.whole()
    if answer.status == "undecided":
        raise Infeasible({}, UNDECIDED)
    return answer


def _shortfall(problem: Problem) -> Infeasible:
    """Which capacities are short, by how much: the least excess with which the model has a solution."""
    answer = _decided(Solver(Formulation(problem, elastic=True).add_all()))
    excess = {tier: math.ceil(answer.values.get(f"excess[{tier}]", 0.0) * MIB - 1e-3) for tier in problem.capacity}
    mend = "give the tier more memory, or choose a smaller batch size, fewer batches or shorter prompts"
    return Infeasible({tier: nbytes for tier, nbytes in excess.items() if nbytes > 0}, mend)


# ------------------------------------------------------------------------------------------------- counts to layers


def johnson(experts: Sequence[int], load_us: dict[int, float], compute_us: dict[int, float]) -> list[int]:
    """Johnson's order of two machines (design 7.4): experts whose compute outlasts their load first, by increasing
    load; the others by decreasing compute. Ties keep their order."""
    first = [e for e in experts if compute_us[e] >= load_us[e]]
    rest = [e for e in experts if compute_us[e] < load_us[e]]
    return sorted(first, key=lambda e: load_us[e]) + sorted(rest, key=lambda e: -compute_us[e])


def woven(experts: Sequence[int], far: frozenset[int], unit: int = 1) -> list[int]:
    """Those that come from disk evenly among the others, by transfer units, each kind in its order: the disk is never the one that is
    waited for while the link behind it has nothing else to send."""
    places = []
    for kind in ([e for e in experts if e not in far], [e for e in experts if e in far]):
        units = [kind[first : first + unit] for first in range(0, len(kind), unit)]
        places += [((i + 0.5) / len(units), chosen) for i, chosen in enumerate(units)]
    return [e for _, chosen in sorted(places, key=lambda place: place[0]) for e in chosen]


def spread(total: int, rooms: Sequence[int], burden_us: list[float], relief_us: float) -> list[int]:
    """``total`` units over layers with so much room each, as evenly as possible; the rest goes to the layers with most
    link time left, evenly spaced among equals. ``burden_us`` is lowered by what is given."""
    given = [0] * len(rooms)
    while total:
        free = [i for i, room in enumerate(rooms) if given[i] < room]
        level = min(total // len(free), min(rooms[i] - given[i] for i in free))
        # Multiples of the golden ratio modulo 1 fill an interval evenly: any first k of them are well spaced.
        chosen = free if level else sorted(free, key=lambda i: (-round(burden_us[i]), i * 40503 % 65536))[:total]
        for i in chosen:
            given[i] += max(1, level)
            burden_us[i] -= max(1, level) * relief_us
        total -= max(1, level) * len(chosen)
    return given


def _layers(
    cost: Cost, problem: Problem, decision: Decision, workload: Workload, counts: dict[str, int]
) -> tuple[LayerDecision, ...]:
    """Every layer's share of its group's counts."""
    out = {
        number: chosen
        for group in problem.groups
        for number, chosen in zip(
            group.layers, _group_layers(cost, problem, group, decision, workload, counts), strict=True
        )
    }
    return tuple(out[number] for number in sorted(out))


def _group_layers(
    cost: Cost, problem: Problem, g: Group, decision: Decision, workload: Workload, counts: dict[str, int]
) -> list[LayerDecision]:
    one, blocks = [1] * g.count, [problem.batches] * g.count
    work = list(g.work.values())[len(g.work) // 2]  # of decode, if there is any: its middle
    burden = [0.0] * g.count
    kv_us = work.row.kv_load_us
    kv = spread(counts[f"kv[{g.name}]"], blocks, burden, kv_us)
    attended = spread(counts[f"attended[{g.name}]"], [problem.batches - n for n in kv], burden, kv_us)
    modules = {
        kind: spread(counts[f"resident[{g.name}.{kind}]"], one, burden, item.load_us)
        for kind, item in g.modules.items()
    }
    resident, static, disk, cpu = list[list[int]](), list[list[int]](), list[list[int]](), list[list[int]]()
    for c, size in enumerate(g.sizes):
        where = f"[{g.name}.c{c}]"
        resident.append(spread(counts[f"resident{where}"], [size] * g.count, burden, g.expert.load_us))
        left = [size - taken for taken in resident[c]]
        saved = g.expert.load_us - work.classes[c].late_us
        # Late experts relieve the link by what is not touched; static ones take what is left.
        late = spread(counts[f"late{where}"], left, burden, saved)
        left = [room - taken for room, taken in zip(left, late, strict=True)]
        cpu.append(spread(counts.get(f"cpu{where}", 0), left, burden, g.expert.load_us))
        static.append([room - taken for room, taken in zip(left, cpu[c], strict=True)])
        disk.append(spread(counts.get(f"disk{where}", 0), static[c], [0.0] * g.count, 0.0))
    tokens = shapes(decision, workload)[1].scope_tokens(ALL)
    layers = []
    for j, number in enumerate(g.layers):
        classes = class_members(cost, number, g.sizes)
        kept, streamed, late_ones, far = list[int](), list[int](), list[int](), list[int]()
        apart = list[int]()
        for c, members in enumerate(classes):
            kept += members[: resident[c][j]]
            named = members[resident[c][j] : resident[c][j] + static[c][j]]
            streamed += named
            late_ones += members[resident[c][j] + static[c][j] : len(members) - cpu[c][j]]
            apart += members[len(members) - cpu[c][j] :]
            far += named[len(named) - disk[c][j] :]
        load = {e: max(g.page.disk_us, g.expert.load_us) if e in far else g.expert.load_us for e in streamed}
        compute = {e: cost.expert_us(number, e, tokens) for e in streamed}
        layers.append(
            LayerDecision(
                resident=tuple(kind for kind in g.modules if modules[kind][j]),
                resident_experts=tuple(kept),
                static=tuple(woven(johnson(streamed, load, compute), frozenset(far), decision.unit)),
                late=tuple(late_ones),
                cpu=tuple(apart),
                on_disk=tuple(sorted(far)),
                kv=problem.compute_tier if kv[j] == decision.part_batches else BEHIND[problem.compute_tier],
                kv_batches=kv[j] if kv[j] < decision.part_batches else 0,
                cpu_batches=round((attended[j] + problem.last) * decision.num_batches / decision.part_batches),
            )
        )
    return layers
