"""Policies side by side on this machine, and forecasts beside measurements: one profile, one model, one memory budget.

Every policy runs at the best size that fits the budget, with the same readers and kernels; ``accelerate`` also with eight
prompts at a time, as a person would type it. Runs are interleaved and repeated, so that ratios are between neighbours in time.
Two workloads: the demo's, where the disk binds, and one with as many prompts as make a decode pass compute as long as it reads.

    python benchmarks/policies.py [--repeats 5] [--json FILE] [--output FILE]        about half an hour
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.demo import BUDGET_SHARE, GEN_LEN, PROMPT_LEN, PROMPTS, TYPED_BATCH, command  # noqa: E402
from klotski_compiler.policies import POLICIES  # noqa: E402

TYPED = f"accelerate, batch {TYPED_BATCH}"
BALANCED_GEN_LEN = 8


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the tables here, with command, date and machine")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model, machine = folder / "model", folder / "hw.json"
    if not (model / "config.json").exists():
        _run(sys.executable, ROOT / "benchmarks" / "checkpoint.py", model)
    _run(*command("klotski_runtime.cli.profile"), "-o", machine, "--scratch", folder)
    budget = sum(file.stat().st_size for file in model.glob("*.safetensors")) // BUDGET_SHARE

    lines = [f"{date.today()}: python benchmarks/policies.py {shlex.join(argv if argv is not None else sys.argv[1:])}"]
    lines += [
        f"{platform.machine()}, {os.cpu_count()} cores; memory budget {budget / 1e6:.0f} MB, a quarter of the weights",
        "",
    ]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder) as plans:
        for row, prompts, gen_len in (
            ("disk binds", PROMPTS, GEN_LEN),
            ("transfer = compute", balanced(model, machine, budget, Path(plans)), BALANCED_GEN_LEN),
        ):
            contenders = compiled(model, machine, budget, prompts, gen_len, Path(plans) / row.replace(" ", "-"))
            reports = measured(contenders, model, arguments.repeats)
            found[row] = reports
            lines += table(f"{row}: {prompts} prompts of {PROMPT_LEN} tokens, {gen_len} new tokens each", reports)
            print("\n".join(lines[-len(reports) * 2 - 8 :]), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def compiled(model: Path, machine: Path, budget: int, prompts: int, gen_len: int, folder: Path) -> list[Contender]:
    """Every policy's best plan, and ``accelerate`` as typed."""
    folder.mkdir()
    shared = (model, machine, budget)
    out = [_compile(name, *shared, prompts, gen_len, folder, "--policy", name) for name in POLICIES]
    typed = ("--policy", "accelerate", "--batch-size", TYPED_BATCH)
    return [*out, _compile(TYPED, *shared, TYPED_BATCH, gen_len, folder, *typed)]


def _compile(
    name: str, model: Path, machine: Path, budget: int, prompts: int, gen_len: int, folder: Path, *options: object
) -> Contender:
    plan = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
    sizes = ("--prompt-len", PROMPT_LEN, "--gen-len", gen_len, "--num-sequences", prompts, "--memory", f"host={budget}")
    _run(*command("klotski_compiler.cli.compile"), model, machine, "-o", plan, *sizes, *options)
    return Contender(name, plan)


def balanced(model: Path, machine: Path, budget: int, folder: Path) -> int:
    """As many prompts as make joint's predicted decode pass compute about as long as it reads."""
    folder = folder / "balance"
    folder.mkdir()
    prompts = PROMPTS
    for _ in range(4):
        plan = _compile(f"joint-{prompts}", model, machine, budget, prompts, 2, folder, "--policy", "joint").plan
        busy = json.loads(_run(*command("klotski_compiler.cli.inspect"), plan, "--json"))["forecast"]["busy_us"]
        ratio = busy["disk>host"] / busy["cpu"]
        if 0.9 < ratio < 1.1:
            break
        prompts = max(8, round(prompts * ratio))
    return prompts


def measured(contenders: list[Contender], model: Path, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Runs in turn: all once, then all again."""
    reports: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    for _ in range(repeats):
        for name, plan in contenders:
            text = _run(*command("klotski_runtime.cli.run"), plan, "--model", model, "--scratch", model, "--json")
            reports[name].append(json.loads(text))
    return reports


def table(title: str, reports: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians; ratios are joint's over the other's, measured pair by pair."""
    lines = [title, ""]
    head = ("tokens/s", "forecast", "joint x", "forecast x", "kept", "prefill", "decode")
    lines.append(f"{'policy':<22}" + "".join(f"{word:>12}" for word in head))
    ours = reports["joint"]
    for name, runs in reports.items():
        rate = statistics.median(r["tokens_per_s"] for r in runs)
        forecast = runs[0]["predicted_tokens_per_s"]
        ratio = statistics.median(o["tokens_per_s"] / r["tokens_per_s"] for o, r in zip(ours, runs, strict=True))
        promised = ours[0]["predicted_tokens_per_s"] / forecast
        off = [
            statistics.median(r["pass_us"][phase]["measured"] / r["pass_us"][phase]["predicted"] for r in runs)
            for phase in ("prefill", "decode")
        ]
        numbers = f"{rate:12.1f}{forecast:12.1f}{ratio:12.2f}{promised:12.2f}{ratio / promised:12.2f}{off[0]:12.2f}{off[1]:12.2f}"
        lines.append(f"{name:<22}{numbers}")
    lines += [
        "",
        "joint x: joint's tokens/s over this policy's, median of pairs; forecast x: the same as forecast; kept: their",
    ]
    lines += ["quotient. prefill, decode: median pass, measured over predicted.", ""]
    return lines


def _run(*words: object) -> str:
    texts = [str(word) for word in words]
    print(f"$ {shlex.join(texts)}", file=sys.stderr, flush=True)
    return subprocess.run(texts, check=True, text=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    raise SystemExit(main())
