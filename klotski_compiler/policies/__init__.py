"""Published schedules and ours, one file each: a loop nest that writes a program, and the decisions that its system can take."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

OURS = "joint"
POLICIES = (OURS, *sorted(module.name for module in iter_modules(__path__) if module.name != OURS))


def policy(name: str) -> ModuleType:
    """The module of that policy, which has a docstring with its timeline and

    build(program): writes one phase.
    ONE_BATCH: whether it computes one batch at a time.
    EXPERTS: how those that are not resident travel: ``static`` (by name), ``picks`` (late-bound) or ``solved`` (both, by the
    residency problem).
    OVERLAPS (optional): False where copies block the processor.
    ROLLING (optional): the orders in which prefill's sub-groups may join: all before decode (False), or one after another (True).
    KV (optional): the tier where it always keeps the cache on a machine with a GPU.
    CPU_ATTENTION (optional): shares of the batches whose decode attention the CPU may compute.
    CPU_EXPERTS (optional): whether the CPU may compute late experts where they live.
    RESIDENT_EXPERTS (optional): ``first layers`` where those are cached first, else every layer gets the same.
    decide(cost, decision) (optional): what its rules set once it is known what is resident.
    """
    return import_module(f"klotski_compiler.policies.{name}")
