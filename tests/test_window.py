"""Order inside a layer: the window's list schedule against the simulator, CP-SAT against all orders, the order that
is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

import pytest

from klotski_compiler import reorder
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.milp.window import Job, Window, listed, solve
from klotski_compiler.model import ModelSpec
from klotski_compiler.ops import Compute, Load
from klotski_compiler.pipeline import Lowered, lower
from klotski_compiler.program import URGENT
from klotski_compiler.record import record
from klotski_compiler.reorder import Alike, reordered, seen, with_order
from klotski_compiler.routing import Routing, uniform
from klotski_compiler.search import Best, Request, Search
from klotski_compiler.verify import verify
from plans import tiny_decision, tiny_hardware, tiny_spec

ROUNDING_US = 15  # starts and ends of some ten ops are rounded to microseconds one by one
WORKLOAD = Workload(prompt_len=64, gen_len=6, num_sequences=12)
BALANCED = Workload(prompt_len=8, gen_len=2, num_sequences=12)  # loads take prefill about as long as computes


def period(window: Window, order: Sequence[int]) -> int:
    """What the list schedule makes of another order."""
    return listed(window._replace(jobs=tuple(window.jobs[n] for n in order))).period_us


def random_window(seed: int, equal_loads: bool) -> Window:
    """Up to six jobs, residents among them, through few slots; loads and computes in balance, so that all three
    bind."""
    rng = random.Random(seed)
    load = rng.randint(10, 40)
    jobs = [
        Job(((load if equal_loads else rng.randint(10, 40), 1),) if rng.random() < 0.8 else (), rng.randint(5, 60))
        for _ in range(rng.randint(2, 6))
    ]
    least = rng.choice((0, 150))
    return Window(tuple(jobs), rng.randint(1, 3), rng.randint(0, 60), least, rng.randint(0, 5))


@pytest.mark.parametrize("equal_loads", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_the_best_order_is_that_of_all_permutations(seed: int, equal_loads: bool) -> None:
    window = random_window(seed, equal_loads)
    known = listed(window)
    solved = solve(window, known)
    best = min(period(window, order) for order in permutations(range(len(window.jobs))))
    assert window.work_us <= solved.bound_us <= solved.period_us <= known.period_us
    assert solved.bound_us <= best, "a bound that some order beats"
    assert solved.period_us <= best
    if equal_loads:  # then loads in the order of computes lose nothing, and the order alone says what the period is
        assert period(window, solved.jobs) == best


def test_a_better_order_of_many_jobs_is_found() -> None:
    """As of gpt-oss-120b: what came before the router gives its slot to a late one, if it does not wait for residents."""
    resident, early, late = Job((), 351), Job(((2377, 3),), 351), Job(((2066, 3),), 351, late=True)
    window = Window((*[resident] * 6, *[late] * 6, early, *[late] * 8), slots=12, front_us=1909, after_us=13)
    known = listed(window)
    assert solve(window, known).period_us < 0.95 * known.period_us


def test_equal_windows_give_equal_orders() -> None:
    window = random_window(5, True)
    assert solve(window, listed(window)) == solve(window, listed(window))


def test_late_jobs_are_loaded_after_the_router() -> None:
    early = Window((Job(((20, 1),), 5), Job(((20, 1),), 5)), slots=2, front_us=60)
    late = early._replace(jobs=tuple(job._replace(late=True) for job in early.jobs))
    assert solve(early, listed(early)).period_us == 70
    assert solve(late, listed(late)).period_us == listed(late).period_us == 60 + 20 + 20 + 5


def test_modules_and_kv_are_part_of_the_links_work() -> None:
    window = Window((Job(((20, 1),), 5),), slots=1, front_us=10, modules_us=(30,), kv_us=(15, 15))
    assert window.work_us == 80
    assert solve(window, listed(window)).bound_us >= 80


# ------------------------------------------------------------------------------------------------------ from a plan


def skewed(spec: ModelSpec, exponent: float = 0.7) -> Routing:
    """Popularity that falls with the number of an expert, in all layers alike."""
    weights = {layer.num_experts: [(1 + e) ** -exponent for e in range(layer.num_experts)] for layer in spec.layers}
    shares = tuple(tuple(w / sum(weights[x.num_experts]) for w in weights[x.num_experts]) for x in spec.layers)
    return uniform(spec).model_copy(update={"popularity": shares})


def search_of(spec: ModelSpec, workload: Workload) -> Search:
    budgets = dict.fromkeys(("gpu", "host", "disk"), 1 << 30)
    return Search(Request(spec, tiny_hardware(True), skewed(spec), workload, budgets, "bf16", "joint"))


def lowered(decision: Decision, spec: ModelSpec) -> tuple[Cost, Lowered]:
    cost = Cost(spec, tiny_hardware(True), skewed(spec), spec.compute_dtype)
    return cost, lower(cost, "joint", decision, WORKLOAD)


def alike_layers(kv: str, lead: int, cpu: int = 0) -> tuple[ModelSpec, Decision]:
    """Ten layers that all do the same."""
    spec = tiny_spec(10, 6)
    base = tiny_decision("joint", spec, kv, num_batches=2, batch_size=6, lead=lead, cpu_batches=0)
    layers = [
        LayerDecision(
            resident_experts=(0, 1),
            static=tuple(range(2, 6 - cpu)),
            cpu=tuple(range(6 - cpu, 6)),
            kv=kv,
            resident=("router",),
        )
        if layer.num_experts
        else LayerDecision(kv=kv)
        for layer in spec.layers
    ]
    return spec, base.model_copy(update={"layers": tuple(layers)})


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("lead", [1, 2, 4])
@pytest.mark.parametrize("kv", ["gpu", "host"])
def test_the_windows_list_schedule_is_the_simulators(phase: str, lead: int, kv: str) -> None:
    spec, decision = alike_layers(kv, lead)
    cost, schedule = lowered(decision, spec)
    steps = schedule.phases[phase].steps
    begins: dict[int, int] = {}
    for step in steps:
        if isinstance(step.op, Compute) and step.op.stream == "gpu":
            begins.setdefault(step.op.layer, step.start_us)
    window = seen(cost, schedule.phases[phase], schedule.tensors, decision)[6].window
    measured = begins[7] - begins[6]
    assert window.work_us - ROUNDING_US <= measured
    if kv == "gpu" or phase == "prefill":  # else KV waits for slots of its own, which the window leaves out
        assert abs(listed(window).period_us - measured) <= ROUNDING_US


def test_the_order_of_a_window_becomes_that_of_the_decision() -> None:
    spec, decision = alike_layers("gpu", 2, cpu=2)
    cost, schedule = lowered(decision, spec)
    layers = seen(cost, schedule.phases["prefill"], schedule.tensors, decision)
    window = layers[4].window
    reverse = tuple(reversed(range(len(window.jobs))))
    tried = with_order(decision, Alike("prefill", layers, window, 1), reverse)
    assert set(tried.layers[4].static) == set(decision.layers[4].static)
    assert tried.layers[4].static == tuple(reversed(decision.layers[4].static))
    assert tried.layers[4].cpu == tuple(reversed(decision.layers[4].cpu))
    assert tried.layers[0] == decision.layers[0]


@pytest.fixture(scope="module")
def tried() -> list[tuple[Best, Best, Search]]:
    """Schedules whose experts are in no good order, before and after all their windows were solved."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reorder, "WORTH", -1.0)
        for seed in range(6):
            rng = random.Random(seed)
            spec, decision = alike_layers("gpu", rng.choice((1, 2, 3)), cpu=rng.choice((0, 2)))
            layers = [
                layer.model_copy(update={"static": tuple(rng.sample(layer.static, len(layer.static)))})
                for layer in decision.layers
            ]
            decision = decision.model_copy(update={"layers": tuple(layers)})
            search = search_of(spec, BALANCED)
            schedule = lower(search.cost, "joint", decision, BALANCED)
            before = Best("joint", decision, search.rate(schedule), schedule)
            found.append((before, reordered(search, before), search))
    return found


