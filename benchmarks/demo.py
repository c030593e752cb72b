"""The main job, end to end, on this machine: a model four times larger than the memory that it may use.

Writes a random 1.5 GB checkpoint, measures the machine, compiles, shows the plan, runs it, and runs beside it what a person
would type without Klotski: transformers with weights offloaded to disk (policy ``accelerate``), eight prompts at a time, with
Klotski's own readers and kernels. Every step is a command that is printed before it runs.

    python benchmarks/demo.py                      into demo/, three minutes; seven on a processor without bf16 instructions
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPTS, PROMPT_LEN, GEN_LEN = 128, 32, 16
TYPED_BATCH = 8  # prompts that a person gives to generate at once
BUDGET_SHARE = 4


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description="Profile, compile, inspect and run a model that does not fit.")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where everything goes (default: demo)")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        demo(folder)
    except subprocess.CalledProcessError as failure:
        print(f"demo: the last command ended with exit code {failure.returncode}", file=sys.stderr)
        return 1
    print(f"\nAll of it took {time.perf_counter() - began:.0f} s.")
    return 0


def demo(folder: Path) -> None:
    """Each step as a user would type it."""
    model, machine = folder / "model", folder / "hw.json"
    if not (model / "config.json").exists():
        say("A model: random weights, the shape of a small Qwen3-MoE, skewed routers.")
        run(sys.executable, ROOT / "benchmarks" / "checkpoint.py", model)
    weights = weight_bytes(model)
    budget = weights // BUDGET_SHARE
    say("The machine: what its processor, memory and disk really do.")
    run(*command("klotski_runtime.cli.profile"), "-o", machine, "--scratch", folder, "--model", model)

    say("The prompts: which experts they ask for.")
    prompts, routing = folder / "prompts.jsonl", folder / "routing.json"
    write_prompts(prompts, model)
    run(*command("klotski_runtime.cli.profile"), "routing", model, "--input", prompts, "-o", routing)

    known = ("--routing", routing, "--memory", f"host={budget}")
    sizes = ("--prompt-len", PROMPT_LEN, "--gen-len", GEN_LEN, *known)
    say(f"The schedule: {weights / 1e9:.2f} GB of weights, {budget / 1e6:.0f} MB of memory.")
    plan, typed = folder / "plan.json", folder / "accelerate.json"
    run(*command("klotski_compiler.cli.compile"), model, machine, "-o", plan, *sizes, "--num-sequences", PROMPTS)
    say("The plan: where a layer's time goes, and what the memory is for.")
    run(*command("klotski_compiler.cli.inspect"), plan)
    say("The run: measured beside predicted.")
    trace = folder / "trace.json"
    ours = measured(plan, model, trace)

    say(f"Beside it: each module's weights on demand, {TYPED_BATCH} prompts at a time, same readers, same memory.")
    fixed = ("--num-sequences", TYPED_BATCH, "--batch-size", TYPED_BATCH, "--policy", "accelerate")
    run(*command("klotski_compiler.cli.compile"), model, machine, "-o", typed, *sizes, *fixed, quiet=True)
    theirs = measured(typed, model)

    say("Side by side")
    for name, report in ((f"klotski, {PROMPTS} prompts", ours), (f"accelerate, {TYPED_BATCH} prompts", theirs)):
        rate, forecast = report["tokens_per_s"], report["predicted_tokens_per_s"]
        took = (report["peak_rss_bytes"] - report["idle_rss_bytes"]) / 1e6
        print(f"  {name:<24}{rate:8.1f} tokens/s (predicted {forecast:.1f}), {took:.0f} of {budget / 1e6:.0f} MB")
    print(f"  ratio                   {ours['tokens_per_s'] / theirs['tokens_per_s']:8.1f}")
    print(f"\nTimeline: open {trace} in https://ui.perfetto.dev or chrome://tracing; the plan is {plan}.")


def weight_bytes(model: Path) -> int:
    """Size of a checkpoint's weights."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def write_prompts(path: Path, model: Path) -> None:
    """PROMPTS rows of PROMPT_LEN random token ids: the model is random too, and has no tokenizer."""
    vocabulary, ids = json.loads((model / "config.json").read_text())["vocab_size"], random.Random(0)
    rows = ({"prompt": [ids.randrange(vocabulary) for _ in range(PROMPT_LEN)]} for _ in range(PROMPTS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(plan: Path, model: Path, trace: Path | None = None) -> dict[str, Any]:
    """Run a plan's own workload; prints the comparison that klotski-run prints, and returns its numbers."""
    options = ("--trace", trace) if trace else ()
    where = ("--model", model, "--scratch", plan.parent)
    text = run(*command("klotski_runtime.cli.run"), plan, *where, *options, "--json", quiet=True)
    report: dict[str, Any] = json.loads(text)
    rows = [(f"{phase} pass", us["predicted"] / 1e6, us["measured"] / 1e6) for phase, us in report["pass_us"].items()]
    rows.append(("tokens/s", report["predicted_tokens_per_s"], report["tokens_per_s"]))
    rows.append(("whole run", report["generated_tokens"] / report["predicted_tokens_per_s"], report["wall_s"]))
    print(f"  {'':<16}{'predicted':>12}{'measured':>12}")
    for name, planned, found in rows:
        unit = "" if name == "tokens/s" else " s"
        print(f"  {name:<16}{planned:>10.2f}{unit:<2}{found:>10.2f}{unit}")
    return report


def command(module: str) -> tuple[str, ...]:
    """A klotski command of this interpreter, installed or not on the PATH."""
    return sys.executable, "-m", module


def run(*words: object, quiet: bool = False) -> str:
    """Print a command and run it; its output is shown or, if ``quiet``, returned. Raises CalledProcessError."""
    texts = [str(word) for word in words]
    shown = shlex.join(texts).replace(f"{sys.executable} -m klotski_compiler.cli.", "klotski-")
    shown = shown.replace(f"{sys.executable} -m klotski_runtime.cli.", "klotski-").replace(sys.executable, "python")
    print(f"$ {shown}", flush=True)
    found = subprocess.run(texts, check=True, text=True, stdout=subprocess.PIPE if quiet else None)
    return found.stdout or ""


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
