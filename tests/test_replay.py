from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import MACHINES, SYSTEMS, Case, machine, origin, read_cases, scaled
from benchmarks.replay_published import PUBLISHED, main, program, spearman

KEPT = (
    "klotski-8x7b-env1-fiddler-bs8",
    "klotski-8x7b-env1-accelerate-bs8",
    "klotski-8x7b-env1-deepspeed-fastgen-bs8",
)


def subset(path: Path, **changes: Any) -> Path:
    cases = {case["id"]: case for case in json.loads(PUBLISHED.read_text())}
    unmeasured = cases[KEPT[0]] | {"id": "unmeasured", "measured": {}}
    path.write_text(json.dumps([case | changes for case in (*(cases[name] for name in KEPT), unmeasured)]))
    return path


def published() -> list[Case]:
    return read_cases(PUBLISHED)


def test_one_json_object_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(subset(tmp_path / "cases.json")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"cases", "median_abs_error", "rank_correlation", "factors"}
    assert [case["id"] for case in found["cases"]] == [*KEPT, "unmeasured"]
    for case in found["cases"][:3]:
        assert case["error"] == pytest.approx(case["predicted"] / case["measured"] - 1)
    assert found["cases"][3]["measured"] is None and found["cases"][3]["error"] is None
    assert 0 < found["median_abs_error"] < 0.4
    assert found["rank_correlation"] == 1.0
    assert len(found["factors"]) == 3
    assert all(set(own) == {"prefill_compute", "decode_transfer"} for own in found["factors"].values())


def test_tables_go_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "replay.txt"
    assert main(["--data", str(subset(tmp_path / "cases.json")), "--output", str(output)]) == 0
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert f"python benchmarks/replay_published.py --data {tmp_path}" in text.splitlines()[0]
    assert all(name in text for name in KEPT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"system": "Nobody's"}, "Nobody's"),
        ({"source": "Nowhere, arXiv 0000.00000"}, "none of this source"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"hardware": {"name": "no-such-machine", "gpu_memory_gb": 1, "host_memory_gb": 1}}, "no-such-machine"),
        ({"workload": {}}, "prompt_len"),
    ],
)
def test_what_is_not_known_is_a_clear_error(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(subset(tmp_path / "cases.json", **changes)), "--json"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out


def test_a_missing_file_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_factors_are_fitted_on_a_few_cases_of_the_same_program() -> None:
    by_id = {case.id: case for case in published()}
    for key, entry in SYSTEMS.items():
        assert len(entry.calibration) <= 4
        assert bool(entry.calibration) != bool(entry.factors_of)
        assert all(program(by_id[name]) == key for name in entry.calibration), key


def test_every_published_case_has_a_system_and_a_machine() -> None:
    for case in published():
        assert (origin(case), case.system) in SYSTEMS
        assert case.hardware.name in MACHINES


def test_scaling_leaves_memory_and_launches_alone() -> None:
    before = machine("klotski-env1")
    after = scaled(before, compute=2.0, transfer=3.0)
    link, gpu = "host>gpu", "gpu"
    assert after.links[link].bandwidth_bytes_per_s == 3 * before.links[link].bandwidth_bytes_per_s
    assert after.processors[gpu].matmul["bf16"][0][1] == 2 * before.processors[gpu].matmul["bf16"][0][1]
    assert after.processors[gpu].memory_bytes_per_s == before.processors[gpu].memory_bytes_per_s
    assert after.processors[gpu].op_us == before.processors[gpu].op_us


def test_ranks_share_ties() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866, abs=1e-3)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0
