"""One number of a request swept: every point compiled, a table of what comes out, a picture of it.

The points are compiled as any other request is; what is fixed in the request stays fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from klotski_compiler.errors import ConfigError, Infeasible
from klotski_compiler.plan import Plan
from klotski_compiler.planner import Request, compile_plan
from klotski_compiler.policies import OURS

BATCH_SIZE = 16  # of a sweep over the number of batches, where none is given
NUM_BATCHES = (1, 2, 4, 8, 16, 32)
MEMORY_SHARES = (0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the compute tier's budget
PROMPT_LENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Point:
    """One request of a sweep. value: what is swept, in the unit of the axis. found: its plan, or why there is none."""

    value: float
    found: Plan | Infeasible


def points(request: Request, swept: str) -> list[tuple[float, Request]]:
    """The values of the swept number with their requests.

    num-batches: groups of so many batches of the request's batch size, each the whole workload. memory: GiB of the compute tier.
    prompt-len: tokens, as many as the model has positions for.
    """
    workload, tier = request.workload, request.hardware.compute_tier
    if swept == "num-batches":
        size = request.batch_size or BATCH_SIZE

        def group(n: int) -> Request:
            whole = workload.model_copy(update={"num_sequences": n * size})
            return replace(request, batch_size=size, num_batches=n, workload=whole)

        return [(n, group(n)) for n in NUM_BATCHES]
    if swept == "memory":
        sizes = [int(share * request.budgets[tier]) for share in MEMORY_SHARES]
        return [(size / 2**30, replace(request, budgets=request.budgets | {tier: size})) for size in sizes]
    most = request.spec.max_positions - workload.gen_len
    return [
        (length, replace(request, workload=workload.model_copy(update={"prompt_len": length})))
        for length in PROMPT_LENS
        if length <= most
    ]


def sweep(request: Request, swept: str, progress: Callable[[str, float], None]) -> list[Point]:
    """Compile every point; one that does not fit is part of the answer. Raises Infeasible where none fits, ConfigError where none is."""
    asked, out = points(request, swept), list[Point]()
    if not asked:
        spec, new = request.spec, request.workload.gen_len
        why = f"{new} new tokens leave no prompt of {PROMPT_LENS[0]} tokens room in the {spec.max_positions} positions of {spec.name}"
        raise ConfigError("--gen-len", "", f"{why}; ask for fewer")
    for number, (value, point) in enumerate(asked):
        progress(f"{swept} {value:g}", number / len(asked))
        try:
            out.append(Point(value, compile_plan(point)))
        except Infeasible as refusal:
            out.append(Point(value, refusal))
    if not any(isinstance(point.found, Plan) for point in out):
        raise next(point.found for point in reversed(out) if isinstance(point.found, Infeasible))
    return out


def axis(request: Request, swept: str) -> str:
    """What the swept numbers are."""
    tier = request.hardware.compute_tier
    return {"num-batches": "batches", "memory": f"{tier}, GiB", "prompt-len": "prompt, tokens"}[swept]


def best_other(plan: Plan) -> str:
    """The fastest other policy, where several were timed."""
    others = [(c.tokens_per_s, c.policy) for c in plan.candidates if c.feasible and c.policy != plan.policy]
    return "{1} {0:.2f}".format(*max(others)) if others else ""


def table(request: Request, swept: str, found: Sequence[Point]) -> Iterator[str]:
    """A line per point: sizes, speed, bound, what binds, the best other policy."""
    yield (
        f"{axis(request, swept):>14}  {'policy':<16}{'n x b':>16}{'tokens/s':>11}{'bound':>11}{'gap':>8}"
        f"  {'binds':<12}best other"
    )
    for point in found:
        if isinstance(point.found, Infeasible):
            yield f"{point.value:>14g}  {str(point.found).splitlines()[0]}"
            continue
        plan, d, forecast = point.found, point.found.decision, point.found.forecast
        busiest = max(forecast.busy_us, key=lambda stream: forecast.busy_us[stream])
        yield (
            f"{point.value:>14g}  {plan.policy:<16}{d.batches:>16}{forecast.tokens_per_s:>11.2f}"
            f"{forecast.bound_tokens_per_s:>11.2f}{forecast.gap:>8.1%}  {busiest:<12}{best_other(plan)}"
        )


def draw(request: Request, swept: str, found: Sequence[Point], path: Path) -> None:
    """Tokens per second of every policy and the bound over the swept number; the suffix of the file says which kind of picture.
    Raises OSError or, of a suffix that is no picture's, ValueError."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    plans = [(point.value, point.found) for point in found if isinstance(point.found, Plan)]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = {c.policy for _, plan in plans for c in plan.candidates if c.feasible}
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for name in sorted(names, key=lambda name: (name != OURS, name)):
        line = [
            (value, c.tokens_per_s) for value, plan in plans for c in plan.candidates if c.feasible and c.policy == name
        ]
        ours = name == OURS
        axes.plot(*zip(*line, strict=True), marker="o" if ours else ".", linewidth=2.5 if ours else 1, label=name)
    bound = [(value, plan.forecast.bound_tokens_per_s) for value, plan in plans]
    axes.plot(*zip(*bound, strict=True), linestyle="--", color="black", linewidth=1, label="bound")
    axes.set(xlabel=axis(request, swept), ylabel="tokens/s", ylim=(0, None))
    if swept != "memory":
        axes.set_xscale("log", base=2)
        axes.set_xticks([value for value, _ in plans], [f"{value:g}" for value, _ in plans])
    axes.set_title(f"{request.spec.name} on {request.hardware.name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
