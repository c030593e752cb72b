"""Bounds: no schedule that the simulator finds may beat one."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import pytest

from klotski_compiler.bounds.apart import TOLERANCE, Relaxation
from klotski_compiler.bounds.certificate import bound_tokens_per_s, intervals, relaxations
from klotski_compiler.bounds.least import SCALE_US, SPANS
from klotski_compiler.bounds.mixed import Mixed
from klotski_compiler.bounds.runs import MOST_BATCHES, Division
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.estimates import WORK_ERROR
from klotski_compiler.hardware import Hardware, read_hardware
from klotski_compiler.layout import most_pages
from klotski_compiler.milp.solve import residency
from klotski_compiler.milp.solver import Solver
from klotski_compiler.model import ModelSpec, read_model
from klotski_compiler.pipeline import Lowered, lower
from klotski_compiler.policies import POLICIES, policy
from klotski_compiler.rough import busiest_us
from klotski_compiler.routing import uniform
from klotski_compiler.tensors import MODULES
from plans import module, tiny_decision, tiny_hardware, tiny_spec


def tokens_per_s(lowered: Lowered, workload: Workload) -> float:
    """As the forecast counts: from the first weight byte."""
    return 1e6 * workload.num_sequences * workload.gen_len / (lowered.load_us + lowered.groups * lowered.group_us)


def sliding(spec: ModelSpec, window: int) -> ModelSpec:
    """Every other layer attends to so many positions; 0: none does."""
    layers = (replace(layer, sliding_window=window * (i % 2) or None) for i, layer in enumerate(spec.layers))
    return replace(spec, layers=tuple(layers))


def random_schedule(policy_name: str, seed: int, window: int = 0) -> tuple[Cost, Workload, Decision, Lowered]:
    """A random decision that the policy can take, lowered."""
    rng = random.Random(f"{policy_name} {seed}")
    gpu, own = rng.random() < 0.5, policy(policy_name)
    spec = sliding(tiny_spec(layers=rng.choice([2, 4]), experts=rng.choice([2, 4, 8])), window)
    hardware = tiny_hardware(gpu)
    popularity = []
    for layer in spec.layers:
        weights = [rng.lognormvariate(0, 1) for _ in range(layer.num_experts)]
        popularity.append(tuple(w / sum(weights) for w in weights))
    routing = uniform(spec).model_copy(update={"popularity": tuple(popularity)})
    cost = Cost(spec, hardware, routing, "bf16")
    workload = Workload(
        prompt_len=rng.choice([1, 8, 64]), gen_len=rng.choice([1, 2, 9]), num_sequences=rng.choice([1, 7, 24, 60])
    )
    kv = hardware.compute_tier if rng.random() < 0.6 else ("host" if gpu else "disk")
    layers, disk = [], rng.choice([0.0, 0.5, 1.0])
    for number, layer in enumerate(spec.layers):
        order = cost.popular(number)
        kept = rng.randint(0, len(order))
        late = {"static": 0, "solved": rng.randint(0, len(order) - kept), "picks": len(order) - kept}[own.experts]
        cut = len(order) - late
        modules = [k for k in ("attention", "router", "shared", "dense") if getattr(layer, k) and rng.random() < 0.4]
        shared = gpu and rng.random() < 0.6  # with the CPU
        cpu = rng.randint(0, cut - kept) if shared and own.solved else 0
        picks = rng.randint(0, late) if shared and own.cpu_experts else 0
        layers.append(
            LayerDecision(
                resident=tuple(modules),
                resident_experts=tuple(order[:kept]),
                static=tuple(order[kept : cut - cpu]),
                late=tuple(order[cut:]),
                cpu=tuple(order[cut - cpu : cut]),
                cpu_picks=picks,
                on_disk=tuple(e for e in sorted(order[kept : cut - cpu]) if gpu and rng.random() < disk),
                kv=kv,
            )
        )
    batch_size = rng.choice([1, 2, 5])
    base = tiny_decision(policy_name, spec, kv, rng.choice([1, 2, 4]), batch_size)
    unit, ages = rng.choice([1, 2]), rng.choice([2, 4])
    cohort = -(-base.num_batches // ages) * batch_size
    rolling = base.num_batches % ages == 0 and workload.gen_len > 2 and (base.rolling or rng.random() < 0.6)
    rolling = rolling and -(-workload.num_sequences // cohort) >= ages
    base = base.model_copy(
        update={"rolling": rolling, "prefill_groups": ages if rolling else rng.choice([1, base.num_batches])}
    )
    decision = base.model_copy(
        update={
            "layers": tuple(layers),
            "unit": unit,
            "lead": max(unit * rng.choice([1, 2, 4]), spec.layers[-1].num_experts if own.experts != "solved" else 0),
            "head_pages": rng.choice([0, 2, 5]),
            "embedding": rng.random() < 0.5,
            "together": own.solved and rng.random() < 0.5,
            "pages": rng.randint(1, most_pages(spec.layers[-1].expert.nbytes)) if unit == 1 else 1,  # type: ignore[union-attr]
        }
    )
    return cost, workload, decision, lower(cost, policy_name, decision, workload)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_no_schedule_beats_the_bounds(policy_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random decisions of every policy, with just the memory that they take; also busy times and critical paths."""
    monkeypatch.setattr("klotski_compiler.layout.LOAD_BYTES", 12 << 10)  # so that experts may have three pages
    for seed, window in ((seed, 4 * (seed % 3 == 0)) for seed in range(30)):
        cost, workload, decision, lowered = random_schedule(policy_name, seed, window)
        bound = bound_tokens_per_s(cost, workload, lowered.peak_bytes, decision.rolling)
        assert tokens_per_s(lowered, workload) <= bound * (1 + 1e-9), f"seed {seed}"
        for name, phase in lowered.phases.items():
            busy = max(phase.times.busy_us.values(), default=0.0)
            assert phase.times.total_us >= busy * (1 - 1e-9), f"seed {seed}, {name}"
            assert phase.times.total_us >= phase.critical_us * (1 - 1e-9), f"seed {seed}, {name}"


