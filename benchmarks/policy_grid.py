"""Every policy on every model, machine and workload of a fixed grid, by one simulator: is ours ever slower, how far is the bound?

Each cell is one ``klotski-compile --policy auto`` with the machine's rates: every policy is searched over the same sizes, with its
own residency fill or ours. Routing is uniform, or skewed as the workload says.

    python benchmarks/policy_grid.py [--models A,B] [--machines A,B] [--workloads A,B] [--anew] [--cells FILE] [--output FILE]

A cell takes seconds to minutes on a core, all of them more than an hour on two. What is done is kept in --cells, a table of every policy's
tokens per second with the commit that each line was computed at, and is done again only with --anew.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from klotski_compiler.decision import Workload  # noqa: E402
from klotski_compiler.errors import Infeasible, KlotskiError  # noqa: E402
from klotski_compiler.hardware import read_hardware  # noqa: E402
from klotski_compiler.model import ModelSpec, read_model  # noqa: E402
from klotski_compiler.output import write_whole  # noqa: E402
from klotski_compiler.planner import Request, compile_plan  # noqa: E402
from klotski_compiler.policies import OURS, POLICIES  # noqa: E402
from klotski_compiler.routing import Routing, uniform  # noqa: E402

MODELS = (
    "mixtral-8x7b",
    "mixtral-8x22b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "deepseek-v3",
    "gpt-oss-120b",
    "olmoe-1b-7b",
    "glm-4.5-air",
    "qwen1.5-moe-a2.7b",
    "deepseek-v2-lite",
    "phi-3.5-moe",
    "gpt-oss-20b",
)
MACHINES = ("rtx3090", "h800", "t4", "l4", "a5000", "h200", "rtx4090", "dev-2core")
TIE = 0.005  # below this two speeds are equal
TIME_LIMIT_S = 600.0  # none strikes, so that the table does not depend on what else the machine does
CELLS = ROOT / "benchmarks" / "results" / "policy_grid.csv"
# Columns before those of the policies.
FIXED = ("model", "machine", "workload", "commit", "compile_s", "bound", "infeasible", "failed")
HEADROOM = 0.10  # what the best published policy must leave to the bound for a cell to have something to win


class Work(NamedTuple):
    """A workload. skew: exponent of expert popularity by rank (Zipf); 0 is uniform."""

    prompt_len: int
    gen_len: int
    num_sequences: int
    skew: float


WORKLOADS = {
    "chat": Work(512, 32, 64, 0.0),
    "batch": Work(512, 32, 960, 0.0),
    "long answers": Work(128, 512, 256, 0.5),
    "long prompts": Work(4096, 64, 128, 0.5),
}


def main(argv: list[str] | None = None) -> int:
    """Computes the cells that are asked for and not there yet, and prints the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=_names, default=MODELS)
    parser.add_argument("--machines", type=_names, default=MACHINES)
    parser.add_argument("--workloads", type=_names, default=tuple(WORKLOADS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--anew", action="store_true", help="compute the cells that are asked for also if they are there"
    )
    parser.add_argument(
        "--cells", type=Path, default=CELLS, metavar="FILE", help="where they are kept (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write the table here, with command, date and machine")
    arguments = parser.parse_args(argv)
    cells = list(product(arguments.models, arguments.machines, arguments.workloads))
    found = read_cells(arguments.cells)
    arguments.cells.parent.mkdir(parents=True, exist_ok=True)
    commit = _commit()
    with ProcessPoolExecutor(arguments.workers) as pool:
        missing = {
            pool.submit(cell, *names): names for names in cells if arguments.anew or " | ".join(names) not in found
        }
        for done, future in enumerate(as_completed(missing), 1):
            found[" | ".join(missing[future])] = future.result() | {"commit": commit}
            write_whole(arguments.cells, cells_text(found))
            print(f"{done} of {len(missing)}: {' | '.join(missing[future])}", file=sys.stderr)
    text = "\n".join(summary(arguments, {key: found[key] for key in map(" | ".join, cells)})) + "\n"
    if arguments.output:
        write_whole(arguments.output, text)
    print(text)
    return 0


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Cells that are kept, as ``cell`` returns them, by ``model | machine | workload``."""
    if not path.exists():
        return {}
    found = {}
    for row in csv.DictReader(io.StringIO(path.read_text())):
        known: dict[str, Any] = {"commit": row["commit"]}
        known |= {kind: row[kind] for kind in ("infeasible", "failed") if row[kind]}
        if row["bound"]:
            rates = {policy: float(row[policy]) for policy in POLICIES if row.get(policy)}
            known |= {"tokens_per_s": rates, "bound": float(row["bound"]), "compile_s": float(row["compile_s"])}
        found[" | ".join(row[name] for name in FIXED[:3])] = known
    return found


def cells_text(cells: dict[str, dict[str, Any]]) -> str:
    """The same as a table, in the order of the grid, then others; a policy's tokens per second are empty where none of its schedules
    fits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*FIXED, *POLICIES), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    grid = [" | ".join(names) for names in product(MODELS, MACHINES, WORKLOADS)]
    for name in dict.fromkeys([*grid, *cells]):
        if known := cells.get(name):
            rates = {policy: f"{rate:.6g}" for policy, rate in known.get("tokens_per_s", {}).items()}
            numbers = {name: f"{known[name]:.6g}" for name in ("compile_s", "bound") if name in known}
            writer.writerow(dict(zip(FIXED, name.split(" | "), strict=False)) | known | rates | numbers)
    return text.getvalue()


