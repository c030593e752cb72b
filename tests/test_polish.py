"""Polishing: a layer that keeps others waiting is mended, memory that is left over is used, what has nothing to gain is left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from klotski_compiler import polish
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.pipeline import lower
from klotski_compiler.polish import polished
from klotski_compiler.record import record
from klotski_compiler.routing import uniform
from klotski_compiler.search import Best, Request, Search
from klotski_compiler.verify import verify
from plans import tiny_decision, tiny_hardware, tiny_spec

WORKLOAD = Workload(prompt_len=32, gen_len=6, num_sequences=12)
SPEC = tiny_spec(6, 8)
RICH = 1 << 30


def searching(gpu_bytes: int = RICH, gpu: bool = True) -> Search:
    hardware = tiny_hardware(gpu)
    budgets = dict.fromkeys(hardware.tiers, RICH) | {hardware.compute_tier: gpu_bytes}
    return Search(Request(SPEC, hardware, uniform(SPEC), WORKLOAD, budgets, "bf16", "joint"))


def decided(kv: str, cpu: int = 0, late: int = 2, policy: str = "joint", **changes: int) -> Decision:
    """All layers alike: two experts are resident."""
    base = tiny_decision(policy, SPEC, kv, num_batches=4, batch_size=3, cpu_batches=0, **changes)
    layers = [
        LayerDecision(
            resident=("attention", "router"),
            resident_experts=(0, 1),
            static=tuple(range(2, 8 - cpu - late)),
            late=tuple(range(8 - cpu - late, 8 - cpu)),
            cpu=tuple(range(8 - cpu, 8)),
            kv=kv,
        )
        if layer.num_experts
        else LayerDecision(kv=kv)
        for layer in SPEC.layers
    ]
    return base.model_copy(update={"layers": tuple(layers)})


def with_picks(decision: Decision, cpu_picks: int) -> Decision:
    """The CPU computes so many of the late experts."""
    layers = (layer.model_copy(update={"cpu_picks": min(cpu_picks, len(layer.late))}) for layer in decision.layers)
    return decision.model_copy(update={"layers": tuple(layers)})


def best_of(search: Search, decision: Decision, policy: str = "joint") -> Best:
    lowered = lower(search.cost, policy, decision, WORKLOAD)
    return Best(policy, decision, search.rate(lowered), lowered)


def where(layer: LayerDecision) -> Counter[int]:
    """How often each expert is somewhere."""
    return Counter((*layer.resident_experts, *layer.static, *layer.late, *layer.cpu))


CASES = {
    "cpu": (False, decided("host")),
    "gpu": (True, decided("gpu", lead=1)),
    "gpu beside cpu": (True, decided("gpu", cpu=3)),
    "kv in host memory": (True, decided("host", cpu=2)),
    "in parts": (True, decided("host", cpu=2, prefill_groups=2)),
    "picks of the cpu": (True, with_picks(decided("gpu", late=3), 2)),
    "attention beside cpu": (True, decided("host", cpu=1).model_copy(update={"cpu_batches": 2})),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spare", [0, 3])
def test_what_is_polished_is_faster_sound_and_within_memory(
    case: str, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, decision = CASES[case]
    monkeypatch.setattr(polish, "WAITING", -1.0)
    rich = searching(gpu=gpu)
    expert = max(layer.expert.nbytes for layer in SPEC.layers if layer.expert)
    before = best_of(rich, decision)
    search = searching(before.lowered.peak_bytes[rich.tier] + spare * 2 * expert, gpu)
    after = polished(search, before)
    assert after.tokens_per_s > before.tokens_per_s
    assert after.tokens_per_s == search.rate(after.lowered) == search.rate(best_of(search, after.decision).lowered)
    assert not search.over(after.lowered)
    for layer, chosen in zip(SPEC.layers, after.decision.layers, strict=True):
        assert where(chosen) == Counter(range(layer.num_experts))
    verify(record(search, after, []))


def test_memory_that_is_left_over_is_used() -> None:
    rich, decision = searching(), decided("host", cpu=2)
    before = best_of(rich, decision)
    kept = sum(len(layer.resident_experts) for layer in decision.layers)
    for search, more in ((searching(before.lowered.peak_bytes["gpu"]), False), (rich, True)):
        after = polished(search, before).decision
        assert (sum(len(layer.resident_experts) for layer in after.layers) > kept) == more


def test_what_all_layers_take_from_the_decision_stays() -> None:
    search, decision = searching(), decided("host", cpu=2).model_copy(update={"cpu_batches": 2})
    assert all(layer.cpu_batches is None for layer in decision.layers)
    near = polish._near(search, decision, 0, set())
    assert {one.decision.cpu_batches for one in near if not isinstance(one.change, polish.Attend)} == {2}


def test_what_one_layer_gives_the_cpu_no_other_follows() -> None:
    """Layers without a number of their own have the decision's, which is the most of any."""
    search, decision = searching(), decided("host", cpu=1).model_copy(update={"cpu_batches": 1})
    few = decision.layers[:3]
    layers = (
        *few,
        *(layer.model_copy(update={"late": layer.late[:1], "static": (2, 3, 4, 6)}) for layer in decision.layers[3:]),
    )
    decision = decision.model_copy(update={"layers": layers})
    more = [one for one in polish._near(search, decision, RICH, set()) if one.change == polish.Attend(1)]
    assert more
    for one in more:
        changed = {number for number, _ in one.states}
        assert all(len(one.decision.attended(n)) == 1 + (n in changed) for n in range(len(layers)))


