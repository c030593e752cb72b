"""Solves linear and mixed-integer programs.

The solvers are GLOP and SCIP through MathOpt: one thread, a fixed seed, stopped by gap or nodes, so that equal inputs give equal
plans. The wall clock is a safety net; whether it struck is in the answer.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

from klotski_compiler.errors import KlotskiError
from klotski_compiler.milp.linear import Model

RELATIVE_GAP = 1e-4
NODE_LIMIT = 2000
SAFETY_SECONDS = 20.0
SEED = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver said. status: optimal, feasible, infeasible, or undecided where its limits struck before any solution. values by
    variable name; duals by row name (linear relaxations only)."""

    status: str
    objective: float
    bound: float
    values: dict[str, float]
    duals: dict[str, float]
    truncated: bool


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
        """Raises KlotskiError with the solver's own words where it fails."""
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
                return Answer("undecided", math.inf, math.inf, {}, {}, False)
            if end.reason == mathopt.TerminationReason.IMPRECISE and solver == mathopt.SolverType.GLOP:
                return GAVE_UP
            raise KlotskiError(f"the solver found no solution: {end.reason.value} {end.detail}")
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
