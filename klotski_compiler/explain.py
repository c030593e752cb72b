"""Why nothing fits: the budgets that conflict, and the nearest change of each kind that would make something fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from klotski_compiler.errors import Infeasible
from klotski_compiler.policies import OURS
from klotski_compiler.search import Request, Search


def explained(request: Request, refusal: Infeasible) -> Infeasible:
    """The refusal with a mend for each thing that the user may change. Raises nothing."""
    if not refusal.shortfalls:
        return refusal
    more = " ".join(f"{tier}={request.budgets[tier] + nbytes}" for tier, nbytes in refusal.shortfalls.items())
    mends = [f"--memory {more}", *_smaller(request)]
    return Infeasible(refusal.shortfalls, f"what would fit, one change at a time: {'; '.join(mends)}")


def _smaller(request: Request) -> Iterator[str]:
    """The largest value of every size at which one schedule fits, where a smaller one helps."""
    workload = request.workload

    def prompts(length: int) -> Request:
        return replace(request, workload=workload.model_copy(update={"prompt_len": length}))

    def texts(length: int) -> Request:
        return replace(request, workload=workload.model_copy(update={"gen_len": length}))

    sizes: list[tuple[str, int | None, Callable[[int], Request]]] = [
        ("--batch-size {}", request.batch_size, lambda size: replace(request, batch_size=size)),
        ("--num-batches {}", request.num_batches, lambda count: replace(request, num_batches=count)),
        ("--prompt-len {} (with --input: without longer prompts)", workload.prompt_len, prompts),
        ("--gen-len {}", workload.gen_len, texts),
    ]
    for mend, now, changed in sizes:
        if now is not None and (most := _most(now, lambda value, changed=changed: _fits(changed(value)))):  # type: ignore[misc]
            yield mend.format(most)


def _most(now: int, fits: Callable[[int], bool]) -> int:
    """The largest value below ``now`` that fits, 0 if none does. Fitting is monotone."""
    if now < 2 or not fits(1):
        return 0
    low, high = 1, now
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(request: Request) -> bool:
    """Whether the smallest group of a policy has room, by the formulas of the search."""
    search, name = Search(request), OURS if request.policy == "auto" else request.policy
    bases = list(search.bases_of(name, [(request.batch_size or 1) * (request.num_batches or 1)]))
    try:
        search.fill(name, min(bases, key=lambda base: base.lead))
    except Infeasible:
        return False
    return True
