"""klotski-compile --sweep: one number swept, a table and a picture."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from klotski_compiler import sweep
from klotski_compiler.decision import Workload
from klotski_compiler.errors import ConfigError, Infeasible
from klotski_compiler.plan import Plan
from klotski_compiler.planner import Request
from klotski_compiler.routing import uniform
from plans import tiny_hardware, tiny_spec


def request(nbytes: int = 1 << 30) -> Request:
    spec, hardware = tiny_spec(), tiny_hardware(True)
    budgets = dict.fromkeys(hardware.tiers, 1 << 40) | {"gpu": nbytes}
    return Request(spec, hardware, uniform(spec), Workload(prompt_len=16, gen_len=4, num_sequences=24), budgets, "bf16")


def silent(what: str, done: float) -> None:
    assert what
    assert 0 <= done < 1


@pytest.mark.parametrize("swept", ["num-batches", "memory", "prompt-len"])
def test_every_point_is_what_a_compilation_of_it_says(swept: str, tmp_path: Path) -> None:
    asked = request()
    found = sweep.sweep(asked, swept, silent)
    assert [point.value for point in found] == [value for value, _ in sweep.points(asked, swept)]
    plans = [point.found for point in found if isinstance(point.found, Plan)]
    assert len(plans) == len(found)
    for point, plan in zip(found, plans, strict=True):
        seen = {
            "num-batches": plan.decision.num_batches,
            "memory": plan.budgets["gpu"] / 2**30,
            "prompt-len": plan.workload.prompt_len,
        }
        assert seen[swept] == point.value
        assert plan.forecast.tokens_per_s <= plan.forecast.bound_tokens_per_s
    lines = list(sweep.table(asked, swept, found))
    assert len(lines) == 1 + len(found)
    assert all(f"{plan.forecast.tokens_per_s:.2f}" in line for plan, line in zip(plans, lines[1:], strict=True))
    for suffix in ("svg", "png"):
        sweep.draw(asked, swept, found, tmp_path / f"sweep.{suffix}")
        assert (tmp_path / f"sweep.{suffix}").stat().st_size > 1000
    assert all(f"<!-- {word} -->" in (tmp_path / "sweep.svg").read_text() for word in ("joint", "bound", "tokens/s"))


def test_more_memory_is_never_slower() -> None:
    found = [point.found for point in sweep.sweep(request(96 << 20), "memory", silent)]
    rates = [plan.forecast.tokens_per_s for plan in found if isinstance(plan, Plan)]
    assert len(rates) > 2
    assert all(b >= a * 0.99 for a, b in pairwise(rates))


def test_a_point_that_does_not_fit_is_part_of_the_answer_and_none_that_fits_a_refusal() -> None:
    least = 40 << 20
    asked = request(least)
    found = sweep.sweep(asked, "memory", silent)
    refused = [point for point in found if isinstance(point.found, Infeasible)]
    assert refused
    assert len(refused) < len(found)
    assert "short by" in "\n".join(sweep.table(asked, "memory", found))
    with pytest.raises(Infeasible):
        sweep.sweep(request(1 << 10), "memory", silent)
    long = replace(asked, workload=asked.workload.model_copy(update={"gen_len": asked.spec.max_positions}))
    with pytest.raises(ConfigError, match="leave no prompt of 64 tokens room"):
        sweep.sweep(long, "prompt-len", silent)
