"""``klotski-compile``: solve for the schedule of a model on a machine, prove it, and write it down."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klotski_compiler import report
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Workload
from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, read_hardware
from klotski_compiler.kernel_facts import DTYPE_BYTES
from klotski_compiler.model import ModelSpec, located, read_model
from klotski_compiler.outcome import outcome
from klotski_compiler.output import check_file, write_whole
from klotski_compiler.pipeline import PASSES, lower
from klotski_compiler.plan import Plan
from klotski_compiler.policies import POLICIES
from klotski_compiler.prompts import Encoder, Estimate, Limits, Tokenizer, read_requests
from klotski_compiler.routing import Routing, read_routing, uniform
from klotski_compiler.words import count

if TYPE_CHECKING:
    from klotski_compiler.planner import Request

EPILOG = """\
examples:
  klotski-compile mixtral-8x7b rtx3090                                       what would this machine do? nothing is written
  klotski-compile ./Qwen3-30B-A3B hw.json -o plan.json                       for the machine that klotski-profile measured
  klotski-compile ./Qwen3-30B-A3B hw.json -o plan.json --input batch.jsonl   for these prompts
  klotski-compile mixtral-8x7b rtx3090 --sweep memory -o memory.svg           what would more or less memory do?
  klotski-compile ./Qwen3-30B-A3B hw.json -o plan.json --memory gpu=16GiB host=64GiB --routing routing.json

Then read it:  klotski-inspect plan.json      and run it:  klotski-run plan.json --input batch.jsonl --output out.jsonl

Sizes: 24GiB, 375MB, 1.5G or bytes; K, M, G, T and KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB of 1000.
Exit codes: 0 done, 2 bad usage or input, 3 nothing fits (which budgets, by how many bytes), 5 internal fault.
"""

SWEPT = ("num-batches", "memory", "prompt-len")
SETS = {
    "num-batches": ("num-batches", "num-sequences"),  # each number is one group, and that all of the workload
    "prompt-len": ("prompt-len",),
}
PICTURES = (".svg", ".png", ".pdf")
PROMPT_LEN, GEN_LEN, NUM_SEQUENCES = 512, 32, 64

Report = Callable[[str, float], None]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; errors are lines on standard error."""
    arguments = _parser().parse_args(argv)
    return outcome("klotski-compile", lambda: _run(arguments), "interrupted; nothing was written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="klotski-compile",
        description="Solve for the schedule that keeps the slowest part of a machine busy, prove it, and write it down.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, config.json, cached Hugging Face id or shipped profile"
    )
    parser.add_argument("hardware", metavar="HARDWARE", help="a profile that klotski-profile wrote, or a shipped one")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan here")

    work = parser.add_argument_group("workload")
    work.add_argument(
        "--prompt-len", type=_positive, metavar="N", help=f"tokens of the longest prompt (default: {PROMPT_LEN})"
    )
    work.add_argument(
        "--gen-len",
        type=_positive,
        metavar="N",
        help=f"new tokens per prompt (default: {GEN_LEN}, or the most that a row of --input asks for)",
    )
    work.add_argument("--num-sequences", type=_positive, metavar="N", help=f"prompts (default: {NUM_SEQUENCES})")
    work.add_argument(
        "--input", metavar="FILE|-", help="take lengths and count from the prompts that klotski-run is to be given"
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--memory",
        type=_budget,
        nargs="+",
        action="extend",
        default=[],
        metavar="TIER=SIZE",
        help="never use more of a tier than this",
    )
    limits.add_argument("--max-latency", type=_seconds, metavar="SECONDS", help="ceiling on one decode pass")
    limits.add_argument(
        "--time-limit", type=_seconds, default=60.0, metavar="SECONDS", help="of the search (default: 60)"
    )

    choice = parser.add_argument_group("choices, solved for unless given")
    choice.add_argument("--batch-size", type=_auto, metavar="auto|N", help="sequences computed together")
    choice.add_argument("--num-batches", type=_auto, metavar="auto|N", help="batches that share each weight transfer")
    choice.add_argument(
        "--policy", choices=("auto", *POLICIES), default="auto", metavar="NAME", help=f"auto, {', '.join(POLICIES)}"
    )
    choice.add_argument(
        "--dtype", choices=tuple(DTYPE_BYTES), help="what kernels compute in (default: the checkpoint's)"
    )
    choice.add_argument("--routing", metavar="FILE", help="expert popularity, as klotski-profile routing wrote it")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--sweep",
        choices=SWEPT,
        metavar="WHAT",
        help=f"compile for several values of one of {', '.join(SWEPT)} and print a table; -o names a picture (.svg, .png, .pdf)",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    output.add_argument(
        "--dump-after", choices=PASSES, metavar="PASS", help=f"also print the program after {', '.join(PASSES)}"
    )
    return parser


