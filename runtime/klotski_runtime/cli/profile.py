"""``klotski-profile``: measure this machine, or how a model routes its tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from klotski_compiler.actual import read
from klotski_compiler.calibrate import calibrated
from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, numbers, read_hardware, to_json
from klotski_compiler.model import located
from klotski_compiler.outcome import outcome
from klotski_compiler.output import check_file, write_whole
from klotski_compiler.plan import load
from klotski_compiler.prompts import check_source
from klotski_runtime.memory import tune_libraries

EPILOG = """\
examples:
  klotski-profile -o hw.json                          this machine's processor, memory and disk
  klotski-profile -o hw.json --device cuda:0          also GPU 0 and the link to it
  klotski-profile -o hw.json --model MODEL            reading measured on the files that will be read
  klotski-profile -o hw.json --scratch /mnt/nvme      the disk that will hold the weights
  klotski-profile routing MODEL --input prompts.jsonl -o routing.json
  klotski-profile --from-trace trace.json plan.json hw.json -o hw2.json     corrected by what a run measured

Then solve for a schedule:  klotski-compile MODEL hw.json -o plan.json

It takes a minute or two. Leave the machine alone meanwhile: what else runs is measured with it.
`klotski-profile routing --help` explains routing profiles.
"""

ROUTING_EPILOG = """\
example:
  klotski-profile routing ./Qwen3-30B-A3B --input prompts.jsonl -o routing.json
  klotski-compile ./Qwen3-30B-A3B hw.json --routing routing.json -o plan.json

Prompts like those of the real job give a profile like that job's.
"""

Report = Callable[[str, float], None]

# Share of the processors' time that others may take before the numbers deserve a warning.
DISTURBED = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; errors are lines on standard error."""
    arguments = _parser().parse_args(argv)
    work = _routing if arguments.command == "routing" else _hardware
    return outcome("klotski-profile", lambda: work(arguments), "interrupted; nothing was written")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="klotski-profile",
        description="Measure this machine: what klotski-compile plans with.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the hardware profile (JSON) here")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda:N", help="the device that computes (default: cpu)")
    parser.add_argument(
        "--scratch", type=Path, default=Path(), metavar="DIR", help="folder on the disk to measure; 1 GiB for a moment"
    )
    parser.add_argument(
        "--model",
        dest="weights",
        metavar="MODEL",
        help="a checkpoint folder or a Hugging Face id (local cache first): measure reading on its own files, which a disk may "
        "give more slowly than new ones",
    )
    parser.add_argument(
        "--from-trace",
        nargs=3,
        type=Path,
        metavar=("TRACE", "PLAN", "HARDWARE"),
        help="measure nothing: correct HARDWARE, with which PLAN was made, by the TRACE of a run of it (klotski-run --trace)",
    )
    parser.add_argument("--json", action="store_true", help="print the profile as one JSON object instead of a table")

    commands = parser.add_subparsers(dest="command", metavar="[routing ...]", title="other measurements")
    routing = commands.add_parser(
        "routing",
        help="expert popularity and layer-to-layer correlation of a model",
        description="Run prompts through a model and count which experts its routers choose.",
        epilog=ROUTING_EPILOG,
        formatter_class=raw,
    )
    routing.add_argument("model", metavar="MODEL", help="a checkpoint folder or a Hugging Face id (local cache first)")
    routing.add_argument(
        "--input", required=True, metavar="FILE|-", help="prompts: text lines, JSON lines or OpenAI batch lines"
    )
    routing.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="write the profile here")
    return parser


def _hardware(arguments: argparse.Namespace) -> str:
    output: Path | None = arguments.output
    if output is not None:
        check_file("--output", output, *(arguments.from_trace or ())[:2])
    if arguments.from_trace:
        trace, plan_path, base = arguments.from_trace
        plan = load(plan_path)
        corrected = calibrated(read_hardware(base), plan, read(plan, trace), trace)
        name = output.stem if output is not None else corrected.name  # a plan says by which of the two it was made
        return _shown(arguments, corrected.model_copy(update={"name": name}))
    tune_libraries()
    # torch takes seconds to import, and --help and usage errors need none of it
    from klotski_runtime.profile import measure, processor_seconds

    weights = located(arguments.weights).parent if arguments.weights else None
    others, available = processor_seconds()
    name = output.stem if output is not None else "this-machine"
    with _progress() as report:
        hardware = measure(arguments.device, arguments.scratch, weights, name=name, report=report)
    others_after, available_after = processor_seconds()
    share = (others_after - others) / (available_after - available or 1)
    if share > DISTURBED:
        print(
            f"klotski-profile: other programs took {share:.0%} of the processors, so the rates may be too low; "
            "measure again when the machine is idle",
            file=sys.stderr,
        )
    return _shown(arguments, hardware)


def _shown(arguments: argparse.Namespace, hardware: Hardware) -> str:
    """Writes the profile, if it is asked for, and says what is in it."""
    output: Path | None = arguments.output
    if output is not None:
        _write(output, to_json(hardware))
    if arguments.json:
        return to_json(hardware)
    kept = f"written to {output}" if output is not None else "not kept: give -o hw.json to write it to a file"
    return f"{_table(hardware)}\n{kept}\n"


def _routing(arguments: argparse.Namespace) -> str:
    check_file("--output", arguments.output, arguments.input)
    check_source(arguments.input)
    measure: Callable[[str, str, Report], str] = import_module("klotski_runtime.routing").measure
    with _progress() as report:
        text = measure(arguments.model, arguments.input, report)
    _write(arguments.output, text)
    return f"written to {arguments.output}\n"


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError("--output", "", f"{path} cannot be written ({error.strerror}); name another file") from None


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar on standard error while a person watches, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda what, done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _table(hardware: Hardware) -> str:
    """Each number on a line with its unit; a matmul table takes a line per point."""
    lines = [f"{hardware.name}: {hardware.description}", ""]
    for field, value in numbers(hardware).items():
        if isinstance(value, tuple):
            lines.append(field)
            lines += [f"  {f'{tokens} tokens':<46}{_quantity('flops_per_s', rate)}" for tokens, rate in value]
        else:
            lines.append(f"{field:<48}{_quantity(field, value)}")
    return "\n".join(lines) + "\n"


# By the unit at the end of a field's name: what to divide by, and how the quotient is called.
_UNITS = {
    "capacity_bytes": (1 << 30, "GiB"),
    "bytes_per_s": (1e9, "GB/s"),
    "flops_per_s": (1e9, "GFLOP/s"),
    "_us": (1, "us"),
    "shared_speed": (0.01, "%"),
    "beside_cpu": (0.01, "%"),
    "_rows": (1, "rows"),
    "threads": (1, ""),
}


def _quantity(field: str, value: object) -> str:
    divisor, unit = next(known for suffix, known in _UNITS.items() if field.endswith(suffix))
    assert isinstance(value, int | float)
    return f"{value / divisor:12,.2f} {unit}"


if __name__ == "__main__":
    raise SystemExit(main())
