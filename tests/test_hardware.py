"""Hardware profiles: the shipped ones, what is refused and how, and the matmul cost that bounds rely on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, Processor, head_us, matmul_us, monotone, numbers, read_hardware, to_json
from klotski_compiler.shipped import shipped_names

SHIPPED = shipped_names("hardware")


def contents() -> dict[str, Any]:
    """A small valid profile, fresh each time."""
    processor = {
        "tier": "host",
        "memory_bytes_per_s": 2e10,
        "matmul": {"bf16": [[1, 1e10], [8, 8e10], [64, 2e11]], "fp32": [[1, 5e9]]},
        "kv_bytes_per_s": 1e10,
        "prefill_attention_flops_per_s": 1e11,
        "op_us": 10,
        "hidden_bytes_per_s": 1e9,
        "attention_op_us": 0,
        "router_op_us": 0,
        "expert_op_us": 50.5,
    }
    return {
        "name": "small",
        "description": "for tests",
        "compute_tier": "host",
        "tiers": {"host": {"capacity_bytes": 1000}, "disk": {"capacity_bytes": 2000}},
        "links": {"disk>host": {"bandwidth_bytes_per_s": 1e9, "latency_us": 50.0}},
        "processors": {"cpu": processor},
        "sources": {},
    }


def refusal(tmp_path: Path, text: str) -> ConfigError:
    path = tmp_path / "hw.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hardware(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    return caught.value


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_valid_and_every_number_has_a_source(name: str) -> None:
    hardware = read_hardware(name)
    assert hardware.name == name
    assert set(hardware.sources) == set(numbers(hardware))
    assert all(hardware.sources.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_have_the_links_and_dtypes_that_plans_use(name: str) -> None:
    hardware = read_hardware(name)
    links = {"disk>host", "host>disk"}
    if "gpu" in hardware.tiers:
        links |= {"host>gpu", "gpu>host"}
    assert set(hardware.links) == links
    assert all({"bf16", "fp32"} <= set(processor.matmul) for processor in hardware.processors.values())


def test_the_expected_machines_are_shipped() -> None:
    assert {"rtx3090", "h800", "t4", "l4", "a5000", "h200", "dev-2core"} <= set(SHIPPED)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    hardware = Hardware.model_validate(contents())
    path = tmp_path / "hw.json"
    path.write_text(to_json(hardware))
    assert read_hardware(path) == hardware == read_hardware(str(path))


def test_numbers_are_named_as_sources_name_them() -> None:
    named = numbers(Hardware.model_validate(contents()))
    assert named["links.disk>host.bandwidth_bytes_per_s"] == 1e9
    assert named["processors.cpu.matmul.fp32"] == ((1, 5e9),)
    assert "compute_tier" not in named


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, "5", True, None])
def test_a_number_that_is_no_rate_is_refused_by_its_field(tmp_path: Path, value: object) -> None:
    broken = contents()
    broken["links"]["disk>host"]["bandwidth_bytes_per_s"] = value
    error = refusal(tmp_path, json.dumps(broken))
    assert error.field == "links.disk>host.bandwidth_bytes_per_s"
    assert json.dumps(value) in error.why
    assert error.exit_code == 2


@pytest.mark.parametrize("literal", ["1e999", "-1e999"])
def test_a_number_beyond_a_float_is_refused(tmp_path: Path, literal: str) -> None:
    text = json.dumps(contents()).replace('"op_us": 10', f'"op_us": {literal}')
    assert refusal(tmp_path, text).field == "processors.cpu.op_us"


def drop_a_field(broken: dict[str, Any]) -> None:
    del broken["processors"]["cpu"]["kv_bytes_per_s"]


def add_a_field(broken: dict[str, Any]) -> None:
    broken["tiers"]["host"]["speed"] = 3


def lower_a_latency(broken: dict[str, Any]) -> None:
    broken["links"]["disk>host"]["latency_us"] = -0.5


def break_a_link(broken: dict[str, Any]) -> None:
    broken["links"]["disk>gpu"] = broken["links"]["disk>host"]


def loop_a_link(broken: dict[str, Any]) -> None:
    broken["links"]["host>host"] = broken["links"]["disk>host"]


def compute_nowhere(broken: dict[str, Any]) -> None:
    broken["compute_tier"] = "gpu"


def compute_without_a_processor(broken: dict[str, Any]) -> None:
    broken["compute_tier"] = "disk"


def misplace_a_processor(broken: dict[str, Any]) -> None:
    broken["processors"]["npu"] = broken["processors"]["cpu"] | {"tier": "sram"}


def shuffle_points(broken: dict[str, Any]) -> None:
    broken["processors"]["cpu"]["matmul"]["bf16"].reverse()


def repeat_a_point(broken: dict[str, Any]) -> None:
    broken["processors"]["cpu"]["matmul"]["bf16"].append([64, 3e11])


def shuffle_points_of_the_head(broken: dict[str, Any]) -> None:
    broken["processors"]["cpu"]["head"] = [[64, 1e10], [1, 1e10]]


def empty_a_table(broken: dict[str, Any]) -> None:
    broken["processors"]["cpu"]["matmul"]["bf16"] = []


def break_a_point(broken: dict[str, Any]) -> None:
    broken["processors"]["cpu"]["matmul"]["bf16"][1][1] = math.nan


@pytest.mark.parametrize(
    ("damage", "field", "words"),
    [
        (drop_a_field, "processors.cpu.kv_bytes_per_s", "missing; add it"),
        (add_a_field, "tiers.host.speed", "3: extra inputs are not permitted; remove it"),
        (lower_a_latency, "links.disk>host.latency_us", "-0.5"),
        (break_a_link, "links.disk>gpu", "host, disk"),
        (loop_a_link, "links.host>host", "different tiers"),
        (compute_nowhere, "compute_tier", "choose one of host, disk"),
        (compute_without_a_processor, "compute_tier", "no processor"),
        (misplace_a_processor, "processors.npu.tier", '"sram"'),
        (shuffle_points, "processors.cpu.matmul.bf16", "[64, 8, 1]: token counts must increase"),
        (shuffle_points_of_the_head, "processors.cpu.head", "[64, 1]: token counts must increase"),
        (repeat_a_point, "processors.cpu.matmul.bf16", "must increase"),
        (empty_a_table, "processors.cpu.matmul.bf16", "at least 1"),
        (break_a_point, "processors.cpu.matmul.bf16.1.1", "NaN"),
    ],
)
def test_a_fault_is_named_with_its_field(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], field: str, words: str
) -> None:
    broken = contents()
    damage(broken)
    error = refusal(tmp_path, json.dumps(broken))
    assert error.field == field
    assert words in error.why
    assert len(str(error).splitlines()) == 1


def test_every_fault_gets_its_own_line(tmp_path: Path) -> None:
    broken = contents()
    drop_a_field(broken)
    add_a_field(broken)
    lower_a_latency(broken)
    lines = str(refusal(tmp_path, json.dumps(broken))).splitlines()
    assert len(lines) == 3
    assert all("pydantic" not in line for line in lines)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"name": "x",}'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "hw.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (binary, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_hardware(path)


def test_an_unknown_name_lists_what_is_shipped() -> None:
    with pytest.raises(ConfigError, match=r"rtx5090: no such file.*\bh800\b.*klotski-profile"):
        read_hardware("rtx5090")


def test_an_unmeasured_dtype_lists_what_is_measured() -> None:
    processor = Hardware.model_validate(contents()).processors["cpu"]
    with pytest.raises(ConfigError, match=r"matmul\.fp8: .*bf16, fp32"):
        matmul_us(processor, "fp8", 1, 1, 1)


def test_matmul_time_at_measured_points_and_between() -> None:
    processor = Hardware.model_validate(contents()).processors["cpu"]
    params = 10**6
    assert matmul_us(processor, "bf16", 8, params, 0) == pytest.approx(2e6 * params * 8 / 8e10)
    assert matmul_us(processor, "bf16", 128, params, 0) == pytest.approx(2e6 * params * 128 / 2e11)
    # The geometric mean of two points has the geometric mean of their rates.
    middle = math.sqrt(8 * 64)
    assert matmul_us(processor, "bf16", middle, params, 0) == pytest.approx(
        2e6 * params * middle / math.sqrt(8e10 * 2e11)
    )
    # Below the first point the time is constant; without tokens there is none.
    assert matmul_us(processor, "bf16", 0.1, params, 0) == pytest.approx(matmul_us(processor, "bf16", 1, params, 0))
    assert matmul_us(processor, "bf16", 0, params, 10**9) == 0.0
    # Reading the weights is the floor.
    assert matmul_us(processor, "bf16", 8, params, 2 * 10**9) == pytest.approx(1e5)


def test_a_head_has_its_own_rates_where_they_are_known() -> None:
    processor = Hardware.model_validate(contents()).processors["cpu"]
    finding = processor.model_copy(update={"head": ((1, 1e10), (64, 4e11))})
    for dtype, rate in (("bf16", 4e11), ("fp16", 4e11)):
        assert head_us(finding, dtype, 128, 10**6, 0) == pytest.approx(2e12 * 128 / rate)
    assert head_us(finding, "bf16", 1, 10**6, 2 * 10**9) == pytest.approx(1e5)  # reading the weights
    for unknown, dtype in ((processor, "bf16"), (finding, "fp32")):
        assert head_us(unknown, dtype, 8, 10**6, 0) == matmul_us(unknown, dtype, 8, 10**6, 0)


points_of_a_table = st.dictionaries(st.integers(1, 10**5), st.floats(1e6, 1e16), min_size=1, max_size=12).map(
    lambda table: tuple(sorted(table.items()))
)


@given(points_of_a_table)
def test_monotone_only_raises_rates_and_is_idempotent(points: tuple[tuple[int, float], ...]) -> None:
    repaired = monotone(points)
    assert [m for m, _ in repaired] == [m for m, _ in points]
    assert all(new >= old * (1 - 1e-12) for (_, old), (_, new) in zip(points, repaired, strict=True))
    for (m0, rate0), (m1, rate1) in pairwise(repaired):
        assert rate0 * (1 - 1e-12) <= rate1 <= rate0 * m1 / m0 * (1 + 1e-12)
    again = monotone(repaired)
    assert all(a == pytest.approx(b, rel=1e-12) for (_, a), (_, b) in zip(again, repaired, strict=True))


@given(
    points_of_a_table,
    st.floats(0.01, 1e6),
    st.floats(1.0, 1e3),
    st.integers(1, 10**9),
    st.integers(0, 10**10),
)
def test_more_tokens_take_no_less_time_and_no_more_time_each(
    points: tuple[tuple[int, float], ...], tokens: float, factor: float, params: int, weight_bytes: int
) -> None:
    base = Hardware.model_validate(contents()).processors["cpu"]
    processor = Processor.model_validate(base.model_dump() | {"matmul": {"bf16": points}})
    fewer = matmul_us(processor, "bf16", tokens, params, weight_bytes)
    more = matmul_us(processor, "bf16", tokens * factor, params, weight_bytes)
    assert more >= fewer * (1 - 1e-9)
    assert more <= fewer * factor * (1 + 1e-9)
