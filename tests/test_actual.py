"""Planned against actual: what a measured trace says beside the plan, and a profile corrected by it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from klotski_compiler import actual
from klotski_compiler.actual import Log
from klotski_compiler.calibrate import calibrated
from klotski_compiler.cli.inspect import main
from klotski_compiler.errors import ConfigError
from klotski_compiler.execute import execute
from klotski_compiler.hardware import numbers, to_json
from klotski_compiler.ops import Compute, op_text
from klotski_compiler.plan import Plan
from klotski_compiler.simulate import Simulation
from klotski_compiler.trace import Row, chrome_trace, predicted
from klotski_runtime.cli.profile import main as profile
from plans import WORKLOAD, make_plan, tiny_hardware, tiny_plan, tiny_spec

PASSES = 3


def ran(plan: Plan, phase: str, slower: dict[str, float]) -> Log:
    """A run of a phase in which the ops of some streams take so many times as long as planned."""
    steps = plan.steps[phase]
    clock = Simulation([(s.end_us - s.start_us) * slower.get(s.op.stream, 1.0) for s in steps])
    execute(steps, PASSES if phase == "decode" else 1, clock)
    return clock.log


def write_trace(plan: Plan, path: Path, slower: dict[str, float]) -> Path:
    rows = [
        Row(
            phase,
            steps[n].op.stream,
            op_text(steps[n].op, plan.names),
            start,
            end - start,
            {"run": 0, "pass": at, "op": n},
        )
        for phase, steps in plan.steps.items()
        for (at, n), (start, end) in ran(plan, phase, slower).items()
    ]
    path.write_text(json.dumps(chrome_trace(rows) | {"plan": plan.digest}))
    return path


def _planned_us(plan: Plan) -> Counter[str]:
    """Of each kind of compute op in decode."""
    total: Counter[str] = Counter()
    for step in plan.steps["decode"]:
        if isinstance(step.op, Compute):
            total[step.op.fn] += step.end_us - step.start_us
    return total


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("policy", ["joint", "klotski", "accelerate"])
def test_the_parts_of_the_compute_stream_add_up_to_the_pass(policy: str, gpu: bool, tmp_path: Path) -> None:
    plan = tiny_plan(policy, gpu)
    link = "host>gpu" if gpu else "disk>host"
    logs = actual.read(plan, write_trace(plan, tmp_path / "trace.json", {link: 2.0}))
    found = {p.phase: p for p in actual.passes(plan, logs)}
    assert set(found) == {"prefill", "decode"} and found["decode"].number == PASSES
    compute = "gpu" if gpu else "cpu"
    for phase in found.values():
        own = [part for part in phase.parts if part.stream == compute]
        assert sum(part.measured_us for part in own) == pytest.approx(phase.measured_us, rel=1e-6)
        for part in phase.parts:  # what was not slower took what was planned
            if part.stream == compute and not part.waits:
                assert part.measured_us == pytest.approx(part.planned_us)
            if part.stream == link and part.planned_us:
                assert part.measured_us == pytest.approx(2 * part.planned_us, rel=0.35)  # the last pass opens no other
    decode = found["decode"]
    planned = sum(part.planned_us for part in decode.parts if part.stream == compute)
    assert planned == pytest.approx(decode.planned_us, rel=0.02)


def test_a_run_beside_its_plan_is_read_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tiny_plan()
    plan.save(tmp_path / "plan.json")
    trace = write_trace(plan, tmp_path / "trace.json", {"disk>host": 3.0})
    assert main([str(tmp_path / "plan.json"), "--compare", str(trace)]) == 0
    out = capsys.readouterr().out
    assert "decode: a pass takes" in out and "waits for experts that have not arrived" in out and "load experts" in out


def test_a_forecast_or_the_trace_of_another_plan_is_refused(tmp_path: Path) -> None:
    plan, path = tiny_plan(), tmp_path / "trace.json"
    path.write_text(json.dumps(chrome_trace(predicted(plan))))
    assert actual.is_trace(path)
    with pytest.raises(ConfigError, match="a forecast, not a measurement"):
        actual.read(plan, path)
    write_trace(plan, path, {})
    with pytest.raises(ConfigError, match="another plan"):
        actual.read(tiny_plan("flexgen"), path)
    path.write_text("[]")
    assert not actual.is_trace(path)
    with pytest.raises(ConfigError, match="klotski-run --trace"):
        actual.read(plan, path)


def test_a_profile_is_corrected_by_what_was_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, hardware = tiny_plan("klotski", gpu=True), tiny_hardware(True)
    trace = write_trace(plan, tmp_path / "trace.json", {"host>gpu": 2.0, "gpu": 1.25})
    found = calibrated(hardware, plan, actual.read(plan, trace), trace)
    before, after = hardware.links["host>gpu"], found.links["host>gpu"]
    assert after.bandwidth_bytes_per_s == pytest.approx(before.bandwidth_bytes_per_s / 2)
    gpu, corrected = hardware.processors["gpu"], found.processors["gpu"]
    assert corrected.attention_op_us > gpu.attention_op_us and corrected.kv_bytes_per_s == gpu.kv_bytes_per_s
    for (_, rate), (_, now) in zip(gpu.matmul["bf16"], corrected.matmul["bf16"], strict=True):
        assert now == pytest.approx(rate / 1.25)
    disk, same = hardware.links["disk>host"], found.links["disk>host"]
    assert same.bandwidth_bytes_per_s == pytest.approx(disk.bandwidth_bytes_per_s)
    assert re.search(r"x 0\.500 by trace.json", found.sources["links.host>gpu.bandwidth_bytes_per_s"])

    plan.save(tmp_path / "plan.json")
    (tmp_path / "hw.json").write_text(to_json(hardware))
    files = [str(trace), str(tmp_path / "plan.json"), str(tmp_path / "hw.json")]
    assert profile(["--from-trace", *files, "-o", str(tmp_path / "hw2.json")]) == 0
    assert "written to" in capsys.readouterr().out
    written = json.loads((tmp_path / "hw2.json").read_text())
    assert written["links"]["host>gpu"] == after.model_dump(exclude_unset=True)
    assert written["name"] == "hw2"  # so that no plan that is made with it passes for one of the other


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_as_planned_corrects_nothing(gpu: bool, tmp_path: Path) -> None:
    for policy in ("joint", "accelerate"):
        plan, hardware = tiny_plan(policy, gpu), tiny_hardware(gpu)
        trace = write_trace(plan, tmp_path / "trace.json", {})
        found = calibrated(hardware, plan, actual.read(plan, trace), trace)
        for field, value in numbers(hardware).items():
            now = numbers(found)[field]
            for one, other in zip(*([v] if isinstance(v, int | float) else v for v in (now, value)), strict=True):
                assert one == pytest.approx(other, rel=1e-3), field  # plans have whole microseconds


def test_a_plan_with_corrected_costs_takes_as_long_as_the_run(tmp_path: Path) -> None:
    """A GPU's ops of decode that took longer than planned: the same plan made with the corrected profile says so."""
    plan, hardware = tiny_plan("klotski", gpu=True), tiny_hardware(True)
    trace = write_trace(plan, tmp_path / "trace.json", {"gpu": 3.0})
    found = calibrated(hardware, plan, {"decode": actual.read(plan, trace)["decode"]}, trace)
    again = make_plan(tiny_spec(), found, plan.policy, plan.decision, WORKLOAD)
    before, after = (_planned_us(each) for each in (plan, again))
    for fn in ("attention", "router", "experts"):  # experts that no token may choose are priced as fewer
        assert after[fn] == pytest.approx(3 * before[fn], rel=0.06), fn


