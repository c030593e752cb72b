"""verify: what makes a plan legal, as a table of named checks. Run after every compilation, before every run, and in tests.

Nothing here looks at how a plan was made: the passes that place slots and compute waits are judged by what the executor core would
do with their result. Two checks drive that very core (``execute``): one with a backend that remembers what each slot holds, one
whose streams are vector clocks. Three passes stand for all: what opens a phase, a settled pass, and the last, which opens nothing.
Each check is a loop over the ops, so that a plan of 60,000 takes a second or two. Taken on trust are sizes: of tensors, which the runtime
holds against the checkpoint, and of the workspace that the decision's micro-batches take.
"""

from __future__ import annotations

from collections.abc import Callable

from klotski_compiler import errors
from klotski_compiler.checks import memory, order, text, work
from klotski_compiler.checks.common import Fault
from klotski_compiler.errors import PlanError
from klotski_compiler.garbage import uncollected
from klotski_compiler.plan import Plan


@uncollected()
def verify(plan: Plan) -> None:
    """Raises PlanError, with the name of the check that failed and the plan lines around the fault."""
    for name, check in CHECKS:
        try:
            check(plan)
        except Fault as fault:
            lines = plan.phase(fault.phase).lines if fault.op >= 0 else ()
            shown = (
                errors.window([f"{fault.phase} {n} {line}" for n, line in enumerate(lines)], fault.op) if lines else ""
            )
            raise PlanError(name, fault.why, shown) from None


CHECKS: tuple[tuple[str, Callable[[Plan], None]], ...] = (
    ("ids", text.ids),
    ("phases", text.phases),
    ("parts", text.parts),
    ("streams", text.streams),
    ("arena", memory.arena),
    ("budget", memory.budget),
    ("residents", memory.residents),
    ("picks", work.picks),
    ("work", work.work),
    ("residency", memory.residency),
    ("race", order.race),
)
