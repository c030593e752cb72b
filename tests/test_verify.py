"""Every plan that the passes make is legal, and every way to spoil one is caught by the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from klotski_compiler.decision import Workload
from klotski_compiler.errors import PlanError
from klotski_compiler.ops import ALL, Bind, Compute, Load, Step, Store, Wait, span, step_text
from klotski_compiler.plan import Plan
from klotski_compiler.policies import POLICIES
from klotski_compiler.verify import CHECKS, verify
from plans import edited, tiny_plan, tiny_spec, with_step

PLACES = ((False, "host"), (False, "disk"), (True, "gpu"), (True, "host"))


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_plans_of_every_policy_are_legal(policy: str, gpu: bool, kv: str) -> None:
    variants: tuple[tuple[int, dict[str, Any]], ...] = (
        (8, {}),
        (2, {"unit": 2, "head_pages": 0}),
        (1, {"embedding": False, "head_pages": 3}),
    )
    for gen_len, changes in variants:
        verify(
            tiny_plan(policy, gpu, kv, workload=Workload(prompt_len=16, gen_len=gen_len, num_sequences=12), **changes)
        )


@pytest.mark.parametrize("policy", ["joint", "klotski", "flexgen"])
def test_prefill_in_sub_groups_is_legal(policy: str) -> None:
    verify(tiny_plan(policy, prefill_groups=2))
    verify(tiny_plan(policy, gpu=True, kv="host", prefill_groups=3))


def test_the_last_pass_is_as_ordered_as_the_others() -> None:
    """Two layers: the only waits before the head's load on the link are those of the loads that wrap."""
    for gpu in (False, True):
        for pages in (1, 2, 4):
            verify(tiny_plan("flexgen", gpu, spec=tiny_spec(2), head_pages=pages, num_batches=1))


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", ["joint", "klotski", "flexgen"])
def test_no_wait_can_be_dropped(policy: str, gpu: bool, kv: str) -> None:
    plan = tiny_plan(policy, gpu, kv, workload=Workload(prompt_len=16, gen_len=4, num_sequences=6))
    dropped = 0
    for number, step in enumerate(plan.steps["decode"]):
        for wait in step.waits:
            less = step._replace(waits=tuple(w for w in step.waits if w != wait))
            assert caught(with_step(plan, "decode", number, less)) == "race", f"{number} without {wait}"
            dropped += 1
    assert dropped > 10


def caught(plan: Plan) -> str:
    """The name of the check that refuses a plan."""
    with pytest.raises(PlanError) as refusal:
        verify(plan)
    return refusal.value.check


def first(plan: Plan, wanted: Callable[[Step], bool]) -> int:
    """The first decode step that is wanted."""
    return next(n for n, step in enumerate(plan.steps["decode"]) if wanted(step))


def loads(kind: str) -> Callable[[Step], bool]:
    return lambda step: isinstance(step.op, Load) and kind in step_kinds(step)


def step_kinds(step: Step) -> set[str]:
    return set() if isinstance(step.op, Bind) else {PLAN.tensors[t].kind for t in step.op.tensors}


def computes(fn: str) -> Callable[[Step], bool]:
    return lambda step: isinstance(step.op, Compute) and step.op.fn == fn


PLAN = tiny_plan("joint")
SPILLED = tiny_plan("joint", gpu=True, kv="host")
STEPS = PLAN.steps["decode"]


def changed(wanted: Callable[[Step], bool], change: Callable[[Step], Step]) -> Plan:
    number = first(PLAN, wanted)
    return with_step(PLAN, "decode", number, change(STEPS[number]))


def on_another_processor() -> Plan:
    """One router computes on a second processor of the compute tier."""
    changed_ = op_changed(computes("router"), stream="npu")
    return edited(changed_, processors={"cpu": "host", "npu": "host"}, streams=(*PLAN.streams, "npu"))


def op_changed(wanted: Callable[[Step], bool], **fields: object) -> Plan:
    return changed(wanted, lambda step: with_op(step, **fields))


def with_op(step: Step, **fields: object) -> Step:
    op: Any = step.op
    return step._replace(op=op._replace(**fields))


def other_slot(step: Step) -> Step:
    """Another slot that decode streams experts through."""
    streamed = {s.slots[0] for s in STEPS if loads("expert")(s) or loads("pick")(s)}
    return step._replace(slots=(min(streamed - {*step.slots}),))


def resident_slot(step: Step) -> Step:
    return step._replace(slots=(next(slot for t, slot in PLAN.placed if PLAN.tensors[t].kind == "expert"),))


