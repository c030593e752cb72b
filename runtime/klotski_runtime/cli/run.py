"""``klotski-run``: run a plan on a file of prompts, or on its own workload to compare what was planned with what is."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klotski_compiler.errors import ConfigError, ExecError
from klotski_compiler.ops import op_text
from klotski_compiler.outcome import outcome
from klotski_compiler.output import check_file, write_whole
from klotski_compiler.plan import Plan, load
from klotski_compiler.prompts import check_source
from klotski_compiler.report import CAUSES
from klotski_compiler.trace import Row as Event
from klotski_compiler.trace import chrome_trace
from klotski_runtime.job import Batch, Job, Keeper, rehearsal
from klotski_runtime.memory import PeakRss, rss_bytes, storage_read_bytes, tune_libraries
from klotski_runtime.progress import progress_of

if TYPE_CHECKING:  # torch takes seconds to import, and --help and usage errors need none of it
    from klotski_runtime.engine import Engine, Row

EPILOG = """\
examples:
  klotski-run plan.json --model ./Qwen3-30B-A3B                        planned against measured, on random tokens
  klotski-run plan.json --model ./Qwen3-30B-A3B --input batch.jsonl --output out.jsonl
  echo "Once upon a time" | klotski-run plan.json --model ./Qwen3-30B-A3B --input -

The input has one prompt per line of text, or JSON lines {"custom_id": "...", "prompt": "..."}, or OpenAI batch lines; a
prompt may be a list of token ids. The output has OpenAI's batch results in input order. What is finished is kept in
OUTPUT.partial until everything is: after an interruption the same command goes on from there.

