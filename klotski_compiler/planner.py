"""The compiler as one call: search every policy asked for, keep the best schedule, prove it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from klotski_compiler.errors import Infeasible
from klotski_compiler.explain import explained
from klotski_compiler.garbage import uncollected
from klotski_compiler.plan import Candidate, Plan
from klotski_compiler.policies import OURS, POLICIES
from klotski_compiler.polish import polished
from klotski_compiler.record import record
from klotski_compiler.reorder import reordered
from klotski_compiler.search import Best, Rated, Request, Search
from klotski_compiler.verify import verify

__all__ = ["Request", "compile_plan"]

WORTH_A_PROCESS = (
    200  # experts of a model for which searching takes longer than to begin a process and to hand over what it found
)


@uncollected()
def compile_plan(request: Request, progress: Callable[[str, float], None] | None = None) -> Plan:
    """Solve, time every asked policy, keep the best, prove it. Raises Infeasible where nothing fits."""
    search = Search(request)
    names = POLICIES if request.policy == "auto" else (request.policy,)
    while True:
        timed: list[Rated] = []
        refusals: dict[str, Infeasible] = {}
        for number, (name, found) in enumerate(_side_by_side(search, names)):
            if progress:
                progress(name, number / len(names))
            if isinstance(found, Infeasible):
                refusals[name] = found
            else:
                timed += found
        timed += search.borrowed(timed)
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
    best[0] = reordered(search, polished(search, best[0]))
    plan = record(search, best[0], candidates(best, timed, refusals))
    verify(plan)
    return plan


def _side_by_side(search: Search, names: Sequence[str]) -> Iterator[tuple[str, list[Rated] | Infeasible]]:
    """What each policy finds, in the order of their names; where it takes seconds, in processes of their own."""
    workers = min(len(names), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if workers < 2 or search.num_experts < WORTH_A_PROCESS:
        yield from ((name, _timed(search, name)) for name in names)
        return
    search.sizes(OURS)  # their bounds, once for all processes
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for name, (found, truncated) in zip(names, pool.map(partial(_apart, search), names), strict=True):
            search.truncated |= truncated
            yield name, found


def _apart(search: Search, name: str) -> tuple[list[Rated] | Infeasible, bool]:
    """What a policy finds and whether the time limit struck, in a process of its own."""
    return _timed(search, name), search.truncated


def _timed(search: Search, name: str) -> list[Rated] | Infeasible:
    try:
        return search.timed(name)
    except Infeasible as refusal:
        return refusal


def candidates(best: list[Best], timed: list[Rated], refusals: dict[str, Infeasible]) -> list[Candidate]:
    """One line per policy, fastest first: its whole schedule where it was lowered, else its estimate, else why there is none."""
    found = {b.policy: (b.tokens_per_s, b.decision) for b in reversed(best)}
    for rated in sorted(timed, key=lambda r: -r.tokens_per_s):
        if rated.policy not in refusals:
            found.setdefault(rated.policy, (rated.tokens_per_s, rated.decision))
    lines = [
        Candidate(policy=name, tokens_per_s=rate, feasible=True, batches=d.batches) for name, (rate, d) in found.items()
    ]
    lines += [_refused(name, refusal) for name, refusal in refusals.items() if name not in found]
    return sorted(lines, key=lambda c: -c.tokens_per_s)


def _refused(name: str, refusal: Infeasible) -> Candidate:
    why = str(refusal).splitlines()[0]
    return Candidate(policy=name, tokens_per_s=0.0, feasible=False, why_not=why)
