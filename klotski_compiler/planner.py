"""The compiler as one call: search every policy asked for, keep the best schedule, prove it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

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

WORTH_A_PROCESS = 200  # experts of a model: of fewer, searching takes less than beginning a process

Found = TypeVar("Found")


@uncollected()
def compile_plan(request: Request, progress: Callable[[str, float], None] | None = None) -> Plan:
    """Solve, time every asked policy, keep the best, prove it. Raises Infeasible where nothing fits."""
    search = Search(request)
    names = POLICIES if request.policy == "auto" else (request.policy,)
    found: dict[str, list[Rated] | Infeasible] = {}
    for name, rated in _side_by_side(search, names):
        if progress:
            progress(name, len(found) / len(names))
        found[name] = rated
    refusals = {name: rated for name in names if isinstance(rated := found[name], Infeasible)}
    timed = [one for name in names if not isinstance(rated := found[name], Infeasible) for one in rated]
    timed += search.borrowed(timed)
    try:
        best = search.whole_best(timed, refusals) or search.leanest(names, refusals)
    except Infeasible as refusal:
        raise explained(request, refusal) from None
    best[0] = reordered(search, polished(search, best[0]))
    plan = record(search, best[0], candidates(best, timed, refusals))
    verify(plan)
    return plan


def _side_by_side(search: Search, names: Sequence[str]) -> Iterator[tuple[str, list[Rated] | Infeasible]]:
    """What each policy finds, as soon as it has; where that takes seconds, in processes of their own, also what is near several starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    workers = min(cores, len(names) + 1)
    if workers < 2 or search.num_experts < WORTH_A_PROCESS:
        yield from ((name, _refusal_or(search.timed, name)) for name in names)
        return
    search.sizes(OURS)  # their bounds, once for all processes
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_adopt, initargs=(search,)) as pool:
        try:
            yield from _shared_out(pool, search, names)
        except BaseException:  # an interrupt, too: nobody waits for what is not begun
            pool.shutdown(cancel_futures=True)
            raise


def _shared_out(
    pool: ProcessPoolExecutor, search: Search, names: Sequence[str]
) -> Iterator[tuple[str, list[Rated] | Infeasible]]:
    started = {name: pool.submit(_apart, Search.begun, name) for name in names}
    ceilings: dict[bool, Future[Any]] = {order: pool.submit(_apart, Search.ceiling, order) for order in search.classes}
    improving: dict[str, tuple[list[Rated], list[Future[Any]]]] = {}
    for name, task in started.items():
        begun = _told(search, task)
        if isinstance(begun, Infeasible):
            yield name, begun
            continue
        rated, starts = begun
        improving[name] = rated, [pool.submit(_apart, Search.improved, start) for start in starts]
        if not starts:
            yield name, _refusal_or(search.chosen, name, rated)
    for name, (rated, better) in improving.items():
        if better:
            yield name, _refusal_or(search.chosen, name, rated + [_told(search, task) for task in better])
    search.ceilings.update({order: _told(search, task) for order, task in ceilings.items()})


# Of a process that ``_side_by_side`` began: what its search remembers serves the next task, too.
_search: Search


def _adopt(search: Search) -> None:
    global _search
    _search = search


def _apart(method: Callable[..., Found], *arguments: object) -> tuple[Found | Infeasible, bool]:
    """What a method of the search finds and whether the time limit struck, in a process of its own."""
    return _refusal_or(partial(method, _search), *arguments), _search.truncated


def _told(search: Search, task: Future[tuple[Found, bool]]) -> Found:
    found, truncated = task.result()
    search.truncated |= truncated
    return found


def _refusal_or(find: Callable[..., Found], *arguments: object) -> Found | Infeasible:
    try:
        return find(*arguments)
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