Exit codes: 0 done, 2 bad usage or input, 4 a plan that cannot be trusted, 5 failed while it ran, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; errors are lines on standard error."""
    arguments = _parser().parse_args(argv)
    return outcome("klotski-run", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klotski-run",
        description="Run a plan. Without --input: its own workload on seeded token ids, measured against predicted.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", metavar="PLAN", type=Path, help="what klotski-compile wrote")
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder or cached Hugging Face id (default: the plan's)"
    )
    parser.add_argument("--input", metavar="FILE|-", help="prompts: text lines, JSON lines or OpenAI batch lines")
    parser.add_argument("--output", metavar="FILE|-", help="results as JSON lines (default: standard output)")
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="new tokens for rows that do not say (default: the plan's)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for KV cache that spills to disk (default: here)",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write what ran when, for Perfetto or chrome://tracing"
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads of the CPU's kernels (default: one per core, beside a GPU three fewer)",
    )
    parser.add_argument(
        "--device", default="cuda:0", metavar="cuda:N", help="the GPU of a plan for one (default: cuda:0)"
    )
    parser.add_argument(
        "--emulate",
        action="store_true",
        help="run a plan for a GPU with host memory in the GPU's place: the same ops and tokens, at another speed",
    )
    parser.add_argument("--json", action="store_true", help="print the measurements as one JSON object")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


# ------------------------------------------------------------------------------------------------------------- the run


def _run(arguments: argparse.Namespace) -> str:
    """What to print. Results that go to standard output are there already."""
    _check_usage(arguments)
    plan = load(arguments.plan)
    new_tokens = arguments.max_new_tokens or plan.envelope.gen_len
    if new_tokens > plan.envelope.gen_len:
        most, mend = plan.envelope.gen_len, f"compile one with klotski-compile --gen-len {new_tokens}"
        raise ConfigError("--max-new-tokens", "", f"{new_tokens:,} is more than the plan takes ({most:,}); {mend}")
    if arguments.model is None and not Path(plan.model).is_dir() and "/" not in plan.model:
        raise ConfigError("--model", "", f"is needed: the plan says only that the model is called {plan.model}")
    tune_libraries()
    from klotski_runtime.device import GpuMemory, device_of
    from klotski_runtime.engine import Engine
    from klotski_runtime.locate import model_folder
    from klotski_runtime.skeleton import import_model

    device = device_of(plan, arguments.device, arguments.emulate)
    folder = model_folder(arguments.model or plan.model, "--model")
    config, gpu = import_model(folder), GpuMemory(device)
    output = None if arguments.output is None else Path(arguments.output)
    if arguments.input is not None:
        job: Job = Batch(plan, folder, config, arguments.input, output, new_tokens)
    else:
        job = rehearsal(plan, config, new_tokens)
    if not job.rows:
        job.finish({})
        if arguments.trace:
            print(f"klotski-run: nothing was left to run, so {arguments.trace} is not written", file=sys.stderr)
        return "{}\n" if arguments.json else ""
    idle, read = rss_bytes(), storage_read_bytes()
    try:
        with PeakRss() as peak:
            engine = Engine(
                plan,
                folder,
                config,
                arguments.scratch,
                threads=arguments.threads or 0,
                device=device,
                emulate=arguments.emulate,
                keep_log=arguments.trace is not None,
            )
            if not engine.places.pinned:
                print(
                    "klotski-run: the system locks no more memory, so copies to the GPU are slow; see ulimit -l",
                    file=sys.stderr,
                )
            try:
                wall_s = _generate(engine, job)
            finally:
                engine.close()
    except BaseException as error:
        if note := job.keep():
            error.add_note(note)
        raise
    report = _report(engine, job.rows, wall_s) | {
        "storage_read_bytes": storage_read_bytes() - read,
        "idle_rss_bytes": idle,
        "peak_rss_bytes": peak.nbytes,
        **gpu.peak(),
    }
    job.finish(report)
    if arguments.trace:
        _write_trace(arguments.trace, engine)
    if arguments.json:
        return json.dumps(report) + "\n"
    return _table(plan, report) if arguments.input is None else ""


def _check_usage(arguments: argparse.Namespace) -> None:
    """Refuses before an hour of work what could not be written after it."""
    if arguments.output in ("-", "/dev/stdout"):
        arguments.output = None
    if arguments.output is not None and arguments.input is None:
        raise ConfigError("--output", "", "needs --input: without prompts there are only measurements to print")
    if arguments.json and arguments.input is not None and arguments.output is None:
        raise ConfigError("--json", "", "takes standard output for itself: give --output FILE for the results")
    if arguments.input is not None:
        check_source(arguments.input)
    if arguments.output is not None:
        check_file("--output", Path(arguments.output), arguments.input, arguments.plan)
    if arguments.trace:
        written = None if arguments.output is None else Path(arguments.output)
        check_file("--trace", arguments.trace, arguments.input, arguments.plan, written)
    if not arguments.scratch.is_dir():
        raise ConfigError("--scratch", "", f"{arguments.scratch} is not a folder; name one with room for the KV cache")


def _generate(engine: Engine, job: Job) -> float:
    """Run all groups, or all rows in rolling order; returns the seconds from the first weight byte to the last token."""
    size = len(job.rows) if engine.plan.decision.rolling else engine.plan.envelope.sequences
    began = time.perf_counter()
    with progress_of(sum(row.max_new_tokens for row in job.rows)) as bar:
        engine.load()
        for number, first in enumerate(range(0, len(job.rows), size)):
            group = job.rows[first : first + size]
            bar.begin(number + 1, -(-len(job.rows) // size))
            kept = Keeper(job, first, group)

            def advance(fresh: int, kept: Keeper = kept) -> None:
                bar.advance(fresh)
                kept.ended()

            try:
                engine.run(group, job.end_tokens, number, advance if engine.plan.decision.rolling else bar.advance)
            finally:
                kept.rest()
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------- what it took


def _report(engine: Engine, rows: Sequence[Row], wall_s: float) -> dict[str, Any]:
    """Measured beside predicted; predictions are for the plan's own workload."""
    measured, forecast = engine.measured, engine.plan.forecast
    generated, passes_s = sum(len(row.tokens) for row in rows), measured.prefill_s + measured.decode_s
    return {
        "generated_tokens": generated,
        "wall_s": wall_s,
        "load_s": measured.load_s,
        "predicted_load_s": forecast.load_us / 1e6,
        "prefill_s": measured.prefill_s,
        "decode_s": measured.decode_s,
        "tokens_per_s": generated / wall_s,
        "predicted_tokens_per_s": forecast.tokens_per_s,
        "pass_us": {
            phase: {"measured": measured.pass_us(phase), "predicted": predicted}
            for phase, predicted in forecast.pass_us.items()
        },
        "pass_faults": {phase: measured.pass_faults(phase) for phase in forecast.pass_us},
        "pass_bytes": {phase: measured.pass_bytes(phase) for phase in measured.link_bytes},
        "bubble_fraction": sum(measured.bubble_s.values()) / passes_s,
        "predicted_bubble_fraction": forecast.bubble_fraction,
        "bubble_s": dict(sorted(measured.bubble_s.items())),
        "predicted_bubble_s": {cause: us / 1e6 for cause, us in forecast.bubble_us.items()},
        "busy_s": dict(sorted(measured.busy_s.items())),
        "predicted_busy_s": {stream: busy / 1e6 for stream, busy in forecast.busy_us.items()},
        "bytes_per_link": engine.bytes_per_link,
        "planned_bytes_per_link": forecast.link_bytes,
        "peak_bytes": forecast.peak_bytes,
    }


