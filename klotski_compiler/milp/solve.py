"""Solves the residency problem and turns counts into layer decisions.

The solver is SCIP through MathOpt: one thread, a fixed seed, stopped by gap or nodes, so that equal inputs give equal
plans. The wall clock is a safety net; whether it struck is in the result.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from klotski_compiler.cost import Cost
from klotski_compiler.errors import Infeasible, KlotskiError
from klotski_compiler.milp.formulation import MIB, Formulation, Model
from klotski_compiler.milp.problem import Group, Problem, build, class_members
from klotski_compiler.pipeline import shapes
from klotski_compiler.plan import ALL, Decision, LayerDecision, Workload

RELATIVE_GAP = 1e-4
NODE_LIMIT = 2000
SAFETY_SECONDS = 20.0
SEED = 1
UNDECIDED = "the solver found no residency within its limits; choose other sizes with --batch-size and --num-batches"


@dataclass(frozen=True)
class Solved:
    """The best residency found. Times in microseconds.

    objective_us: whole workload without ``load_us``, the time to load what memory keeps. bound_us: the solver's lower
    bound on objective_us + load_us. binding: microseconds saved per further byte of each tier, from the duals of the
    linear relaxation. period_us: per layer group and phase. statistics: size of the model.
    """

    status: str
    objective_us: float
    load_us: float
    bound_us: float
    wall_s: float
    truncated: bool
    layers: tuple[LayerDecision, ...]
    embedding: bool
    head_resident: bool
    binding: dict[str, float]
    period_us: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, int] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver said. values by variable name; duals by row name (linear relaxations only)."""

    status: str
    objective: float
    bound: float
    values: dict[str, float]
    duals: dict[str, float]
    truncated: bool


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
    began = time.perf_counter()
    problem = build(cost, workload, decision, capacity, may_spill, uniform, stretch, spans=True)
    formulation = Formulation(problem)
    model = formulation.add_all()
    solver = Solver(model)
    relaxed = solver.relaxed()
    answer = relaxed if relaxed.status == "infeasible" else solver.whole()
    if answer.status == "infeasible":
        raise _shortfall(problem)
    values = answer.values
    load = sum(factor * (values[name] if name else 1.0) for name, factor in formulation.load_terms().items())
    return Solved(
        status=answer.status,
        objective_us=answer.objective - load,
        load_us=load,
        bound_us=answer.bound,
        wall_s=time.perf_counter() - began,
        truncated=answer.truncated,
        layers=_layers(cost, problem, decision, workload, {name: round(v) for name, v in values.items()}),
        embedding=round(values["resident[embedding]"]) == 1,
        head_resident=round(values["resident[head]"]) == 1,
        binding={tier: max(0.0, -relaxed.duals.get(f"capacity[{tier}]", 0.0)) / MIB for tier in capacity},
        period_us={name: value for name, value in values.items() if name.startswith("period_us")},
        statistics=model.statistics(),
    )


def relaxed_us(cost: Cost, workload: Workload, decision: Decision, capacity: dict[str, int]) -> float:
    """What ``residency`` would take if experts and layers could be divided, loading included: within a few percent, in a tenth of
    the time. Raises Infeasible as it does."""
    return _relaxed(build(cost, workload, decision, capacity), whole=False).objective


def attended_share(cost: Cost, workload: Workload, decision: Decision, capacity: dict[str, int]) -> float:
    """The share of a group's sequences to which the CPU would attend if batches could be divided. Raises Infeasible as ``residency``
    does."""
    problem = build(cost, workload, decision, capacity)
    values = _relaxed(problem).values
    shares = [values[f"attended[{g.name}]"] / (g.count * problem.batches) for g in problem.groups]
    return sum(g.count * share for g, share in zip(problem.groups, shares, strict=True)) / len(cost.spec.layers)


def _relaxed(problem: Problem, whole: bool = True) -> Answer:
    solver = Solver(Formulation(problem).add_all())
    answer = solver.relaxed() if whole else solver.least()
    if answer.status == "infeasible":
        raise _shortfall(problem)
    return answer


def _shortfall(problem: Problem) -> Infeasible:
    """Which capacities are short, by how much: the least excess with which the model has a solution."""
    answer = Solver(Formulation(problem, elastic=True).add_all()).whole()
    excess = {tier: math.ceil(answer.values.get(f"excess[{tier}]", 0.0) * MIB - 1e-3) for tier in problem.capacity}
    mend = "give the tier more memory, or choose a smaller batch size, fewer batches or shorter prompts"
    return Infeasible({tier: nbytes for tier, nbytes in excess.items() if nbytes > 0}, mend)


# ------------------------------------------------------------------------------------------------------------ the solver


