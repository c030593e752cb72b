"""The compiler as one call: search every policy asked for, keep the best schedule, prove it."""

from __future__ import annotations

from collections.abc import Callable

from klotski_compiler.errors import Infeasible
from klotski_compiler.explain import explained
from klotski_compiler.garbage import uncollected
from klotski_compiler.plan import Candidate, Decision, Plan
from klotski_compiler.policies import POLICIES
from klotski_compiler.record import record
from klotski_compiler.search import Best, Request, Search
from klotski_compiler.verify import verify

__all__ = ["Request", "compile_plan"]


@uncollected()
def compile_plan(request: Request, progress: Callable[[str, float], None] | None = None) -> Plan:
    """Solve, time every asked policy, keep the best, prove it. Raises Infeasible where nothing fits."""
    search = Search(request)
    names = POLICIES if request.policy == "auto" else (request.policy,)
    while True:
        timed: list[tuple[float, str, Decision]] = []
        refusals: dict[str, Infeasible] = {}
        for number, name in enumerate(names):
            if progress:
                progress(name, number / len(names))
            try:
                timed += search.timed(name)
            except Infeasible as refusal:
                refusals[name] = refusal
        try:
            best = search.whole_best(timed, refusals)
            break
        except Infeasible:
            if search.narrow(timed):
                continue
            try:
                best = search.leanest(names, refusals)
                break
            except Infeasible as refusal:
                raise explained(request, refusal) from None
    plan = record(search, best[0], candidates(best, timed, refusals))
    verify(plan)
    return plan


def candidates(
    best: list[Best], timed: list[tuple[float, str, Decision]], refusals: dict[str, Infeasible]
) -> list[Candidate]:
    """One line per policy, fastest first: its whole schedule where it was lowered, else its estimate, else why there is none."""
    found = {b.policy: (b.tokens_per_s, b.decision) for b in reversed(best)}
    for rate, name, decision in timed:
        if name not in refusals:
            found.setdefault(name, (rate, decision))
    lines = [
        Candidate(policy=name, tokens_per_s=rate, num_batches=d.num_batches, batch_size=d.batch_size, feasible=True)
        for name, (rate, d) in found.items()
    ]
    lines += [_refused(name, refusal) for name, refusal in refusals.items() if name not in found]
    return sorted(lines, key=lambda c: -c.tokens_per_s)


def _refused(name: str, refusal: Infeasible) -> Candidate:
    why = str(refusal).splitlines()[0]
    return Candidate(policy=name, tokens_per_s=0.0, num_batches=0, batch_size=0, feasible=False, why_not=why)
