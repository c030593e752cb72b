"""Measured cases of published papers beside what our cost model and simulator predict for the same systems.

Every system runs its published policy on its machine's shared rates; ``published.py`` says what each case means. A system has at
most two factors of its own: on the compute rates while prefill is priced, and on the link bandwidths while decode is. They are
fitted here, on the few cases that its entry names, by least squares of the logarithm; where those leave a factor open, it is 1.

    python benchmarks/replay_published.py [--data FILE] [--json] [--output FILE]        about two minutes
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import product
from math import exp, log
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.published import (  # noqa: E402
    FOUR_MACHINES,
    KLOTSKI,
    MACHINES,
    SYSTEMS,
    Case,
    Setup,
    origin,
    read_cases,
    scaled,
    setup,
    system,
)
from klotski_compiler.cost import Cost  # noqa: E402
from klotski_compiler.decision import Decision, Workload  # noqa: E402
from klotski_compiler.hardware import Hardware  # noqa: E402
from klotski_compiler.outcome import outcome  # noqa: E402
from klotski_compiler.output import write_whole  # noqa: E402
from klotski_compiler.pipeline import LoweredPhase, lower  # noqa: E402

PUBLISHED = Path(__file__).with_name("published_results.json")
SAMPLED = (4, 8)  # layers of the short models that are timed; a model's time is linear in them
COARSE = tuple(2.0**n for n in range(-5, 4))  # factors at which phases are timed to fit between
COARSE_LOGS = tuple(log(factor) for factor in COARSE)
STEPS = 141  # of the fine grid between the first and the last of these, in the logarithm
FINE = tuple(COARSE_LOGS[0] + n * (COARSE_LOGS[-1] - COARSE_LOGS[0]) / (STEPS - 1) for n in range(STEPS))
TIE = 1e-2  # weight of a factor's own square logarithm: decides where the cases do not
WIDE = 0.4  # an error that is explained
EXPLAINED = {
    "klotski-8x7b-env1-klotski-q": "4 bits take as long as 16 in the paper: small batches wait for the host, as in figure 14, not for "
    "the link, and a factor on links cannot say so",
    "klotski-8x7b-env1-klotski": "as figure 14 at n = 15",
    "klotski-8x7b-env1-fig14-bs4": "each further batch of four costs the paper's program 25 ms per layer and pass: twice the host work "
    "that figure 15 shows, and not beside the copies, presumably because both are Python threads of one interpreter",
    "moe-lightning-s1-8x7b-flexgen": "139 or 62 batches of 8 or 16, each with a barrier in FlexGen that the policy leaves out",
    "moe-gen-8x7b-small-bs1-": "one token asks for a quarter of the experts, and the programs fetch no others: two "
    "seconds a token, in which the link carries 40 of 90 GB; the policies fetch all",
    "moe-gen-8x7b-small-bs32-moe-gen": "33.6 tokens/s leave the link 0.95 s for 90 GB: more than PCIe 4.0 carries; the machine is not "
    "named and must have kept most of the model",
    "moe-gen-8x7b-small-bs32-moe-lightning": "re-implemented by MoE-Gen's authors: 6.1 tokens/s are 17 GB/s of weights, as their other "
    "rows have; the factor is fitted to MoE-Lightning's own runs, which copied more slowly",
    "moe-gen-8x7b-small-bs32-flexgen": "the fill keeps experts on the GPU that a batch of 139 leaves no room for; theirs stay away",
    "moe-gen-c1-8x7b-16k-8k": "published as whole tokens per second, 1.5 to 2.5 where it says 2; sizes are not stated, and the share "
    "of CPU attention is only for short prompts",
    "flexgen-t4-opt-175b": "published with one digit: 0.01 is 0.005 to 0.015",
    "flexgen-4xt4-opt-175b": "stages wait for one another and for the network; sizes are not stated",
}


class Factors(NamedTuple):
    """A system's own: on compute rates in prefill, on link bandwidths in decode."""

    prefill_compute: float = 1.0
    decode_transfer: float = 1.0


@dataclass(frozen=True)
class Replayed:
    """A case with its rates per second, predicted for every one that was measured; its ``rate`` is the one that is compared."""

    case: Case
    setup: Setup
    rates: dict[str, float]
    rate: str

    @property
    def predicted(self) -> float:
        """The rate that is compared."""
        return self.rates[self.rate]

    @property
    def measured(self) -> float | None:
        """What the source says of it."""
        return self.case.measured.found.get(self.rate)

    @property
    def error(self) -> float | None:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1 if self.measured else None


# -------------------------------------------------------------------------------------------------------------- pricing


