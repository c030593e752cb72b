"""Klotski's own machine: what the paper measured there, what its schedule and ours would do at equal rates, how far the bound is.

The paper's row (ASPLOS '25, figure 10; RTX 3090, Mixtral-8x7B, 512 + 32 tokens, batch size 64, n = 15: 22.41 tokens/s) is replayed
with the two efficiency factors that are fitted on the system's calibration cases (``replay_published.py``). Then the same workload is
compiled twice, with the machine's own rates and with rates lowered by those factors: policy ``klotski`` at the paper's sizes, the same
at the sizes that are best for it, and ``joint``, each beside the bound over all schedules at those rates.

    python benchmarks/klotski_machine.py [--output FILE]

It takes a minute.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.published import read_cases, scaled, setup  # noqa: E402
from benchmarks.replay_published import PUBLISHED, Factors, fitted, program, replay  # noqa: E402
from klotski_compiler.hardware import Hardware  # noqa: E402
from klotski_compiler.outcome import outcome  # noqa: E402
from klotski_compiler.output import write_whole  # noqa: E402
from klotski_compiler.plan import Plan  # noqa: E402
from klotski_compiler.planner import Request, compile_plan  # noqa: E402

ROW = "klotski-8x7b-env1-klotski-bs64"
LEAST_TIMES, LEAST_SHARE, MOST_ERROR = 2.0, 0.95, 0.20  # what is asked of joint and of the replay


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="write the table here, with command and date")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "benchmarks/klotski_machine.py", *(sys.argv[1:] if argv is None else argv)])

    def work() -> str:
        text = "\n".join([f"{date.today()}: {command}", "", *table()]) + "\n"
        if arguments.output:
            write_whole(arguments.output, text)
        return text

    return outcome("klotski_machine", work)


def table() -> Iterator[str]:
    """The replay of the paper's row, then every schedule at either rates."""
    cases = read_cases(PUBLISHED)
    row = next(case for case in cases if case.id == ROW)
    factors = fitted([row], cases)[program(row)]
    replayed = replay(row, factors)
    measured, error = replayed.measured or 0.0, replayed.error or 0.0
    yield f"the paper's row, batch size {row.workload.batch_size}, n = {row.workload.num_batches}: {measured:.2f} tokens/s"
    yield f"replayed with its factors (prefill compute x {factors.prefill_compute}, decode transfer x {factors.decode_transfer}): "
    yield f"  {replayed.predicted:.2f} tokens/s, {error:+.1%} (asked: within {MOST_ERROR:.0%})"
    yield ""
    yield f"{'rates':<16}{'schedule':<30}{'n x b':>10}{'tokens/s':>10}{'bound':>9}{'of bound':>10}{'paper x':>9}"
    joint: dict[str, Plan] = {}
    for rates, hardware in _rates(setup(row).search.request, factors):
        request = setup(row).search.request
        for title, policy, sizes in (
            ("klotski, the paper's sizes", "klotski", (request.batch_size, request.num_batches)),
            ("klotski, best sizes", "klotski", (None, None)),
            ("joint", "joint", (None, None)),
        ):
            asked = Request(
                request.spec,
                hardware,
                request.routing,
                request.workload,
                request.budgets,
                request.dtype,
                policy,
                batch_size=sizes[0],
                num_batches=sizes[1],
            )
            plan = compile_plan(asked)
            found, d = plan.forecast, plan.decision
            joint |= {rates: plan} if policy == "joint" else {}
            share = found.tokens_per_s / found.bound_tokens_per_s
            yield (
                f"{rates:<16}{title:<30}{f'{d.num_batches} x {d.batch_size}':>10}{found.tokens_per_s:>10.2f}"
                f"{found.bound_tokens_per_s:>9.2f}{share:>10.3f}{found.tokens_per_s / measured:>9.2f}"
            )
    yield ""
    times = joint["the machine's"].forecast.tokens_per_s / measured
    lowered = joint["the paper's"].forecast
    yield f"joint at the machine's rates: {times:.2f} times the paper's row (asked: {LEAST_TIMES})"
    yield (
        f"joint at the paper's rates: {lowered.tokens_per_s / lowered.bound_tokens_per_s:.3f} of the bound at those rates "
        f"(asked: {LEAST_SHARE})"
    )


def _rates(request: Request, factors: Factors) -> Iterator[tuple[str, Hardware]]:
    yield "the machine's", request.hardware
    yield "the paper's", scaled(request.hardware, factors.prefill_compute, factors.decode_transfer)


if __name__ == "__main__":
    raise SystemExit(main())
