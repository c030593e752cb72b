"""A plan as text that a person wants to read, and as the JSON object that a program does. Nothing here prints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from klotski_compiler.decision import Decision
from klotski_compiler.ops import ALL, Bind, Compute, Load, Step, Store, step_text
from klotski_compiler.plan import Candidate, Phase, Plan
from klotski_compiler.timeline import timeline
from klotski_compiler.words import bar, count, size, span

Row = tuple[str, str]  # a subject, empty where the line goes on about the one before, and what is said about it

# What the compute stream waits for, by the simulator's name of the cause.
CAUSES = {
    "intra_layer": "experts that have not arrived",
    "inter_layer": "attention, router or dense weights",
    "kv": "KV cache",
    "end_of_pass": "head, embedding, sampled tokens",
}
_PLURAL = {
    "router": "routers",
    "expert": "experts",
    "shared": "shared experts",
    "dense": "dense MLPs",
    "kv": "KV cache",
}


def summary(plan: Plan) -> dict[str, object]:
    """What ``--json`` prints: everything but tensors, slots and steps."""
    return plan.model_dump(
        mode="json",
        include={
            "model", "dtype", "hardware", "compute_tier", "budgets", "workload", "envelope", "policy", "decision",
            "workspace", "forecast", "candidates", "notes", "truncated", "digest",
        },
    )  # fmt: skip


def overview(plan: Plan, phase: str = "", layer: int | None = None) -> str:
    """All that ``klotski-inspect`` shows by default."""
    phase = phase or plan.phases[-1].name
    parts = [headline(plan), decision(plan), forecast(plan), candidates(plan), busy(plan), bubbles(plan)]
    return "\n\n".join([*parts, timeline(plan, phase, layer), memory(plan)]) + "\n"


def decided(plan: Plan) -> str:
    """What ``klotski-compile`` shows: what was decided and why, the predicted speed, what else was tried, where time goes."""
    return (
        "\n\n".join([headline(plan), decision(plan), forecast(plan), candidates(plan), busy(plan), bubbles(plan)])
        + "\n"
    )


# --------------------------------------------------------------------------------------------------------------- sections


def headline(plan: Plan) -> str:
    """Model, machine and workload."""
    work = plan.workload
    budgets = ", ".join(f"{tier} {size(nbytes)}" for tier, nbytes in plan.budgets.items())
    return (
        f"{plan.model} in {plan.dtype} on {plan.hardware}, computing in {plan.compute_tier} (budgets: {budgets})\n"
        f"{count(work.num_sequences, 'prompt')} of up to {work.prompt_len} tokens, {work.gen_len} new tokens each"
    )


def decision(plan: Plan) -> str:
    """What was decided, in words."""
    return "\n".join([f"Decided (policy {plan.policy})", *_table(decision_rows(plan))])


def decision_rows(plan: Plan) -> list[Row]:
    """What was decided, subject by subject."""
    d = plan.decision
    groups = -(-plan.workload.num_sequences // d.sequences)
    whole = "the whole workload is one group" if groups == 1 else f"{groups} groups run one after another"
    if d.rolling:
        every = count(d.stride(plan.envelope.gen_len), "pass")
        whole = f"every {every}, {count(d.part_batches, 'batch')} of them join and as many are done"
    rows = [
        (
            "group",
            f"{count(d.num_batches, 'batch')} of {_batch_sizes(d)} share every transfer; {whole}",
        ),
        ("resident", _residents(plan)),
        *_streamed(plan),
        ("KV cache", _kv_places(plan)),
        *_on_cpu(plan),
    ]
    experts = next((t.nbytes for t in plan.tensors if t.kind == "expert"), 0)
    if any(layer.static or layer.late for layer in d.layers):
        fewer = d.lead_of(decoding=False)
        slots = count(d.lead, "expert slot") + (f" ({fewer} in prefill)" if fewer < d.lead else "")
        unit = f"{count(d.unit, 'expert')} per load ({size(d.unit * experts)}), {slots} for those in flight or waiting"
        rows.append(("transfer", unit))
    if d.pages > 1 and (away := sum(len(layer.on_disk) for layer in d.layers)):
        rows.append(
            (
                "pages",
                f"an expert has {d.pages}; of {count(away, 'expert')} the last one lives on disk, the others in host memory",
            )
        )
    passes = (
        "in one pass" if d.prefill_groups == 1 else f"in {d.prefill_groups} passes, each of which reads the weights"
    )
    if d.rolling:
        passes = "of those who join, in a pass in which the others decode"
    rows.append(("prefill", f"{passes}; attention over {count(d.attention_batch, 'prompt')} at a time"))
    head = "resident" if d.head_pages == 0 else f"streamed in {count(d.head_pages, 'page')}"
    gathered = "gathered from disk by rows" if plan.compute_tier == "host" else "in host memory"
    rows.append(("vocabulary", f"head {head}, embedding {'resident' if d.embedding else gathered}"))
    return rows


def _batch_sizes(d: Decision) -> str:
    """How large batches are."""
    last = f" (the last of each sub-group, the CPU's own, of {d.last_batch})" if d.last_batch else ""
    return count(d.batch_size, "sequence") + last


def _on_cpu(plan: Plan) -> Iterator[Row]:
    """What the CPU computes beside a GPU in decode."""
    d = plan.decision
    experts = sum(len(layer.cpu) + layer.cpu_picks for layer in d.layers)
    if plan.compute_tier != "gpu" or not (d.cpu_batches or experts):
        return
    parts = [f"attention of {d.cpu_batches} of {count(d.num_batches, 'batch')}"] if d.cpu_batches else []
    parts += [f"{count(experts, 'expert')}"] if experts else []
    yield "CPU", f"{' and '.join(parts)} in decode, where their KV and weights are"
    if d.by_batch:
        yield "order", "batch by batch: the experts of one compute while the CPU attends to the next"
    elif d.cpu_batches:
        order = ["what surrounds attention is one op for several batches"] if d.together and d.num_batches > 1 else []
        order += ["experts compute over prompts while the CPU attends to the others"] if _begins(plan) else []
        yield from [("order", "; ".join(order))] if order else []


def _begins(plan: Plan) -> bool:
    """Whether experts compute over prompts apart from what decodes beside them."""
    ops = (step.op for step in plan.steps["prefill"])
    return plan.decision.rolling and any(
        isinstance(op, Compute) and op.fn == "experts" and op.batch < ALL for op in ops
    )


def _table(rows: Iterable[Row]) -> Iterator[str]:
    return (f"  {name:<12}{text}" for name, text in rows)


def _places(plan: Plan, tier: str) -> dict[str, list[int]]:
    """Tensors that have a permanent slot in a tier, by kind."""
    found = defaultdict[str, list[int]](list)
    for tensor, slot in plan.placed:
        if plan.slots[slot].tier == tier:
            found[plan.tensors[tensor].kind].append(tensor)
    return found


def _residents(plan: Plan) -> str:
    placed = _places(plan, plan.compute_tier)
    totals = Counter(t.kind for t in plan.tensors)
    texts = []
    for kind in ("attention", "router", "shared", "dense", "expert"):
        if not totals[kind]:
            continue
        held = placed.get(kind, [])
        share = "all" if len(held) == totals[kind] else f"{len(held)} of" if held else "none of"
        room = f" ({size(sum(plan.tensors[t].nbytes for t in held))})" if held else ""
        texts.append(f"{share} {totals[kind]} {_PLURAL.get(kind, kind)}{room}")
    return ", ".join(texts)


def _streamed(plan: Plan) -> Iterator[Row]:
    """Experts and modules that travel in every pass."""
    steps = plan.steps[plan.phases[-1].name]
    moved = {
        t for s in steps if isinstance(s.op, Load) and s.op.link.endswith(f">{plan.compute_tier}") for t in s.op.tensors
    }
    kinds = Counter(plan.tensors[t].kind for t in moved)
    sizes = Counter[str]()
    for tensor in moved:
        sizes[plan.tensors[tensor].kind] += plan.tensors[tensor].nbytes
    if kinds["expert"]:
        yield (
            "by name",
            f"{kinds['expert']} experts ({size(sizes['expert'])}) travel in every pass without asking the router",
        )
    if kinds["pick"]:
        predicted = any(isinstance(s.op, Bind) and s.op.rule == "predicted" for s in steps)
        hot = plan.decision.hot if predicted else 0
        when = (
            f"the {hot} likeliest of a layer when a predictor names them, the others when the router does"
            if hot
            else "when the router names them"
        )
        yield (
            "late",
            f"{kinds['pick']} experts (at most {size(sizes['pick'])}) travel{':' * bool(hot)} {when}; what no token asks for stays",
        )
    others = [
        f"{kinds[k]} {_PLURAL.get(k, k)} ({size(sizes[k])})"
        for k in ("attention", "router", "shared", "dense")
        if kinds[k]
    ]
    if others:
        yield "modules", f"{', '.join(others)} travel in every pass"


def _kv_places(plan: Plan) -> str:
    nbytes = Counter[str]()
    for tensor in plan.tensors:
        if tensor.kind == "kv":
            nbytes[tensor.home] += tensor.nbytes
    total = sum(nbytes.values())
    return ", ".join(
        f"{'all' if held == total else format(held / total, '.0%')} in {tier} ({size(held)})"
        for tier, held in nbytes.most_common()
    )


def forecast(plan: Plan) -> str:
    """Predicted speed, both bounds, and what the planner says would change it."""
    return "\n".join(["Predicted", *_table(forecast_rows(plan))])


def forecast_rows(plan: Plan) -> list[Row]:
    """What is predicted, subject by subject."""
    f = plan.forecast
    phases = [f"{phase.name} {span(_phase_us(plan, phase.name))}{_passes(plan, phase)}" for phase in plan.phases]
    bound = f"this decision cannot take less than {span(f.bound_us)}; its schedule takes {span(f.makespan_us)}"
    over = f.makespan_us / f.bound_us - 1 if f.bound_us else 0.0
    rows = [
        ("speed", f"{f.tokens_per_s:.2f} tokens/s from the first weight byte to the last token"),
        ("time", "; ".join(phases) + _groups(plan)),
        ("bound", f"{bound} ({over:+.1%})"),
        (
            "",
            f"no decision of this class ({f.schedule_class}) exceeds {f.bound_tokens_per_s:.2f} tokens/s (gap {f.gap:.1%})",
        ),
        *(
            ("", f"of the other class ({name}) none exceeds {bound:.2f} tokens/s")
            for name, bound in f.class_bounds.items()
            if name != f.schedule_class
        ),
        *(("", note) for note in plan.notes),
    ]
    if plan.truncated:
        rows.append(("", "the search was cut short by its time limit; --time-limit gives it more"))
    return rows


def _phase_us(plan: Plan, name: str) -> int:
    """Time of a phase of one group; the residents are loaded once."""
    return plan.forecast.load_us if name == "load" else plan.forecast.phase_us.get(name, 0)


def _passes(plan: Plan, phase: Phase) -> str:
    if phase.passes == 1:
        return ""
    each = span(plan.forecast.pass_us[phase.name])
    if plan.decision.rolling and phase.name == "decode":  # fewer batches are there in the first rounds and the last
        rounds = plan.decision.rounds(plan.workload.num_sequences)
        return f" ({rounds} times {phase.passes} passes of up to {each})"
    return f" ({phase.passes} passes of {each})"


def _groups(plan: Plan) -> str:
    if plan.decision.rolling:
        return "; in prefill's passes some join while the others decode"
    groups = -(-plan.workload.num_sequences // plan.decision.sequences)
    return f"; prefill and decode {groups} times" if groups > 1 else ""


def candidates(plan: Plan) -> str:
    """Every policy's best schedule."""
    lines = [f"Policies{'batches':>26}{'tokens/s':>12}{'against best':>15}"]
    for c in plan.candidates:
        if not c.feasible:
            lines.append(f"  {c.policy:<16}{c.why_not}")
            continue
        lines.append(f"  {c.policy:<16}{c.batches:>16}{c.tokens_per_s:>12.2f}{against_best(plan, c):>15}")
    return "\n".join(lines)