@cache
def phase_s(run: Setup, phase: str, factor: float) -> float:
    """Seconds of one phase of a group with the phase's rates scaled: from short models, for all layers."""
    request, decision = run.search.request, run.decision
    workload = request.workload
    if phase == "prefill":
        hardware = scaled(request.hardware, compute=factor)
        workload = Workload(prompt_len=workload.prompt_len, gen_len=1, num_sequences=workload.num_sequences)
    else:
        hardware = scaled(request.hardware, transfer=factor)
        decision = decision.model_copy(update={"prefill_groups": decision.num_batches})  # as short a program as can be
    few, more = (_cut_us(run, decision, workload, phase, hardware, count) for count in SAMPLED)
    grown = (more - few) / (SAMPLED[1] - SAMPLED[0])
    return (more + grown * (len(request.spec.layers) - SAMPLED[1])) / 1e6


def _cut_us(run: Setup, decision: Decision, workload: Workload, phase: str, hardware: Hardware, layers: int) -> float:
    """Microseconds of a phase of the model cut to so many layers."""
    cut, decided = run.search.short(decision, layers)
    cost = run.cost(decided, hardware)
    lowered = lower(cost, run.policy, cut, workload, quick=True)
    if phase not in lowered.phases:
        return 0.0
    found = lowered.phases[phase]
    total = found.times.total_us
    if run.cache_on_disk:
        total = max(total, *_disk_us(cost, found, decision.sequences))
    return total


def _disk_us(cost: Cost, phase: LoweredPhase, sequences: int) -> tuple[float, float]:
    """Microseconds that the disk takes for a phase's weights and for a KV cache that lives there: reading, writing.

    ``lower`` cannot write KV through a GPU machine's host memory to its disk; the disk works beside all else, so that the phase
    takes as long as the slower of both.
    """
    shape = phase.shape
    position = sequences * sum(layer.kv_elements for layer in cost.spec.layers) * cost.compute_bytes
    seen = (shape.first_context + shape.last_context) / 2 if shape.decoding else 0.0
    new = shape.tokens * shape.sequences / sequences
    read_us = shape.passes * cost.transfer_us("disk>host", position * seen)
    write_us = shape.passes * cost.transfer_us("host>disk", position * new)
    return phase.times.busy_us.get("disk>host", 0.0) + read_us, write_us


def rate(run: Setup, name: str, prefill_s: float, decode_s: float) -> float:
    """Tokens per second of a kind, from the seconds of a group's phases."""
    asked, sequences = run.search.request.workload, run.sequences
    if name == "prefill_tokens_per_s":
        return sequences * asked.prompt_len / prefill_s
    if name == "decode_tokens_per_s":
        return sequences * (asked.gen_len - 1) / decode_s
    return sequences * asked.gen_len / (prefill_s + decode_s)


def needs(name: str) -> tuple[bool, bool]:
    """Whether a rate counts prefill, and whether decode."""
    return name != "decode_tokens_per_s", name != "prefill_tokens_per_s"


def replay(case: Case, factors: Factors) -> Replayed:
    """Predict every rate that was measured."""
    run, names = setup(case), list(case.measured.found) or ["tokens_per_s"]
    prefill, decode = (any(needs(name)[part] for name in names) for part in (0, 1))
    prefill_s = phase_s(run, "prefill", factors.prefill_compute) if prefill else 0.0
    decode_s = phase_s(run, "decode", factors.decode_transfer) if decode else 0.0
    return Replayed(case, run, {name: rate(run, name, prefill_s, decode_s) for name in names}, names[0])


# -------------------------------------------------------------------------------------------------------------- factors


def program(case: Case) -> tuple[str, str]:
    """The system whose factors a case takes."""
    return origin(case), system(case).factors_of or case.system


def fit(cases: Sequence[Case]) -> Factors:
    """The factors that minimise the squared logarithm of predicted over measured, over every rate that the cases give."""
    if not cases:
        return Factors()
    rates = [(setup(case), name, value) for case in cases for name, value in case.measured.found.items()]
    fitted = [any(needs(name)[part] for _, name, _ in rates) for part in (0, 1)]
    curves = [
        tuple(_curve(run, phase) if needs(name)[part] else () for part, phase in enumerate(("prefill", "decode")))
        for run, name, _ in rates
    ]
    grids = [FINE if free else (0.0,) for free in fitted]

    def loss(point: tuple[float, ...]) -> float:
        compute, transfer = point
        total = TIE * (compute**2 + transfer**2)
        for (run, name, value), (prefill, decode) in zip(rates, curves, strict=True):
            total += log(rate(run, name, _at(prefill, compute), _at(decode, transfer)) / value) ** 2
        return total

    compute, transfer = min(product(*grids), key=loss)
    return Factors(round(exp(compute), 3), round(exp(transfer), 3))


