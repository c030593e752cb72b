"""The search: what is asked for is kept, budgets hold, a refusal says what is missing, and the best that was found is returned."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Workload
from klotski_compiler.errors import Infeasible
from klotski_compiler.estimates import WHOLE_STEPS
from klotski_compiler.fill import ANY, EVERYTHING, NO_SPILL
from klotski_compiler.hardware import read_hardware
from klotski_compiler.model import ModelSpec, read_model
from klotski_compiler.pipeline import lower
from klotski_compiler.plan import Candidate, Plan
from klotski_compiler.planner import Request, compile_plan
from klotski_compiler.policies import POLICIES, policy
from klotski_compiler.routing import uniform
from klotski_compiler.search import Rated, Search
from klotski_compiler.verify import verify
from plans import module, tiny_hardware, tiny_spec

WORKLOAD = Workload(prompt_len=16, gen_len=8, num_sequences=24)
RICH = 1 << 30
MACHINES = pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])


@pytest.fixture(autouse=True, scope="module")
def small_loads() -> Iterator[None]:
    """So that experts of 0.8 MB travel one by one, as large ones do."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("candidates", "fill"):
            patch.setattr(f"klotski_compiler.{module}.LOAD_BYTES", 1 << 20)
        yield


def spec() -> ModelSpec:
    """19 MB, most of it experts: enough to matter beside the 60 MB that the runtime itself takes."""
    hidden, inner, vocab, experts = 256, 512, 2048, 8
    base = tiny_spec(3, experts)
    common = {"attention": module(4 * hidden * hidden, 4), "kv_elements": 2 * hidden, "attention_flops": 4 * hidden}
    expert = module(3 * hidden * inner, 3)
    dense = replace(base.layers[0], **common, dense=module(6 * hidden * inner, 4))  # type: ignore[arg-type]
    moe = replace(base.layers[1], **common, router=module(hidden * experts, 2), shared=expert, expert=expert)  # type: ignore[arg-type]
    table = module(vocab * hidden)
    return replace(
        base,
        hidden_size=hidden,
        vocab_size=vocab,
        layers=(dense, moe, moe),
        embedding=module(vocab * hidden, flops=False),
        norm=module(hidden, flops=False),
        head=table,
    )


SPEC = spec()


@lru_cache(maxsize=512)
def compiled(
    gpu: bool,
    near: int,
    name: str = "auto",
    host: int = RICH,
    batch_size: int | None = None,
    num_batches: int | None = None,
    max_latency_s: float | None = None,
    gen_len: int = WORKLOAD.gen_len,
    num_sequences: int = WORKLOAD.num_sequences,
) -> Plan | Infeasible:
    """The plan for ``near`` bytes of the compute tier, or why there is none."""
    hardware = tiny_hardware(gpu)
    budgets = dict.fromkeys(hardware.tiers, RICH) | {"host": host} | {hardware.compute_tier: near}
    workload = WORKLOAD.model_copy(update={"gen_len": gen_len, "num_sequences": num_sequences})
    request = Request(
        SPEC, hardware, uniform(SPEC), workload, budgets, "bf16", name, batch_size, num_batches, max_latency_s
    )
    try:
        return compile_plan(request)
    except Infeasible as refusal:
        return refusal


def plan_of(found: Plan | Infeasible) -> Plan:
    assert isinstance(found, Plan), found
    return found


@lru_cache(maxsize=64)
def least(gpu: bool, name: str) -> int:
    """Bytes of the compute tier with which a policy has a plan: by giving what is short until nothing is."""
    near, tier = 1 << 20, "gpu" if gpu else "host"
    for _ in range(10):
        found = compiled(gpu, near, name)
        if isinstance(found, Plan):
            return near
        near += found.shortfalls[tier]
    raise AssertionError(f"{name} asks for ever more")