# -------------------------------------------------------------------------------------------------------------- arguments

_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of ``24GiB``, ``375MB``, ``1.5G`` or ``1000``. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (nbytes := round(float(match[1]) * unit)) <= 0:
        raise ValueError(f"{text!r} is not a size such as 24GiB, 375MB, 1.5G or 1000000")
    return nbytes


def _budget(text: str) -> tuple[str, int]:
    tier, equals, amount = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TIER=SIZE, such as gpu=24GiB")
    try:
        return tier, parse_size(amount)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 1 or more")
    return int(text)


def _auto(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


# ---------------------------------------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class Asked:
    """The workload, and what a reader of the plan must know about it."""

    workload: Workload
    notes: tuple[str, ...] = ()


def _run(arguments: argparse.Namespace) -> str:
    output: Path | None = arguments.output
    if output is not None:
        check_file("--output", output, arguments.input, arguments.model, arguments.hardware, arguments.routing)
    if arguments.sweep and (arguments.json or arguments.dump_after):
        raise ConfigError("--sweep", "", "prints a table; leave out --json and --dump-after")
    if arguments.json and arguments.dump_after:
        raise ConfigError(
            "--dump-after", "", "prints text, but --json prints nothing else than one object; choose one of them"
        )
    spec, hardware = read_model(arguments.model), read_hardware(arguments.hardware)
    routing = read_routing(arguments.routing, spec) if arguments.routing else uniform(spec)
    asked = workload(arguments, spec)
    if arguments.sweep:
        return _swept(arguments, _request(arguments, spec, hardware, routing, asked), asked)
    plan = _compiled(arguments, _request(arguments, spec, hardware, routing, asked), asked)
    if output is not None:
        try:
            write_whole(output, plan.dumps())
        except OSError as error:
            raise ConfigError(
                "--output", "", f"{output} cannot be written ({error.strerror}); name another file"
            ) from None
    if arguments.json:
        return json.dumps(report.summary(plan)) + "\n"
    dump = _dump(arguments, plan, Cost(spec, hardware, routing, plan.dtype)) if arguments.dump_after else ""
    kept = f"written to {output}" if output is not None else "not kept: give -o plan.json to write it to a file"
    return f"{dump}{report.decided(plan)}\n{kept}\n"


def _request(
    arguments: argparse.Namespace, spec: ModelSpec, hardware: Hardware, routing: Routing, asked: Asked
) -> Request:
    from klotski_compiler.planner import Request  # the solvers take a second to import; --help needs none

    return Request(
        spec=spec,
        hardware=hardware,
        routing=routing,
        workload=asked.workload,
        budgets=budgets(hardware, arguments.memory),
        dtype=arguments.dtype or spec.compute_dtype,
        policy=arguments.policy,
        batch_size=arguments.batch_size,
        num_batches=arguments.num_batches,
        max_latency_s=arguments.max_latency,
        time_limit_s=arguments.time_limit,
        model_digest=spec.digest,
    )


def _swept(arguments: argparse.Namespace, request: Request, asked: Asked) -> str:
    """The table of a sweep; its picture is written to --output."""
    from klotski_compiler import sweep

    output: Path | None = arguments.output
    if output is not None and output.suffix.lower() not in PICTURES:
        raise ConfigError("--output", "", f"{output} is no picture: name a file that ends in {', '.join(PICTURES)}")
    with _progress() as progress:
        found = sweep.sweep(request, arguments.sweep, progress)
    unused = [option for option in SETS.get(arguments.sweep, ()) if getattr(arguments, option.replace("-", "_"))]
    notes = [f"--{option} does not count: the sweep sets that" for option in unused]
    text = "\n".join([*sweep.table(request, arguments.sweep, found), *asked.notes, *notes]) + "\n"
    if output is None:
        return f"{text}\nno picture: give -o sweep.svg to draw one\n"
    try:
        sweep.draw(request, arguments.sweep, found, output)
    except OSError as error:
        raise ConfigError("--output", "", f"{output} cannot be written ({error.strerror}); name another file") from None
    return f"{text}\ndrawn to {output}\n"


def _compiled(arguments: argparse.Namespace, request: Request, asked: Asked) -> Plan:
    from klotski_compiler.planner import compile_plan

    with _progress() as progress:
        plan = compile_plan(request, progress)
    return plan.model_copy(update={"notes": (*plan.notes, *asked.notes)}).sealed() if asked.notes else plan


def budgets(hardware: Hardware, given: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Bytes of every tier: what the machine has, or what the user allows. Raises ConfigError for a tier that is not there."""
    found = {tier: memory.capacity_bytes for tier, memory in hardware.tiers.items()}
    for tier, nbytes in given:
        if tier not in found:
            raise ConfigError("--memory", tier, f"{hardware.name} has no such tier; choose one of {', '.join(found)}")
        found[tier] = nbytes
    return found


def _dump(arguments: argparse.Namespace, plan: Plan, cost: Cost) -> str:
    """The winner's program after a pass, as text."""
    dumps = lower(cost, plan.policy, plan.decision, plan.workload, arguments.dump_after).dumps
    return "".join(
        f"{phase} after {arguments.dump_after}\n" + "".join(f"  {line}\n" for line in lines)
        for phase, lines in dumps.items()
    )


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


# --------------------------------------------------------------------------------------------------------------- workload


def workload(arguments: argparse.Namespace, spec: ModelSpec) -> Asked:
    """Lengths and count as given, or as found in the input file. Raises ConfigError."""
    if arguments.input is not None:
        return _counted(arguments, spec)
    prompt_len, gen_len = arguments.prompt_len or PROMPT_LEN, arguments.gen_len or GEN_LEN
    if prompt_len + gen_len > spec.max_positions:
        why = f"{prompt_len} prompt and {gen_len} new tokens exceed the {spec.max_positions} positions of {spec.name}"
        option = "--gen-len" if prompt_len < spec.max_positions else "--prompt-len"
        raise ConfigError(option, "", f"{why}; ask for fewer")
    sequences = arguments.num_sequences or NUM_SEQUENCES
    return Asked(Workload(prompt_len=prompt_len, gen_len=gen_len, num_sequences=sequences))


def _counted(arguments: argparse.Namespace, spec: ModelSpec) -> Asked:
    """What a file of prompts asks for, read as klotski-run reads it. Raises ConfigError."""
    if arguments.prompt_len or arguments.num_sequences:
        why = "lengths and count come from the file; leave out --prompt-len and --num-sequences"
        raise ConfigError("--input", "", why)
    own = Tokenizer(located(arguments.model).parent)
    encoder: Encoder = own if own.exists else Estimate()
    most, usual = arguments.gen_len or sys.maxsize, arguments.gen_len or GEN_LEN
    limits = Limits(spec.max_positions - (arguments.gen_len or 1), most, usual, spec.vocab_size, planned=False)
    rows = read_requests(arguments.input, encoder, limits)
    usable = [row for row in rows if not row.refused]
    if not usable:
        why = f"none of {len(rows)} rows can be run, the first because {rows[0].refused}"
        raise ConfigError(arguments.input, "", why)
    longest, wanting = max(usable, key=lambda row: len(row.ids)), max(usable, key=lambda row: row.new_tokens)
    prompt_len, gen_len = len(longest.ids), arguments.gen_len or wanting.new_tokens
    if prompt_len + gen_len > spec.max_positions:
        why = f"its longest prompt ({prompt_len} tokens, line {longest.line}) and its most new tokens ({gen_len}, line {wanting.line})"
        mend = f"exceed the {spec.max_positions} positions of {spec.name}; leave such rows out, or give fewer with --gen-len"
        raise ConfigError(arguments.input, "", f"{why} {mend}")
    name = "standard input" if arguments.input == "-" else Path(arguments.input).name
    notes = [
        f"{name}: {count(len(usable), 'prompt')}, the longest {prompt_len} tokens (line {longest.line}), {encoder.how}"
    ]
    if refused := [row.refused for row in rows if row.refused]:
        notes.append(f"{name}: {len(refused)} of {len(rows)} rows cannot be run, the first because {refused[0]}")
    workload = Workload(prompt_len=prompt_len, gen_len=gen_len, num_sequences=len(usable))
    return Asked(workload, tuple(notes))


if __name__ == "__main__":
    raise SystemExit(main())
