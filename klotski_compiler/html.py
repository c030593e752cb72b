"""A plan as one HTML file that needs nothing else: to open in a browser, and to attach to a mail.

Words and numbers are the report's. What is drawn is drawn by the script in ``report.html`` from the lines of the plan
themselves, which travel packed: they repeat so much that a quarter of their size is left.
"""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from klotski_compiler import report
from klotski_compiler.ops import Bind, Compute, Op
from klotski_compiler.plan import Plan
from klotski_compiler.timeline import lanes, timeline
from klotski_compiler.words import size, span

TEMPLATE = Path(__file__).with_name("report.html")

# Colours of the timeline (the template's style has a variable for each) and what they stand for.
KINDS = {
    "attention": "attention",
    "router": "router",
    "dense": "dense and shared",
    "resident": "experts, resident",
    "named": "experts by name",
    "late": "late experts",
    "cpu": "experts of the CPU",
    "kv": "KV cache",
    "exchange": "exchange with the CPU",
    "head": "embedding and head",
}
_OF_FUNCTION = {
    **dict.fromkeys(("attention", "project", "attend", "output"), "attention"),
    **dict.fromkeys(("embed", "norm", "head", "sample"), "head"),
    "router": "router",
    **dict.fromkeys(("shared", "dense"), "dense"),
    "add": "exchange",
}
_OF_TENSOR = {
    **dict.fromkeys(("state", "query", "rows", "sums"), "exchange"),
    **dict.fromkeys(("embedding", "head"), "head"),
    "attention": "attention",
    "router": "router",
    "dense": "dense",
    "shared": "dense",
    "pick": "late",
    "kv": "kv",
}
_OF_ROLE = {
    "resident": "resident",
    "kept": "dense",
    "KV": "kv",
    "slots": "named",
    "states": "exchange",
    "workspace": "router",
    "free": "band",
}
_OF_CAUSE = {"intra_layer": "late", "inter_layer": "attention", "kv": "kv"}


def page(plan: Plan, phase: str, layer: int | None = None) -> str:
    """The whole file. ``phase`` and ``layer`` say where its timeline opens; the middle layer unless told."""
    parts = {
        "title": escape(f"{plan.model} on {plan.hardware}"),
        "headline": _headline(plan),
        "tiles": _tiles(plan),
        "decision": _definitions(report.decision_rows(plan)),
        "forecast": _definitions(report.forecast_rows(plan)),
        "timeline": escape(timeline(plan, phase, layer)),
        "legend": "".join(f"<span>{_key(kind)}{name}</span>" for kind, name in KINDS.items()),
        "candidates": _candidates(plan),
        "busy": _busy(plan),
        "bubbles": _bubbles(plan),
        "memory": "".join(_tier(plan, tier, held) for tier, held in report.holdings(plan).items()),
        "footer": f"Written by klotski-inspect from the plan with digest <code>{escape(plan.digest)}</code>.",
        "data": _packed(plan, phase, len(plan.decision.layers) // 2 if layer is None else layer),
    }
    # In one go: what a plan says may look like a place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], TEMPLATE.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- what is drawn


def _packed(plan: Plan, phase: str, layer: int) -> str:
    """What the script reads: base64, so that nothing in a plan can end the element that it is in."""
    data = {
        "kinds": list(KINDS),
        "titles": list(KINDS.values()),
        "compute": next(name for name, tier in plan.processors.items() if tier == plan.compute_tier),
        "phase": next(n for n, p in enumerate(plan.phases) if p.name == phase),
        "layer": layer,
        "phases": [
            {
                "name": p.name,
                "passes": p.passes,
                "pass_us": plan.forecast.pass_us.get(p.name, plan.forecast.load_us),
                "lanes": lanes(plan.steps[p.name]),
                "lines": p.lines,
                "kinds": op_kinds(plan, p.name),
            }
            for p in plan.phases
        ],
    }
    text = json.dumps(data, separators=(",", ":"))
    return b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def op_kinds(plan: Plan, phase: str) -> str:
    """A digit per op: the position in KINDS of what it mostly does or moves."""
    places = {kind: str(n) for n, kind in enumerate(KINDS)}
    of_tensor = _tensor_kinds(plan)
    return "".join(places[_kind(plan, step.op, of_tensor)] for step in plan.steps[phase])


def _kind(plan: Plan, op: Op, of_tensor: Sequence[str]) -> str:
    if isinstance(op, Bind):
        return "router"
    if isinstance(op, Compute) and op.fn in _OF_FUNCTION:
        return _OF_FUNCTION[op.fn]
    nbytes = Counter[str]()
    for tensor in op.tensors:
        nbytes[of_tensor[tensor]] += plan.tensors[tensor].nbytes
    if isinstance(op, Compute) and len(nbytes) > 1:
        del nbytes["exchange"]  # where experts of the CPU add their results
    return max(nbytes, key=lambda kind: nbytes[kind], default="head")


def _tensor_kinds(plan: Plan) -> list[str]:
    found = []
    for tensor in plan.tensors:
        kind = _OF_TENSOR.get(tensor.kind, "head")
        if tensor.kind == "expert":
            layer = plan.decision.layers[tensor.layer]
            where = {"resident": layer.resident_experts, "cpu": layer.cpu, "late": layer.late}
            kind = next((name for name, experts in where.items() if tensor.index in experts), "named")
        found.append(kind)
    return found


# --------------------------------------------------------------------------------------------------------- sections


def _headline(plan: Plan) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in report.headline(plan).splitlines())
    return f"<h1>{escape(plan.model)} on {escape(plan.hardware)}</h1>\n{lines}"