def ladder(gpu: bool) -> list[int]:
    """Budgets from the least to more than everything takes."""
    first = least(gpu, "auto")
    return [first + step * SPEC.nbytes * 4 // 9 for step in range(4)]


# ------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(("batch_size", "num_batches"), [(3, 2), (5, None), (None, 3), (1, 1), (30, 1), (None, 24)])
@pytest.mark.parametrize("name", [name for name in POLICIES if not policy(name).one_batch])
def test_fixed_sizes_are_kept(name: str, batch_size: int | None, num_batches: int | None) -> None:
    decision = plan_of(compiled(True, 120 << 20, name, batch_size=batch_size, num_batches=num_batches)).decision
    assert decision.batch_size == (batch_size or decision.batch_size)
    assert decision.num_batches == (num_batches or decision.num_batches)


@pytest.mark.parametrize("batch_size", [1, 5, 24])
@pytest.mark.parametrize("name", POLICIES)
def test_a_fixed_batch_size_is_kept_by_every_policy(name: str, batch_size: int) -> None:
    assert plan_of(compiled(False, 120 << 20, name, batch_size=batch_size)).decision.batch_size == batch_size


@pytest.mark.parametrize("name", [name for name in POLICIES if policy(name).one_batch])
def test_a_number_of_batches_is_kept_or_refused(name: str) -> None:
    found = compiled(False, 120 << 20, name, batch_size=3, num_batches=2)
    assert isinstance(found, Infeasible) or (found.decision.num_batches, found.decision.batch_size) == (2, 3)


@pytest.mark.parametrize(("name", "gpu"), [*zip(POLICIES, cycle([True, False]), strict=False)])
def test_no_decode_pass_takes_longer_than_the_ceiling(name: str, gpu: bool) -> None:
    free = plan_of(compiled(gpu, 120 << 20, name)).forecast.pass_us["decode"]
    refused = 0
    for share in (1.5, 0.5, 0.01):
        ceiling_s = share * free / 1e6
        found = compiled(gpu, 120 << 20, name, max_latency_s=ceiling_s)
        if isinstance(found, Plan):
            assert found.forecast.pass_us["decode"] <= 1e6 * ceiling_s + 1
            assert not refused, "a higher ceiling was refused"
        else:
            refused += 1
            assert "--max-latency" in str(found) or found.shortfalls
    assert refused, "no pass is a hundred times faster"


@pytest.mark.parametrize("name", ["joint", "flexgen"])
def test_a_ceiling_that_a_smaller_group_meets_is_met(name: str) -> None:
    """Also by the last pass, whose context is the longest."""
    free = plan_of(compiled(False, 120 << 20, name, gen_len=200, num_sequences=64)).forecast
    for share in (0.6, 0.3):
        ceiling_s = share * free.pass_us["decode"] / 1e6
        plan = plan_of(compiled(False, 120 << 20, name, max_latency_s=ceiling_s, gen_len=200, num_sequences=64))
        assert plan.decision.sequences < 64
        cost = Cost(SPEC, tiny_hardware(False), uniform(SPEC), "bf16")
        longest = plan.workload.model_copy(update={"prompt_len": plan.workload.prompt_len + 190, "gen_len": 10})
        assert lower(cost, name, plan.decision, longest).phases["decode"].times.pass_us <= 1e6 * ceiling_s


@pytest.mark.parametrize("num_batches", [2, None])
def test_sizes_that_are_asked_for_are_tried_once(num_batches: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no smaller groups, or few, however far the ceiling is away."""
    begun, tries = Search._begun, list[str]()
    monkeypatch.setattr(Search, "_begun", lambda search, name: tries.append(name) or begun(search, name))  # type: ignore[func-returns-value]
    sizes = {"batch_size": 8, "num_batches": num_batches}
    assert isinstance(compiled(False, 120 << 20, "flexgen", max_latency_s=1e-7, **sizes), Infeasible)
    assert len(tries) == 1 if num_batches else len(tries) < 10


def test_a_ceiling_is_met_by_smaller_batches_where_their_number_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller ones are tried until there are none."""
    begun, tries = Search._begun, list[str]()
    monkeypatch.setattr(Search, "_begun", lambda search, name: tries.append(name) or begun(search, name))  # type: ignore[func-returns-value]
    assert isinstance(compiled(False, 120 << 20, "flexgen", max_latency_s=1e-7, num_batches=2), Infeasible)
    assert len(tries) > 1


def test_a_search_that_is_cut_short_says_so() -> None:
    """Wherever the limit strikes."""
    budgets = {"host": 120 << 20, "disk": RICH}
    search = Search(Request(SPEC, tiny_hardware(False), uniform(SPEC), WORKLOAD, budgets, "bf16", "joint"))
    _, starts = search.begun("joint")
    assert not search.truncated
    search.deadline = 0.0
    search.improved(starts[0])
    assert search.truncated


def test_a_model_of_few_layers_is_timed_whole() -> None:
    """However many ops a pass has: of six layers there are no eight to tell what they take from."""
    dense, moe, _ = SPEC.layers
    few = replace(SPEC, layers=(dense, *[moe] * 6))
    workload = Workload(prompt_len=16, gen_len=8, num_sequences=128)
    search = Search(Request(few, tiny_hardware(False), uniform(few), workload, {"host": RICH, "disk": RICH}, "bf16"))
    base = search.base("picks", 128, 1, 8, 1, 1)
    decision = search.fill("klotski", base)
    assert search.steps(decision) > WHOLE_STEPS
    assert search.estimate("klotski", decision) == search.rate(lower(search.cost, "klotski", decision, workload))


def test_batches_of_a_size_that_does_not_divide_the_workload_may_be_one_more() -> None:
    """So that all of it is one group."""
    request = Request(
        SPEC, tiny_hardware(False), uniform(SPEC), WORKLOAD, {"host": RICH, "disk": RICH}, "bf16", "joint", 16
    )
    assert Search(request).batch_counts(24) == [1, 2]
    assert Search(request).batch_counts(32) == [2]


def test_a_policy_that_cannot_have_such_sizes_says_why() -> None:
    candidates = plan_of(compiled(False, 120 << 20, batch_size=3, num_batches=2)).candidates
    assert all("one batch at a time" in c.why_not for c in candidates if policy(c.policy).one_batch)
    refusal = compiled(False, 120 << 20, "moe_lens", batch_size=8, num_batches=4)
    assert isinstance(refusal, Infeasible) and "max-latency" not in str(refusal)


def test_what_fits_but_is_too_slow_says_more_than_what_others_lack() -> None:
    """With just the memory of one policy, beneath a latency that none has."""
    near = least(False, "auto")
    assert any(c.why_not for c in plan_of(compiled(False, near)).candidates)
    refusal = compiled(False, near, max_latency_s=1e-7)
    assert isinstance(refusal, Infeasible) and "--max-latency" in str(refusal)
    # Of these sizes moe_lens has none, however slow they might be: what the others lack says more.
    refusal = compiled(False, 1 << 20, batch_size=2, num_batches=4, num_sequences=4, max_latency_s=1e6)
    assert isinstance(refusal, Infeasible) and refusal.shortfalls


def test_prefill_in_more_parts_leaves_some_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few sequences, the CPU's own batch may be all that a smaller part has."""
    monkeypatch.setattr(Search, "is_rugged", True)
    hardware = tiny_hardware(True)
    budgets = {"gpu": 120 << 20, "host": RICH, "disk": RICH}
    workload = WORKLOAD.model_copy(update={"num_sequences": 4})
    search = Search(Request(SPEC, hardware, uniform(SPEC), workload, budgets, "bf16", "joint"))
    base = next(search.bases_of("joint", [4]))
    for last in (1, 2, 3):
        sizes = {"num_batches": 2, "batch_size": 4 - last, "last_batch": last, "prefill_groups": 1}
        found = Rated(1.0, "joint", base.model_copy(update=sizes), ANY)
        others = [other for other, _ in search._in_other_parts(found)]
        assert all(other.batch_size > 0 for other in others)
        assert bool(others) == (last < 3)


def test_without_decode_no_ceiling_matters() -> None:
    assert plan_of(compiled(False, 120 << 20, max_latency_s=1e-6, gen_len=1)).forecast.pass_us.keys() == {"prefill"}


# -------------------------------------------------------------------------------------------------------------- budgets


@MACHINES
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(("auto", *POLICIES)),
    share=st.floats(0.7, 1.4),
    host=st.sampled_from((0.1, 0.5, 0.9, 1.2, 9.0)),
)
def test_no_plan_exceeds_a_budget_and_a_refusal_says_what_is_short(
    gpu: bool, name: str, share: float, host: float
) -> None:
    near = int(least(gpu, name) * share)
    found = compiled(gpu, near, name, host=int(SPEC.nbytes * host) if gpu else RICH)
    if isinstance(found, Plan):
        assert all(peak <= found.budgets[tier] for tier, peak in found.forecast.peak_bytes.items())
        assert found.budgets["gpu" if gpu else "host"] == near
    else:
        assert found.shortfalls and min(found.shortfalls.values()) > 0
        assert set(found.shortfalls) <= {"gpu", "host"}


@MACHINES
@pytest.mark.parametrize("name", ("auto", *POLICIES))
def test_what_a_refusal_says_is_short_is_enough(name: str, gpu: bool) -> None:
    near, tier = 50 << 20, "gpu" if gpu else "host"
    found = compiled(gpu, near, name)
    assert isinstance(found, Infeasible)
    found = compiled(gpu, near + found.shortfalls[tier], name)
    plan_of(found)


def test_no_size_is_refused_that_fits_when_asked_for() -> None:
    """Just above the least budget, where what joint keeps resident changes how many slots the rest takes."""
    for step in range(6):
        near = least(False, "klotski") + step * (1 << 20)
        if isinstance(compiled(False, near, "joint"), Infeasible):
            for batch_size in (1, 2, 4):
                assert isinstance(compiled(False, near, "joint", batch_size=batch_size, num_batches=1), Infeasible)


@MACHINES
def test_more_memory_never_makes_it_slower(gpu: bool) -> None:
    """Beyond the 2 % that a search over few sizes may miss."""
    fastest = 0.0
    for near in ladder(gpu):
        rate = plan_of(compiled(gpu, near)).forecast.tokens_per_s
        assert rate >= 0.98 * fastest
        fastest = max(fastest, rate)
    assert fastest > 2 * plan_of(compiled(gpu, ladder(gpu)[0])).forecast.tokens_per_s


# ----------------------------------------------------------------------------------------------------------------- best


@MACHINES
def test_the_best_candidate_is_the_plan(gpu: bool) -> None:
    for near in ladder(gpu)[1:]:
        table = candidates_of(plan_of(compiled(gpu, near)))
        assert {c.policy for c in table} == set(POLICIES)
        for candidate in table:
            assert candidate.feasible == (candidate.tokens_per_s > 0) == (not candidate.why_not)


@pytest.mark.parametrize("name", ["auto", "joint"])
def test_policies_side_by_side_find_what_they_find_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, where what is near several starts is searched at once; also what does not fit, and how far it got."""
    hardware = tiny_hardware(True)
    request = Request(SPEC, hardware, uniform(SPEC), WORKLOAD, {"gpu": least(True, "auto"), "host": RICH}, "bf16", name)
    seen: dict[int, list[str]] = {}
    plans = dict[int, Plan]()
    for experts in (10**9, 0):
        monkeypatch.setattr("klotski_compiler.planner.WORTH_A_PROCESS", experts)
        seen[experts] = []
        plans[experts] = compile_plan(request, lambda policy_name, _, asked=seen[experts]: asked.append(policy_name))  # type: ignore[misc]
    assert plans[0] == plans[10**9]
    assert sorted(seen[0]) == sorted(seen[10**9]) == sorted(POLICIES if name == "auto" else [name])


@pytest.mark.parametrize("near", [84 << 20, 100 << 20])
@pytest.mark.parametrize("name", ["klotski", "fate"])
def test_no_size_is_faster_when_asked_for_where_memory_is_short(name: str, near: int) -> None:
    """Of a model with a large vocabulary, which then is streamed in small pieces, by whatever policy."""
    words = 1 << 15
    large = replace(SPEC, embedding=module(words * 256, flops=False), head=module(words * 256), vocab_size=words)
    budgets = {"host": near, "disk": RICH}

    def rate(batch_size: int | None = None, num_batches: int | None = None) -> float:
        sizes = batch_size, num_batches
        request = Request(large, tiny_hardware(False), uniform(large), WORKLOAD, budgets, "bf16", name, *sizes)
        with suppress(Infeasible):
            return compile_plan(request).forecast.tokens_per_s
        return 0.0

    assert max(rate(size, 1) for size in (8, 24)) <= rate()


def test_a_policy_whose_schedule_turned_out_not_to_fit_is_no_candidate() -> None:
    for near in range(least(True, "auto"), least(True, "auto") + (4 << 20), 1 << 20):
        candidates_of(plan_of(compiled(True, near)))


def candidates_of(plan: Plan) -> tuple[Candidate, ...]:
    """The table, fastest first, with the plan at its head."""
    best = plan.candidates[0]
    assert (plan.policy, plan.forecast.tokens_per_s) == (best.policy, best.tokens_per_s)
    assert plan.decision.batches == best.batches
    rates = [c.tokens_per_s for c in plan.candidates]
    assert rates == sorted(rates, reverse=True)
    return plan.candidates


@MACHINES
def test_auto_is_at_least_as_fast_as_every_policy_alone(gpu: bool) -> None:
    near = ladder(gpu)[1]
    auto = plan_of(compiled(gpu, near))
    for name in POLICIES:
        alone = compiled(gpu, near, name)
        if isinstance(alone, Plan):
            assert auto.forecast.tokens_per_s >= alone.forecast.tokens_per_s * (1 - 1e-9)
            assert alone.policy == name


@MACHINES
def test_the_forecast_counts_every_token_from_the_first_weight_on(gpu: bool) -> None:
    for near in ladder(gpu):
        forecast = plan_of(compiled(gpu, near)).forecast
        seconds = (forecast.makespan_us + forecast.load_us) / 1e6
        assert forecast.tokens_per_s == pytest.approx(24 * 8 / seconds, rel=1e-3)
        assert forecast.tokens_per_s <= forecast.bound_tokens_per_s and forecast.gap >= 0
        assert forecast.makespan_us >= forecast.bound_us * (1 - 1e-6)


def test_a_bound_that_is_beaten_is_said_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "ceiling", lambda search, rolling: 1e-3)
    request = Request(
        SPEC, tiny_hardware(False), uniform(SPEC), WORKLOAD, {"host": RICH, "disk": RICH}, "bf16", "flexgen"
    )
    plan = compile_plan(request)
    assert plan.forecast.gap < 0 and plan.forecast.bound_tokens_per_s == 1e-3
    assert any("beats the bound of its class" in note for note in plan.notes)


def test_a_large_file_of_prompts_is_taken_in_rolling_order() -> None:
    """Four layers of Mixtral: where there are many groups, prompts that are taken in while weights travel for decode beat any
    schedule with phases apart; one group alone is done sooner in phases."""
    spec = read_model("mixtral-8x7b")
    spec, hardware, budgets = (
        replace(spec, layers=spec.layers[:4]),
        read_hardware("rtx3090"),
        {"gpu": 6 << 30, "host": 16 << 30},
    )
    rolling = []
    for num_sequences in (32, 4096):
        workload = Workload(prompt_len=512, gen_len=32, num_sequences=num_sequences)
        plan = compile_plan(Request(spec, hardware, uniform(spec), workload, budgets, "bf16", "joint"))
        rolling.append(plan.decision.rolling)
        assert plan.forecast.schedule_class == ("mixed passes" if plan.decision.rolling else "phases apart")
        assert plan.forecast.bound_tokens_per_s == plan.forecast.class_bounds[plan.forecast.schedule_class]
        verify(plan)
    assert rolling == [False, True]
    assert plan.forecast.tokens_per_s > plan.forecast.class_bounds["phases apart"]


@pytest.mark.parametrize(
    "model", ["mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-20b", "deepseek-v2-lite", "qwen1.5-moe-a2.7b"]
)
def test_whatever_is_asked_for_is_planned_or_refused(model: str) -> None:
    """Four layers of real models on real machines: a plan is proved and beneath its bound, a refusal says what to change."""
    rng, whole = random.Random(model), read_model(model)
    spec = replace(whole, layers=(*whole.layers[:3], whole.layers[-1]))
    for machine in ("rtx3090", "t4", "dev-2core"):
        hardware = read_hardware(machine)
        near = int(spec.nbytes * 10 ** rng.uniform(-0.7, 0.2))
        budgets = {tier: min(memory.capacity_bytes, near) for tier, memory in hardware.tiers.items() if tier != "disk"}
        lengths = {"prompt_len": rng.choice([1, 32, 512]), "gen_len": rng.choice([1, 8, 64])}
        workload = Workload(num_sequences=rng.choice([1, 4, 5, 60]), **lengths)
        sizes = rng.choice([None, 1, 3]), rng.choice([None, None, 4])
        disk = {"disk": hardware.tiers["disk"].capacity_bytes}
        request = Request(spec, hardware, uniform(spec), workload, budgets | disk, "bf16", "auto", *sizes)
        try:
            plan = compile_plan(request)
        except Infeasible as refusal:
            assert re.search("(gpu|host) is short by|--batch-size|--num-batches", str(refusal)), request
        else:
            assert plan.forecast.gap >= 0, request


@pytest.mark.parametrize("max_latency_s", [None, 1e9])
def test_where_only_shares_of_experts_fit_the_leanest_schedule_is_tried(
    max_latency_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is solved for in fractions may have no whole numbers: then what is missing is memory, not speed."""
    monkeypatch.setattr(Search, "fills", lambda *_: iter(()))

    def plan(near: int) -> Plan:
        budgets = {"host": near, "disk": RICH}
        request = Request(SPEC, tiny_hardware(False), uniform(SPEC), WORKLOAD, budgets, "bf16", "joint")
        return compile_plan(replace(request, max_latency_s=max_latency_s))

    assert plan(least(False, "joint") + (16 << 20)).decision.sequences == 1
    with pytest.raises(Infeasible, match="host is short by"):
        plan(50 << 20)


# -------------------------------------------------------------------------- host memory that cannot hold all weights


def crowded(name: str, share: float) -> tuple[int, int]:
    """Bytes of a GPU that must stream, and of a host that has room for ``share`` of the weights."""
    return least(True, "flexgen") + (1 << 20), int(share * SPEC.nbytes)


@pytest.mark.parametrize(("name", "share"), [*zip(POLICIES, cycle([0.1, 0.4, 0.4, 0.1]), strict=False)])
def test_host_memory_that_is_too_small_is_respected_or_refused_with_what_is_short(name: str, share: float) -> None:
    """On a machine with a GPU, where weights that are not resident live in host memory, or on disk if need be."""
    near, host = crowded(name, share)
    found = compiled(True, near, name, host=host)
    if isinstance(found, Infeasible):
        assert found.shortfalls and set(found.shortfalls) <= {"gpu", "host"}
        near, host = near + found.shortfalls.get("gpu", 0), host + found.shortfalls.get("host", 0)
        found = compiled(True, near, name, host=host)
    assert plan_of(found).forecast.peak_bytes["host"] <= host


@pytest.mark.parametrize("name", ["auto", *(name for name in POLICIES if policy(name).experts != "picks")])
def test_what_does_not_fit_in_host_memory_stays_on_disk(name: str) -> None:
    near, host = crowded(name, 0.5)
    plan = plan_of(compiled(True, near, name, host=host))
    assert any(layer.on_disk for layer in plan.decision.layers)


@pytest.mark.parametrize("name", [name for name in POLICIES if policy(name).experts == "picks"])
def test_experts_that_are_bound_at_run_time_must_be_in_host_memory(name: str) -> None:
    near, host = crowded(name, 0.4)
    found = compiled(True, near, name, host=host)
    assert isinstance(found, Infeasible) and "host" in found.shortfalls


def test_joint_is_also_tried_without_spilling_kv() -> None:
    """Where the residency problem finds a spill cheap, the schedule may not: one candidate of both kinds, and the best of them."""
    hardware = tiny_hardware(True)
    workload = WORKLOAD.model_copy(update={"gen_len": 40, "num_sequences": 96})
    budgets = dict.fromkeys(hardware.tiers, RICH) | {"gpu": 116_000_000}
    search = Search(Request(SPEC, hardware, uniform(SPEC), workload, budgets, "bf16", "joint"))
    both = set()
    for base in islice(search.bases("joint"), 0, None, 3):
        with suppress(Infeasible):
            found = {way: {layer.kv for layer in decision.layers} for way, decision in search.fills("joint", base)}
            assert found.get(NO_SPILL, {"gpu"}) == {"gpu"}
            both.add(NO_SPILL in found and found.get(ANY) not in (None, {"gpu"}))
    assert True in both


def test_everything_resident_makes_room_as_well() -> None:
    """What a schedule turns out to lack is left free by every kind of fill: else it would be lowered again and again."""
    hardware = tiny_hardware(True)
    budgets = dict.fromkeys(hardware.tiers, RICH)
    search = Search(Request(SPEC, hardware, uniform(SPEC), WORKLOAD, budgets, "bf16", "joint"))
    base = next(search.bases("joint"))
    assert search.filled("joint", base, EVERYTHING) is not None
    room = search.capacity("joint", base, {})["gpu"]
    assert search.filled("joint", base, EVERYTHING, {"gpu": room}) is None


def test_spilled_kv_is_tried_in_as_many_places_as_it_may_take() -> None:
    """With one batch in each part of prefill a layer's KV moves whole or not at all; nothing is tried where no KV moves."""
    search = Search(
        Request(SPEC, tiny_hardware(True), uniform(SPEC), WORKLOAD, {"gpu": RICH, "host": RICH}, "bf16", "joint")
    )
    base = search.base("solved", 8, 3, 2, 1, 8)
    away = tuple(layer.model_copy(update={"kv": "host"}) for layer in base.layers)
    assert [d.prefill_groups for d in search.finer([base.model_copy(update={"layers": away})])] == [2]
    assert search.finer([base]) == []


def test_buffers_shrink_where_memory_is_worth_more() -> None:
    """A model that just fits in GPU and host memory together: what buffers take, the disk brings in every pass."""
    hardware = read_hardware("h200")
    budgets = {tier: memory.capacity_bytes for tier, memory in hardware.tiers.items()}
    model, workload = read_model("mixtral-8x22b"), Workload(prompt_len=128, gen_len=512, num_sequences=52)
    search = Search(Request(model, hardware, uniform(model), workload, budgets, "bf16"))
    base = next(base for base in search.bases_of("joint", [52]) if base.num_batches == 1)
    plain = search.score("joint", base)
    [(us, fitted)] = search.fitted("joint", [(plain, base)])
    assert us < 0.6 * plain
    assert fitted.expert_rows < base.expert_rows and fitted.lead < base.lead
    assert search.fitted("joint", [(us, fitted)]) == [(us, fitted)], "nothing single would better it"


def test_what_passes_through_a_small_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads, pages of the head and micro-batches are looked for in the size of the budget, not in that of a disk's or a link's optimum."""
    monkeypatch.setattr("klotski_compiler.candidates.LOAD_BYTES", 32 << 20)
    hardware = tiny_hardware(False)

    def sizes(budget: int) -> tuple[int, int, int]:
        search = Search(
            Request(SPEC, hardware, uniform(SPEC), WORKLOAD, {"host": budget, "disk": RICH}, "bf16", "joint")
        )
        base = next(search.bases("joint"))
        return base.unit, base.head_pages, search.least_rows

    assert sizes(RICH) == (SPEC.layers[1].num_experts, 1, 512)
    assert sizes(64 << 20) == (4, 1, 256)
    assert sizes(16 << 20) == (1, 1, 128)


def test_of_many_estimates_the_first_are_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best by what they really take comes first."""
    search = Search(
        Request(SPEC, tiny_hardware(True), uniform(SPEC), WORKLOAD, {"gpu": RICH, "host": RICH}, "bf16", "joint")
    )
    monkeypatch.setattr("klotski_compiler.estimates.WHOLE_STEPS", 0)
    base = next(search.bases("joint"))
    true = search.rate(lower(search.cost, "joint", base, WORKLOAD, quick=True))
    wrong = Rated(10 * true, "joint", base, ANY)
    assert [one.tokens_per_s for one in search.retimed([wrong])] == [true]


def test_ours_is_lowered_whole_where_it_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a model so large that only few schedules are, and where another's estimate is better."""
    for name, value in {"search.MOST_WHOLE": {0: 1}, "estimates.WHOLE_STEPS": 0}.items():
        monkeypatch.setattr(f"klotski_compiler.{name}", value)
    search = Search(Request(SPEC, tiny_hardware(True), uniform(SPEC), WORKLOAD, {"gpu": RICH, "host": RICH}, "bf16"))
    other, ours = (search.timed(name)[0] for name in ("flexgen", "joint"))
    rate = search.whole_best([other], {})[0].tokens_per_s
    timed = [replace(other, tokens_per_s=rate), replace(ours, tokens_per_s=0.999 * rate)]
    assert {best.policy for best in search.whole_best(timed, {})} == {"flexgen", "joint"}
    # Where the first of ours turns out to be behind, the next one may not be.
    slow = Rated(0.9995 * rate, "joint", next(search.bases("joint")), ANY)  # nothing resident
    assert search.whole_best([slow], {})[0].tokens_per_s < 0.99 * rate
    timed.append(slow)
    assert [best.policy for best in search.whole_best(timed, {})].count("joint") == 2
    # Where the first falls short of its estimate, the next one may not; else it is taken to be as good as its own says.
    rate = search.whole_best([ours], {})[0].tokens_per_s
    for error, lowered in ((1.04, 2), (1.005, 1)):
        timed = [replace(ours, tokens_per_s=error * rate), replace(slow, tokens_per_s=1.002 * rate)]
        assert len(search.whole_best(timed, {})) == lowered


def test_what_another_policy_turns_out_to_be_ahead_with_ours_takes_over() -> None:
    """Where memory is short, the decision that a whole schedule has may be another one than what was estimated."""
    request = Request(SPEC, tiny_hardware(True), uniform(SPEC), WORKLOAD, {"gpu": RICH, "host": RICH}, "bf16")
    search = Search(request)
    slow = Rated(1.0, "joint", search._stream_all("joint", next(search.bases("joint"))), ANY)
    other = search.timed("flexgen")[0]
    found = {best.policy: best for best in reversed(search.whole_best([other, slow], {}))}
    assert found["joint"].decision == found["flexgen"].decision
    assert found["joint"].tokens_per_s >= found["flexgen"].tokens_per_s * (1 - 1e-9)
    alone = Search(replace(request, policy="flexgen")).whole_best([other], {})
    assert [best.policy for best in alone] == ["flexgen"]


@MACHINES
@pytest.mark.parametrize("asked", [{"batch_size": 2, "gen_len": 1000}, {"batch_size": 24, "gen_len": 8}])
def test_a_refusal_names_sizes_that_fit(gpu: bool, asked: dict[str, int]) -> None:
    """With little more memory than one sequence takes: each change that is named makes it fit."""
    near = least(gpu, "joint") + (1 << 20)
    found = compiled(gpu, near, "joint", num_batches=1, **asked)
    assert isinstance(found, Infeasible) and "--memory" in str(found)
    sizes = dict(re.findall(r"--(batch-size|gen-len) (\d+)", str(found)))
    assert sizes
    for option, size in sizes.items():
        plan_of(compiled(gpu, near, "joint", num_batches=1, **asked | {option.replace("-", "_"): int(size)}))


def test_a_batch_of_the_cpus_own_is_tried() -> None:
    """Long prompts of a small model: KV is most of what there is, the CPU would attend to a few sequences, not to half of them."""
    spec, hardware = read_model("olmoe-1b-7b"), read_hardware("rtx4090")
    budgets = {tier: memory.capacity_bytes for tier, memory in hardware.tiers.items()}
    workload = Workload(prompt_len=4000, gen_len=64, num_sequences=128)
    search = Search(Request(spec, hardware, uniform(spec), workload, budgets, spec.compute_dtype, policy="joint"))
    base = search.base("solved", 2, 16, 6, 3, 2)
    found = list(search.with_last("joint", base))
    assert found
    for decision in found:
        assert (decision.part_batches, decision.num_batches % decision.prefill_groups) == (2, 0)
        assert base.sequences <= decision.sequences <= base.sequences + decision.num_batches
        assert search.score("joint", decision) < 1.1 * search.score("joint", base)
    sizes = {
        decision.last_batch for decision in search.with_last("joint", found[0].model_copy(update={"last_batch": 5}))
    }
    assert min(sizes) < 5 < max(sizes)
    fixed = Search(replace(search.request, batch_size=16))
    assert not list(fixed.with_last("joint", base))