def resized(by: int) -> Plan:
    number = next(s for s in STEPS[first(PLAN, loads("expert"))].slots)
    slots = [s._replace(nbytes=s.nbytes + by) if s.id == number else s for s in PLAN.slots]
    return edited(PLAN, slots=tuple(slots))


def reforecast(**fields: object) -> Plan:
    return edited(PLAN, forecast=PLAN.forecast.model_copy(update=fields))


def redecided(layer: int, **fields: object) -> Plan:
    layers = [la.model_copy(update=fields) if n == layer else la for n, la in enumerate(PLAN.decision.layers)]
    return edited(PLAN, decision=PLAN.decision.model_copy(update={"layers": tuple(layers)}))


def garbled(text: str) -> Plan:
    decode = PLAN.phase("decode")
    lines = (decode.lines[0] + text, *decode.lines[1:])
    return edited(PLAN, phases=tuple(p.model_copy(update={"lines": lines}) if p is decode else p for p in PLAN.phases))


def without(wanted: Callable[[Step], bool]) -> Plan:
    return with_step(PLAN, "decode", first(PLAN, wanted), None)


def shared_twice() -> Plan:
    """A shared expert once more in the place of the layer's first experts."""
    again = STEPS[first(PLAN, computes("shared"))]
    return with_step(PLAN, "decode", first(PLAN, computes("experts")), again)


def twice_bound() -> Plan:
    """A second bind of a layer in the place of its next expert compute."""
    number = first(PLAN, lambda s: isinstance(s.op, Bind))
    later = next(n for n in range(number + 1, len(STEPS)) if isinstance(STEPS[n].op, Compute))
    return with_step(PLAN, "decode", later, STEPS[later]._replace(op=STEPS[number].op, slots=()))


def unlike_parts() -> Plan:
    """Prefill in two parts of one batch each, one of whose KV is said to live elsewhere."""
    plan = tiny_plan("joint", gpu=True, kv="host", num_batches=2, prefill_groups=2)
    number = next(t.id for t in plan.tensors if t.kind == "kv")
    tensors = [t._replace(home="gpu") if t.id == number else t for t in plan.tensors]
    return edited(plan, tensors=tuple(tensors))


def uneven_parts() -> Plan:
    """Three batches in two parts of prefill, of which only one can have a last batch of its own size."""
    plan = tiny_plan("joint", gpu=True, kv="host", num_batches=3, prefill_groups=2)
    return edited(plan, decision=plan.decision.model_copy(update={"last_batch": 1}))


def experts_by_batch() -> Plan:
    """Experts computed batch by batch where batches are of two sizes."""
    plan = tiny_plan("flexgen", gpu=True, kv="host", num_batches=2)
    return edited(plan, decision=plan.decision.model_copy(update={"last_batch": 1}))


def twice_over_some() -> Plan:
    """A resident over all batches, and over the first two again in the place of the next op of experts."""
    number, later = [n for n, step in enumerate(STEPS) if computes("experts")(step)][:2]
    return with_step(PLAN, "decode", later, with_op(STEPS[number], batch=span(0, 2)))


def dropped(plan: Plan, move: type[Load | Store], kind: str, phase: str = "decode") -> Plan:
    """Without one of the loads, or stores, of that kind, and without what other ops waited for because of it."""
    steps = plan.steps[phase]
    number = next(
        n
        for n, s in enumerate(steps)
        if isinstance(s.op, move) and kind in {plan.tensors[t].kind for t in s.op.tensors}
    )
    return with_step(in_turn(plan, phase), phase, number, None)


def in_turn(plan: Plan, phase: str) -> Plan:
    """Every op waits for the one before it, the first for the last: what is wrong then is no matter of order."""
    steps = plan.steps[phase]
    for number, step in enumerate(steps):
        before = Wait(number - 1, 0) if number else Wait(len(steps) - 1, 1)
        plan = with_step(plan, phase, number, step._replace(waits=(before,)))
    return plan


def again(plan: Plan, wanted: Callable[[Step], bool]) -> Plan:
    """A decode op twice, one after the other."""
    plan = in_turn(plan, "decode")
    number = first(plan, wanted)
    lines = list(plan.phase("decode").lines)
    lines.insert(number + 1, step_text(plan.steps["decode"][number]._replace(waits=()), plan.names))
    return with_phase(plan, "decode", lines=tuple(lines))


def with_phase(plan: Plan, name: str, **fields: object) -> Plan:
    return edited(plan, phases=tuple(p.model_copy(update=fields) if p.name == name else p for p in plan.phases))