def test_a_heads_own_rates_are_corrected_by_heads(tmp_path: Path) -> None:
    hardware, made = tiny_hardware(), tiny_plan()
    heads = ((1, 3e9), (64, 2e10))
    cpu = hardware.processors["cpu"].model_copy(update={"head": heads})
    hardware = hardware.model_copy(update={"processors": {"cpu": cpu}})
    plan = make_plan(tiny_spec(), hardware, made.policy, made.decision, WORKLOAD)
    assert _planned_us(plan)["head"] < _planned_us(made)["head"]
    logs = actual.read(plan, write_trace(plan, tmp_path / "trace.json", {}))
    for phase, runs in logs.items():
        heads_of = {
            n for n, step in enumerate(plan.steps[phase]) if isinstance(step.op, Compute) and step.op.fn == "head"
        }
        for log in runs:
            log |= {(at, n): (start, 2 * end - start) for (at, n), (start, end) in log.items() if n in heads_of}
    found = calibrated(hardware, plan, logs, tmp_path / "trace.json").processors["cpu"]
    assert [rate for _, rate in found.head] == pytest.approx([rate / 2 for _, rate in heads], rel=0.01)
    assert dict(found.matmul["bf16"])[64] == pytest.approx(dict(cpu.matmul["bf16"])[64], rel=1e-3)


def test_a_profile_of_another_machine_is_refused(tmp_path: Path) -> None:
    plan, trace = tiny_plan(gpu=True), tmp_path / "trace.json"
    logs = actual.read(plan, write_trace(plan, trace, {}))
    with pytest.raises(ConfigError, match="the plan was made for"):
        calibrated(tiny_hardware(True).model_copy(update={"name": "other"}), plan, logs, trace)


def test_kinds_of_ops_are_words() -> None:
    plan = tiny_plan(gpu=True)
    found = {actual.kind(plan, step.op) for steps in plan.steps.values() for step in steps}
    assert {"experts", "late experts", "load experts", "load late experts", "attention", "bind"} <= found