def against_best(plan: Plan, candidate: Candidate) -> str:
    """A feasible candidate's speed beside the fastest one's."""
    best = max(c.tokens_per_s for c in plan.candidates)
    return "best" if candidate.tokens_per_s == best else f"{candidate.tokens_per_s / best - 1:+.1%}"


def busy(plan: Plan) -> str:
    """How busy each stream is during a middle pass, and which one binds."""
    lines = ["Where the time of a pass goes"]
    for phase in plan.phases[1:]:
        length = plan.forecast.pass_us[phase.name] or 1
        title, binds = f"{phase.name} {span(length)}", "  <- binds"
        for work in stream_work(plan.steps[phase.name]):
            copies = f", {work.copying / length:.0%} in copies that block it" if work.copying else ""
            share = work.total / length
            lines.append(f"  {title:<18}{work.stream:<11}{bar(share)} {share:4.0%}{copies}{binds}")
            title = binds = ""
    return "\n".join(lines)


@dataclass
class StreamWork:
    """Microseconds of a stream in one pass; those in which a compute stream copies."""

    stream: str
    total: int = 0
    copying: int = 0


def stream_work(steps: Sequence[Step]) -> list[StreamWork]:
    """What each stream does in one pass, the busiest, which binds, first."""
    found: dict[str, StreamWork] = {}
    for step in steps:
        work = found.setdefault(step.op.stream, StreamWork(step.op.stream))
        work.total += step.end_us - step.start_us
        if isinstance(step.op, Load | Store) and step.op.link != step.op.stream:
            work.copying += step.end_us - step.start_us
    return sorted(found.values(), key=lambda work: -work.total)


