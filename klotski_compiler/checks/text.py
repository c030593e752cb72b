"""Whether what a plan says exists: ids, phases, batches, streams, and waits that point backwards."""

from __future__ import annotations

from collections import Counter

from klotski_compiler.checks.common import Fault, is_sent, phases_of
from klotski_compiler.ops import (
    ALL,
    FUNCTIONS,
    NOWHERE,
    RULES,
    SEVERAL,
    SINGLE,
    Bind,
    Compute,
    Load,
    Step,
    Store,
    batches_of,
)
from klotski_compiler.plan import Phase, Plan


def ids(plan: Plan) -> None:
    """Every line parses, and every id that it or a table names exists."""
    tensors, slots = len(plan.tensors), len(plan.slots)
    for what, found in (("tensor", [t.id for t in plan.tensors]), ("slot", [s.id for s in plan.slots])):
        if found != list(range(len(found))):
            raise Fault(f"a {what} id is not its position")
    if len(set(plan.names)) != tensors:
        raise Fault("two tensors have one name")
    if len({phase.name for phase in plan.phases}) != len(plan.phases):
        raise Fault("two phases have one name")
    for owner, placed in (("the plan", plan.placed), *((phase.name, phase.placed) for phase in plan.phases)):
        for tensor, slot in placed:
            if not (0 <= tensor < tensors and 0 <= slot < slots):
                raise Fault(
                    f"{owner} places tensor {tensor} in slot {slot}: there are {tensors} tensors and {slots} slots"
                )
    for phase, steps in phases_of(plan):
        for number, step in enumerate(steps):
            if why := _out_of_range(plan, phase, step):
                raise Fault(why, phase.name, number)


def phases(plan: Plan) -> None:
    """What is resident is loaded once; prefill and decode have the batches and passes that follow from the decision, the workload and
    the envelope; there are as many KV caches and pages of the head as the decision says."""
    d, gen_len = plan.decision, plan.envelope.gen_len
    prefill, decode = (d.part_batches, d.prefill_groups), (d.num_batches, gen_len - 1)
    if d.rolling:  # one round, unless all rounds are passes of one phase
        stride = d.stride(gen_len)
        prefill, decode = (
            (d.num_batches, d.rounds(plan.workload.num_sequences) if stride == 1 else 1),
            (d.num_batches, stride - 1),
        )
    wanted = {"load": (0, 1), "prefill": prefill} | ({"decode": decode} if decode[1] else {})
    found = {phase.name: (phase.batches, phase.passes) for phase in plan.phases}
    if found != wanted:
        name = next(name for name in (*wanted, *found) if wanted.get(name) != found.get(name))
        has, asked = (
            "{} batches in {} passes".format(*pairs[name]) if name in pairs else "no part" for pairs in (found, wanted)
        )
        raise Fault(f"phase {name} has {has} of the plan, by the decision {asked}")
    counts = Counter((tensor.kind, tensor.layer) for tensor in plan.tensors if tensor.kind in ("kv", "head"))
    for kind, layer, count in (
        ("head", -1, d.head_parts),
        *(("kv", n, d.num_batches) for n in range(len(d.layers))),
    ):
        if counts[kind, layer] != count:
            raise Fault(
                f"{counts[kind, layer]} tensors are {kind}{f' of layer {layer}' * (layer >= 0)}, by the decision {count}"
            )


def parts(plan: Plan) -> None:
    """What prefill's sub-groups all run, with batches of their own, is the same for all of them: where a batch's KV lives. In rolling
    order, and where the last batch of each differs from the others, they are equally large."""
    decision = plan.decision
    if decision.last_batch and (decision.num_batches % decision.prefill_groups or decision.part_batches < 2):
        raise Fault(
            f"{decision.num_batches} batches in {decision.prefill_groups} sub-groups cannot each have a last one"
        )
    if decision.rolling and (decision.prefill_groups < 2 or decision.num_batches % decision.prefill_groups):
        raise Fault(f"{decision.num_batches} batches cannot roll in {decision.prefill_groups} sub-groups of equal size")
    homes: dict[tuple[int, int], str] = {}
    for tensor in plan.tensors:
        if tensor.kind == "kv":
            place = tensor.layer, tensor.index % plan.decision.part_batches
            if homes.setdefault(place, tensor.home) != tensor.home:
                raise Fault(f"{plan.names[tensor.id]} lives in {tensor.home}, a batch in its place in {homes[place]}")


def _out_of_range(plan: Plan, phase: Phase, step: Step) -> str:
    op = step.op
    if op.stream not in plan.streams:
        return f"stream {op.stream} is not among {', '.join(plan.streams)}"
    places = *step.slots, *step.sources
    if places and not NOWHERE <= min(places) <= max(places) < len(plan.slots):
        return f"names a slot beyond the {len(plan.slots)} of the plan"
    if NOWHERE in step.slots and any(
        slot == NOWHERE and plan.tensors[t].kind != "pick"
        for t, slot in zip(op.tensors, step.slots, strict=False)  # type: ignore[union-attr]
    ):
        return "has a tensor without a slot that is no pick"
    wanted = 0 if isinstance(op, Bind) else len(op.tensors)
    slots, sources = ({0, wanted} if isinstance(op, Store) else {wanted}), {0, wanted}
    if len(step.slots) not in slots or len(step.sources) not in sources:
        return f"has {len(step.slots)} slots and {len(step.sources)} source slots for {wanted} tensors"
    if wanted > 1 and not isinstance(op, Bind) and len(set(op.tensors)) < wanted:
        return "names a tensor twice"
    if isinstance(op, Load | Store):
        return "" if op.link.count(">") == 1 else f"link {op.link} is not of the form tier>tier"
    if op.stream not in plan.processors:
        return f"computes on {op.stream}, which is no processor"
    batches = max(1, phase.batches)
    scope = batches_of(op.batch, batches)
    if not (-1 <= op.layer < len(plan.decision.layers) and _may_take(op) and scope.start < scope.stop <= batches):
        return f"layer {op.layer} or batch {op.batch} does not exist"
    if isinstance(op, Bind):
        return "" if op.rule in RULES and op.count > 0 else f"binds {op.count} picks by {op.rule}"
    return "" if op.fn in FUNCTIONS else f"there is no function {op.fn}"


def _may_take(op: Compute | Bind) -> bool:
    """Whether an op of that kind works on such batches: one, some in a row, or all."""
    if isinstance(op, Bind):
        return op.batch >= ALL
    return op.fn in SEVERAL or (op.batch > ALL if op.fn in SINGLE else op.batch == ALL)


def streams(plan: Plan) -> None:
    """Every wait points backwards, so FIFO streams cannot deadlock; kernels and binds share one stream, so that hidden states
    and routing are read and written in the order of the lines: another processor has only what it is sent."""
    for phase, steps in phases_of(plan):
        compute = {
            step.op.stream for step in steps if isinstance(step.op, Compute | Bind) and not is_sent(plan, step.op)
        }
        if len(compute) > 1:
            raise Fault(
                f"phase {phase.name} computes on {' and '.join(sorted(compute))}: hidden states would have no order"
            )
        for number, step in enumerate(steps):
            for wait in step.waits:
                if not 0 <= wait.op < len(steps) or wait.back not in (0, 1):
                    raise Fault(
                        f"waits for op {wait.op}, {wait.back} passes back, which does not exist", phase.name, number
                    )
                if wait.back == 0 and wait.op >= number:
                    raise Fault(f"waits for op {wait.op}, which does not come before it", phase.name, number)
