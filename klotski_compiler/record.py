"""What a search found, as a plan: the schedule with its forecast, its bounds, and what would make it faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from klotski_compiler.decision import Decision
from klotski_compiler.errors import Infeasible
from klotski_compiler.ops import CPU, Bind
from klotski_compiler.pipeline import Lowered, phase_record
from klotski_compiler.plan import APART, MIXED, SCHEMA_VERSION, Candidate, Envelope, Forecast, Plan
from klotski_compiler.search import Best, Search
from klotski_compiler.simulate import weighted_sum
from klotski_compiler.words import size

ROUNDING = 1e-6  # of what meets its bound exactly


def record(search: Search, best: Best, candidates: list[Candidate]) -> Plan:
    """The record of the winner, sealed."""
    request, lowered = search.request, best.lowered
    names = [t.name for t in lowered.tensors]
    decision, workload, cpu = best.decision, request.workload, request.hardware.processors.get(CPU)
    predicted = forecast(search, decision, lowered)
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=request.spec.name,
        model_digest=request.model_digest,
        dtype=request.dtype,
        hardware=request.hardware.name,
        compute_tier=search.tier,
        processors={name: processor.tier for name, processor in request.hardware.processors.items()},
        least_own_rows=cpu.least_own_rows if cpu else 0,
        most_own_rows=cpu.most_own_rows if cpu else 0,
        budgets=request.budgets,
        workload=workload,
        envelope=Envelope(sequences=decision.sequences, prompt_len=workload.prompt_len, gen_len=workload.gen_len),
        policy=best.policy,
        decision=decision,
        tensors=tuple(lowered.tensors),
        slots=tuple(lowered.slots),
        placed=tuple(lowered.placed),
        streams=tuple(sorted({s.op.stream for p in lowered.phases.values() for s in p.steps})),
        phases=tuple(phase_record(phase, names) for phase in lowered.phases.values()),
        workspace=lowered.workspace,
        predictor=request.routing.successors if _predicts(lowered) else (),
        forecast=predicted,
        candidates=tuple(candidates),
        notes=tuple(notes(search, best, predicted)),
        truncated=search.truncated,
        digest="",
    ).sealed()


def _predicts(lowered: Lowered) -> bool:
    """Whether any pick is bound before its router has spoken."""
    ops = (step.op for phase in lowered.phases.values() for step in phase.steps)
    return any(isinstance(op, Bind) and op.rule == "predicted" for op in ops)


def forecast(search: Search, decision: Decision, lowered: Lowered) -> Forecast:
    """Pass times, busy times, bubbles and both bounds of a whole schedule."""
    groups = lowered.groups
    work = {name: phase for name, phase in lowered.phases.items() if name != "load"}
    busy = weighted_sum((groups, phase.times.busy_us) for phase in work.values())
    bubble = weighted_sum((groups, phase.times.bubble_us) for phase in work.values())
    links = {n: p.link_bytes[n] for p in lowered.phases.values() for n in p.link_bytes}
    for link in links:
        links[link] = sum(p.link_bytes[link] * (1 if name == "load" else groups) for name, p in lowered.phases.items())
    rate = search.rate(lowered)
    bounds = {MIXED if order else APART: search.ceiling(order) for order in search.classes}
    kind = MIXED if decision.rolling else APART
    if rate <= bounds[kind] * (1 + ROUNDING):
        bounds[kind] = max(rate, bounds[kind])
    ceiling = bounds[kind]
    return Forecast(
        makespan_us=round(groups * lowered.group_us),
        load_us=round(lowered.load_us),
        pass_us={name: round(phase.times.pass_us) for name, phase in work.items()},
        phase_us={name: round(phase.times.total_us) for name, phase in work.items()},
        bound_us=round(groups * lowered.busiest_us),
        tokens_per_s=rate,
        bound_tokens_per_s=ceiling,
        gap=ceiling / rate - 1,
        bubble_fraction=sum(bubble.values()) / (groups * lowered.group_us),
        bubble_us={cause: round(us) for cause, us in sorted(bubble.items())},
        busy_us={stream: round(us) for stream, us in sorted(busy.items())},
        peak_bytes=lowered.peak_bytes,
        link_bytes=links,
        schedule_class=kind,
        class_bounds=bounds,
    )


def notes(search: Search, best: Best, predicted: Forecast) -> Iterator[str]:
    """What binds, and what relaxing each budget would buy: finite differences of the score by which the search compares sizes (for
    ``joint`` the residency problem's optimum), at the sizes of the plan."""
    slowest = max(predicted.busy_us, key=lambda s: predicted.busy_us[s])
    share = predicted.busy_us[slowest] / predicted.makespan_us
    yield f"{slowest} binds: it is busy {share:.0%} of the time"
    yield f"routing: {search.request.routing.source}"
    if predicted.gap < 0:
        yield "this schedule beats the bound of its class, which is therefore wrong: please report it"
    if best.order:
        yield best.order
    decision, request = best.decision, search.request
    try:
        now = search.score(best.policy, search.bare(best.policy, decision, decision.num_batches))
    except Infeasible:  # the leanest schedule is not one that the search would score
        yield "what more memory would buy is not known: this is about the least that fits"
        return
    changes: list[tuple[str, Search, int]] = []
    for tier in sorted({"gpu", "host"} & request.budgets.keys()):
        step = min(1 << 30, request.budgets[tier] // 8)
        more = replace(request, budgets={**request.budgets, tier: request.budgets[tier] + step})
        changes.append((f"{size(step)} more of {tier}", Search(more), decision.num_batches))
    if decision.sequences < request.workload.num_sequences:
        if not decision.last_batch and not request.max_latency_s:  # scores do not know how long a pass takes
            step = decision.prefill_groups  # of which each has as many batches
            what = "one more batch" if step == 1 else f"{step} more batches"
            changes.append((what, search, decision.num_batches + step))
    else:
        yield "one more batch: the workload already fits in one group"
    for what, tried, num_batches in changes:
        try:
            then = tried.score(best.policy, tried.bare(best.policy, decision, num_batches))
        except Infeasible as refusal:
            yield f"{what}: does not fit ({str(refusal).splitlines()[0]})"
            continue
        yield f"{what}: {now / then - 1:+.1%} tokens/s"
    if (ceiling := request.max_latency_s) and (slowest_us := best.lowered.slowest_us):
        yield f"the slowest pass takes {slowest_us / 1e6:.3g} s of the {ceiling:g} s that --max-latency allows"
