"""Experts in pages: of one on disk only the last page lives there, and only that passes through host memory on its way to a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from klotski_compiler.candidates import lean, resized
from klotski_compiler.decision import Decision, Workload
from klotski_compiler.errors import PlanError
from klotski_compiler.hardware import read_hardware
from klotski_compiler.layout import most_pages
from klotski_compiler.model import read_model
from klotski_compiler.ops import Compute, Load, Pages, Step, Tensor, op_text, parse_op
from klotski_compiler.pipeline import lower
from klotski_compiler.plan import Plan
from klotski_compiler.planner import Request
from klotski_compiler.routing import uniform
from klotski_compiler.search import Search
from klotski_compiler.verify import verify
from plans import tiny_decision, tiny_plan, tiny_spec, with_step

PAGES = 3
POLICIES = ["joint", "flexgen", "zero_inference", "accelerate", "moe_lightning"]


def paged(policy: str, pages: int = PAGES, kv: str = "gpu", far: int = 2) -> Plan:
    """A plan for a GPU, the last ``far`` experts by name of every layer on disk, or one page of each."""
    decision = tiny_decision(policy, tiny_spec(), kv)
    layers = [layer.model_copy(update={"on_disk": layer.static[-far:]}) for layer in decision.layers]
    return tiny_plan(policy, True, decision=decision.model_copy(update={"layers": tuple(layers), "pages": pages}))


def far_loads(plan: Plan, phase: str) -> list[Step]:
    """What comes from disk in a pass."""
    return [s for s in plan.steps[phase] if isinstance(s.op, Load) and s.op.link == "disk>host"]


def test_an_op_with_pages_prints_and_parses_back() -> None:
    names = ["L3.E5", "L3.E6"]
    ids = {name: number for number, name in enumerate(names)}
    for wraps, stream in ((False, "host>gpu"), (True, "host>gpu"), (False, "gpu")):
        op = Load(stream, "host>gpu", (0, 1), wraps, Pages(17, 18, 18))
        assert parse_op(op_text(op, names), ids) == op
    assert op_text(Load("host>gpu", "host>gpu", (0,), pages=Pages(0, 2, 3)), names) == "host>gpu load pages=0:2/3 L3.E5"
    for wrong in ("pages=2:2/3", "pages=1:4/3", "pages=1:2"):
        with pytest.raises(ValueError):
            parse_op(f"host>gpu load {wrong} L3.E5", ids)


@pytest.mark.parametrize("nbytes", [1, 5000, 36864, 604_000_000])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_pages_are_all_of_a_tensor_and_do_not_overlap(nbytes: int, count: int) -> None:
    tensor = Tensor(0, "expert", 0, 0, nbytes, 3, "disk")
    spans = [tensor.span(Pages(i, i + 1, count)) for i in range(count)]
    assert spans[0][0] == 0 and spans[-1][1] == tensor.slot_bytes
    assert all(one[1] == two[0] for one, two in pairwise(spans))
    assert all(begin % 4096 == 0 for begin, _ in spans)
    assert sum(tensor.moved_bytes(Pages(i, i + 1, count)) for i in range(count)) == nbytes
    assert max(end - begin for begin, end in spans) <= -(-tensor.slot_bytes // count) + 4096


@pytest.mark.parametrize("kv", ["gpu", "host"])
@pytest.mark.parametrize("policy", POLICIES)
def test_staging_holds_two_pages_and_host_memory_the_rest(policy: str, kv: str) -> None:
    whole, plan = paged(policy, 1, kv), paged(policy, kv=kv)
    verify(plan)
    expert = next(t for t in plan.tensors if t.kind == "expert")
    page = max(expert.room(Pages(i, i + 1, PAGES)) for i in range(PAGES))
    permanent = {slot for _, slot in plan.placed}
    for phase in plan.phases[1:]:
        steps = far_loads(plan, phase.name)
        slots = {slot for step in steps for slot in step.slots}
        assert steps and not slots & permanent and len(slots) <= 2
        assert all(plan.slots[slot].nbytes == page for slot in slots)
        before, after = (p.forecast.link_bytes["disk>host"] for p in (whole, plan))
        assert after < before
    kept = [(t, s) for t, s in plan.placed if plan.tensors[t].home == "disk" and plan.slots[s].tier == "host"]
    assert len(kept) == sum(len(layer.on_disk) for layer in plan.decision.layers)
    assert all(plan.slots[s].nbytes == plan.tensors[t].slot_bytes - page for t, s in kept)


def test_a_page_is_fetched_while_the_rest_waits_for_its_turn() -> None:
    """What lives in host memory goes first, the page behind it; the page comes from disk as far ahead as there are staging slots."""
    plan = paged("joint")
    steps = plan.steps["decode"]
    for number, step in enumerate(steps):
        if isinstance(step.op, Load) and step.op.link == "host>gpu" and step.op.pages == plan.decision.far:
            before = next(s for s in reversed(steps[:number]) if s.op.stream == "host>gpu")
            assert isinstance(before.op, Load)
            assert (before.op.tensors, before.op.pages, before.slots) == (
                step.op.tensors,
                plan.decision.near,
                step.slots,
            )
    first = next(n for n, s in enumerate(steps) if isinstance(s.op, Compute) and s.op.layer == 0)
    assert sum(step in steps[:first] for step in far_loads(plan, "decode")) >= 2


def test_moe_lightning_sends_pages_of_experts_where_micro_batches_are_more_than_weights() -> None:
    """Nine micro-batches, five experts that travel, attention, router and shared expert; what comes from disk comes whole."""
    spec = tiny_spec()
    decision = tiny_decision("moe_lightning", spec, "host", 9, 1, cpu_batches=9)
    for far in (0, 1):
        layers = [layer.model_copy(update={"on_disk": layer.static[:far]}) for layer in decision.layers]
        plan = tiny_plan("moe_lightning", True, decision=decision.model_copy(update={"layers": tuple(layers)}))
        verify(plan)
        loads = [s.op for s in plan.steps["decode"] if isinstance(s.op, Load) and s.op.link == "host>gpu"]
        sent = Counter[int]()
        for op in loads:
            if plan.tensors[op.tensors[0]].kind == "expert":
                sent.update(dict.fromkeys(op.tensors, op.pages.end - op.pages.first if op.pages else 2))
        assert sent == Counter(dict.fromkeys([t.id for t in plan.tensors if t.kind == "expert" and t.index], 2))
        assert {op.pages.of for op in loads if op.pages} == {2}
        assert {op.pages for op in loads if plan.tensors[op.tensors[0]].home == "disk"} <= {None}
    few = tiny_plan("moe_lightning", True, decision=tiny_decision("moe_lightning", spec, "host", 3, cpu_batches=3))
    assert not any(isinstance(s.op, Load) and s.op.pages for s in few.steps["decode"])


# ---------------------------------------------------------------------------------------------------- what is not legal

JOINT = paged("joint")


def index(wanted: Callable[[Load], bool]) -> int:
    """The first load of a decode pass that is wanted."""
    return next(n for n, s in enumerate(JOINT.steps["decode"]) if isinstance(s.op, Load) and wanted(s.op))


def near(op: Load) -> bool:
    return op.link == "host>gpu" and op.pages == JOINT.decision.near


def far(op: Load) -> bool:
    return op.link == "host>gpu" and op.pages == JOINT.decision.far


def staged(op: Load) -> bool:
    return op.link == "disk>host"


def again(wanted: Callable[[Load], bool]) -> Plan:
    """The next load on that link is replaced by the one before it."""
    steps = JOINT.steps["decode"]
    number = index(wanted)
    later = next(n for n in range(number + 1, len(steps)) if steps[n].op.stream == steps[number].op.stream)
    return with_step(
        JOINT,
        "decode",
        later,
        steps[later]._replace(op=steps[number].op, slots=steps[number].slots, sources=steps[number].sources),
    )


def as_whole(wanted: Callable[[Load], bool]) -> Plan:
    """A load says that it brings all, from a slot that holds some of it."""
    number = index(wanted)
    step = JOINT.steps["decode"][number]
    assert isinstance(step.op, Load)
    return with_step(JOINT, "decode", number, step._replace(op=step.op._replace(pages=None)))


SPOILED: dict[str, Callable[[], Plan]] = {
    "the first pages are missing": lambda: with_step(JOINT, "decode", index(near), None),
    "the last page is missing": lambda: with_step(JOINT, "decode", index(far), None),
    "a page never comes from disk": lambda: with_step(JOINT, "decode", index(staged), None),
    "the first pages come twice": lambda: again(near),
    "the last page comes twice": lambda: again(far),
    "all of an expert comes from where its first pages are": lambda: as_whole(near),
    "all of an expert comes from where its last page is": lambda: as_whole(far),
    "all of an expert comes into a page's slot": lambda: as_whole(staged),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_plan_in_which_a_page_is_missing_or_comes_twice_is_refused(how: str) -> None:
    with pytest.raises(PlanError) as refusal:
        verify(SPOILED[how]())
    assert refusal.value.check == "residency"


# ---------------------------------------------------------------------------------------------------------- the search


def test_pages_are_fitted_like_other_buffers() -> None:
    """From one to as many as there may be, or as leave enough on disk; then halves and doubles."""
    base = tiny_decision("joint", tiny_spec(), "gpu")
    tried = [d.pages for d in resized(base, "pages", most_pages=18)]
    assert tried == [18, 9, 4, 2]
    assert [d.pages for d in resized(base.model_copy(update={"pages": 18}), "pages", most_pages=18)] == [9]
    assert [d.pages for d in resized(base.model_copy(update={"pages": 2}), "pages", most_pages=18)] == [1, 4]
    assert not list(resized(base.model_copy(update={"unit": 2}), "pages", most_pages=18))
    assert not list(resized(base, "pages"))
    assert lean(base, 1, 18).pages == 18 and lean(base.model_copy(update={"unit": 2}), 1, 18).pages == 1


def test_sizes_to_be_fitted_of_slots_in_prefill() -> None:
    """Between two units, one that computes and one that arrives, and as many as in decode."""
    base = tiny_decision("joint", tiny_spec(), "host", lead=12, unit=2)
    assert [d.prefill_lead for d in resized(base, "prefill_lead")] == [6]
    assert [d.prefill_lead for d in resized(base.model_copy(update={"prefill_lead": 6}), "prefill_lead")] == [4, 12]
    assert not list(resized(base.model_copy(update={"lead": 4}), "prefill_lead"))


def test_what_host_memory_cannot_hold_passes_in_pages() -> None:
    """Mixtral-8x22B behind 137 GB: the plan keeps within memory with two pages where a whole expert passed, also while it is loaded."""
    spec, hardware = read_model("mixtral-8x22b"), read_hardware("h200")
    workload = Workload(prompt_len=512, gen_len=64, num_sequences=52)
    budgets = {tier: memory.capacity_bytes for tier, memory in hardware.tiers.items()}
    search = Search(Request(spec, hardware, uniform(spec), workload, budgets, spec.compute_dtype, policy="joint"))
    expert = spec.layers[0].expert
    assert expert is not None
    assert search.most_pages == most_pages(expert.nbytes) == expert.nbytes // (32 << 20)
    base = search.base("solved", 1, 52, 1, 1, 1)
    base = base.model_copy(update={"pages": search.most_pages, "attention_batch": 1})
    decision: Decision = search.fill("joint", base)
    assert sum(len(layer.on_disk) for layer in decision.layers)
    lowered = lower(search.cost, "joint", decision, workload)
    assert not search.over(lowered)
    permanent = {slot for _, slot in lowered.placed}
    for phase in lowered.phases.values():
        moved = {
            s for step in phase.steps if isinstance(step.op, Load) and step.op.link == "disk>host" for s in step.slots
        }
        staging = sum(lowered.slots[slot].nbytes for slot in moved - permanent)
        assert 0 < staging < 0.2 * expert.nbytes
    assert Search(replace(search.request, budgets=budgets | {"host": 1 << 40})).most_pages == 1