def bubbles(plan: Plan) -> str:
    """What the compute stream waits for, over the whole workload."""
    f = plan.forecast
    total = sum(f.bubble_us.values())
    lines = [f"Bubbles: computing waits {f.bubble_fraction:.1%} of the time ({span(total)})"]
    for cause, us in bubble_causes(plan):
        lines.append(f"  {span(us):>10}  {us / total:4.0%}  for {CAUSES.get(cause, cause)}")
    return "\n".join(lines)


def bubble_causes(plan: Plan) -> list[tuple[str, int]]:
    """Why computing waits, and for how many microseconds of the whole workload; the worst first."""
    return [(cause, us) for cause, us in sorted(plan.forecast.bubble_us.items(), key=lambda item: -item[1]) if us]


# ----------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Holding:
    """What one thing takes of a tier, phase by phase. ``role``: resident, kept (for streaming), KV, slots, states (and what
    processors exchange), workspace or free."""

    name: str
    role: str
    nbytes: list[int]


def memory(plan: Plan) -> str:
    """Who holds how much of each tier: residents, KV, streaming slots, hidden states, workspace, free."""
    lines = []
    for tier, held in holdings(plan).items():
        title = f"Memory of {tier}: {size(plan.forecast.peak_bytes[tier])} of {size(plan.budgets[tier])}"
        lines.append(f"{title:<40}" + "".join(f"{phase.name:>14}" for phase in plan.phases))
        lines += [f"  {h.name:<38}" + "".join(f"{size(n) if n else '-':>14}" for n in h.nbytes) for h in held]
    return "\n".join(lines)


