"""klotski-profile: a real, small measurement of this machine, and the command around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, numbers, read_hardware, to_json
from klotski_runtime import profile, profile_kernels
from klotski_runtime.checkpoint import Extent
from klotski_runtime.cli.profile import main
from klotski_runtime.reader import DiskReader


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Hardware, list[float], Path]:
    """One quick measurement, the progress it reported and its scratch folder."""
    scratch = tmp_path_factory.mktemp("scratch")
    progress: list[float] = []
    hardware = profile.measure("cpu", scratch, quick=True, report=lambda what, done: progress.append(done))
    return hardware, progress, scratch


def test_a_measurement_is_a_hardware_profile(measured: tuple[Hardware, list[float], Path], tmp_path: Path) -> None:
    hardware, _, _ = measured
    path = tmp_path / "hw.json"
    path.write_text(to_json(hardware))
    assert read_hardware(path) == hardware


def test_every_measured_number_says_how(measured: tuple[Hardware, list[float], Path]) -> None:
    hardware, _, _ = measured
    assert set(hardware.sources) == set(numbers(hardware))
    assert all(source.startswith("measured with klotski-profile, 20") for source in hardware.sources.values())


def test_a_machine_without_a_gpu_computes_in_host_memory(measured: tuple[Hardware, list[float], Path]) -> None:
    hardware, _, _ = measured
    assert hardware.compute_tier == "host"
    assert set(hardware.tiers) == {"host", "disk"}
    assert set(hardware.links) == {"disk>host", "host>disk"}
    cpu = hardware.processors["cpu"]
    assert set(cpu.matmul) == {"bf16", "fp32"}
    assert bool(cpu.head) == (cpu.least_own_rows > 0)


def test_nothing_is_left_in_the_scratch_folder(measured: tuple[Hardware, list[float], Path]) -> None:
    assert list(measured[2].iterdir()) == []


def test_progress_runs_from_nothing_to_all(measured: tuple[Hardware, list[float], Path]) -> None:
    _, progress, _ = measured
    assert progress[0] == 0.0
    assert progress[-1] == 1.0
    assert progress == sorted(progress)


@pytest.mark.parametrize(
    ("ours", "places"),
    [
        ([2.0, 2.0, 2.0, 2.0], []),  # never
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3]),  # always
        ([1.1, 0.9, 0.9, 1.1], [1, 2]),  # where it is faster
        ([0.9, 1.0, 0.9, 1.1], [0, 1, 2]),  # though not everywhere between
        ([0.9, 1.1, 0.9, 0.9], [2, 3]),
        ([1.1, 1.1, 1.02, 1.1], [2]),  # where PyTorch's compute 80 rows for 64
        ([1.04, 0.9, 0.9, 1.04], [0, 1, 2, 3]),  # and where it is about as fast
        ([1.04, 1.04, 1.5, 1.2], []),
    ],
)
def test_our_kernel_is_used_where_it_is_worth_it(ours: list[float], places: list[int]) -> None:
    assert list(profile_kernels.worth((8, 16, 64, 1024), [1.0] * 4, ours)) == places


def test_small_ops_are_no_faster_beside_a_busy_cpu() -> None:
    """The CPU stands in for the GPU."""
    import torch

    with torch.inference_mode():
        left, how = profile_kernels.beside_cpu(torch.device("cpu"), profile.QUICK, profile.QUICK)
    assert 0 < left <= 1 and "beside decode attention" in how


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu and gpu", "meta"])
def test_a_device_that_cannot_be_measured_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--device"):
        profile.measure(device, tmp_path, quick=True)


def test_reading_is_measured_on_a_models_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "some-model"
    weights.mkdir()
    (weights / "a.safetensors").write_bytes(bytes(20 << 20))
    with pytest.raises(ConfigError, match="--model"):
        profile.measure("cpu", tmp_path, weights, quick=True)
    (weights / "b.safetensors").write_bytes(bytes(15 << 20))
    read: set[tuple[Path, int]] = set()
    own = DiskReader.read_all

    def noted(reader: DiskReader, parts: list[tuple[list[Extent], memoryview]]) -> int:
        read.update((extent.file, extent.offset) for extents, _ in parts for extent in extents)
        return own(reader, parts)

    monkeypatch.setattr(DiskReader, "read_all", noted)
    hardware = profile.measure("cpu", tmp_path, weights, quick=True)
    assert "some-model" in hardware.sources["links.disk>host.bandwidth_bytes_per_s"]
    pieces = {"a": 5, "b": 3}
    assert read == {
        (weights / f"{name}.safetensors", 4 * n << 20) for name, most in pieces.items() for n in range(most)
    }


def test_a_scratch_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scratch"):
        profile.measure("cpu", tmp_path / "absent", quick=True)


@pytest.fixture
def instant(measured: tuple[Hardware, list[float], Path], monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """The command with the measurement already made."""
    monkeypatch.setattr(profile, "measure", lambda *args, **more: measured[0])
    return measured[0]


def test_the_command_writes_the_profile_and_prints_a_table(
    instant: Hardware, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hw.json"
    assert main(["-o", str(path)]) == 0
    assert read_hardware(path) == instant
    out, err = capsys.readouterr()
    assert "links.disk>host.bandwidth_bytes_per_s" in out
    assert "GFLOP/s" in out
    assert str(path) in out
    assert len(err.splitlines()) <= 1  # at most the warning that the machine is busy


def test_json_is_one_object_and_nothing_else(instant: Hardware, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    assert Hardware.model_validate(json.loads(capsys.readouterr().out)) == instant


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--device", "tpu"],
        ["--scratch", str(tmp_path / "absent")],
        ["-o", str(tmp_path / "absent" / "hw.json")],
        ["-o", str(tmp_path)],
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("no kernel\nsecond line"), 5)])
def test_a_stopped_measurement_is_one_line(
    stop: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*args: object, **more: object) -> Hardware:
        raise stop

    monkeypatch.setattr(profile, "measure", measure)
    assert main([]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_interrupted_measurement_leaves_no_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile.measure("cpu", tmp_path, quick=True)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "klotski-profile -o hw.json --device cuda:0" in capsys.readouterr().out