def _curve(run: Setup, phase: str) -> tuple[float, ...]:
    """Seconds of a phase at the coarse factors."""
    return tuple(phase_s(run, phase, factor) for factor in COARSE)


def _at(curve: Sequence[float], x: float) -> float:
    """Between the coarse factors, linearly in the logarithms; 0 where the phase does not count."""
    if not curve:
        return 0.0
    step = (COARSE_LOGS[-1] - COARSE_LOGS[0]) / (len(COARSE_LOGS) - 1)
    left = min(int((x - COARSE_LOGS[0]) / step + 1e-9), len(COARSE_LOGS) - 2)
    share = (x - COARSE_LOGS[left]) / step
    if not curve[left]:
        return 0.0
    return exp(log(curve[left]) * (1 - share) + log(curve[left + 1]) * share)


def fitted(cases: Iterable[Case], published: Sequence[Case]) -> dict[tuple[str, str], Factors]:
    """The factors of all programs that the cases need."""
    found = {}
    for key in sorted({program(case) for case in cases}):
        found[key] = fit([case for case in published if program(case) == key and case.id in SYSTEMS[key].calibration])
    return found


# -------------------------------------------------------------------------------------------------------------- summary


def median_error(replays: Iterable[Replayed]) -> float | None:
    """Median of the absolute errors; None where nothing was measured."""
    errors = [abs(r.error) for r in replays if r.error is not None]
    return statistics.median(errors) if errors else None


def group(case: Case) -> tuple[object, ...]:
    """What makes cases comparable: machine, model, prompt and new tokens, the rate; and the number of sequences where the source
    gave all systems the same, not where each took as many as it could."""
    asked = case.workload
    same = asked.num_sequences if origin(case) == KLOTSKI or "-small-" in case.id else None
    unpadded = "unpadded" in case.id
    return (
        case.hardware.name,
        case.model,
        asked.prompt_len,
        asked.gen_len,
        next(iter(case.measured.found), ""),
        same,
        unpadded,
    )


def rank_correlations(replays: Iterable[Replayed]) -> dict[tuple[object, ...], float]:
    """Spearman's coefficient of each group with at least three systems, of each of which the first case counts."""
    groups: dict[tuple[object, ...], dict[str, Replayed]] = defaultdict(dict)
    for r in replays:
        if r.measured:
            groups[group(r.case)].setdefault(r.case.system, r)
    return {
        key: spearman([r.predicted for r in found.values()], [r.measured or 0.0 for r in found.values()])
        for key, found in groups.items()
        if len(found) >= 3
    }