def holdings(plan: Plan) -> dict[str, list[Holding]]:
    """What ``memory`` tells, tier by tier; what takes nothing is left out, what is free comes last."""
    phases = plan.phases
    found = {}
    for tier in (tier for tier in plan.budgets if tier in plan.forecast.peak_bytes):
        resident = Counter[tuple[str, str]]()
        for kind, held in _places(plan, tier).items():
            verb, role = ("resident", "resident") if tier == plan.compute_tier else ("kept for streaming", "kept")
            label = ("KV cache", "KV") if kind == "kv" else (_label(kind, verb), role)
            resident[label] += sum(plan.tensors[t].slot_bytes for t in held)
        streamed = [_streaming(plan, phase, tier) for phase in phases]
        workspace = plan.workspace.get(tier, {})
        rows = [Holding(*label, [nbytes] * len(phases)) for label, nbytes in resident.most_common()]
        labels = {label for slots in streamed for label in slots}
        passing = [Holding(*label, [slots[label] for slots in streamed]) for label in sorted(labels)]
        rows += sorted(passing, key=lambda holding: -max(holding.nbytes))
        rows += [
            Holding(f"workspace: {name}", "workspace", [nbytes] * len(phases))
            for name, nbytes in sorted(workspace.items(), key=lambda i: -i[1])
        ]
        used = [sum(row.nbytes[n] for row in rows) for n in range(len(phases))]
        rows.append(Holding("free", "free", [plan.budgets[tier] - nbytes for nbytes in used]))
        found[tier] = [row for row in rows if any(row.nbytes)]
    return found


