"""Peers side by side: the cage holds, pairs are pairs, what is done is kept, peers generate what the resident model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import cage, gguf_file, limit, peers
from benchmarks.peer_sweep import prolonged
from benchmarks.peer_tables import (
    Best,
    Report,
    Tried,
    after_loading,
    decode,
    end_to_end,
    prefill,
    ratios,
    same_first,
    sweeps,
    tables,
)
from commands import ENVIRONMENT, ROOT
from klotski_compiler.cost import Cost
from klotski_compiler.decision import Workload
from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import read_hardware
from klotski_compiler.model import read_model
from klotski_compiler.ops import Load
from klotski_compiler.planner import Request, compile_plan
from klotski_compiler.routing import uniform
from tiny import make_checkpoint

MB = 1 << 20

NO_CAGE = cage.unavailable()
needs_cage = pytest.mark.skipif(bool(NO_CAGE), reason=f"no cgroup can be made here: {NO_CAGE}")


@pytest.fixture(autouse=True)
def _no_cage_left() -> Iterator[None]:
    """Whatever a test does, its groups go."""
    yield
    parents, _ = cage.parent_groups("memory")
    assert not [child for parent in parents for child in parent.glob(f"klotski-cage-{os.getpid()}-*")]


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


# --------------------------------------------------------------------------------------------------------------- cage


@needs_cage
def test_who_takes_more_than_the_limit_is_killed_and_reported() -> None:
    done = cage.run(python(f"bytearray({200 * MB}); print('alive')"), 64 * MB)
    assert done.killed
    assert done.code
    assert "memory" in done.why
    assert not done.stdout


@needs_cage
def test_who_takes_less_lives_and_its_peak_is_known() -> None:
    done = cage.run(python(f"bytearray({40 * MB}); print('alive')"), 128 * MB)
    assert (done.code, done.killed, done.stdout) == (0, False, "alive\n")
    assert done.peak_bytes == 0 or 40 * MB < done.peak_bytes < 128 * MB


@needs_cage
def test_the_page_cache_counts_and_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100 * MB))
    cage.drop_page_cache([tmp_path])
    done = cage.run(["/bin/cat", file], 50 * MB)
    assert len(done.stdout) == 100 * MB
    assert not done.killed
    assert done.peak_bytes == 0 or 40 * MB < done.peak_bytes <= 50 * MB


@needs_cage
def test_groups_are_removed() -> None:
    with cage.cage(64 * MB) as groups:
        folders = [group.folder for group in groups]
        assert folders
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)


def test_a_run_that_takes_too_long_is_ended() -> None:
    done = cage.run(python("import time; time.sleep(60)"), timeout_s=0.5)
    assert done.timed_out
    assert done.wall_s < 30
    assert "took longer" in done.why


def test_a_failure_is_told_by_its_last_line() -> None:
    done = cage.run(python("raise ValueError('first\\nlast')"))
    assert (done.code, done.why) == (1, "last")


MOUNTS = {
    "version 1": "30 20 0:1 / {mount} rw - cgroup cgroup rw,memory\n31 20 0:2 / /none rw - cgroup2 cgroup2 rw\n",
    "version 2": "31 20 0:2 / {mount} rw - cgroup2 cgroup2 rw\n",
    "version 2, in a container": "31 20 0:2 /pod {mount} rw - cgroup2 cgroup2 rw\n",
}


@pytest.mark.parametrize(
    ("mounted", "own", "folders", "names"),
    [
        ("version 1", "4:memory:/a/b\n0::/\n", ["a/b"], cage.V1),
        ("version 2", "0::/a/b\n", ["a/b", "a"], cage.V2),
        ("version 2", "0::/\n", ["."], cage.V2),
        ("version 2, in a container", "0::/pod/a\n", ["a", "."], cage.V2),
    ],
)
def test_where_groups_are_made(mounted: str, own: str, folders: list[str], names: Any, tmp_path: Path) -> None:
    (tmp_path / "cgroups/a/b").mkdir(parents=True)
    mounts, ours = tmp_path / "mountinfo", tmp_path / "cgroup"
    mounts.write_text(MOUNTS[mounted].format(mount=tmp_path / "cgroups"))
    ours.write_text(own)
    found = cage.parent_groups("memory", mounts, ours)
    assert found == ([tmp_path / "cgroups" / folder for folder in folders], names)


# ------------------------------------------------------------------------------------------------------------- tables


def made_up(speed: float, **fields: Any) -> Report:
    """A run of 4 prompts of 10 tokens, 3 new ones each: 12 tokens at this speed, a quarter of the time for each of load
    and prefill."""
    wall_s = 12 / speed
    return {
        "generated_tokens": 12,
        "prompt_tokens": 40,
        "first_tokens": [1, 2, 3, 4],
        "of_prompts": 4,
        "wall_s": wall_s,
        "load_s": wall_s / 4,
        "prefill_s": wall_s / 4,
        "decode_s": wall_s / 2,
        "decode_pass_s": wall_s / 4,
        "cap_bytes": 100 * MB,
        "peak_bytes": 90 * MB,
        "own_bytes": 80 * MB,
        "storage_read_bytes": 1_000_000_000,
        "began": 0.0,
    } | fields


OWN: Report = {  # what reports of ours have more
    "shown": "2 x 2",
    "limit": {"read_bytes": 1e8, "compute_s": 0.3, "head_s": 0.1, "layer_bytes": 5e7},
    "pass_us": {"prefill": {"predicted": 90, "measured": 100}, "decode": {"predicted": 110, "measured": 100}},
    "busy_s": {"cpu": 0.9},
    "predicted_bubble_s": {"kv": 0.1},
    "disk": {"bytes_per_s": 1e9, "shown": "1.00 GB/s"},
}
FAILED: Report = {"failed": "killed: it needs more memory than that", "killed": True}


def test_rates_are_of_their_phase() -> None:
    report = made_up(2.0)  # 6 s in all
    assert end_to_end(report) == 2.0
    assert prefill(report) == 40 / 1.5
    assert decode(report) == (12 - 4) / 3
    assert end_to_end(report | {"of_prompts": 12}) == 36 / (1.5 + 3 * 4.5)  # loads once, runs three times as long
    assert end_to_end(FAILED) == prefill(FAILED) == decode(FAILED) == 0


def test_a_short_run_tells_what_a_long_one_takes() -> None:
    report = made_up(2.0)  # 4 prompts, 3 tokens each: 3 s in 2 passes of decode
    assert prolonged(report, 3, 3) == report
    longer = prolonged(report, 3, 5)
    assert (longer["decode_s"], longer["wall_s"], longer["generated_tokens"]) == (6, 9, 20)
    assert prolonged(FAILED, 3, 5) == FAILED


def test_ratios_are_of_neighbours_and_failures_fall_out() -> None:
    ours, theirs = [made_up(8.0), made_up(4.0), made_up(6.0)], [made_up(2.0), FAILED, made_up(1.0)]
    assert ratios(ours, theirs, end_to_end) == [4.0, 6.0]


def test_same_first_tokens_are_counted_in_the_first_whole_pair() -> None:
    assert same_first([made_up(1), made_up(1)], [FAILED, made_up(1, first_tokens=[1, 2, 0, 0])]) == 0.5
    assert same_first([FAILED], [made_up(1)]) is None


def test_the_table_shows_speeds_ratios_and_what_did_not_run() -> None:
    setting = {"batch": 4, "experts": "eager"}
    found = {
        "disk_offload": Best(setting, 2, [Tried(setting, 1, FAILED), Tried(setting, 2, made_up(2.0))]),
        "llama_cpp": Best({}, 1, [], "not installed here; pip install gguf llama-cpp-python"),
    }
    ours = [made_up(8.0, **OWN), made_up(6.0, **OWN)]
    shown = "batch 4, experts eager"
    theirs = [made_up(2.0, shown=shown), made_up(1.0, again=1, shown="batch 2, experts eager")]
    runs = {
        "klotski": ours,
        "disk_offload": [report | {"beside": our} for our, report in zip(ours, theirs, strict=True)],
        "klotski, as disk_offload": [made_up(4.0, shown="1 x 4"), made_up(2.0, shown="1 x 4")],
    }
    text = "\n".join([*tables(found, runs), *sweeps(found)])
    assert "5.00 (4.00 to 6.00)" in text
    assert "2.00 (2.00 to 2.00)" in text  # at equal batch
    assert "llama_cpp: not installed here" in text
    assert "disk_offload: 2 times the cap is the least" in text
    assert "killed: it needs more memory" in text
    assert "disk_offload: was killed, and ran when tried again (2 tries)" in text
    assert "disk_offload: was killed at its best setting whenever it was tried; ran with batch 2, experts eager" in text
    assert "2.67*" in text  # after loading
    assert "80.0%" in text  # of the limit: 0.3 s of a decode pass of 12 / 8 / 4 s
    assert "-10.0%" in text  # forecast of prefill
    assert "+10.0%" in text
    assert "11.1%" in text  # overhead: 1 - (0.9 + 0.1) / 1.125


def test_every_way_to_read_reads_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "SAMPLE_BYTES", 3 * MB)
    (tmp_path / "file").write_bytes(bytes(7 * MB))
    found = list(limit.readings([tmp_path / "file"]))
    assert len(found) == 2 * len(limit.THREADS) * len(limit.BLOCKS)
    assert all(reading.bytes_per_s > 0 for reading in found if not reading.direct)
    assert limit.fastest(found).bytes_per_s == max(reading.bytes_per_s for reading in found)


@pytest.mark.parametrize(("budget", "reads"), [(1 << 30, True), (2 << 30, True), (6 << 30, False)])
def test_no_plan_reads_less_than_the_limit_says(budget: int, reads: bool) -> None:
    spec, hardware = read_model("olmoe-1b-7b"), read_hardware("dev-2core")
    spec = replace(spec, layers=spec.layers[:4])
    budgets, workload = {"host": budget, "disk": 1 << 40}, Workload(prompt_len=16, gen_len=4, num_sequences=8)
    plan = compile_plan(Request(spec, hardware, uniform(spec), workload, budgets, "bf16", "joint", 8, 1))
    least = limit.limit(plan, Cost(spec, hardware, uniform(spec), "bf16"))
    assert least
    loads = (step.op for step in plan.steps["decode"] if isinstance(step.op, Load))
    assert least.read_bytes <= sum(plan.tensors[tensor].nbytes for op in loads for tensor in op.tensors)
    assert (least.read_bytes > 0) == reads
    assert 0 < least.compute_s <= plan.forecast.pass_us["decode"] / 1e6


# -------------------------------------------------------------------------------------------------------------- sweep


class Pretend(peers.Bench):
    """Runs that cost nothing. speed: of a setting; 0 where it is killed."""

    def __init__(self, speed: Any, cap: int = 1) -> None:
        self.asked = SimpleNamespace(prompts=100, sweep_prompts=0)  # type: ignore[assignment]
        self.cap, self.weights, self.speed = cap, 4, speed
        self.ran: list[tuple[int, int]] = []

    def _missing(self, peer: str) -> str:
        return ""

    def run(
        self, peer: str, setting: Any, factor: int, count: int, repeat: int | None = None, again: int = 0
    ) -> Report:
        self.ran.append((setting["batch"], count))
        speed = self.speed(setting, factor)
        return made_up(speed) if speed else FAILED


def test_a_sweep_climbs_to_the_best_setting_and_runs_nothing_twice() -> None:
    bench = Pretend(lambda s, factor: 0 if s["batch"] > 70 else s["batch"] * (2 if s["experts"] == "eager" else 1))
    best = bench.sweep("disk_offload")
    assert best.setting == {"batch": 64, "experts": "eager"}
    assert best.factor == 1
    assert len({json.dumps(one.setting) for one in best.tried}) == len(best.tried)
    killed = sum("failed" in one.report for one in best.tried)
    assert len(bench.ran) == len(best.tried) + killed  # which is tried once more
    assert 96 in [one.setting["batch"] for one in best.tried]
    assert all(count % batch == 0 or count == 100 for batch, count in bench.ran)


def test_every_run_of_ours_stands_between_two_peers() -> None:
    bench, order = Pretend(lambda s, factor: 1.0), list[str]()
    bench.asked.peer_prompts = 0
    bench.record = peers.Record(None, {})
    run = bench.run
    bench.run = lambda peer, *rest: order.append(peer) or run(peer, *rest)  # type: ignore[method-assign, func-returns-value]
    bench.ours = lambda turn, batch, count: order.append(f"{turn} {batch}") or made_up(2.0)  # type: ignore[method-assign, func-returns-value]
    bench._reader = dict  # type: ignore[method-assign]
    found = {name: Best({"batch": size}, 1, []) for name, size in (("a", 1), ("b", 2), ("c", 3))}
    reports = dict(bench.repeat(4, found | {"d": Best({}, 1, [], "is not here")}))
    assert order == ["a", "4.0 1", "4.0 None", "b", "4.0 2", "c", "4.1 3", "4.1 None"]
    assert all("beside" in report for name, report in reports.items() if name != "klotski")


def test_a_peer_that_is_killed_at_its_best_setting_runs_at_the_next_best() -> None:
    bench = Pretend(lambda s, factor: 0 if s["batch"] == 8 else 1.0)
    bench.asked.peer_prompts = 0
    bench.ours = lambda turn, batch, count: made_up(2.0, shown=f"{batch}")  # type: ignore[method-assign]
    tried = [Tried({"batch": size}, 1, made_up(speed)) for size, speed in ((2, 1.0), (8, 5.0), (4, 3.0))]
    (_, theirs), (_, ours) = bench._pair("0.0", 0, "a", Best({"batch": 8}, 1, tried))
    assert [size for size, _ in bench.ran] == [8] * peers.TRIES + [4]
    assert (theirs["shown"], ours["shown"]) == ("batch 4", "4")


def test_a_peer_that_is_killed_gets_the_least_cap_that_works() -> None:
    best = Pretend(lambda s, factor: s["batch"] if factor >= 4 or s["batch"] <= 2 else 0).sweep("disk_offload")
    assert (best.factor, best.setting["batch"], best.why_not) == (4, 100, "")
    assert [one.setting["batch"] for one in best.tried if one.factor == 1 and after_loading(one.report)] == [2]
    never = Pretend(lambda s, factor: 0).sweep("disk_offload")
    assert "killed" in never.why_not


def test_runs_that_are_done_are_kept(tmp_path: Path) -> None:
    path, calls = tmp_path / "runs.json", iter(range(9))

    def work() -> Report:
        return {"number": next(calls)}

    record = peers.Record(path, {"prompts": 4})
    assert record.once("one", work) == record.once("one", work) == {"number": 0}
    again = peers.Record(path, {"prompts": 4})
    assert again.once("one", work) == {"number": 0}
    assert again.once("two", work) == {"number": 1}
    with pytest.raises(ConfigError, match="another prompts"):
        peers.Record(path, {"prompts": 5})


@pytest.mark.parametrize("options", [["--peers", "nobody"], ["--repeats", "0"], ["--model", "nowhere"]])
def test_bad_usage_is_refused_in_a_line(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--folder", str(tmp_path), *options]) == 2
    told = capsys.readouterr().err
    assert options[1] in told
    assert len(told.splitlines()) == 1


# --------------------------------------------------------------------------------------------------------- real peers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose rows do not end early, and prompts beside it."""
    folder = tmp_path_factory.mktemp("peers")
    source = make_checkpoint("qwen3_moe", folder / "source", dtype="bfloat16")
    choose = np.random.default_rng(0)
    rows = choose.integers(3, 128, (4, 8)).tolist()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return peers.bare(source, folder / "model")