def spearman(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Pearson's coefficient of the ranks; equal numbers share the mean of theirs; 0 where one side is constant."""
    first, second = _ranks(ours), _ranks(theirs)
    return statistics.correlation(first, second) if len(set(first)) > 1 and len(set(second)) > 1 else 0.0


def _ranks(numbers: Sequence[float]) -> list[float]:
    ordered = sorted(numbers)
    return [ordered.index(x) + (ordered.count(x) - 1) / 2 for x in numbers]


# --------------------------------------------------------------------------------------------------------------- report


def as_json(replays: Sequence[Replayed], factors: dict[tuple[str, str], Factors]) -> str:
    """Everything as one JSON object."""
    ranks = rank_correlations(replays)
    found = {
        "cases": [
            {"id": r.case.id, "predicted": r.predicted, "measured": r.measured, "error": r.error} for r in replays
        ],
        "median_abs_error": median_error(replays),
        "rank_correlation": statistics.mean(ranks.values()) if ranks else None,
        "factors": {f"{source}: {name}": value._asdict() for (source, name), value in factors.items()},
    }
    return json.dumps(found, indent=1) + "\n"


def as_text(replays: Sequence[Replayed], factors: dict[tuple[str, str], Factors], command: str) -> str:
    """The tables, under command and date."""
    lines = [f"{date.today()}: {command}", "", *_summary(replays), "", *_cases(replays), ""]
    lines += [*_systems(factors), "", *_ranks_table(replays), "", *_machines(), "", *_misses(replays)]
    return "\n".join(lines) + "\n"


def _summary(replays: Sequence[Replayed]) -> list[str]:
    errors = [abs(r.error) for r in replays if r.error is not None]
    calibrating = {name for entry in SYSTEMS.values() for name in entry.calibration}
    blind = [abs(r.error) for r in replays if r.error is not None and r.case.id not in calibrating]
    ranks = rank_correlations(replays)
    lines = [
        f"{len(errors)} measured cases of {len(replays)}; {len(errors) - len(blind)} of them calibrate their system's factors"
    ]
    if errors:
        within = sum(error <= WIDE for error in errors)
        lines.append(
            f"median absolute error {statistics.median(errors):.1%}; {within} of {len(errors)} within {WIDE:.0%}"
        )
    if blind:
        lines.append(f"of those that calibrate nothing {statistics.median(blind):.1%}")
    if ranks:
        lines.append(f"rank correlation {statistics.mean(ranks.values()):.3f}, mean of {len(ranks)} groups")
    return lines


def _cases(replays: Sequence[Replayed]) -> list[str]:
    lines = [
        "n x b: batches of a group and sequences of a batch. KV: where it lives. * does not fit by our own memory model.",
        "rates in tokens/s; further measured rates of a case, predicted and (measured), at the end of its line",
        "",
        f"{'case':<50}{'policy':<16}{'n x b':>10} {'KV':<5}{'predicted':>10}{'measured':>10}{'error':>8}",
    ]
    for r in replays:
        decision = r.setup.decision
        tier = "disk" if r.setup.cache_on_disk else decision.layers[0].kv
        size = f"{decision.num_batches} x {decision.batch_size}{'' if r.setup.fits else '*'}"
        measured = f"{r.measured:10.3f}{r.error:+8.0%}" if r.measured and r.error is not None else f"{'-':>10}{'-':>8}"
        others = [
            f"{name.split('_')[0]} {value:.2f} ({r.case.measured.found[name]:g})"
            for name, value in r.rates.items()
            if name != r.rate
        ]
        line = f"{r.case.id:<50}{r.setup.policy:<16}{size:>10} {tier:<5}{r.predicted:10.3f}{measured}"
        lines.append("  ".join([line, *others]))
    return lines


def _systems(factors: dict[tuple[str, str], Factors]) -> list[str]:
    lines = ["systems: factors on compute in prefill and on links in decode, fitted on the cases named", ""]
    for key, (compute, transfer) in factors.items():
        entry = SYSTEMS[key]
        lines.append(f"{key[0]}: {key[1]}: prefill compute {compute:.3f}, decode transfer {transfer:.3f}")
        lines.append(f"    {entry.policy}: {entry.why}")
        lines.append(f"    {', '.join(entry.calibration)}")
    shared = [
        (key, entry) for key, entry in SYSTEMS.items() if entry.factors_of and (key[0], entry.factors_of) in factors
    ]
    return [
        *lines,
        *(f"{source}: {name}: factors of {entry.factors_of}; {entry.why}" for (source, name), entry in shared),
    ]


def _ranks_table(replays: Sequence[Replayed]) -> list[str]:
    lines = ["rank correlation (Spearman) of groups with equal machine and workload and at least three systems", ""]
    for key, value in rank_correlations(replays).items():
        name, model, prompt_len, gen_len, rate_name, size, _ = key
        sized = f", {size} sequences" if size else ""
        lines.append(f"{value:6.2f}  {name} {model} {prompt_len} + {gen_len} tokens{sized}: {rate_name}")
    return lines


def _machines() -> list[str]:
    lines = ["machines: shipped profile, and what a source says of this one", ""]
    for name, (profile, changes) in MACHINES.items():
        lines.append(f"{name}: {profile}{', four stages of a quarter of the layers' if name == FOUR_MACHINES else ''}")
        lines += [f"    {field} = {value}: {why}" for field, (value, why) in changes.items()]
    return lines


def _misses(replays: Sequence[Replayed]) -> list[str]:
    lines = [f"errors over {WIDE:.0%}", ""]
    for r in replays:
        if r.error is not None and abs(r.error) > WIDE:
            reasons = [why for prefix, why in EXPLAINED.items() if r.case.id.startswith(prefix)]
            lines.append(f"{r.case.id} {r.error:+.0%}: {reasons[0] if reasons else 'not explained'}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Prints the tables or the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=PUBLISHED, help="cases (default: all published ones)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="write the tables here, with command and date")
    arguments = parser.parse_args(argv)
    words = shlex.join(argv if argv is not None else sys.argv[1:])

    def work() -> str:
        cases = read_cases(arguments.data)
        factors = fitted(cases, read_cases(PUBLISHED))
        replays = [replay(case, factors[program(case)]) for case in cases]
        text = as_text(replays, factors, f"python benchmarks/replay_published.py {words}".rstrip())
        if arguments.output:
            write_whole(arguments.output, text)
        return as_json(replays, factors) if arguments.json else text

    return outcome("replay_published", work)


if __name__ == "__main__":
    raise SystemExit(main())
