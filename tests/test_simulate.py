"""The simulator against a replay that knows nothing of it, and what must hold of any schedule in time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klotski_compiler.cost import Cost
from klotski_compiler.decision import LayerDecision, Workload
from klotski_compiler.execute import execute
from klotski_compiler.hardware import read_hardware
from klotski_compiler.model import read_model
from klotski_compiler.ops import Bind, Compute, Load, Step, Store
from klotski_compiler.pipeline import Lowered, LoweredPhase, lower
from klotski_compiler.policies import POLICIES
from klotski_compiler.routing import uniform
from klotski_compiler.shape import Shape
from klotski_compiler.simulate import NEGLIGIBLE, SIMULATED_PASSES, Simulation, bubbles, simulate
from plans import tiny_decision, tiny_hardware, tiny_spec

RANDOM = settings(max_examples=60, deadline=None, derandomize=True)
PLACES = ((False, "host"), (False, "disk"), (True, "gpu"), (True, "host"))
Log = dict[tuple[int, int], tuple[float, float]]  # (pass, op) -> (start, end)


@lru_cache(maxsize=256)
def schedule(policy: str, gpu: bool, kv: str, layers: int = 3, gen_len: int = 8) -> tuple[Cost, Lowered]:
    spec, workload = tiny_spec(layers, 4), Workload(prompt_len=16, gen_len=gen_len, num_sequences=6)
    cost = Cost(spec, tiny_hardware(gpu), uniform(spec), "bf16")
    return cost, lower(cost, policy, tiny_decision(policy, spec, kv), workload)


def decode(policy: str, gpu: bool, kv: str) -> list[Step]:
    return schedule(policy, gpu, kv)[1].phases["decode"].steps


def random_times(steps: Sequence[Step], seed: int) -> list[float]:
    """Integers, so that sums are exact; streams of very different speed."""
    rng = random.Random(seed)
    speed = {stream: rng.choice([1, 2, 4, 8]) for stream in sorted({s.op.stream for s in steps})}
    return [float(rng.randint(0, 50) * speed[s.op.stream]) for s in steps]


def replay(steps: Sequence[Step], passes: int, times: Callable[[int], Sequence[float]]) -> Log:
    """Every pass, one op after the other: an op starts when its stream is free and what it waits for has ended. What opens the
    phase is pass -1; in the last pass, loads for the next take no time."""
    log: Log = {}
    free = Counter[str]()
    for at in range(-1, passes):
        now = times(max(at, 0))
        for number, step in enumerate(steps):
            wraps = isinstance(step.op, Load) and step.op.wraps
            if at < 0 and not wraps:
                continue
            start = float(free[step.op.stream])
            for wait in step.waits:
                start = max(start, log.get((at - wait.back, wait.op), (0.0, 0.0))[1])
            end = start if wraps and at == passes - 1 else start + now[number]
            log[at, number] = (start, end)
            free[step.op.stream] = end  # type: ignore[assignment]
    return log


def length(log: Log) -> float:
    return max(end for _, end in log.values())


# --------------------------------------------------------------------------------------------------------- the clock


def simulated(steps: Sequence[Step], passes: int, times: Sequence[float]) -> Log:
    backend = Simulation(times)
    execute(steps, passes, backend)
    return backend.log


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_op_starts_as_soon_as_its_stream_and_what_it_waits_for_allow(policy: str, gpu: bool, kv: str) -> None:
    steps = decode(policy, gpu, kv)
    for seed in range(4):
        times, passes = random_times(steps, seed), 1 + seed
        expected = replay(steps, passes, lambda at, times=times: times)  # type: ignore[misc]
        log = simulated(steps, passes, times)
        assert log == {key: expected[key] for key in log}
        assert len(log) == passes * len(steps)  # what opens the phase runs before it, and not in the last pass


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
@RANDOM
@given(seed=st.integers(0, 1 << 32), passes=st.integers(1, 6))
def test_no_stream_is_busier_than_the_phase_is_long_and_no_op_starts_early(
    policy: str, gpu: bool, kv: str, seed: int, passes: int
) -> None:
    steps = decode(policy, gpu, kv)
    times = random_times(steps, seed)
    log = simulated(steps, passes, times)
    busy = Counter[str]()
    for (at, number), (start, end) in log.items():
        busy[steps[number].op.stream] += end - start  # type: ignore[assignment]
        for wait in steps[number].waits:
            assert start >= log.get((at - wait.back, wait.op), (0.0, 0.0))[1]
    assert length(log) >= max(busy.values())
    for stream in busy:
        lane = [log[key] for key in sorted(log) if steps[key[1]].op.stream == stream]
        assert all(one[1] <= two[0] for one, two in pairwise(lane))


# --------------------------------------------------------------------------------------------------------- whole phases


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
@settings(RANDOM, max_examples=15)
@given(seed=st.integers(0, 1 << 32))
def test_after_settling_every_further_pass_takes_the_same_time(policy: str, gpu: bool, kv: str, seed: int) -> None:
    steps = decode(policy, gpu, kv)
    times = random_times(steps, seed)

    def timed(passes: int) -> float:
        return simulate(steps, passes, "gpu" if gpu else "cpu", lambda x: times).total_us

    settled = simulate(steps, 40, "gpu" if gpu else "cpu", lambda x: times).pass_us
    totals = [timed(passes) for passes in range(SIMULATED_PASSES, SIMULATED_PASSES + 4)]
    assert [two - one for one, two in pairwise(totals)] == pytest.approx([settled] * 3)
    assert totals == sorted(totals) and timed(1) <= timed(2) <= timed(3) <= totals[0]
    assert timed(40) == pytest.approx(length(replay(steps, 40, lambda at: times)), rel=0.01)


@pytest.mark.parametrize("load_us", [102, 105, 108])
def test_a_phase_is_as_long_as_its_busiest_stream_though_it_settles_late(load_us: int) -> None:
    """One layer whose experts are all in flight: the link begins nearly a pass behind the processor and catches up slowly."""
    spec = replace(tiny_spec(2, 8), layers=tiny_spec(2, 8).layers[1:])
    cost = Cost(spec, tiny_hardware(), uniform(spec), "bf16")
    streamed = LayerDecision(resident=("attention", "router", "shared"), static=tuple(range(8)), kv="host")
    decision = tiny_decision("joint", spec, "host", layers=(streamed,), lead=8, head_pages=0)
    workload = Workload(prompt_len=16, gen_len=41, num_sequences=6)
    steps = lower(cost, "joint", decision, workload).phases["decode"].steps
    count = Counter(s.op.stream for s in steps)
    times = [load_us / count["disk>host"] if s.op.stream == "disk>host" else 112 / count["cpu"] for s in steps]
    found = simulate(steps, 40, "cpu", lambda x: times)
    assert found.busy_us["cpu"] == pytest.approx(40 * 112)
    assert found.total_us >= found.busy_us["cpu"]


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_forecast_of_decode_is_close_above_the_replay_of_all_its_passes(policy: str, gpu: bool, kv: str) -> None:
    """Each pass with the times that its ops have at its position; the cache grows fivefold meanwhile."""
    cost, lowered = schedule(policy, gpu, kv, gen_len=64)
    phase, decision = lowered.phases["decode"], tiny_decision(policy, cost.spec, "host")
    if decision.rolling:
        rounds = [phase.shape.with_ages(ages) for ages in there(6 // 2, decision.prefill_groups)]
        exact = sum(
            length(replay(phase.steps, phase.shape.passes, times_at(cost, lowered, phase, shape, policy)))
            for shape in rounds
        )
    else:
        exact = length(replay(phase.steps, phase.shape.passes, times_at(cost, lowered, phase, phase.shape, policy)))
    assert exact * (1 - NEGLIGIBLE) <= phase.times.total_us <= exact * 1.05


def there(cohorts: int, ages: int) -> list[range]:
    """Which ages there are in every round, counted out: cohort c joins in round c, and stays for so many."""
    present = [[k - c for c in range(cohorts) if 0 <= k - c < ages] for k in range(cohorts + ages - 1)]
    return [range(min(found), max(found) + 1) for found in present]


def times_at(
    cost: Cost, lowered: Lowered, phase: LoweredPhase, shape: Shape, policy: str
) -> Callable[[int], list[float]]:
    """Op times of a pass, priced one by one."""
    decision = tiny_decision(policy, cost.spec, "host")
    late = {number: list(layer.late) for number, layer in enumerate(decision.layers)}
    first = shape.first_context
    return lambda at: [cost.op_us(s.op, lowered.tensors, shape, first + at, late) for s in phase.steps]


@pytest.mark.parametrize("cohorts", [1, 2, 4, 9, 40])
@pytest.mark.parametrize(("gpu", "kv"), PLACES)
def test_the_forecast_of_passes_back_to_back_in_rolling_order_is_close_to_their_replay(
    gpu: bool, kv: str, cohorts: int
) -> None:
    """Four ages and four tokens: one cohort joins in every pass, until no more come."""
    spec, workload = tiny_spec(3, 4), Workload(prompt_len=16, gen_len=4, num_sequences=2 * cohorts)
    cost = Cost(spec, tiny_hardware(gpu), uniform(spec), "bf16")
    decision = tiny_decision("joint", spec, kv, 4, rolling=True, prefill_groups=4)
    lowered = lower(cost, "joint", decision, workload)
    assert list(lowered.phases) == ["load", "prefill"] and lowered.groups == 1
    phase, late = lowered.phases["prefill"], {n: list(layer.late) for n, layer in enumerate(decision.layers)}
    shapes = [phase.shape.with_ages(ages) for ages in there(cohorts, 4)]
    assert phase.shape.passes == len(shapes)

    def times(at: int) -> list[float]:
        return [cost.op_us(s.op, lowered.tensors, shapes[at], shapes[at].first_context, late) for s in phase.steps]

    exact = length(replay(phase.steps, len(shapes), times))
    assert exact * 0.97 <= phase.times.total_us <= exact * 1.05
    moved = Counter[str]()
    for shape, step in product(shapes, phase.steps):
        if isinstance(step.op, Load | Store):
            nbytes = cost.moved_bytes(step.op, lowered.tensors, shape, shape.first_context, late)
            moved[step.op.link] += nbytes  # type: ignore[assignment]
    assert dict(phase.link_bytes) == pytest.approx(dict(moved), rel=0.03)


def test_the_forecast_of_a_large_model_is_within_a_percent_of_its_replay() -> None:
    """Mixtral on an RTX 3090, 512 prompt and 32 new tokens."""
    spec = read_model("mixtral-8x7b")
    spec = replace(spec, layers=spec.layers[:6])
    cost = Cost(spec, read_hardware("rtx3090"), uniform(spec), "bf16")
    layers = tuple(
        LayerDecision(resident=("router",), resident_experts=(0,), static=(1, 2, 3, 4), late=(5, 6, 7), kv="gpu")
        for _ in spec.layers
    )
    decision = tiny_decision("joint", spec, "gpu", 4, 32, layers=layers, head_pages=4, expert_rows=8192)
    lowered = lower(cost, "joint", decision, Workload(prompt_len=512, gen_len=32, num_sequences=128))
    phase, late = lowered.phases["decode"], {n: [5, 6, 7] for n in range(6)}

    def times(at: int) -> list[float]:
        return [cost.op_us(s.op, lowered.tensors, phase.shape, 513 + at, late) for s in phase.steps]

    exact = length(replay(phase.steps, phase.shape.passes, times))
    assert exact * (1 - NEGLIGIBLE) <= phase.times.total_us <= exact * 1.01


# -------------------------------------------------------------------------------------------------------------- bubbles


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
@RANDOM
@given(seed=st.integers(0, 1 << 32), passes=st.integers(1, 4))
def test_bubbles_and_computing_fill_the_span_of_the_compute_stream(
    policy: str, gpu: bool, kv: str, seed: int, passes: int
) -> None:
    steps, compute = decode(policy, gpu, kv), "gpu" if gpu else "cpu"
    times = random_times(steps, seed)
    log = simulated(steps, passes, times)
    computing = sum(
        times[n] * passes for n, s in enumerate(steps) if s.op.stream == compute and isinstance(s.op, Compute | Bind)
    )
    span = max(end for (_, n), (_, end) in log.items() if steps[n].op.stream == compute)
    idle = bubbles(steps, log, passes, compute)
    assert sum(idle.values()) + computing == pytest.approx(span)
    assert set(idle) <= {"inter_layer", "intra_layer", "kv", "end_of_pass"} and min(idle.values(), default=0) >= 0


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_transfers_that_take_no_time_leave_no_bubble(policy: str, gpu: bool, kv: str) -> None:
    steps = decode(policy, gpu, kv)
    compute = "gpu" if gpu else "cpu"
    times = [7.0 if s.op.stream == compute and isinstance(s.op, Compute | Bind) else 0.0 for s in steps]
    found = simulate(steps, 9, compute, lambda x: times)
    assert sum(found.bubble_us.values()) == 0
    assert found.total_us == pytest.approx(9 * sum(times))


def test_computes_that_take_no_time_leave_nothing_but_bubbles() -> None:
    steps = [s for s in decode("accelerate", False, "host") if s.op.stream == "cpu"]
    times = [3.0 if isinstance(s.op, Load) else 0.0 for s in steps]
    found = simulate([s._replace(waits=()) for s in steps], 9, "cpu", lambda x: times)
    assert sum(found.bubble_us.values()) == pytest.approx(found.total_us) == pytest.approx(9 * sum(times))


def test_a_decision_is_priced_by_what_its_steps_show() -> None:
    """Times in a plan are those of one settled pass, from its first op."""
    for policy in POLICIES:
        phase = schedule(policy, False, "host")[1].phases["decode"]
        assert min(s.start_us for s in phase.steps) == 0
        assert all(s.end_us >= s.start_us for s in phase.steps)
        spans = {n: (s.start_us, s.end_us) for n, s in enumerate(phase.steps)}
        for number, step in enumerate(phase.steps):
            for wait in step.waits:
                if wait.back == 0:
                    assert spans[number][0] >= spans[wait.op][1] - 1  # whole microseconds


def test_a_gpu_is_slower_while_the_cpu_computes() -> None:
    hardware = tiny_hardware(True)
    gpu = hardware.processors["gpu"].model_copy(update={"beside_cpu": 0.5})
    hardware = hardware.model_copy(update={"processors": hardware.processors | {"gpu": gpu}})
    spec = tiny_spec()
    cost = Cost(spec, hardware, uniform(spec), spec.compute_dtype)
    assert cost.sharing({"gpu": 0.9, "cpu": 0.5, "host>gpu": 1.0})["gpu"] == pytest.approx(1.5)
    assert "gpu" not in cost.sharing({"gpu": 0.9, "cpu": 0.0, "host>gpu": 1.0})