class Solver:
    """A model as MathOpt holds it, built once for its linear relaxation and for itself."""

    def __init__(self, model: Model) -> None:
        """Copies variables, rows and objective."""
        self.unit = {v.name: v.unit for v in model.variables.values()}
        self.row_unit = dict[str, float]()
        self.goal_unit = 1.0
        self.built = mathopt.Model.from_model_proto(self._proto(model))
        self.variables = dict(zip(model.variables, self.built.variables(), strict=True))
        self.rows = dict(zip(self.row_unit, self.built.linear_constraints(), strict=True))
        self.integers = [self.variables[v.name] for v in model.variables.values() if v.integer]

    def _proto(self, model: Model) -> model_pb2.ModelProto:
        """The model as a message, column by column: adding variables and coefficients one by one takes longer than most solves.
        Variables count in their own units; of a row and of the objective, the largest coefficient is one."""
        built = model_pb2.ModelProto(name="residency")
        number = {name: i for i, name in enumerate(model.variables)}
        columns, rows, matrix = built.variables, built.linear_constraints, built.linear_constraint_matrix
        columns.ids.extend(range(len(number)))
        columns.names.extend(number)
        columns.integers.extend([False] * len(number))
        columns.lower_bounds.extend([v.lower / v.unit for v in model.variables.values()])
        columns.upper_bounds.extend([v.upper / v.unit for v in model.variables.values()])
        rows.ids.extend(range(len(model.rows)))
        for row_number, row in enumerate(model.rows):
            terms = {number[name]: value * self.unit[name] for name, value in row.terms.items() if value}
            unit = self.row_unit[row.name] = max(map(abs, terms.values()), default=1.0)
            rows.names.append(row.name)
            rows.lower_bounds.append(row.lower / unit)
            rows.upper_bounds.append(row.upper / unit)
            columns_used = sorted(terms)
            matrix.row_ids.extend([row_number] * len(columns_used))
            matrix.column_ids.extend(columns_used)
            matrix.coefficients.extend([terms[n] / unit for n in columns_used])
        goal = {number[name]: value * self.unit[name] for name, value in model.objective.items() if name and value}
        self.goal_unit = max(map(abs, goal.values()), default=1.0)
        built.objective.offset = model.objective.get("", 0.0) / self.goal_unit
        built.objective.linear_coefficients.ids.extend(sorted(goal))
        built.objective.linear_coefficients.values.extend([goal[n] / self.goal_unit for n in sorted(goal)])
        return built

    def relaxed(self) -> Answer:
        """The linear relaxation, with duals; without them where the simplex method loses its precision or gives up."""
        answer = self._run(mathopt.SolverType.GLOP, relax=True)
        return self._run(mathopt.SolverType.GSCIP, relax=True) if answer is GAVE_UP else answer

    def least(self) -> Answer:
        """The objective of the linear relaxation alone: handing over values takes longer than finding them."""
        answer = self._run(mathopt.SolverType.GLOP, relax=True, values=False)
        return self.relaxed() if answer is GAVE_UP else answer

    def whole(self) -> Answer:
        """The model itself."""
        return self._run(mathopt.SolverType.GSCIP, relax=False)

    def _run(self, solver: mathopt.SolverType, relax: bool, values: bool = True) -> Answer:
        """Raises KlotskiError with the solver's own words where it fails, Infeasible where its limits strike before any solution."""
        for variable in self.integers:
            variable.integer = not relax
        try:
            wanted = mathopt.ModelSolveParameters() if values else NO_VALUES
            result = mathopt.solve(self.built, solver, params=_parameters(relax), model_params=wanted)
        except (AttributeError, RuntimeError, ValueError) as fault:
            if solver == mathopt.SolverType.GLOP:
                return GAVE_UP
            # This version raises AttributeError while it reports an error; the error's own text is its context.
            raise KlotskiError(f"the solver failed: {fault.__context__ or fault}") from fault
        end = result.termination
        if not result.has_primal_feasible_solution():
            if end.reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
                return Answer("infeasible", math.inf, math.inf, {}, {}, False)
            if end.reason == mathopt.TerminationReason.NO_SOLUTION_FOUND and not relax:
                raise Infeasible({}, UNDECIDED)
            if end.reason == mathopt.TerminationReason.IMPRECISE and solver == mathopt.SolverType.GLOP:
                return GAVE_UP
            raise KlotskiError(f"the solver found no residency: {end.reason.value} {end.detail}")
        with_duals = values and relax and result.has_dual_feasible_solution()
        return Answer(
            status="optimal" if end.reason == mathopt.TerminationReason.OPTIMAL else "feasible",
            objective=result.objective_value() * self.goal_unit,
            bound=end.objective_bounds.dual_bound * self.goal_unit,
            values={
                name: value * self.unit[name]
                for name, value in zip(self.variables, result.variable_values(self.variables.values()), strict=True)
            }
            if values
            else {},
            duals={
                name: value * self.goal_unit / self.row_unit[name]
                for name, value in zip(self.rows, result.dual_values(self.rows.values()), strict=True)
            }
            if with_duals
            else {},
            truncated=end.limit == mathopt.Limit.TIME,
        )


GAVE_UP = Answer("gave up", math.inf, math.inf, {}, {}, False)
NO_VALUES = mathopt.ModelSolveParameters(
    variable_values_filter=mathopt.SparseVectorFilter(filtered_items=()),
    dual_values_filter=mathopt.SparseVectorFilter(filtered_items=()),
    reduced_costs_filter=mathopt.SparseVectorFilter(filtered_items=()),
)


def _parameters(relax: bool) -> mathopt.SolveParameters:
    limit = datetime.timedelta(seconds=SAFETY_SECONDS)
    if relax:
        return mathopt.SolveParameters(time_limit=limit)
    return mathopt.SolveParameters(
        time_limit=limit,
        threads=1,
        random_seed=SEED,
        relative_gap_tolerance=RELATIVE_GAP,
        node_limit=NODE_LIMIT,
        heuristics=mathopt.Emphasis.LOW,  # the models are small: more of them take longer than what they find is worth
    )


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
    home = "host" if problem.compute_tier == "gpu" else "disk"
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
                kv=problem.compute_tier if kv[j] == decision.part_batches else home,
                kv_batches=kv[j] if kv[j] < decision.part_batches else 0,
                cpu_batches=round((attended[j] + problem.last) * decision.num_batches / decision.part_batches),
            )
        )
    return layers
