"""A hardware profile corrected by a run: each rate, and what an op costs beside its work, by how much longer its ops took than planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from klotski_compiler.actual import Log
from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware
from klotski_compiler.ops import Bind, Compute, Op
from klotski_compiler.plan import Plan

LEAST_SHARE = 0.01  # of all measured time, that a resource must have worked for it to be corrected
LEAST_COST = 0.2  # of what was profiled: an op's own cost becomes no less
PARTLY = {"pick", "kv", "query", "rows", "sums"}  # copies that move less than all of it, or wait for more than the link
Resource = tuple[str, str]  # what of a machine, and of which link or processor


@dataclass(slots=True)
class _Found:
    """What a run says of a resource. calls: how many fixed costs are in ``planned_us``."""

    planned_us: float = 0.0
    measured_us: float = 0.0
    calls: float = 0.0

    @property
    def slower(self) -> float:
        """Measured over planned."""
        return self.measured_us / self.planned_us

    def cost(self, cost_us: float, slower: float) -> float:
        """What a fixed cost must be multiplied by to explain what was measured. slower: how much longer all else takes by now."""
        fixed_us = self.calls * cost_us
        return max(LEAST_COST, (self.measured_us - slower * (self.planned_us - fixed_us)) / fixed_us)


def calibrated(hardware: Hardware, plan: Plan, logs: dict[str, list[Log]], trace: Path) -> Hardware:
    """The profile with the rates and costs at which the plan's ops would have been priced as they were measured.

    A rate is divided, a fixed cost multiplied, by measured over planned time of all ops that it prices; both together, where an op has
    both. But a GPU's ops of decode wait for the thread that issues them: what they take beyond the plan is their fixed costs. Of a
    phase's passes the median counts: the first ones bring in what the later ones use.

    Raises ConfigError where the plan is for another machine.
    """
    if plan.hardware != hardware.name:
        why = f"is {hardware.name}, but the plan was made for {plan.hardware}; name the profile that klotski-compile was given"
        raise ConfigError("hardware profile", "name", why)
    found: dict[Resource, _Found] = {}
    for phase, runs in logs.items():
        for resource, passes in _passes(hardware, plan, phase, runs).items():
            total, slower = found.setdefault(resource, _Found()), median_low(each.slower for each in passes)
            for each in passes:
                total.planned_us += each.planned_us
                total.measured_us += slower * each.planned_us
                total.calls += each.calls
    least_us = LEAST_SHARE * sum(each.measured_us for each in found.values())
    factors = dict(_factors(hardware, {r: each for r, each in found.items() if each.measured_us >= least_us}))
    changed, sources = hardware.model_dump(exclude_unset=True), dict(hardware.sources)
    for path, factor in factors.items():
        _multiply(changed, path.split("."), factor)
        sources[path] = f"{sources.get(path, 'not stated')}; x {factor:.3f} by {trace.name}"
    return Hardware.model_validate(changed | {"sources": sources})


def _passes(hardware: Hardware, plan: Plan, phase: str, runs: Iterable[Log]) -> dict[Resource, list[_Found]]:
    """What each pass of a phase says of each resource that it used."""
    found: dict[tuple[int, int, Resource], _Found] = {}
    for run, log in enumerate(runs):
        for (at, number), (start, end) in log.items():
            if at < 0:
                continue  # loads before the first pass are none of a pass
            step = plan.steps[phase][number]
            resource, planned_us = _resource(hardware, plan, phase, step.op), float(step.end_us - step.start_us)
            if resource and planned_us > 0:
                own = found.setdefault((run, at, resource), _Found())
                own.planned_us += planned_us
                own.measured_us += end - start
                own.calls += _calls(plan, step.op)
    passes: dict[Resource, list[_Found]] = {}
    for (_, _, resource), own in found.items():
        passes.setdefault(resource, []).append(own)
    return passes


def _resource(hardware: Hardware, plan: Plan, phase: str, op: Op) -> Resource | None:
    """What an op's time is a measure of: a link, the matmuls of a processor, its attention in either phase, its routers; ``calls of``
    what a GPU does in decode."""
    if isinstance(op, Bind):
        return None
    if not isinstance(op, Compute):
        whole = all(plan.tensors[index].kind not in PARTLY for index in op.tensors)
        return ("link", op.link) if whole else None
    prefill, what = phase == "prefill", ""
    if prefill and plan.decision.rolling and op.fn == "attention":
        return None  # some bring prompts, some decode
    if op.fn == "attend" and hardware.processors[op.stream].tier != "host":
        return None  # few calls, that are no fixed cost of their own, and keys and values
    match op.fn:
        case "head" if hardware.processors[op.stream].head:
            what = "head"
        case "experts" | "shared" | "dense" | "head":
            what = "matmul"
        case "router":
            what = "router"
        case "attention" | "attend" | "project" | "output":
            what = "prefill" if prefill else "attention"
    if hardware.processors[op.stream].tier != "host":
        if not prefill and what:
            what = f"calls of {op.fn if what == 'matmul' else what}"
        elif what == "router":
            return None  # nearly all of it is what the first one brings in
    return (what, op.stream) if what else None


def _calls(plan: Plan, op: Op) -> float:
    """How many fixed costs are in the price of an op of decode."""
    if not isinstance(op, Compute):
        return 0.0
    match op.fn:
        case "experts":
            return sum(plan.tensors[index].kind in ("expert", "pick") for index in op.tensors)
        case "attention":
            return -(-plan.decision.size_of(op.batch) // plan.decision.decode_batch)
        case "project" | "output":
            return 0.5
    return 1.0


def _factors(hardware: Hardware, found: dict[Resource, _Found]) -> Iterator[tuple[str, float]]:
    """The fields that change, as ``sources`` names them, and what they are multiplied by."""
    for (what, name), each in found.items():
        here = f"processors.{name}."
        match what:
            case "link":
                yield f"links.{name}.bandwidth_bytes_per_s", 1 / each.slower
            case "matmul":
                for dtype in hardware.processors[name].matmul:
                    yield f"{here}matmul.{dtype}", 1 / each.slower
                if hardware.processors[name].tier == "host":
                    yield f"{here}expert_op_us", each.slower
            case "head":
                yield f"{here}head", 1 / each.slower
            case "prefill":
                yield f"{here}prefill_attention_flops_per_s", 1 / each.slower
            case "attention":
                yield f"{here}kv_bytes_per_s", 1 / each.slower
                yield f"{here}attention_op_us", each.slower
            case "router":
                yield f"{here}router_op_us", each.slower
            case "calls of experts" | "calls of attention" | "calls of router":
                cost = f"{what.removeprefix('calls of ').removesuffix('s')}_op_us"
                matmul = found.get(("matmul", name))
                yield here + cost, each.cost(getattr(hardware.processors[name], cost), matmul.slower if matmul else 1.0)


def _multiply(profile: dict[str, Any], path: list[str], factor: float) -> None:
    """Change a number of a profile, or the rates of a table."""
    *outer, last = path
    for name in outer:
        profile = profile[name]
    old = profile[last]
    profile[last] = [(m, rate * factor) for m, rate in old] if isinstance(old, tuple) else old * factor
