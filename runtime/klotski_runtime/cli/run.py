"""``klotski-run``: run a plan on a file of prompts, or on its own workload to compare what was planned with what is."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klotski_compiler.errors import ConfigError, ExecError
from klotski_compiler.outcome import outcome
from klotski_compiler.output import check_file, write_whole
from klotski_compiler.plan import Plan, load, op_text
from klotski_compiler.prompts import Limits, Tokenizer, check_source, read_requests
from klotski_compiler.report import CAUSES
from klotski_compiler.trace import Row as Event
from klotski_compiler.trace import chrome_trace
from klotski_runtime.memory import PeakRss, rss_bytes, storage_read_bytes, tune_libraries
from klotski_runtime.results import Results, completed, request_id

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
"""

SEED = 0
SAMPLE_BYTES = 1 << 16
LINE_S = 60  # from one line of a log to the next
FIRST_WORD = 3
"""The seeded workload leaves out the lowest token ids, which are special ones in most vocabularies."""


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
    if arguments.input is not None:
        job: Job = Batch(plan, folder, config, arguments, new_tokens)
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
    with _progress(sum(row.max_new_tokens for row in job.rows)) as bar:
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


class Keeper:
    """Keeps the rows of a run as they end: in rolling order that is one cohort after the other, long before the last."""

    def __init__(self, job: Job, first: int, group: Sequence[Row]) -> None:
        self.job, self.first, self.group, self.kept = job, first, group, 0

    def ended(self) -> None:
        """Keep the rows that have ended before any that has not."""
        done = self.kept
        while done < len(self.group) and self.group[done].done:
            done += 1
        if done > self.kept:
            self.job.save(self.first + self.kept, self.group[self.kept : done])
            self.kept = done

    def rest(self) -> None:
        """Keep what else has ended."""
        self.job.save(self.first + self.kept, self.group[self.kept :])
        self.kept = len(self.group)


class Job:
    """Rows to run in this order. This plain one keeps no results: a rehearsal's tokens mean nothing."""

    def __init__(self, rows: list[Row], end_tokens: frozenset[int]) -> None:
        self.rows, self.end_tokens = rows, end_tokens

    def save(self, first: int, group: Sequence[Row]) -> None:
        """Keep the finished ones of rows ``first`` onwards."""

    def keep(self) -> str:
        """After a failure: a line that says where the finished rows are."""
        return ""

    def finish(self, report: dict[str, Any]) -> None:
        """All rows have run. report: empty where there was none left to run."""


def rehearsal(plan: Plan, config: Any, new_tokens: int) -> Job:
    """The plan's own workload on seeded token ids; nothing ends a row early."""
    from klotski_runtime.engine import Row

    choose, workload = random.Random(SEED), plan.workload
    first = min(FIRST_WORD, config.vocab_size - 1)
    prompts = [
        [choose.randrange(first, config.vocab_size) for _ in range(workload.prompt_len)]
        for _ in range(workload.num_sequences)
    ]
    return Job([Row(prompt, new_tokens) for prompt in prompts], frozenset())


