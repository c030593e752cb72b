"""What of ``benchmarks/gpu.sh`` runs without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.checkpoint import SHAPES, make_checkpoint
from klotski_compiler.hardware import to_json
from klotski_compiler.plan import load
from plans import tiny_hardware

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
ROOT = SCRIPT.parents[1]
SMALL = replace(SHAPES["demo"], layers=2, hidden=256, experts=4, moe_intermediate=64, vocab=512)


def test_it_says_what_it_does() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    shown = subprocess.run([SCRIPT, "--help"], env=environment, capture_output=True, text=True, check=True).stdout
    assert all(step in shown for step in ("profile", "plans", "run"))


def test_what_runs_on_the_gpu_machine_needs_no_solver() -> None:
    """Not even to compare tokens."""
    code = "import sys, benchmarks.gpu, same, tiny; sys.exit(bool({'ortools', 'networkx'} & {*sys.modules}))"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "runtime", ROOT / "tests")))
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode == 0


def test_budgets_are_shares_of_what_the_files_hold(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", SMALL)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert gpu.weight_bytes(SMALL) == pytest.approx(stored, rel=0.02)


def test_plans_of_every_policy_are_for_the_checkpoint_that_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "MODELS", (gpu.Model("small", SMALL, 6, 8, 3, ("joint", "klotski"), 1.0),))
    monkeypatch.setattr(gpu, "GPU_SHARE", 200)
    monkeypatch.setattr(gpu, "_family_plans", lambda folder: None)
    hardware = tmp_path / "machine.json"
    hardware.write_text(to_json(tiny_hardware(gpu=True)))
    assert gpu.main(["plans", str(hardware), "-o", str(tmp_path / "plans")]) == 0
    assert "FAILED" not in capsys.readouterr().out
    folder = make_checkpoint(tmp_path / "model", SMALL)
    for policy in ("joint", "klotski"):
        path = tmp_path / "plans" / "small" / f"{policy}.json"
        assert load(path).policy == policy
        report = gpu.klotski_run([str(path), "--model", str(folder), "--emulate", "--threads", "1", "--json"])
        assert report["generated_tokens"] == 6 * 3
        assert gpu.after_loading(report) > 0
