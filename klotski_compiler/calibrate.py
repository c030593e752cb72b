"""A hardware profile corrected by a run: each rate by how much longer its ops took than planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median_low

from klotski_compiler.actual import Log
from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, Link, Processor
from klotski_compiler.plan import Bind, Compute, Load, Op, Plan, Store

LEAST_SHARE = 0.01  # of all measured time, that a resource must have worked for its rate to be corrected
PARTLY = {"pick", "kv", "query", "rows", "sums"}  # copies that move less than all of it, or wait for more than the link
Resource = tuple[str, str]  # what of a machine, and of which link or processor


def calibrated(hardware: Hardware, plan: Plan, logs: dict[str, list[Log]], trace: Path) -> Hardware:
    """The profile with the rates at which the plan's ops would have been priced as they were measured.

    A rate is divided, a fixed cost multiplied, by measured over planned time of all ops that it prices; both together, where an op has
    both. Of an op's runs the median counts: the first ones bring in what the later ones use. Raises ConfigError where the plan is for
    another machine.
    """
    if plan.hardware != hardware.name:
        why = f"is {hardware.name}, but the plan was made for {plan.hardware}; name the profile that klotski-compile was given"
        raise ConfigError("hardware profile", "name", why)
    planned, measured = Counter[Resource](), Counter[Resource]()
    for phase, runs in logs.items():
        taken: dict[int, list[float]] = {}
        for log in runs:
            for (_, number), (start, end) in log.items():
                taken.setdefault(number, []).append(end - start)
        for number, each in taken.items():
            step = plan.steps[phase][number]
            resource, expected_us = _resource(plan, phase, step.op), step.end_us - step.start_us
            if isinstance(step.op, Load | Store):  # the plan has them slower where others use the same memory
                expected_us = round(_alone_us(hardware.links[step.op.link], plan, step.op))
            if resource and expected_us > 0:
                planned[resource] += len(each) * expected_us
                measured[resource] += len(each) * median_low(each)  # type: ignore[assignment]
    total = sum(measured.values())
    slower = {r: measured[r] / planned[r] for r in planned if measured[r] >= LEAST_SHARE * total}
    links = {name: _link(link, slower.get(("link", name), 1.0)) for name, link in hardware.links.items()}
    processors = {name: _processor(p, name, slower) for name, p in hardware.processors.items()}
    sources = dict(hardware.sources)
    for field, factor in _corrected(hardware, slower):
        sources[field] = f"{sources.get(field, 'not stated')}; x {factor:.3f} by {trace.name}"
    return hardware.model_copy(update={"links": links, "processors": processors, "sources": sources})


def _resource(plan: Plan, phase: str, op: Op) -> Resource | None:
    """What an op's time is a measure of."""
    if isinstance(op, Bind):
        return None
    if not isinstance(op, Compute):
        whole = all(plan.tensors[index].kind not in PARTLY for index in op.tensors)
        return ("link", op.link) if whole else None
    if op.fn in ("experts", "dense", "head"):
        return "matmul", op.stream
    if op.fn == "router":
        return "router", op.stream
    if op.fn not in ("attention", "attend"):
        return None
    mixed = phase == "prefill" and plan.decision.rolling  # some bring prompts, some decode
    return None if mixed else ("prefill" if phase == "prefill" else "attention", op.stream)


def _alone_us(link: Link, plan: Plan, op: Load | Store) -> float:
    nbytes = sum(plan.tensors[index].moved_bytes(op.pages if isinstance(op, Load) else None) for index in op.tensors)
    return link.latency_us * len(op.tensors) + 1e6 * nbytes / link.bandwidth_bytes_per_s


def _link(link: Link, slower: float) -> Link:
    return link.model_copy(update={"bandwidth_bytes_per_s": link.bandwidth_bytes_per_s / slower})


def _processor(processor: Processor, name: str, slower: dict[Resource, float]) -> Processor:
    matmul, attention, prefill, router = (
        slower.get((what, name), 1.0) for what in ("matmul", "attention", "prefill", "router")
    )
    tables = {dtype: tuple((m, rate / matmul) for m, rate in points) for dtype, points in processor.matmul.items()}
    return processor.model_copy(
        update={
            "matmul": tables,
            "expert_op_us": processor.expert_op_us * matmul,
            "kv_bytes_per_s": processor.kv_bytes_per_s / attention,
            "attention_op_us": processor.attention_op_us * attention,
            "prefill_attention_flops_per_s": processor.prefill_attention_flops_per_s / prefill,
            "router_op_us": processor.router_op_us * router,
        }
    )


def _corrected(hardware: Hardware, slower: dict[Resource, float]) -> Iterator[tuple[str, float]]:
    """The fields that change, as ``sources`` names them, and what they are multiplied by."""
    rates = {"attention": ["kv_bytes_per_s"], "prefill": ["prefill_attention_flops_per_s"]}
    costs = {"attention": ["attention_op_us"], "router": ["router_op_us"], "matmul": ["expert_op_us"]}
    for (what, name), factor in slower.items():
        if what == "link":
            yield f"links.{name}.bandwidth_bytes_per_s", 1 / factor
            continue
        tables = [f"matmul.{dtype}" for dtype in hardware.processors[name].matmul] if what == "matmul" else []
        for field in (*tables, *rates.get(what, [])):
            yield f"processors.{name}.{field}", 1 / factor
        for field in costs.get(what, []):
            yield f"processors.{name}.{field}", factor
