"""Published schedules and ours, one file each: a loop nest that writes a program, and what else its system may decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision
from klotski_compiler.program import Program

OURS = "joint"
POLICIES = (OURS, *sorted(module.name for module in iter_modules(__path__) if module.name != OURS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a file of this folder calls POLICY, beside a docstring with its timeline.

    build: writes one phase. experts: how those that are not resident travel: by name, late-bound (``picks``), or both, as the residency
    problem says (``solved``). one_batch: it computes one batch at a time. overlaps: False where copies block the processor.
    rolling: the orders in which prefill's sub-groups may join: all before decode (False), or one after another (True).
    kv: the tier where it always keeps the cache on a machine with a GPU, else where there is room. cpu_attention: shares of the batches
    whose decode attention the CPU may compute. cpu_experts: the CPU may compute late experts where they live.
    first_layers: which experts stay is decided layer by layer from the first on, else every layer keeps as many.
    decide: what its own rules set once it is known what is resident.
    """

    build: Callable[[Program], None]
    experts: Literal["static", "picks", "solved"]
    one_batch: bool = False
    overlaps: bool = True
    rolling: tuple[bool, ...] = (False,)
    kv: str = ""
    cpu_attention: tuple[float, ...] = (0.0,)
    cpu_experts: bool = False
    first_layers: bool = False
    decide: Callable[[Cost, Decision], Decision] = lambda cost, decision: decision

    @property
    def solved(self) -> bool:
        """Whether residency is solved for."""
        return self.experts == "solved"


@cache
def policy(name: str) -> Policy:
    """The policy of that name."""
    found: Policy = import_module(f"klotski_compiler.policies.{name}").POLICY
    return found