def _tiles(plan: Plan) -> str:
    f, last = plan.forecast, plan.phases[-1]
    tiles = [
        (f"{f.tokens_per_s:.2f} tokens/s", f"predicted, policy {plan.policy}"),
        (f"{f.bound_tokens_per_s:.2f} tokens/s", f"bound ({f.schedule_class}): gap {f.gap:.1%}"),
        (span(f.makespan_us), f"whole workload, and {span(f.load_us)} to load"),
        (span(f.pass_us[last.name]), f"a pass of {last.name}, {last.passes} of them"),
        (f"{f.bubble_fraction:.1%}", "of the time computing waits"),
    ]
    return "".join(f'<div class="tile"><b>{escape(big)}</b>{escape(small)}</div>' for big, small in tiles)


def _definitions(rows: Iterable[report.Row]) -> str:
    """Subjects and what is said about them; a row without a subject goes on about the one before."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows)}</dl>"


def _candidates(plan: Plan) -> str:
    f = plan.forecast
    bounds = {f.schedule_class: f.bound_tokens_per_s, **f.class_bounds}
    most = max([*bounds.values(), *(c.tokens_per_s for c in plan.candidates)]) or 1.0
    other = {name: "" if name == f.schedule_class else " other" for name in bounds}
    marks = "".join(
        f'<i class="mark{other[name]}" style="left:calc({bound / most:.2%} - 2px)"></i>'
        for name, bound in bounds.items()
    )
    rows = []
    for c in plan.candidates:
        name = f"<td{' class=chosen' if c.policy == plan.policy else ''}>{escape(c.policy)}</td>"
        if not c.feasible:
            rows.append(f'<tr>{name}<td colspan="4" class="faint">{escape(c.why_not)}</td></tr>')
            continue
        kind = "accent" if c.policy == plan.policy else "plain"
        cells = (c.batches, f"{c.tokens_per_s:.2f}", report.against_best(plan, c))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        bar = f'<div class="bar">{_part(kind, c.tokens_per_s / most)}{marks}</div>'
        rows.append(f'<tr>{name}{numbers}<td class="wide">{bar}</td></tr>')
    numbers = "".join(f'<th class="number">{name}</th>' for name in ("batches", "tokens/s", "against best"))
    lines = "; ".join(
        f"{'Dotted' if other[name] else 'Line'}: no schedule with {name} exceeds {bound:.2f}"
        for name, bound in bounds.items()
    )
    table = f'<table><tr><th>policy</th>{numbers}<th class="wide"></th></tr>{"".join(rows)}</table>'
    return f'{table}<p class="hint">Best schedule of each. {escape(lines)}.</p>'


def _busy(plan: Plan) -> str:
    out = []
    for phase in plan.phases[1:]:
        length = plan.forecast.pass_us[phase.name] or 1
        rows = []
        for n, work in enumerate(report.stream_work(plan.steps[phase.name])):
            kind = "accent" if n == 0 else "plain"
            bar = _part(kind, (work.total - work.copying) / length) + _part(kind, work.copying / length, "copying")
            note = "binds" if n == 0 else ""
            copies = f"{work.copying / length:.0%} in copies that block it" if work.copying else ""
            rows.append(
                f'<tr><td>{escape(work.stream)}</td><td class="number">{work.total / length:.0%}</td>'
                f'<td class="wide"><div class="bar">{bar}</div></td>'
                f'<td class="hint">{"; ".join(filter(None, (note, copies)))}</td></tr>'
            )
        title = f"<h3>{escape(phase.name)}, {span(length)}</h3>"
        out.append(f'{title}<table class="even">{"".join(rows)}</table>')
    return "".join(out)


def _bubbles(plan: Plan) -> str:
    f = plan.forecast
    causes = report.bubble_causes(plan)
    total = sum(us for _, us in causes) or 1
    parts = [("resident", 1 - f.bubble_fraction, "computing", "")]
    for cause, us in causes:
        words = f"waiting for {report.CAUSES.get(cause, cause)}"
        parts.append((_OF_CAUSE.get(cause, "head"), f.bubble_fraction * us / total, words, span(us)))
    bar = "".join(_part(kind, share) for kind, share, _, _ in parts)
    rows = "".join(
        f'<tr><td>{_key(kind)}{escape(text)}</td><td class="number">{time}</td><td class="number">{share:.1%}</td></tr>'
        for kind, share, text, time in parts
    )
    waited = f"Over the whole workload, computing waits {f.bubble_fraction:.1%} of the time."
    return f'<p>{waited}</p><div class="bar">{bar}</div><table>{rows}</table>'


def _tier(plan: Plan, tier: str, held: Sequence[report.Holding]) -> str:
    """One memory: a bar against its budget for each phase, and the same as numbers."""
    budget = plan.budgets[tier] or 1
    bars = []
    for n, phase in enumerate(plan.phases):
        shares = [(role, sum(h.nbytes[n] for h in group)) for role, group in groupby(held, key=lambda h: h.role)]
        parts = "".join(_part(_OF_ROLE[role], nbytes / budget) for role, nbytes in shares if role != "free")
        bars.append(f'<tr><td>{escape(phase.name)}</td><td class="wide"><div class="bar">{parts}</div></td></tr>')
    heads = "".join(f'<th class="number">{escape(phase.name)}</th>' for phase in plan.phases)
    rows = "".join(
        f"<tr><td>{_key(_OF_ROLE[h.role])}{escape(h.name)}</td>"
        + "".join(f'<td class="number">{size(n) if n else "-"}</td>' for n in h.nbytes)
        + "</tr>"
        for h in held
    )
    title = f"{tier}: {size(plan.forecast.peak_bytes[tier])} of {size(plan.budgets[tier])}"
    return (
        f'<div><h3>{escape(title)}</h3><table class="bars">{"".join(bars)}</table>'
        f"<table><tr><th></th>{heads}</tr>{rows}</table></div>"
    )


def _part(kind: str, share: float, style: str = "") -> str:
    """A piece of a bar, as wide as its share of the whole."""
    width = f"{min(1.0, max(0.0, share)):.2%}"
    return f'<i class="{style}" style="width:{width};background-color:var(--{kind})"></i>'


def _key(kind: str) -> str:
    return f'<span class="key" style="background:var(--{kind})"></span>'