def _commit() -> str:
    """What is checked out, if that is known: a table may be filled over more than one day."""
    try:
        words = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def cell(model: str, machine: str, work: str) -> dict[str, Any]:
    """One compilation: {policy: tokens/s}, the bound, the seconds that it took; or why nothing fits."""
    spec, hardware, asked = read_model(model), read_hardware(machine), WORKLOADS[work]
    workload = Workload(prompt_len=asked.prompt_len, gen_len=asked.gen_len, num_sequences=asked.num_sequences)
    budgets = {tier: memory.capacity_bytes for tier, memory in hardware.tiers.items()}
    began = time.perf_counter()
    try:
        request = Request(spec, hardware, skewed(spec, asked.skew), workload, budgets, spec.compute_dtype)
        plan = compile_plan(replace(request, time_limit_s=TIME_LIMIT_S))
    except KlotskiError as fault:  # one cell must not end the table
        what = "infeasible" if isinstance(fault, Infeasible) else "failed"
        return {what: str(fault).splitlines()[0]}
    return {
        "tokens_per_s": {c.policy: c.tokens_per_s for c in plan.candidates if c.feasible},
        "bound": plan.forecast.bound_tokens_per_s,
        "compile_s": time.perf_counter() - began,
    }


def skewed(spec: ModelSpec, exponent: float) -> Routing:
    """Popularity falls with the rank of an expert to this power; ranks are shifted from layer to layer."""
    if not exponent:
        return uniform(spec)

    def shares(number: int, count: int) -> tuple[float, ...]:
        weights = [(1 + (expert + 7 * number) % count) ** -exponent for expert in range(count)]
        return tuple(weight / sum(weights) for weight in weights)

    popularity = tuple(shares(number, layer.num_experts) for number, layer in enumerate(spec.layers))
    return uniform(spec).model_copy(update={"popularity": popularity, "source": f"Zipf, exponent {exponent}"})


def summary(arguments: argparse.Namespace, cells: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The figures of the grid, then a line per cell."""
    rows = {name: found for name, found in cells.items() if "bound" in found}
    yield f"{date.today()}: python benchmarks/policy_grid.py{_asked(arguments)}"
    failed = sum("failed" in found for found in cells.values())
    yield (
        f"{platform.machine()}, {os.cpu_count()} cores; {len(rows)} cells, "
        f"{len(cells) - len(rows) - failed} in which nothing fits, {failed} failed"
    )
    commits = Counter(found.get("commit", "unknown") for found in cells.values())
    yield f"computed at {', '.join(f'{commit} ({count} cells)' for commit, count in commits.most_common())}"
    yield ""
    ratios, closed, gaps = [], [], []
    lines = []
    for name, found in rows.items():
        rates = found["tokens_per_s"]
        ours = rates.get(OURS, 0.0)
        best, other = max((rate, policy) for policy, rate in rates.items() if policy != OURS)
        headroom, gap = found["bound"] / best - 1, found["bound"] / ours - 1 if ours else float("inf")
        ratios.append(ours / best)
        gaps.append(gap)
        if headroom >= HEADROOM:
            closed.append((ours - best) / (found["bound"] - best))
        lines.append(
            f"{name:<52}{ours:>10.2f}{other:>16}{best:>10.2f}{ours / best:>7.2f}{gap:>8.1%}{found['compile_s']:>7.1f}"
        )
    yield f"never slower: {sum(r >= 1 - TIE for r in ratios)} of {len(ratios)} cells (ties within {TIE:.1%}); least {min(ratios):.3f}"
    yield f"speed-up over the best other policy: median {statistics.median(ratios):.2f}, most {max(ratios):.2f}"
    if closed:
        yield f"headroom closed, in the {len(closed)} cells that have {HEADROOM:.0%}: median {statistics.median(closed):.0%}"
    yield f"gap to the bound: median {statistics.median(gaps):.1%}, 95th percentile {_percentile(gaps, 0.95):.1%}"
    if beaten := sum(gap < 0 for gap in gaps):
        yield f"in {beaten} cells the bound is beaten, and so wrong"
    yield ""
    yield f"{'model | machine | workload':<52}{OURS:>10}{'best other':>16}{'':>10}{'ratio':>7}{'gap':>8}{'s':>7}"
    yield from lines
    for name, found in cells.items():
        if "bound" not in found:
            yield f"{name:<52}{found.get('infeasible') or found['failed']}"


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _asked(arguments: argparse.Namespace) -> str:
    """The options that differ from the whole grid."""
    whole = {"models": MODELS, "machines": MACHINES, "workloads": tuple(WORKLOADS)}
    return "".join(
        f" --{n} '{','.join(getattr(arguments, n))}'" for n, all_ in whole.items() if getattr(arguments, n) != all_
    )


if __name__ == "__main__":
    raise SystemExit(main())
