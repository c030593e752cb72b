"""A mixed-integer linear program as plain data, and sums of linear terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Terms = dict[str, float]


@dataclass(frozen=True, slots=True)
class Variable:
    """lower <= name <= upper. unit: what a solver should count it in, so that its values are near one."""

    name: str
    lower: float
    upper: float
    integer: bool
    unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """lower <= sum of coefficient x variable <= upper. The family is the name up to its bracket."""

    name: str
    terms: Terms
    lower: float
    upper: float


@dataclass(slots=True)
class Model:
    """A mixed-integer linear program as plain data: what is inspected, and what any solver is given. Minimised."""

    variables: dict[str, Variable] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    objective: Terms = field(default_factory=dict)

    def statistics(self) -> dict[str, int]:
        """Variables, integers, rows and nonzeros, then rows by family."""
        out = {
            "variables": len(self.variables),
            "integers": sum(v.integer for v in self.variables.values()),
            "rows": len(self.rows),
            "nonzeros": sum(len(row.terms) for row in self.rows),
        }
        for row in self.rows:
            family = row.name.split("[")[0]
            out[family] = out.get(family, 0) + 1
        return out


def plus(*parts: Mapping[str, float]) -> Terms:
    """The sum of linear expressions; "" names the constant."""
    out: Terms = {}
    for part in parts:
        for name, value in part.items():
            out[name] = out.get(name, 0.0) + value
    return out


def times(factor: float, terms: Mapping[str, float]) -> Terms:
    """A multiple of a linear expression."""
    return {name: factor * value for name, value in terms.items()}