def test_what_is_kept_is_never_slower_than_the_list_schedule(tried: list[tuple[Best, Best, Search]]) -> None:
    for before, after, search in tried:
        assert after.tokens_per_s >= before.tokens_per_s
        assert after.tokens_per_s == search.rate(after.lowered)
        assert after.order.startswith("order of experts")
        for old, new in zip(before.decision.layers, after.decision.layers, strict=True):
            assert sorted(old.static) == sorted(new.static)
            assert sorted(old.cpu) == sorted(new.cpu)
            assert sorted(old.resident_experts) == sorted(new.resident_experts)
    assert any(after.tokens_per_s > before.tokens_per_s for before, after, _ in tried)


def test_a_plan_with_another_order_is_sound(tried: list[tuple[Best, Best, Search]]) -> None:
    for _, after, search in tried[:2]:
        plan = record(search, after, [])
        verify(plan)
        assert after.order in plan.notes


def test_an_order_that_is_as_good_as_proved_is_not_mentioned() -> None:
    spec, decision = alike_layers("gpu", 4)
    search = search_of(spec, WORKLOAD)
    layers = (LayerDecision(kv="gpu", resident_experts=tuple(range(layer.num_experts))) for layer in spec.layers)
    decision = decision.model_copy(update={"layers": tuple(layers)})
    schedule = lower(search.cost, "joint", decision, WORKLOAD)
    best = Best("joint", decision, search.rate(schedule), schedule)
    assert reordered(search, best) is best


# ------------------------------------------------------------------------------------------------------- the list rule


def test_in_prefill_attention_waits_for_no_expert_that_it_does_not_need() -> None:
    spec, decision = alike_layers("host", 2)
    _, schedule = lowered(decision, spec)
    streams: dict[str, set[str]] = {"kv": set(), "expert": set()}
    for step in schedule.phases["prefill"].steps:
        if isinstance(step.op, Load) and (kind := schedule.tensors[step.op.tensors[0]].kind) in streams:
            streams[kind].add(step.op.stream)
    assert streams == {"kv": {URGENT}, "expert": {"host>gpu"}}


def test_prefill_begins_with_what_the_cpu_computes_in_decode_the_fastest_first() -> None:
    spec, decision = alike_layers("gpu", 2, cpu=2)
    _, schedule = lowered(decision, spec)
    order = [
        schedule.tensors[step.op.tensors[0]].index
        for step in schedule.phases["prefill"].steps
        if isinstance(step.op, Load) and schedule.tensors[step.op.tensors[0]].layer == 4
    ]
    experts = [index for index in order if index > 1]
    assert experts == [5, 4, 2, 3]