@pytest.mark.parametrize("policy_name", ["joint", "flexgen", "hybrimoe", "moe_lens"])
def test_no_schedule_takes_less_than_the_work_of_its_busiest_streams(policy_name: str) -> None:
    """By which the search corrects what it estimates from a few layers; also where routing takes longest."""
    for seed in range(40):
        cost, workload, decision, _ = random_schedule(policy_name, seed)
        here = cost.processor_name
        slow = cost.processor.model_copy(update={"router_op_us": 300.0 * (seed % 2)})
        hardware = cost.hardware.model_copy(update={"processors": {**cost.hardware.processors, here: slow}})
        cost = Cost(cost.spec, hardware, cost.routing, cost.dtype)
        lowered = lower(cost, policy_name, decision, workload)
        total_us = lowered.load_us + lowered.groups * lowered.group_us
        assert busiest_us(cost, decision, workload) <= total_us * (1 + WORK_ERROR), f"seed {seed}"


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_no_schedule_that_leans_on_the_cpu_beats_the_bound(share: float) -> None:
    """Behind a slow link the CPU computes most of a layer's experts, or all, and attends: no faster than the bound, nor much slower."""
    spec = tiny_spec(layers=4, experts=8)
    hardware = tiny_hardware(True)
    quick = {"bandwidth_bytes_per_s": 1e12}
    links = {name: link.model_copy(update=quick) for name, link in hardware.links.items()}
    links["host>gpu"] = hardware.links["host>gpu"].model_copy(update={"bandwidth_bytes_per_s": 6e8})
    cpu = hardware.processors["cpu"].model_copy(
        update={"memory_bytes_per_s": 1e15}
    )  # so that links do not slow it down
    processors = {**hardware.processors, "cpu": cpu}
    cost = Cost(spec, hardware.model_copy(update={"links": links, "processors": processors}), uniform(spec), "bf16")
    workload = Workload(prompt_len=1, gen_len=128, num_sequences=8)
    cut = round(8 * (1 - share))
    layers = tuple(
        LayerDecision(
            resident=("attention", "router"), resident_experts=tuple(range(cut)), cpu=tuple(range(cut, 8)), kv="host"
        )
        for _ in spec.layers
    )
    bound = Relaxation(cost, workload, {"gpu": 1 << 30, "host": 1 << 30})
    kept = bound.module_bytes + cut / 8 * bound.expert_bytes
    bound.room = lambda sequences: kept  # type: ignore[method-assign]
    least_us, taken = bound.refined_us(1), list[float]()
    for num_batches, attended in ((1, 0), (1, 1), (2, 1), (2, 2), (4, 4)):
        decision = tiny_decision("joint", spec, "host", num_batches, 8 // num_batches)
        decision = decision.model_copy(update={"layers": layers, "cpu_batches": attended, "head_pages": 0})
        lowered = lower(cost, "joint", decision, workload)
        taken.append(lowered.load_us + lowered.group_us)
    assert least_us <= min(taken) * (1 + 1e-9)
    assert min(taken) < 2.2 * least_us  # a bound that says little would show little


def test_what_is_late_in_rolling_order_is_bounded() -> None:
    """Schedules of few cohorts, in which much is decoded after the last has joined, on machines where attention is slow on the CPU or
    the link: none is faster than the bound of its own stride and sequences, and some come near it."""
    slack = list[float]()
    for seed in range(150):
        rng = random.Random(seed)
        spec, hardware = tiny_spec(layers=2, experts=rng.choice([2, 4])), tiny_hardware(True)
        spec = sliding(spec, 2 * (seed % 3 == 0))
        link = {"bandwidth_bytes_per_s": rng.choice([1e8, 1e10, 1e12]), "latency_us": 0.0}
        cpu = hardware.processors["cpu"]
        cpu = cpu.model_copy(update={"kv_bytes_per_s": cpu.kv_bytes_per_s / rng.choice([1, 30, 1000])})
        links = {name: one.model_copy(update=link) for name, one in hardware.links.items()}
        machine = {"links": links, "processors": {**hardware.processors, "cpu": cpu}}
        cost = Cost(spec, hardware.model_copy(update=machine), uniform(spec), "bf16")
        ages, cohort, stride = rng.choice([2, 4, 8]), rng.choice([1, 2, 4]), rng.choice([1, 2])
        cohorts = ages + rng.choice([0, 0, 1, 3, 8])
        missing, prompt_len = rng.randrange(cohort), rng.choice([1, 2, 64])
        workload = Workload(prompt_len=prompt_len, gen_len=ages * stride, num_sequences=cohort * cohorts - missing)
        kv = rng.choice(["gpu", "host"])
        layers = tuple(
            LayerDecision(resident=("attention", "router"), resident_experts=tuple(range(layer.num_experts)), kv=kv)
            for layer in spec.layers
        )
        changes = {"layers": layers, "rolling": True, "prefill_groups": ages, "head_pages": 0}
        decision = tiny_decision("joint", spec, kv, ages, cohort)
        shares = {"cpu_batches": rng.randrange(ages + 1), "together": rng.random() < 0.5}
        decision = decision.model_copy(update={**changes, **shares})
        lowered = lower(cost, "joint", decision, workload)
        size = decision.sequences
        least_us = Mixed(cost, workload, lowered.peak_bytes, (stride, stride)).least_us(size, size)
        slack.append((lowered.load_us + lowered.group_us) / least_us)
    assert min(slack) >= 1 - 1e-9, f"seed {slack.index(min(slack))}"
    # A router of all ages at once takes least, which is not what joint does with prompts; and attention to each age takes calls.
    assert min(slack) < 1.27


def nearly_free(hardware: Hardware, rates: dict[str, dict[str, Any]]) -> Hardware:
    """The machine with ops and links that take next to nothing, but for what ``rates`` say of its processors."""
    free = dict.fromkeys(("op_us", "attention_op_us", "router_op_us", "expert_op_us"), 1e-4)
    free |= dict.fromkeys(("hidden_bytes_per_s", "memory_bytes_per_s", "kv_bytes_per_s"), 1e15)
    free |= {"prefill_attention_flops_per_s": 1e18}
    links = {
        name: link.model_copy(update={"latency_us": 0.0, "bandwidth_bytes_per_s": 1e14})
        for name, link in hardware.links.items()
    }
    processors = {name: p.model_copy(update=free | rates[name]) for name, p in hardware.processors.items()}
    return hardware.model_copy(update={"links": links, "processors": processors})


@pytest.mark.parametrize("cpu_batches", range(5))
def test_the_cpus_share_is_the_same_at_every_age(cpu_batches: int) -> None:
    """Were it of the older one of two only, it would be all of what is read beside prompts, and about half of the rest."""
    prompt_len, rate = 4096, 1e8
    kv = {"kv_bytes_per_s": rate, "matmul": {"bf16": ((1, 1e14), (64, 8e14))}}
    prompts = {"prefill_attention_flops_per_s": rate * prompt_len}
    spec, hardware = tiny_spec(layers=2, experts=2), nearly_free(tiny_hardware(True), {"gpu": kv | prompts, "cpu": kv})
    cost = Cost(spec, hardware, uniform(spec), "bf16")
    workload = Workload(prompt_len=prompt_len, gen_len=4, num_sequences=40)
    layers = tuple(
        LayerDecision(resident=("attention", "router"), resident_experts=tuple(range(layer.num_experts)), kv="host")
        for layer in spec.layers
    )
    changes = {"layers": layers, "rolling": True, "prefill_groups": 2, "head_pages": 0, "cpu_batches": cpu_batches}
    decision = tiny_decision("joint", spec, "host", 4, 1).model_copy(update=changes)
    assert decision.attended(0) == [[], [], [1, 3], [1, 3], [0, 1, 2, 3]][cpu_batches]
    lowered = lower(cost, "joint", decision, workload)
    least_us = Mixed(cost, workload, lowered.peak_bytes, (2, 2)).least_us(4, 4)
    assert least_us <= (lowered.load_us + lowered.group_us) * (1 + TOLERANCE)
    bound = bound_tokens_per_s(cost, workload, lowered.peak_bytes, True)
    assert tokens_per_s(lowered, workload) <= bound * (1 + TOLERANCE)


def test_batches_of_two_sizes_may_take_less_than_of_one() -> None:
    """Where few tokens are computed at nearly the rate of many, not at a rate in proportion."""
    kv, rate = 2e7, {"bf16": ((1, 1e10), (65536, 256e10))}
    rates = {"gpu": {"kv_bytes_per_s": kv, "matmul": rate}, "cpu": {"kv_bytes_per_s": kv / 7, "matmul": rate}}
    base = tiny_spec(layers=3, experts=2)
    wide = replace(base.layers[1], shared=None, attention=module(40 * (4 * 64 * 64 + 64), 5))
    spec, hardware = replace(base, layers=(wide,) * 3), nearly_free(tiny_hardware(True), rates)
    cost, workload = Cost(spec, hardware, uniform(spec), "bf16"), Workload(prompt_len=64, gen_len=2, num_sequences=64)
    layer = LayerDecision(
        resident=("attention", "router"), resident_experts=(0, 1), kv="host", kv_batches=1, cpu_batches=1
    )
    sizes = {"cpu_batches": 1, "last_batch": 8, "attention_batch": 64, "decode_batch": 64, "together": True}
    decision = tiny_decision("joint", spec, "host", 2, 56).model_copy(
        update={"layers": (layer,) * 3, "head_pages": 0, **sizes}
    )
    lowered = lower(cost, "joint", decision, workload)
    least_us = Relaxation(cost, workload, lowered.peak_bytes).least_us(1, 1, Division(batches=2))
    assert 0.9 < least_us / (lowered.load_us + lowered.group_us) <= 1


def shared_schedule(policy_name: str, seed: int, window: int = 0) -> tuple[Relaxation, Decision, Lowered]:
    """Attention takes GPU and CPU about as long, and each layer shares it as it likes; with CPU experts, short last groups and
    batches. Half of the schedules are as a solver would have them: all layers alike but for one batch, and, where some attend to a
    window only, with a share of their own for those; nothing streamed."""
    rng = random.Random(f"shared {policy_name} {seed}")
    spec, hardware = tiny_spec(layers=rng.choice([3, 5]), experts=rng.choice([2, 8])), tiny_hardware(True)
    if rng.random() < 0.7:
        spec = replace(spec, layers=spec.layers[1:])  # no dense layer
    spec = sliding(spec, window)
    links = {name: link.model_copy(update={"bandwidth_bytes_per_s": 1e11}) for name, link in hardware.links.items()}
    gpu, cpu = hardware.processors["gpu"], hardware.processors["cpu"]
    read = gpu.kv_bytes_per_s / 16
    slow = {"memory_bytes_per_s": 1e15, "kv_bytes_per_s": read * rng.choice([0.3, 1.0, 2.0])}
    processors = {"gpu": gpu.model_copy(update={"kv_bytes_per_s": read}), "cpu": cpu.model_copy(update=slow)}
    cost = Cost(spec, hardware.model_copy(update={"links": links, "processors": processors}), uniform(spec), "bf16")
    workload = Workload(
        prompt_len=rng.choice([1, 64, 512]), gen_len=rng.choice([3, 9, 65]), num_sequences=rng.choice([5, 16, 23, 64])
    )
    batches, groups = rng.choice([1, 2, 3, 4, 5]), rng.choice([1, 2, 3])
    batch_size = -(-workload.num_sequences // (batches * groups)) + rng.choice([0, 0, 1])
    solved, share = rng.random() < 0.5, rng.randint(0, batches)
    among = rng.choice([share, 0, batches]) if window else share  # of those that attend to it
    layers = []
    for layer in spec.layers:
        experts = list(range(layer.num_experts))
        on_cpu = rng.choice([0, 0, 1, len(experts) // 2]) if experts and policy(policy_name).solved else 0
        kept = len(experts) - on_cpu if solved else rng.randint(0, len(experts) - on_cpu)
        own = among if layer.sliding_window else share
        attended = min(batches, own + rng.choice([0, 1])) if solved else rng.randint(0, batches)
        layers.append(
            LayerDecision(
                resident=tuple(k for k in MODULES if getattr(layer, k) and (solved or rng.random() < 0.7)),
                resident_experts=tuple(experts[:kept]),
                static=tuple(experts[kept : len(experts) - on_cpu]),
                cpu=tuple(experts[len(experts) - on_cpu :]),
                kv="host",
                kv_batches=batches - attended if solved else rng.randint(0, batches),
                cpu_batches=attended,
            )
        )
    base = tiny_decision(policy_name, spec, "host", batches, batch_size, prefill_groups=1)
    last = rng.choice([0, 1, batch_size // 2, 2 * batch_size]) if policy_name == "joint" and batches > 1 else 0
    changes = {"layers": tuple(layers), "head_pages": 0, "cpu_batches": share, "hot": 0, "lead": 8, "last_batch": last}
    decision = base.model_copy(update={**changes, "together": policy_name == "joint" and rng.random() < 0.5})
    lowered = lower(cost, policy_name, decision, workload)
    return Relaxation(cost, workload, lowered.peak_bytes), decision, lowered


def least_us_as_shared(relaxation: Relaxation, decision: Decision, groups: int) -> float:
    """The bound of schedules in which the CPU's shares, of attention and of experts, are those of a decision."""
    spec, (low, high) = relaxation.cost.spec, relaxation.sequences(groups, groups)
    model = relaxation.program(groups, low, high, relaxation.room(low), 0, Division(batches=decision.num_batches))
    shares = {"cpu[1]": sum(len(layer.cpu) for layer in decision.layers) / sum(n.num_experts for n in spec.layers)}
    for kind, window in enumerate(dict.fromkeys(layer.sliding_window for layer in spec.layers)):
        alike = [number for number, layer in enumerate(spec.layers) if layer.sliding_window == window]
        attended = sum(decision.size_of(batch) for number in alike for batch in decision.attended(number))
        shares[f"cpu[kv.{kind}]"] = attended / len(alike) / decision.sequences
    for name, share in shares.items():
        model.variables[name] = replace(model.variables[name], lower=share, upper=share)
    return SCALE_US * Solver(model).relaxed().objective


@pytest.mark.parametrize("policy_name", ["joint", "moe_gen", "moe_lightning", "flexgen"])
def test_no_schedule_that_shares_attention_by_batches_beats_the_bound(policy_name: str) -> None:
    """The bound of its own shares and numbers, and of any number of batches; for joint some come close."""
    closest = dict.fromkeys(range(1, 6), 0.0)
    charged = (230, 447, 755)  # where each batch was charged an op of experts
    for seed, window in (*((n, 0) for n in (*range(80), *charged)), *((n, 8) for n in range(60))):
        relaxation, decision, lowered = shared_schedule(policy_name, seed, window)
        taken, groups = lowered.load_us + lowered.groups * lowered.group_us, lowered.groups
        least_us = least_us_as_shared(relaxation, decision, groups)
        assert least_us <= taken * (1 + TOLERANCE), f"seed {seed}, window {window}"
        assert relaxation.refined_us(groups) <= min(taken, least_us) * (1 + TOLERANCE), f"seed {seed}, window {window}"
        closest[decision.num_batches] = max(closest[decision.num_batches], least_us / taken)
    assert policy_name != "joint" or min(closest.values()) > 0.82, closest


def test_what_is_decided_once_is_bounded_where_contexts_grow() -> None:
    """A share of attention that suits the middle of decode suits neither its beginning nor its end: the bound knows."""
    spec = tiny_spec()
    cost = Cost(spec, tiny_hardware(True), uniform(spec), "bf16")
    budgets = {"gpu": spec.nbytes + (50 << 20), "host": spec.nbytes * 4}
    rates = []
    for prompt_len in (8, 4096):
        workload = Workload(prompt_len=prompt_len, gen_len=512, num_sequences=64)
        relaxation = Relaxation(cost, workload, budgets)
        names = relaxation.program(1, 64, 64, relaxation.room(64)).variables
        rates.append(sum(name.startswith("decode[") for name in names))
    assert rates == [SPANS, 0]


def test_each_span_of_decode_pays_for_sharing_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At first the processor is what is waited for, later the disk: either is slowed down by the other in its own spans, too."""
    spec, hardware = read_model("qwen1.5-moe-a2.7b"), read_hardware("dev-2core")
    workload = Workload(prompt_len=128, gen_len=512, num_sequences=256)
    relaxation = Relaxation(Cost(spec, hardware, uniform(spec), "bf16"), workload, {"host": spec.nbytes * 9 // 10})
    paid = relaxation.refined_us(1)
    shares = relaxation._shares(1, paid)
    assert 0.9 < sum(shares) < 1 and shares == sorted(shares)
    monkeypatch.setattr(Relaxation, "dragged", 0.0)
    assert 1.01 < paid / relaxation.refined_us(1) < 1.1


def test_parts_of_prefill_cost_memory_or_transfers() -> None:
    """States of many prompts at once, or weights that are read again: the refined bound knows both, and stays above the other."""
    spec = tiny_spec()
    cost = Cost(spec, tiny_hardware(True), uniform(spec), "bf16")
    workload = Workload(prompt_len=16, gen_len=16, num_sequences=8)
    tight = Relaxation(cost, workload, {"gpu": 1 << 40, "host": 1 << 40})
    tight.room = lambda sequences: 0.3 * spec.nbytes  # type: ignore[method-assign]
    assert tight.refined_us(1) > tight.least_us(1, 1) * 1.01
    tight.room = lambda sequences: 1 << 40  # type: ignore[method-assign]
    assert tight.refined_us(1) == min(tight.least_us(1, 1, Division(batches=n)) for n in range(1, MOST_BATCHES + 2))


def test_batches_cost_ops_and_are_attended_to_whole() -> None:
    """Every batch costs ops and is attended to by one processor: no number of them does what any number might do."""
    spec, hardware = tiny_spec(), tiny_hardware(True)
    slow = {name: p.model_copy(update={"kv_bytes_per_s": 5e8}) for name, p in hardware.processors.items()}
    cost = Cost(spec, hardware.model_copy(update={"processors": slow}), uniform(spec), "bf16")
    bound = Relaxation(cost, Workload(prompt_len=256, gen_len=64, num_sequences=8), {"gpu": 1 << 40, "host": 1 << 40})
    bound.room = lambda sequences: 1.1 * spec.nbytes  # type: ignore[method-assign]
    any_number, *each = (bound.least_us(1, 1, Division(batches=n)) for n in range(MOST_BATCHES + 2))
    assert any_number * 1.03 < min(each)
    assert bound.refined_us(1) >= min(each)


def test_host_memory_lends_a_place_to_what_passes_through() -> None:
    """Where the host cannot hold all experts, those on their way take room there: two places, or disk and link take turns."""
    spec = tiny_spec()
    cost = Cost(spec, tiny_hardware(True), uniform(spec), "bf16")
    workload = Workload(prompt_len=16, gen_len=64, num_sequences=4)
    relaxation = Relaxation(cost, workload, {"gpu": 60 << 20, "host": spec.nbytes // 2})
    room = spec.nbytes / 4
    free, one, two = (Solver(relaxation.program(1, 4, 4, room, staging)).relaxed().objective for staging in (0, 1, 2))
    assert free * 1.01 < min(one, two)


def test_an_interval_bounds_all_that_it_contains() -> None:
    """Numbers of groups, and of sequences at once in rolling order, may be pruned by the interval that they lie in."""
    spec = tiny_spec()
    cost = Cost(spec, tiny_hardware(True), uniform(spec), "bf16")
    workload = Workload(prompt_len=16, gen_len=8, num_sequences=24)
    whole = spec.nbytes
    budgets = {"gpu": whole // 3 + (60 << 20), "host": whole}
    for relaxation in (*relaxations(cost, workload, budgets, False), *relaxations(cost, workload, budgets, True)):
        least, most = relaxation.sizes
        single = [relaxation.least_us(size, size) for size in range(least, most + 1)]
        for first, last in combinations_with_replacement(range(least, most + 1, 3), 2):
            assert relaxation.least_us(first, last) <= min(single[first - least : last - least + 1]) * (1 + 1e-9)


@pytest.mark.parametrize(("prompt_len", "quick"), [(64, False), (1, True)])
def test_an_interval_of_strides_bounds_all_that_it_contains(prompt_len: int, quick: bool) -> None:
    """However far apart cohorts join: each interval by itself, and all of them together, is no tighter than what lies in it. quick: a CPU
    that computes experts of decode faster than the GPU, so that passes in which others join take longer than those between."""
    spec, hardware = tiny_spec(experts=8), tiny_hardware(True)
    if quick:
        rates = {
            "gpu": {"matmul": {"bf16": ((1, 1e10), (2, 1e10))}},
            "cpu": {"matmul": {"bf16": ((1, 1e11), (2, 1e11))}},
        }
        hardware = nearly_free(hardware, rates)
    cost = Cost(spec, hardware, uniform(spec), "bf16")
    workload = Workload(prompt_len=prompt_len, gen_len=33, num_sequences=96)
    budgets = {"gpu": spec.nbytes // 3 + (60 << 20), "host": spec.nbytes}
    for size in (40, 60, 100):
        single = {s: Mixed(cost, workload, budgets, (s, s)).least_us(size, size) for s in range(1, 18)}
        for coarse in (False, True):
            for first, last in intervals(workload.gen_len, coarse):
                least = Mixed(cost, workload, budgets, (first, last)).least_us(size, size)
                assert least <= min(single[s] for s in range(first, last + 1)) * (1 + 1e-9)


def test_more_memory_never_lowers_the_bound_and_none_is_infeasible() -> None:
    """Monotone in the budget; 0 where not even the states fit."""
    spec = read_model("mixtral-8x7b")
    cost = Cost(spec, read_hardware("rtx3090"), uniform(spec), "bf16")
    workload = Workload(prompt_len=512, gen_len=32, num_sequences=320)
    rates = [bound_tokens_per_s(cost, workload, {"gpu": gib << 30, "host": 256 << 30}) for gib in (8, 16, 24, 48, 96)]
    assert rates == sorted(rates) and rates[0] > 0
    assert bound_tokens_per_s(cost, workload, {"gpu": 1 << 20, "host": 256 << 30}) == 0.0


def test_the_bound_is_close_to_the_solved_schedule() -> None:
    """Mixtral on an RTX 3090: within 15 %."""
    spec = read_model("mixtral-8x7b")
    hardware = read_hardware("rtx3090")
    gpu_alone = hardware.model_copy(update={"processors": {"gpu": hardware.processors["gpu"]}})
    cost = Cost(spec, gpu_alone, uniform(spec), "bf16")
    workload = Workload(prompt_len=512, gen_len=32, num_sequences=320)
    layers = tuple(LayerDecision() for _ in spec.layers)
    sizes: dict[str, Any] = {
        "num_batches": 10,
        "batch_size": 32,
        "lead": 4,
        "unit": 1,
        "head_pages": 4,
        "prefill_groups": 10,
    }
    decision = Decision(
        **sizes, attention_batch=1, decode_batch=32, expert_rows=8192, hot=0, embedding=False, layers=layers
    )
    solved = residency(cost, workload, decision, {"gpu": 21 << 30, "host": 256 << 30})
    lowered = lower(cost, "joint", solved.decide(decision), workload)
    bound = bound_tokens_per_s(cost, workload, lowered.peak_bytes)
    assert 1.0 <= bound / tokens_per_s(lowered, workload) <= 1.15


def test_everything_resident_needs_no_link() -> None:
    """With room for all, a host machine loads once and then computes."""
    spec = tiny_spec()
    cost = Cost(spec, tiny_hardware(), uniform(spec), "bf16")
    workload = Workload(prompt_len=16, gen_len=64, num_sequences=4)
    rich, poor = (Relaxation(cost, workload, {"host": 1 << 30}), Relaxation(cost, workload, {"host": 1 << 30}))
    poor.room = lambda sequences: spec.nbytes / 2  # type: ignore[method-assign]
    once = 1e6 * spec.nbytes / cost.hardware.links["disk>host"].bandwidth_bytes_per_s
    compute = sum(rich.compute_us(1, 4, 4)) + rich.cores_us(4)[0][0]
    compute += sum(sum(weight.compute_us) for weight in rich.weights(1, 4, 4))
    assert compute <= rich.least_us(1, 1) <= once + compute
    assert poor.least_us(1, 1) > rich.least_us(1, 1)