class Batch(Job):
    """The rows of an input file, longest prompt first: a group pads its prompts to its longest."""

    def __init__(self, plan: Plan, folder: Path, config: Any, arguments: argparse.Namespace, new_tokens: int) -> None:
        """Reads the input and opens the output, which gets the refused rows. Raises ConfigError where no row can run."""
        from klotski_runtime.engine import Row

        self._model, self._tokenizer, self._began = plan.model, Tokenizer(folder), time.time()
        self._output = arguments.output or "standard output"
        envelope = plan.envelope
        limits = Limits(envelope.prompt_len, envelope.gen_len, new_tokens, config.vocab_size)
        self._requests, ends = read_requests(arguments.input, self._tokenizer, limits), end_tokens(folder)
        self._tokenizer.load()
        answering = json.dumps([plan.dtype, sorted(ends), _weights(folder)])
        self._ids = [request_id(request, answering) for request in self._requests]
        usable = [place for place, request in enumerate(self._requests) if not request.refused]
        self._results = Results(Path(arguments.output) if arguments.output else None, self._requests, self._ids)
        if not usable:
            why = f"none of {len(self._requests):,} rows can be run, the first because {self._requests[0].refused}"
            if arguments.output and Path(arguments.output).is_file():
                raise ConfigError(arguments.input, "", f"{why}; {self._output} stays as it was")
            self._results.finish()
            raise ConfigError(arguments.input, "", f"{why}; all reasons are in {self._output}")
        if refused := [request.refused for request in self._requests if request.refused]:
            count = f"{len(refused):,} of {len(self._requests):,} rows cannot be run"
            print(f"klotski-run: {count}, the first because {refused[0]}", file=sys.stderr)
        left = [place for place in usable if place not in self._results.finished]
        self._order = sorted(left, key=lambda place: -len(self._requests[place].ids))
        self._refused, self._earlier = len(self._requests) - len(usable), len(usable) - len(left)
        if self._earlier:
            done = f"{self._earlier:,} of {len(self._requests):,} rows are finished by an earlier run"
            print(f"klotski-run: {done}; {len(left):,} left", file=sys.stderr)
        rows = [Row(self._requests[place].ids, self._requests[place].new_tokens) for place in self._order]
        super().__init__(rows, ends)

    def save(self, first: int, group: Sequence[Row]) -> None:
        places = self._order[first : first + len(group)]
        self._results.add((p, self._completed(p, row)) for p, row in zip(places, group, strict=True) if row.done)

    def keep(self) -> str:
        return self._results.keep()

    def finish(self, report: dict[str, Any]) -> None:
        self._results.finish()
        rows = f"{len(self._requests):,} rows" + (f", {self._refused:,} of them refused" if self._refused else "")
        if self._earlier:
            rows += f", {self._earlier:,} finished by an earlier run"
        if report:
            speed = f"{report['tokens_per_s']:,.1f} tokens/s (predicted {report['predicted_tokens_per_s']:,.1f})"
            rows += f": {report['generated_tokens']:,} tokens in {report['wall_s']:,.1f} s, {speed}"
        print(f"{rows}; written to {self._output}", file=sys.stderr)

    def _completed(self, place: int, row: Row) -> dict[str, Any]:
        request = self._requests[place]
        return completed(request, self._ids[place], row.tokens, row.reason, self._model, self._tokenizer, self._began)


def _weights(folder: Path) -> str:
    """What tells a checkpoint from another, wherever it lies: a digest of a few pieces of each file."""
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for quarter in range(4):
                file.seek(quarter * size // 4)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def end_tokens(folder: Path) -> frozenset[int]:
    """The ids that end a text: those of generation_config.json or, where it names none, of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(path, "", f"cannot be read as JSON ({error}); download it again") from None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


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


# ----------------------------------------------------------------------------------------------------------- progress


class Progress:
    """Tokens so far, and their rate since the first group began."""

    def __init__(self) -> None:
        self.tokens, self._began, self._group = 0, 0.0, ""

    def begin(self, group: int, groups: int) -> None:
        """A group starts."""
        self._began = self._began or time.perf_counter()
        self._group = f"group {group} of {groups}"

    def advance(self, tokens: int) -> None:
        """That many tokens were generated."""
        self.tokens += tokens
        rate = self.tokens / (time.perf_counter() - self._began)
        self.show(f"{self._group}, {self.tokens:,} tokens, {rate:,.1f} tokens/s")

    def show(self, said: str) -> None:
        """To who watches."""


class Lines(Progress):
    """For a log: a line now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.perf_counter()

    def show(self, said: str) -> None:
        if (now := time.perf_counter()) - self._last > LINE_S:
            self._last = now
            print(f"klotski-run: {said}", file=sys.stderr, flush=True)


@contextmanager
def _progress(most_tokens: int) -> Iterator[Progress]:
    """A bar on standard error where that is a terminal. most_tokens: if no row ends early."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich import progress
    from rich.console import Console

    class Bar(Progress):
        """For a person."""

        def __init__(self, shown: progress.Progress) -> None:
            super().__init__()
            self._shown, self._task = shown, shown.add_task("loading weights", total=most_tokens)

        def show(self, said: str) -> None:
            self._shown.update(self._task, completed=self.tokens, description=said)

    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn()
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Bar(shown)


if __name__ == "__main__":
    raise SystemExit(main())