def ran(peer: str, model: Path, **setting: Any) -> Any:
    words = [sys.executable, ROOT / "benchmarks" / "peer.py", peer, model, model.parent / "prompts.jsonl"]
    # One thread: where tests run side by side, two that wait for each other spin for minutes.
    options = ["--gen-len", "3", "--setting", json.dumps({"batch": 2, "experts": "eager", "threads": 1} | setting)]
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*map(str, words), *options], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # after what DeepSpeed has to say


def test_peers_generate_what_the_resident_model_does(model: Path) -> None:
    pytest.importorskip("accelerate")
    resident = ran("resident", model)
    mapped = ran("device_map", model, cpu_bytes=100_000, scratch=str(model.parent))
    assert resident["tokens"] == mapped["tokens"]
    assert [len(row) for row in resident["tokens"]] == [3] * 4
    for report in (resident, mapped):
        assert (report["generated_tokens"], report["prompt_tokens"]) == (12, 32)
        assert (report["prefill_passes"], report["decode_passes"]) == (2, 4)
        assert report["load_s"] + report["prefill_s"] + report["decode_s"] <= report["wall_s"]


@pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
def test_zero_inference_generates_what_the_resident_model_does(model: Path) -> None:
    assert ran("zero_inference", model)["tokens"] == ran("resident", model)["tokens"]


def test_every_tensor_gets_into_the_gguf_file(model: Path) -> None:
    tensors = gguf_file.checkpoint_tensors(model)
    config = json.loads((model / "config.json").read_text())
    sources = [source for target in gguf_file.targets(config, tensors) for source in target.sources]
    assert sorted(sources) == sorted(tensors)


def test_the_gguf_file_holds_the_same_numbers(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    gguf_file.write_gguf(model, tmp_path / "model.gguf")
    tensors = gguf_file.checkpoint_tensors(model)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    experts = found["blk.1.ffn_up_exps.weight"].data.view(np.uint16)
    assert np.array_equal(experts[3], tensors["model.layers.1.mlp.experts.3.up_proj.weight"])
    norm = found["output_norm.weight"].data
    assert np.array_equal(norm, gguf_file.widened(tensors["model.norm.weight"]))
