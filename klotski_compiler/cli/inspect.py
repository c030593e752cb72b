"""``klotski-inspect``: read a plan: what was decided, its timeline, its memory, its bubbles."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from klotski_compiler import actual, html, report
from klotski_compiler.errors import ConfigError
from klotski_compiler.outcome import outcome
from klotski_compiler.output import check_file, write_whole
from klotski_compiler.plan import Plan, load
from klotski_compiler.trace import chrome_trace, predicted

EPILOG = """\
examples:
  klotski-inspect plan.json                            decisions, forecast, timeline of a middle layer, memory
  klotski-inspect plan.json --phase prefill --layer 3  the timeline of another layer
  klotski-inspect plan.json --ops 100:140              the plan itself: decode ops 100 to 139
  klotski-inspect plan.json --compare other.json       two plans side by side
  klotski-inspect plan.json --compare trace.json       a run of it (klotski-run --trace) beside the plan: where time went
  klotski-inspect plan.json --html report.html         all of it and every op's place in a pass, in one file for a browser
  klotski-inspect plan.json --trace forecast.json      a predicted pass, to open at https://ui.perfetto.dev

A line of --ops reads: number, stream, what, tensors, >slot, ^source slot, <op that must have ended (' in the pass before),
@start+duration in microseconds of a middle pass.
"""

PHASES = ("decode", "prefill", "load")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; errors are lines on standard error."""
    arguments = _parser().parse_args(argv)
    return outcome("klotski-inspect", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klotski-inspect",
        description="Read a plan: what was decided and why, the predicted speed, its timeline, its memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan.json that klotski-compile wrote")
    parser.add_argument("--phase", choices=PHASES, help="the phase that --ops and the timeline show (default: decode)")
    parser.add_argument(
        "--layer", type=int, metavar="N", help="the layer that the timeline shows (default: the middle one)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a predicted pass as a Chrome trace (JSON)")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write all of it as one page, with a timeline of every op, to open in a browser",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print one JSON object instead")
    what.add_argument("--ops", type=_range, metavar="A:B", help="print ops A to B - 1 of the phase instead")
    what.add_argument(
        "--compare", type=Path, metavar="OTHER", help="print two plans, or a plan and its measured trace, instead"
    )
    return parser


def _range(text: str) -> tuple[int, int]:
    """``A:B``; either end may be left out."""
    first, colon, end = text.partition(":")
    if not colon or (not (first + end).isdecimal() and first + end):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B, such as 100:140")
    return int(first or 0), int(end or 1 << 60)


def _run(arguments: argparse.Namespace) -> str:
    for option in ("trace", "html"):
        path: Path | None = getattr(arguments, option)
        if path:
            check_file(
                f"--{option}", path, arguments.plan, arguments.compare, arguments.html if option == "trace" else None
            )
    plan = load(arguments.plan)
    phase = _phase(plan, arguments.phase)
    layers = len(plan.decision.layers)
    if arguments.layer is not None and not 0 <= arguments.layer < layers:
        raise ConfigError("--layer", "", f"{arguments.layer} is not a layer: {plan.model} has 0 to {layers - 1}")
    if arguments.trace:
        _write("--trace", arguments.trace, json.dumps(chrome_trace(predicted(plan))))
    if arguments.html:
        _write("--html", arguments.html, html.page(plan, phase, arguments.layer))
    if arguments.json:
        return json.dumps(report.summary(plan)) + "\n"
    written = "".join(f"written to {path}\n" for path in (arguments.trace, arguments.html) if path)
    return _shown(arguments, plan, phase) + (f"\n{written}" if written else "")


def _shown(arguments: argparse.Namespace, plan: Plan, phase: str) -> str:
    if arguments.ops:
        if not (shown := report.ops(plan, phase, *arguments.ops)):
            raise ConfigError("--ops", "", f"{phase} has no such ops; it has 0 to {len(plan.steps[phase]) - 1}")
        return shown
    if arguments.compare:
        if actual.is_trace(arguments.compare):
            return actual.compare(plan, actual.read(plan, arguments.compare))
        return report.compare(plan, load(arguments.compare))
    return report.overview(plan, phase, arguments.layer)


def _phase(plan: Plan, asked: str | None) -> str:
    names = [phase.name for phase in plan.phases]
    if asked and asked not in names:
        raise ConfigError("--phase", "", f"this plan has no {asked} phase; it has {', '.join(names)}")
    return asked or names[-1]


def _write(option: str, path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(option, "", f"{path} cannot be written ({error.strerror}); name another file") from None


if __name__ == "__main__":
    raise SystemExit(main())