def without_phase(name: str) -> Plan:
    return edited(PLAN, phases=tuple(phase for phase in PLAN.phases if phase.name != name))


def decided(**fields: object) -> Plan:
    return edited(PLAN, decision=PLAN.decision.model_copy(update=fields))


def states_elsewhere(slot: int) -> Plan:
    """Decode's hidden states in another slot."""
    phase = PLAN.phase("decode")
    placed = tuple((t, slot if PLAN.tensors[t].kind == "state" else own) for t, own in phase.placed)
    return with_phase(PLAN, "decode", placed=placed)


def experts_through_states() -> Plan:
    """An expert is streamed through the slot of the hidden states."""
    slot = next(own for t, own in PLAN.phase("decode").placed if PLAN.tensors[t].kind == "state")
    slots = [s._replace(nbytes=max(o.nbytes for o in PLAN.slots)) if s.id == slot else s for s in PLAN.slots]
    number = first(PLAN, loads("expert"))
    plan = with_step(PLAN, "decode", number, STEPS[number]._replace(slots=(slot,) * len(STEPS[number].slots)))
    slots = [s._replace(offset=1 << 24) if s.id == slot else s for s in slots]
    return edited(plan, slots=tuple(slots), forecast=PLAN.forecast.model_copy(update={"peak_bytes": {"host": 1 << 30}}))


def twice_named(step: Step) -> Step:
    return with_op(step, tensors=step.op.tensors + step.op.tensors[:1])._replace(slots=step.slots + step.slots[:1])  # type: ignore[union-attr]


