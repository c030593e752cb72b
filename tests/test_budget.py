"""The budget holds: what a real run takes and moves, by the kernel's own count, against what the plan says and the user allows."""

from __future__ import annotations

import gc
import json
import re
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.checkpoint import Shape
from benchmarks.checkpoint import make_checkpoint as make_large
from commands import klotski, refused
from klotski_compiler.decision import Workload
from klotski_compiler.hardware import read_hardware, to_json
from klotski_compiler.model import read_model
from klotski_compiler.plan import Plan, load
from klotski_compiler.planner import Request, compile_plan
from klotski_compiler.routing import uniform
from klotski_runtime.engine import Engine, Row
from klotski_runtime.kernels import Group
from klotski_runtime.skeleton import import_model
from tiny import make_checkpoint

TOLERANCE = 0.05
SHAPE = Shape(layers=30, hidden=768, experts=8, moe_intermediate=512, skew=0.0)
"""0.65 GB. Of the least that a process takes, about 70 MB do not depend on the model: a smaller one would say nothing."""
FEW = ["--prompt-len", "32", "--gen-len", "5", "--num-sequences", "4"]
SPILLING = ["--prompt-len", "112", "--gen-len", "4", "--num-sequences", "16", "--batch-size", "16"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, a machine and a budget of a quarter of the model's weights."""
    folder = tmp_path_factory.mktemp("large")
    hardware = read_hardware("dev-2core")
    # 16-bit matmuls through fp32, which takes memory too: without, a processor that lacks the first is ten times as slow.
    cpu = hardware.processors["cpu"].model_copy(update={"least_own_rows": 16})
    hardware = hardware.model_copy(update={"name": "here", "processors": {"cpu": cpu}})
    (folder / "hw.json").write_text(to_json(hardware))
    model = make_large(folder / "model", SHAPE)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return SimpleNamespace(model=model, hardware=folder / "hw.json", budget=weights // 4, folder=folder)


def compiled(large: SimpleNamespace, policy: str, budget: int, *workload: str) -> tuple[Any, Path]:
    """What klotski-compile says, and where its plan is."""
    plan = large.folder / f"{policy}.json"
    options = ("--memory", f"host={budget}", "--policy", policy, *workload, "-o", plan, "--json")
    return klotski("klotski-compile", large.model, large.hardware, *options), plan


def check_plan(plan: Plan, budget: int) -> None:
    """Arena and workspace stay within the planned peak, and that within the budget, in every tier."""
    assert plan.budgets["host"] == budget
    assert plan.forecast.peak_bytes["host"] <= budget
    for tier, peak in plan.forecast.peak_bytes.items():
        arena = max((slot.offset + slot.nbytes for slot in plan.slots if slot.tier == tier), default=0)
        assert arena + sum(plan.workspace.get(tier, {}).values()) <= peak <= plan.budgets[tier]


def check_run(large: SimpleNamespace, path: Path, plan: Plan) -> dict[str, Any]:
    """A real run takes no more memory than allowed, and moves the bytes that were planned."""
    done = klotski("klotski-run", path, "--model", large.model, "--scratch", large.folder, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    moved, planned = report["bytes_per_link"], report["planned_bytes_per_link"]
    taken, budget = report["peak_rss_bytes"] - report["idle_rss_bytes"], plan.budgets["host"]
    print(f"{plan.policy}: {taken:,} bytes taken, {plan.forecast.peak_bytes['host']:,} planned, {budget:,} allowed")
    print(f"moved {moved}, planned {planned}, by the kernel's count {report['storage_read_bytes']:,} read")
    assert taken <= (1 + TOLERANCE) * budget
    assert moved == pytest.approx(planned, rel=TOLERANCE)
    if report["storage_read_bytes"]:  # a container may hide it, and a file system in memory reads nothing
        assert report["storage_read_bytes"] == pytest.approx(moved["disk>host"], rel=TOLERANCE)
    return report


@pytest.mark.parametrize(
    ("policy", "workload"), [("joint", FEW), ("flexgen", FEW), ("accelerate", SPILLING)], ids=lambda value: str(value)
)
def test_a_model_of_four_times_the_budget(policy: str, workload: list[str], large: SimpleNamespace) -> None:
    done, path = compiled(large, policy, large.budget, *workload)
    assert done.returncode == 0, done.stderr
    plan = load(path)
    check_plan(plan, large.budget)
    report = check_run(large, path, plan)
    assert report["bytes_per_link"]["disk>host"] > 4 * large.budget
    if workload is SPILLING:
        assert {layer.kv for layer in plan.decision.layers} == {"disk"}
        assert report["bytes_per_link"]["host>disk"] > 0


@pytest.mark.parametrize("policy", ["joint", "flexgen", "accelerate"])
def test_a_budget_that_cannot_work_is_refused_with_what_it_lacks(policy: str, large: SimpleNamespace) -> None:
    first = allowed = large.budget // 4
    (large.folder / f"{policy}.json").unlink(missing_ok=True)
    done, path = compiled(large, policy, allowed, *FEW)
    refused(done, 3, "host is short by", "--memory host=")
    assert not path.exists()
    allowed += lacking(done.stderr)
    done, path = compiled(large, policy, allowed, *FEW)
    assert done.returncode == 0, done.stderr
    plan = load(path)
    check_plan(plan, allowed)
    if policy == "joint":
        check_run(large, path, plan)
    done, _ = compiled(large, policy, (first + 3 * allowed) // 4, *FEW)
    refused(done, 3, "host is short by")


def lacking(said: str) -> int:
    """The bytes that an infeasible compilation asks for."""
    found = re.search(r"host is short by ([\d,]+) bytes", said)
    assert found
    return int(found[1].replace(",", ""))


# ------------------------------------------------------------------------------------------------- what a night adds up


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A loaded engine for groups of four sequences."""
    folder = make_checkpoint("qwen3_moe", tmp_path / "model")
    spec = read_model(folder)
    workload, budgets = Workload(prompt_len=8, gen_len=40, num_sequences=4), {"host": 150_000_000, "disk": 10**12}
    request = Request(spec, read_hardware("dev-2core"), uniform(spec), workload, budgets, "fp32", "flexgen", 4, 1)
    engine = Engine(compile_plan(request), folder, import_model(folder), tmp_path, threads=1)
    engine.load()
    yield engine
    engine.close()


def rows(new_tokens: int) -> list[Row]:
    return [Row([5, 6, 7 + n], new_tokens) for n in range(4)]


def test_a_finished_group_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[weakref.ref[Group]] = []
    begin = Group.begin

    def begun(group: Group, wide: torch.Tensor, x: torch.Tensor) -> None:
        groups.append(weakref.ref(group))
        begin(group, wide, x)

    monkeypatch.setattr(Group, "begin", begun)
    gc.disable()  # which comes too late: what it would collect is small to it, and megabytes to the budget
    try:
        engine.run(rows(3))
        assert groups
        assert [group() for group in groups if group()] == []
    finally:
        gc.enable()


def test_a_longer_answer_takes_no_more_memory(engine: Engine) -> None:
    def peak(new_tokens: int) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        engine.run(rows(new_tokens))
        return tracemalloc.get_traced_memory()[1] - before

    engine.run(rows(3))
    tracemalloc.start()
    try:
        peak(3)
        short, long = peak(10), peak(40)
    finally:
        tracemalloc.stop()
    assert long - short < 30 * 2000  # bytes per pass: its end, and its tokens