def test_no_more_picks_are_the_cpus_than_there_are_late_experts() -> None:
    """Where an expert that was late goes elsewhere."""
    search, decision = searching(), decided("host", late=2)
    for number in range(1, len(decision.layers)):
        moved = polish.Move("late", "static").of(search, with_picks(decision, 2), number)
        assert (len(moved.late), moved.cpu_picks) == (1, 1)


def test_a_layer_that_keeps_the_others_waiting_is_mended() -> None:
    search, decision = searching(), decided("gpu", cpu=3)
    tight = searching(best_of(search, decision).lowered.peak_bytes["gpu"])
    even = polished(tight, best_of(tight, decision))
    layers = list(even.decision.layers)
    number = max(n for n, layer in enumerate(SPEC.layers) if layer.num_experts)
    odd = layers[number]
    streamed = (*odd.static, *odd.late)
    layers[number] = odd.model_copy(update={"static": (), "late": (), "cpu": (*streamed, *odd.cpu)})
    spoiled = best_of(tight, even.decision.model_copy(update={"layers": tuple(layers)}))
    assert spoiled.tokens_per_s < even.tokens_per_s
    mended = polished(tight, spoiled)
    assert mended.tokens_per_s > 0.999 * even.tokens_per_s


def test_what_streams_hardly_wait_for_and_what_is_not_ours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    search = searching()
    best = best_of(search, decided("gpu"))
    monkeypatch.setattr(polish, "WAITING", 1.0)
    assert polished(search, best) is best
    monkeypatch.setattr(polish, "WAITING", 0.0)
    other = best_of(search, tiny_decision("flexgen", SPEC, "gpu"), "flexgen")
    assert polished(search, other) is other


def test_no_time_is_spent_beyond_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    search, tries = searching(), [0]
    best = best_of(search, decided("gpu", cpu=3))

    def counting(*arguments: object, **options: object) -> object:
        tries[0] += 1
        return lower(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(polish, "lower", counting)
    monkeypatch.setattr(polish, "MOST_STEPS", 5 * search.steps(best.decision))
    polished(search, best)
    assert tries[0] <= 1 + 5 + 1  # as it is, what is tried, and the best of it whole
    tries[0] = 0
    search.deadline = 0.0
    assert polished(search, best) is best
    assert tries[0] == 1


def test_what_seems_to_be_beyond_the_latency_ceiling_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    search = searching()
    best = best_of(search, decided("gpu", cpu=3))
    monkeypatch.setattr(search, "request", replace(search.request, max_latency_s=1e-9))
    assert polished(search, best) is best