def _label(kind: str, verb: str) -> str:
    return f"{_PLURAL.get(kind, kind)}, {verb}"


def _streaming(plan: Plan, phase: Phase, tier: str) -> Counter[tuple[str, str]]:
    """Bytes of the slots that a phase alone uses, by name and role of what passes through them."""
    permanent = {slot for _, slot in plan.placed}
    names = {"state": "hidden states"}
    through = {slot: (names.get(plan.tensors[t].kind, "exchanged with the CPU"), "states") for t, slot in phase.placed}
    for step in plan.steps[phase.name]:
        if not isinstance(step.op, Load | Compute):
            continue
        for tensor, slot in zip(step.op.tensors, step.slots, strict=True):
            kind = plan.tensors[tensor].kind
            label = (
                ("KV, slots", "KV")
                if kind == "kv"
                else (_label("expert" if kind == "pick" else kind, "slots"), "slots")
            )
            through.setdefault(slot, label)
    nbytes = Counter[tuple[str, str]]()
    for slot, label in through.items():
        if slot not in permanent and plan.slots[slot].tier == tier:
            nbytes[label] += plan.slots[slot].nbytes
    return nbytes


# --------------------------------------------------------------------------------------------------------- ops, comparison


def ops(plan: Plan, phase: str, first: int, end: int) -> str:
    """Steps [first, end) of a phase, numbered as waits name them."""
    steps = plan.steps[phase]
    digits = len(str(len(steps)))
    return "".join(f"{n:>{digits}} {step_text(steps[n], plan.names)}\n" for n in range(first, min(end, len(steps))))


def compare(one: Plan, other: Plan) -> str:
    """Two plans side by side; the last column is the second over the first."""
    rows: list[tuple[str, str, str, str]] = []

    def words(name: str, *texts: str) -> None:
        rows.append((name, texts[0], texts[1], "" if texts[0] == texts[1] else "differs"))

    def numbers(name: str, show: str, a: float, b: float) -> None:
        text = {"span": span, "size": size}.get(show) or (lambda value: format(value, show))
        rows.append((name, text(a), text(b), f"{b / a:.2f} x" if a else ""))

    plans = (one, other)
    words("model", *(f"{p.model} {p.dtype}" for p in plans))
    words("machine", *(p.hardware for p in plans))
    words(
        "workload", *(f"{p.workload.num_sequences} x ({p.workload.prompt_len} + {p.workload.gen_len})" for p in plans)
    )
    words("policy", *(p.policy for p in plans))
    words("batches", *(p.decision.batches for p in plans))
    words("slots and unit", *(f"{p.decision.lead}, {p.decision.unit} per load" for p in plans))
    words("pages of an expert", *(str(p.decision.pages) for p in plans))
    for name in ("resident_experts", "static", "late"):
        title = {"resident_experts": "experts resident", "static": "experts by name", "late": "experts late"}[name]
        words(title, *(str(sum(len(getattr(layer, name)) for layer in p.decision.layers)) for p in plans))
    words(
        "KV cache",
        *(_kv_places(p) for p in plans),
    )
    a, b = one.forecast, other.forecast
    numbers("tokens/s", ".2f", a.tokens_per_s, b.tokens_per_s)
    numbers("bound tokens/s", ".2f", a.bound_tokens_per_s, b.bound_tokens_per_s)
    numbers("whole workload", "span", a.makespan_us, b.makespan_us)
    for name in ("load", "prefill", "decode"):
        numbers(name, "span", *(_phase_us(p, name) for p in plans))
    numbers("bubbles", ".1%", a.bubble_fraction, b.bubble_fraction)
    for tier in dict.fromkeys((*a.peak_bytes, *b.peak_bytes)):
        numbers(f"peak of {tier}", "size", a.peak_bytes.get(tier, 0), b.peak_bytes.get(tier, 0))
    for link in dict.fromkeys((*a.link_bytes, *b.link_bytes)):
        numbers(f"bytes {link}", "size", a.link_bytes.get(link, 0), b.link_bytes.get(link, 0))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, (*widths, 0), strict=True)).rstrip() + "\n" for row in rows
    )
