"""Published schedules and ours, one file each: a loop nest that writes a program, and the decisions that its system can take."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

POLICIES = ("joint", "klotski", "flexgen", "zero_inference", "accelerate")


def policy(name: str) -> ModuleType:
    """The module of that policy: ``build(program)``, ``SEARCH`` (what may be searched) and a docstring with its timeline."""
    return import_module(f"klotski_compiler.policies.{name}")
