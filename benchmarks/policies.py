"""Policies side by side on this machine, and forecasts beside measurements: one model, one memory budget.

Every policy runs at the best size that fits the budget, with the same readers and kernels; ``accelerate`` also with eight
prompts at a time, as a person would type it. Two workloads: the demo's, where decode waits for the disk and prefill computes,
and one of short prompts, as many as make a decode pass compute as long as it reads. Every repeat profiles the machine anew,
finds that number, compiles, and runs all in turn: ratios are between neighbours in time, and a forecast is no older than its
repeat.

    python benchmarks/policies.py [--row disk|balanced] [--repeats 5] [--json FILE] [--output FILE]
                                                                        some eight minutes per row and repeat
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo import (  # noqa: E402
    BUDGET_SHARE,
    GEN_LEN,
    PROMPT_LEN,
    PROMPTS,
    TYPED_BATCH,
    command,
    run,
    weight_bytes,
    write_prompts,
)
from klotski_compiler.output import write_whole  # noqa: E402
from klotski_compiler.plan import load  # noqa: E402
from klotski_compiler.policies import POLICIES  # noqa: E402

TYPED = f"accelerate, batch {TYPED_BATCH}"
SHORT_PROMPT_LEN = 4  # its prefill computes not much longer than it reads, either
DISK, BALANCED = "disk", "balanced"
TITLES = {DISK: "disk binds", BALANCED: "transfer = compute"}


LEGEND = [
    "joint x: joint's tokens/s over this policy's, pair by pair; forecast x: the same as forecast; kept: their quotient.",
    "prefill, decode: median pass, measured over predicted. peak: MB of memory taken.",
]


class Row(NamedTuple):
    """A workload: ``prompts`` of ``prompt_len`` tokens, GEN_LEN new ones each."""

    name: str
    prompts: int
    prompt_len: int


class Setting(NamedTuple):
    """What all plans share."""

    model: Path
    machine: Path
    routing: Path
    budget: int


class Contender(NamedTuple):
    """What runs: a name and a compiled plan."""

    name: str
    plan: Path


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo", help="has or gets the demo's model (default: demo)"
    )
    parser.add_argument("--row", choices=tuple(TITLES), help="one workload only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the tables here, with command, date and machine")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model, machine = folder / "model", folder / "hw.json"
    if not (model / "config.json").exists():
        run(sys.executable, ROOT / "benchmarks" / "checkpoint.py", model, quiet=True)
    prompts, routing = folder / "prompts.jsonl", folder / "routing.json"
    write_prompts(prompts, model)
    run(*command("klotski_runtime.cli.profile"), "routing", model, "--input", prompts, "-o", routing, quiet=True)
    budget = weight_bytes(model) // BUDGET_SHARE

    setting = Setting(model, machine, routing, budget)

    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    rows = [Row(DISK, PROMPTS, PROMPT_LEN), Row(BALANCED, 2 * PROMPTS, SHORT_PROMPT_LEN)]
    rows = [row for row in rows if arguments.row in (None, row.name)]
    for _ in range(arguments.repeats):
        run(*command("klotski_runtime.cli.profile"), "-o", machine, "--scratch", folder, "--model", model, quiet=True)
        with tempfile.TemporaryDirectory(dir=folder) as plans:
            rows = [balanced(setting, row, Path(plans)) if row.name == BALANCED else row for row in rows]
            for row in rows:
                contenders = compiled(setting, row, Path(plans) / row.name)
                for name, report in measured(contenders, model):
                    found.setdefault(row.name, {}).setdefault(name, []).append(report | {"prompts": row.prompts})
        # What is measured is kept, whatever happens next.
        text = summary(rows, found, budget, arguments)
        if arguments.json:
            write_whole(arguments.json, json.dumps(found, indent=1) + "\n")
        if arguments.output:
            write_whole(arguments.output, text)
    print(text)
    return 0


def summary(
    rows: list[Row], found: dict[str, dict[str, list[dict[str, Any]]]], budget: int, asked: argparse.Namespace
) -> str:
    """A table per row, under command, date and machine."""
    lines = [
        f"{date.today()}: python benchmarks/policies.py {f'--row {asked.row} ' if asked.row else ''}--repeats {asked.repeats}",
        f"{platform.machine()}, {os.cpu_count()} cores; memory budget {budget / 1e6:.0f} MB, a quarter of the weights",
        "",
    ]
    for row in rows:
        reports = found[row.name]
        counts = sorted({report["prompts"] for report in reports["joint"]})
        prompts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        title = f"{TITLES[row.name]}: {prompts} prompts of {row.prompt_len} tokens, {GEN_LEN} new tokens each"
        lines += table(f"{title}; medians of {len(reports['joint'])}", reports)
    return "\n".join([*lines, *LEGEND]) + "\n"


def compiled(setting: Setting, row: Row, folder: Path) -> list[Contender]:
    """Every policy's best plan, and ``accelerate`` as typed."""
    folder.mkdir()
    out = [compile_plan(setting, name, row, folder, "--policy", name) for name in POLICIES]
    typed = ("--policy", "accelerate", "--batch-size", TYPED_BATCH)
    return [*out, compile_plan(setting, TYPED, row._replace(prompts=TYPED_BATCH), folder, *typed)]