HELPED = tiny_plan("joint", gpu=True, kv="host", cpu_batches=1)
SENT = tiny_plan("fiddler", gpu=True, kv="host")
HIGHEST = max(PLAN.forecast.peak_bytes.values())
SPOILED: dict[str, tuple[str, Callable[[], Plan]]] = {
    "a line is no step": ("text", lambda: garbled(" >x")),
    "a slot does not exist": ("ids", lambda: changed(loads("expert"), lambda s: s._replace(slots=(len(PLAN.slots),)))),
    "a tensor has no slot": ("ids", lambda: changed(loads("expert"), lambda s: s._replace(slots=()))),
    "a batch does not exist": ("ids", lambda: op_changed(computes("attention"), batch=3)),
    "a stream is unknown": ("ids", lambda: op_changed(loads("expert"), stream="wire")),
    "a part of prefill keeps KV elsewhere": ("parts", unlike_parts),
    "a part has no last batch": ("parts", uneven_parts),
    "experts by batch where sizes differ": ("work", experts_by_batch),
    "a wait points forward": ("streams", lambda: changed(loads("expert"), lambda s: s._replace(waits=(Wait(len(STEPS) - 1, 0),)))),
    "an op waits for itself": ("streams", lambda: changed(loads("pick"), lambda s: s._replace(waits=(Wait(STEPS.index(s), 0),)))),
    "a wait points nowhere": ("streams", lambda: changed(loads("expert"), lambda s: s._replace(waits=(Wait(999, 1),)))),
    "two streams compute": ("streams", on_another_processor),
    "there is no load": ("phases", lambda: without_phase("load")),
    "there is no prefill": ("phases", lambda: without_phase("prefill")),
    "there is no decode": ("phases", lambda: without_phase("decode")),
    "there are too few passes": ("phases", lambda: with_phase(PLAN, "decode", passes=2)),
    "there are more batches than KV caches": ("phases", lambda: decided(num_batches=9)),
    "the head has other pages": ("phases", lambda: decided(head_pages=5)),
    "an op names a tensor twice": ("ids", lambda: changed(computes("experts"), twice_named)),
    "one batch alone is embedded": ("ids", lambda: op_changed(computes("embed"), batch=1)),
    "one batch alone is sampled": ("ids", lambda: op_changed(computes("sample"), batch=0)),
    "hidden states share a slot": ("residents", lambda: states_elsewhere(PLAN.placed[0][1])),
    "hidden states have no slot": ("residents", lambda: with_phase(PLAN, "decode", placed=())),
    "an expert overwrites hidden states": ("residency", experts_through_states),
    "picks are bound out of order": ("picks", lambda: op_changed(lambda s: isinstance(s.op, Bind), first=1)),
    "a rank is of one batch": ("picks", lambda: op_changed(lambda s: isinstance(s.op, Bind), batch=0)),
    "KV is not written back": ("residency", lambda: dropped(SPILLED, Store, "kv")),
    "KV of prompts is not written back": ("residency", lambda: dropped(SPILLED, Store, "kv", "prefill")),
    "queries are not sent": ("residency", lambda: dropped(HELPED, Store, "query")),
    "attention does not come back": ("residency", lambda: dropped(HELPED, Load, "query")),
    "rows are not sent": ("residency", lambda: dropped(SENT, Store, "rows")),
    "sums do not come back": ("residency", lambda: dropped(SENT, Load, "sums")),
    "sums are added twice": ("work", lambda: again(SENT, computes("add"))),
    "slots overlap": ("arena", lambda: resized(4096)),
    "the peak is too low": ("budget", lambda: reforecast(peak_bytes={"host": HIGHEST - 1})),
    "the peak exceeds the budget": ("budget", lambda: reforecast(peak_bytes={"host": (1 << 30) + 1})),
    "a resident has no slot": ("residents", lambda: redecided(1, resident_experts=(0, 1), static=(2,))),
    "two residents share a slot": ("residents", lambda: edited(PLAN, placed=(*PLAN.placed, (PLAN.placed[0][0], PLAN.placed[1][1])))),
    "an expert is in no class": ("picks", lambda: redecided(1, static=())),
    "a pick is not bound": ("picks", lambda: op_changed(lambda s: isinstance(s.op, Bind), count=1)),
    "nothing is bound": ("picks", lambda: without(lambda s: isinstance(s.op, Bind))),
    "a pick is bound twice": ("picks", twice_bound),
    "an expert is dropped": ("work", lambda: without(lambda s: computes("experts")(s) and "expert" in step_kinds(s))),
    "a pick is dropped": ("work", lambda: without(lambda s: computes("experts")(s) and "pick" in step_kinds(s))),
    "a batch is left out": ("work", lambda: op_changed(lambda s: computes("attention")(s) and s.op.batch == 2, batch=1)),  # type: ignore[union-attr]
    "a layer is left out": ("work", lambda: op_changed(computes("attention"), layer=1)),
    "an op lacks its weights": ("work", lambda: changed(computes("router"), lambda s: with_op(s, tensors=())._replace(slots=()))),
    "an expert misses a batch": ("work", lambda: op_changed(lambda s: computes("experts")(s) and s.op.batch == ALL, batch=0)),  # type: ignore[union-attr]
    "an expert misses the last one": ("work", lambda: op_changed(lambda s: computes("experts")(s) and s.op.batch == ALL, batch=span(0, 2))),  # type: ignore[union-attr]
    "an expert computes twice over some batches": ("work", twice_over_some),
    "a shared expert is dropped": ("work", lambda: without(computes("shared"))),
    "a shared expert misses a batch": ("work", lambda: op_changed(computes("shared"), batch=span(0, 2))),
    "a shared expert computes twice": ("work", shared_twice),
    "the head is left out": ("work", lambda: without(computes("head"))),
    "no token is sampled": ("work", lambda: without(computes("sample"))),
    "a load is left out": ("residency", lambda: without(loads("expert"))),
    "a load takes another slot": ("residency", lambda: changed(loads("pick"), other_slot)),
    "a load overwrites a resident": ("residency", lambda: changed(loads("expert"), resident_slot)),
    "a slot is too small": ("residency", lambda: resized(-4096)),
    "a pick is loaded for the next pass": ("residency", lambda: op_changed(loads("pick"), wraps=True)),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_plan_is_caught_by_the_check_that_is_there_for_it(how: str) -> None:
    check, spoil = SPOILED[how]
    assert caught(spoil()) == check


def test_every_check_catches_something() -> None:
    assert {name for name, _ in CHECKS} == {check for check, _ in SPOILED.values()} - {"text"} | {"race"}


def test_a_cache_must_be_written_where_it_lives() -> None:
    number = next(n for n, s in enumerate(SPILLED.steps["decode"]) if isinstance(s.op, Store))
    step = SPILLED.steps["decode"][number]
    assert isinstance(step.op, Store)
    astray = with_op(step, link="gpu>disk")
    assert caught(with_step(SPILLED, "decode", number, astray)) == "residency"


def test_a_violation_shows_the_lines_around_it() -> None:
    number = first(PLAN, loads("pick"))
    with pytest.raises(PlanError) as refusal:
        verify(with_step(PLAN, "decode", number, STEPS[number]._replace(waits=())))
    lines = refusal.value.window.splitlines()
    assert len(lines) == 7
    assert lines[3].startswith(f"--> decode {number} disk>host load L1.P0")
    assert "without waiting until" in refusal.value.why and refusal.value.exit_code == 4