def _table(plan: Plan, report: dict[str, Any]) -> str:
    """The report of a rehearsal, for a reader."""
    lines = [
        (f"{plan.policy} on {plan.hardware}, {plan.model}", "predicted", "measured"),
        ("tokens/s", f"{report['predicted_tokens_per_s']:,.1f}", f"{report['tokens_per_s']:,.1f}"),
        ("load", _seconds(report["predicted_load_s"]), _seconds(report["load_s"])),
    ]
    for phase, us in report["pass_us"].items():
        lines.append((f"{phase} pass", _seconds(us["predicted"] / 1e6), _seconds(us["measured"] / 1e6)))
    for phase, faults in report["pass_faults"].items():
        lines.append((f"page faults of a {phase} pass", "0", f"{faults:,.0f}"))
    lines.append(("compute waits", f"{report['predicted_bubble_fraction']:.1%}", f"{report['bubble_fraction']:.1%}"))
    for cause, words in CAUSES.items():
        planned, waited = (report[which].get(cause, 0.0) for which in ("predicted_bubble_s", "bubble_s"))
        if planned or waited:
            lines.append((f"  for {words}", _seconds(planned), _seconds(waited)))
    for stream, busy in report["busy_s"].items():
        lines.append((f"{stream} busy", _seconds(report["predicted_busy_s"].get(stream, 0.0)), _seconds(busy)))
    for link, nbytes in report["bytes_per_link"].items():
        lines.append((f"{link} moved", _megabytes(report["planned_bytes_per_link"].get(link, 0)), _megabytes(nbytes)))
    lines.append(("read from storage, by the kernel's count", "", _megabytes(report["storage_read_bytes"])))
    taken = {"host": report["peak_rss_bytes"] - report["idle_rss_bytes"], "gpu": report.get("peak_gpu_bytes", 0)}
    for tier, nbytes in report["peak_bytes"].items():
        lines.append(
            (f"{tier} memory at its peak", _megabytes(nbytes), _megabytes(taken[tier]) if taken.get(tier) else "")
        )
    idle = _megabytes(report["idle_rss_bytes"])
    body = "\n".join(f"{name:<44}{planned:>14}{found:>14}" for name, planned, found in lines)
    tokens = f"{report['generated_tokens']:,} tokens in {_seconds(report['wall_s'])}"
    return f"{body}\n\n{tokens}; memory is beyond the {idle} of Python and its libraries\n"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.2f} ms"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _write_trace(path: Path, engine: Engine) -> None:
    """Every op that ran, on one clock from the first."""
    plan, log = engine.plan, engine.measured.log
    began = min((ran.start for _, _, ops in log for ran in ops), default=0.0)
    text = {phase: [op_text(step.op, plan.names) for step in steps] for phase, steps in plan.steps.items()}
    rows = (
        Event(
            phase,
            ran.stream,
            text[phase][ran.number],
            1e6 * (ran.start - began),
            1e6 * (ran.end - ran.start),
            {"run": number, "pass": ran.at, "op": ran.number},
        )
        for number, (_, phase, ops) in enumerate(log)
        for ran in ops
    )
    try:
        write_whole(path, json.dumps(chrome_trace(rows) | {"plan": plan.digest}))
    except OSError as error:
        raise ExecError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    raise SystemExit(main())