def compile_plan(setting: Setting, name: str, row: Row, folder: Path, *options: object) -> Contender:
    """One plan."""
    plan = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    sizes = ("--prompt-len", row.prompt_len, "--gen-len", GEN_LEN, "--num-sequences", row.prompts)
    known = ("--memory", f"host={setting.budget}", "--routing", setting.routing)
    compiler = command("klotski_compiler.cli.compile")
    run(*compiler, setting.model, setting.machine, "-o", plan, *sizes, *known, *options, quiet=True)
    return Contender(name, plan)


def balanced(setting: Setting, row: Row, folder: Path) -> Row:
    """The row with as many prompts as make joint's decode pass compute about as long as it reads, by forecast."""
    for attempt in range(5):
        plan = load(compile_plan(setting, f"balance-{attempt}", row, folder, "--policy", "joint").plan)
        busy = Counter[str]()
        for step in plan.steps["decode"]:
            busy[step.op.stream] += step.end_us - step.start_us
        ratio = busy["disk>host"] / busy["cpu"]
        if 0.95 < ratio < 1.05:
            break
        row = row._replace(prompts=max(8, round(row.prompts * ratio)))
    return row


def measured(contenders: list[Contender], model: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs one after the other: (name, what klotski-run reports)."""
    for name, plan in contenders:
        report = json.loads(
            run(
                *command("klotski_runtime.cli.run"),
                plan,
                "--model",
                model,
                "--scratch",
                plan.parent,
                "--json",
                quiet=True,
            )
        )
        print(
            f"{name}: {report['tokens_per_s']:.1f} tokens/s, {report['predicted_tokens_per_s']:.1f} predicted",
            file=sys.stderr,
        )
        yield name, report


def table(title: str, reports: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line per policy; LEGEND says what is in it."""
    head = ("tokens/s", "forecast", "joint x", "forecast x", "kept", "prefill", "decode", "peak")
    lines = [title, "", f"{'policy':<20}" + "".join(f"{word:>11}" for word in head)]
    ours = reports["joint"]
    for name, runs in reports.items():
        pairs = list(zip(ours, runs, strict=True))
        ratio = [o["tokens_per_s"] / r["tokens_per_s"] for o, r in pairs]
        promised = [o["predicted_tokens_per_s"] / r["predicted_tokens_per_s"] for o, r in pairs]
        numbers = [
            statistics.median(r["tokens_per_s"] for r in runs),
            statistics.median(r["predicted_tokens_per_s"] for r in runs),
            statistics.median(ratio),
            statistics.median(promised),
            statistics.median(r / p for r, p in zip(ratio, promised, strict=True)),
            *(
                statistics.median(r["pass_us"][phase]["measured"] / r["pass_us"][phase]["predicted"] for r in runs)
                for phase in ("prefill", "decode")
            ),
            statistics.median((r["peak_rss_bytes"] - r["idle_rss_bytes"]) / 1e6 for r in runs),
        ]
        lines.append(f"{name:<20}" + "".join(f"{number:11.2f}" for number in numbers))
    return [*lines, ""]


if __name__ == "__main__":
    raise SystemExit(main())
