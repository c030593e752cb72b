"""klotski-run on tiny checkpoints: the tokens, the shape of the results, and what is left when something goes wrong."""

from __future__ import annotations

import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from klotski_compiler.decision import Workload
from klotski_compiler.errors import ExecError
from klotski_compiler.hardware import read_hardware
from klotski_compiler.model import read_model
from klotski_compiler.plan import Plan
from klotski_compiler.planner import Request, compile_plan
from klotski_compiler.prompts import Estimate, Limits, read_requests
from klotski_compiler.prompts import Request as Prompt
from klotski_compiler.routing import uniform
from klotski_runtime import memory
from klotski_runtime.cli.run import main
from klotski_runtime.engine import Engine, Row
from klotski_runtime.progress import Lines
from klotski_runtime.results import Results
from klotski_runtime.skeleton import import_model
from tiny import make_checkpoint

MODEL = Path(__file__).parents[2] / "shared" / "models" / "moe-text-28m"
ROOT = Path(__file__).parents[1]


def compiled(folder: Path, prompt_len: int = 20, dtype: str = "fp32", policy: str = "klotski") -> Plan:
    spec = read_model(folder)
    workload = Workload(prompt_len=prompt_len, gen_len=6, num_sequences=9)
    budgets = {"host": 150_000_000, "disk": 10**12}
    request = Request(spec, read_hardware("dev-2core"), uniform(spec), workload, budgets, dtype, policy, 2, 2)
    return compile_plan(request)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint without a tokenizer, in several shards, and its plan for groups of four."""
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"), max_shard_size="500KB")
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = compiled(folder)
    plan.save(path)
    # One thread: several that wait for each other spin, and where tests run side by side they hardly come to an end.
    return SimpleNamespace(
        folder=folder, path=path, plan=plan, run=[str(path), "--model", str(folder), "--threads", "1"]
    )


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def choice(row: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = row["response"]["body"]["choices"][0]
    return chosen


@contextmanager
def files_limited_to(nbytes: int) -> Iterator[None]:
    """A full disk: writes beyond ``nbytes`` of a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------------------------------------------------- results


def test_tokens_are_the_engines_and_rows_in_input_order(tiny: SimpleNamespace, tmp_path: Path) -> None:
    ids = prompts(3, 20, 1, 12, 7, 15)
    source = write_lines(tmp_path / "in.jsonl", [{"custom_id": f"row {i}", "prompt": p} for i, p in enumerate(ids)])
    assert main([*tiny.run, "--input", source, "--output", str(tmp_path / "out.jsonl")]) == 0

    engine = Engine(tiny.plan, tiny.folder, import_model(tiny.folder), tmp_path)
    engine.load()
    rows = [Row(p, 6) for p in sorted(ids, key=lambda p: -len(p))]
    for first in (0, 4):
        engine.run(rows[first : first + 4], frozenset({2}))
    engine.close()
    expected = {tuple(row.prompt): row for row in rows}

    written = read_lines(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in written] == [f"row {i}" for i in range(6)]
    for row, prompt in zip(written, ids, strict=True):
        want = expected[tuple(prompt)]
        assert (choice(row)["token_ids"], choice(row)["finish_reason"]) == (want.tokens, want.reason)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(want.tokens)}
        assert row["response"]["body"]["usage"] == usage | {"total_tokens": len(prompt) + len(want.tokens)}
        assert (row["response"]["status_code"], row["error"], choice(row)["text"]) == (200, None, "")
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_row_ends_at_its_own_limit_or_at_an_end_token(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = prompts(9)[0]
    body = {"prompt": prompt, "max_tokens": 2}
    batch_line = {"custom_id": "two", "method": "POST", "url": "/v1/completions", "body": body}
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": prompt}, batch_line, batch_line])
    output = tmp_path / "out.jsonl"
    assert main([*tiny.run, "--input", source, "--output", str(output), "--max-new-tokens", "4"]) == 0
    longer, *shorter = (choice(row)["token_ids"] for row in read_lines(output))
    assert len(longer) == 4
    assert shorter == [longer[:2]] * 2
    assert "2 rows share a custom_id with others, the first lines 2 and 3 ('two')" in capsys.readouterr().err

    (tmp_path / "model").mkdir()
    for file in tiny.folder.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "model" / "generation_config.json").unlink()
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [127, longer[1]]}))
    assert main([str(tiny.path), "--model", str(tmp_path / "model"), "--input", source, "--output", str(output)]) == 0
    ended = choice(read_lines(output)[0])
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"] == longer[: longer.index(longer[1]) + 1]


def test_lines_that_cannot_be_run_become_error_rows(tiny: SimpleNamespace, tmp_path: Path) -> None:
    bad = {
        "not json": "line 2: is not JSON",
        "[1, 2]": "line 3: is not an object with a prompt",
        '{"prompt": []}': "line 4: the prompt is empty",
        '{"custom_id": 7, "prompt": [5]}': "line 5: custom_id is 7",
        '{"prompt": [5, 999]}': "line 6: token id 999",
        json.dumps(
            {"prompt": [5] * 21}
        ): "line 7: the prompt has 21 tokens, of which 20 are taken; compile a plan with "
        "--prompt-len 21, or with --input for all rows",
        '{"prompt": [5], "max_tokens": 7}': "--gen-len 7",
        '{"prompt": [5], "temperature": 0.7}': "line 9: temperature is 0.7, which is not supported",
        '{"body": {"input": "x"}}': "line 10: has neither prompt nor messages",
        '{"custom_id": "\\ud83d", "prompt": [5]}': "line 11: has half a character",
        "[" * 100_000: "line 12: is nested too deeply",
        '{"prompt": [5], "messages": [{"content": "x"}]}': "line 13: has both prompt and messages",
        '{"messages": [{"content": "x"}, {"content": null}]}': "line 14: the content of message 2 is not text",
        '{"messages": [{"content": [{"image_url": "x"}]}]}': "line 15: the content of message 1 is not text",
    }
    source = tmp_path / "in.jsonl"
    lines = [b'{"custom_id": "good", "prompt": [5, 6]}', *(line.encode() for line in bad), b"", b"\xff\xfe"]
    source.write_bytes(b"\n".join(lines))
    assert main([*tiny.run, "--input", str(source), "--output", str(tmp_path / "out.jsonl")]) == 0
    good, *rest, undecodable = read_lines(tmp_path / "out.jsonl")
    assert good["custom_id"] == "good"
    assert good["error"] is None
    for row, message in zip(rest, bad.values(), strict=True):
        assert row["response"] is None
        assert message in row["error"]["message"]
    assert undecodable["error"]["message"] == "line 17: is not UTF-8 text (byte 1)"


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (['{"prompt": [5]}', "not json", '{"prompt": [6]}'], 2),
        (["oops", '{"prompt": [5]}', '{"prompt": [6]}'], 2),
        (["{x} is", "a set", ""], 0),
    ],
)
def test_most_lines_tell_json_from_text(lines: list[str], count: int, tmp_path: Path) -> None:
    """Whatever the first one is."""
    (tmp_path / "in").write_text("\n".join(lines))
    limits = Limits(20, 6, 6, 128)
    found = read_requests(str(tmp_path / "in"), Estimate(), limits)
    assert sum(request.ids in ([5], [6]) for request in found) == count


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress, now = Lines(), time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    progress.begin(1, 2)
    for seconds in (1, 50, 20, 3):
        now += seconds
        progress.advance(10)
    assert capsys.readouterr().err == "klotski-run: group 1 of 2, 30 tokens, 0.4 tokens/s\n"


def test_standard_input_to_standard_output(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b'{"prompt": [5, 6, 7]}\n{"prompt": [8]}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    assert main([*tiny.run, "--input", "-"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["custom_id"] for line in out.splitlines()] == ["line-1", "line-2"]
    assert "2 rows: 12 tokens" in err


@pytest.mark.skipif(not MODEL.exists(), reason="the trained model is not here")
def test_text_and_chat_of_a_model_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = tmp_path / "plan.json"
    compiled(MODEL, prompt_len=40).save(plan)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    run = [str(plan), "--model", str(folder), "--threads", "1"]
    text = "And the king said unto the"
    (tmp_path / "in.txt").write_text(f"{text}\n\n")
    chat = {"custom_id": "c", "body": {"messages": [{"role": "user", "content": text}]}}
    source = write_lines(tmp_path / "chat.jsonl", [chat])

    assert main([*run, "--input", str(tmp_path / "in.txt")]) == 0
    row, empty = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert choice(row)["text"] == tokenizer.decode(generated, skip_special_tokens=True)
    assert "token_ids" not in choice(row)
    assert empty["error"]["message"] == "line 2: the prompt is empty"

    assert main([*run, "--input", source]) == 2
    assert "no chat template" in json.loads(capsys.readouterr().out)["error"]["message"]
    settings = json.loads((MODEL / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert main([*run, "--input", source]) == 0
    body = json.loads(capsys.readouterr().out)["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": choice(row)["text"]}


# ---------------------------------------------------------------------------------------------------- measurements


def test_a_rehearsal_compares_with_the_plan(tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny.run) == 0
    out = capsys.readouterr().out
    for word in ("predicted", "measured", "tokens/s", "decode pass", "disk>host moved", "54 tokens in"):
        assert word in out


def test_json_is_one_object(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny.run, "--json", "--trace", str(tmp_path / "trace.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["generated_tokens"] == 9 * 6
    assert report["tokens_per_s"] == pytest.approx(54 / report["wall_s"])
    assert report["predicted_tokens_per_s"] == tiny.plan.forecast.tokens_per_s
    assert report["load_s"] + report["prefill_s"] + report["decode_s"] <= report["wall_s"]
    assert 0 <= report["bubble_fraction"] < 1
    assert set(report["busy_s"]) <= set(tiny.plan.streams)
    assert report["bytes_per_link"]["disk>host"] >= report["planned_bytes_per_link"]["disk>host"] > 0
    assert report["peak_bytes"] == tiny.plan.forecast.peak_bytes
    assert 0 < report["idle_rss_bytes"] <= report["peak_rss_bytes"]
    assert all(us["measured"] > 0 and us["predicted"] > 0 for us in report["pass_us"].values())
    assert set(report["pass_faults"]) == set(report["pass_us"])

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ran = [event["name"] for event in events if event["ph"] == "X"]
    groups = 3
    assert sum(" sample " in name for name in ran) == groups * 6
    assert min(event["ts"] for event in events if event["ph"] == "X") == 0


def test_peak_memory_where_the_kernel_keeps_no_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmRSS:\t    2000 kB\n")
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nowhere")
    assert memory.storage_read_bytes() == 0
    with pytest.raises(OSError, match="No such file"):
        memory.rss_bytes()
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    with memory.PeakRss() as peak:
        time.sleep(0.01)
    assert peak.nbytes == 2000 << 10


# ---------------------------------------------------------------------------------------------------------- failures


def test_a_damaged_tokenizer_is_found_before_there_is_anything_to_lose(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damaged(tiny.folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    source, output = write_lines(tmp_path / "in.jsonl", [{"prompt": [5, 6]}]), tmp_path / "out.jsonl"
    monkeypatch.setattr(Engine, "run", lambda *args, **keywords: pytest.fail("has run"))
    assert main([str(tiny.path), "--model", str(folder), "--input", source, "--output", str(output)]) == 2
    assert "its tokenizer cannot be loaded" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_link_stays_a_link(tiny: SimpleNamespace, tmp_path: Path) -> None:
    target, link = tmp_path / "target.jsonl", tmp_path / "out.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": [5, 6]}])
    assert main([*tiny.run, "--input", source, "--output", str(link)]) == 0
    assert link.is_symlink() and len(read_lines(target)) == 1


def test_finished_rows_survive_a_failure(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = prompts(*range(1, 10))
    source = write_lines(tmp_path / "in.jsonl", [{"custom_id": str(len(p)), "prompt": p} for p in ids])
    run = Engine.run
    arguments = [*tiny.run, "--input", source, "--output", str(tmp_path / "out.jsonl")]

    def fail_in_third(*args: Any, **keywords: Any) -> None:
        if args[3] == 2:
            raise ExecError("the disk is gone")
        run(*args, **keywords)

    monkeypatch.setattr(Engine, "run", fail_in_third)
    assert main(arguments) == 5
    err = capsys.readouterr().err
    assert "the disk is gone" in err
    assert "8 of 9 rows are finished and saved in" in err
    assert "Traceback" not in err
    saved = read_lines(tmp_path / "out.jsonl.partial")
    assert [row["custom_id"] for row in saved] == list("98765432")  # the longest prompts run first
    assert not (tmp_path / "out.jsonl").exists()

    other = write_lines(tmp_path / "other.jsonl", [{"custom_id": str(len(p)), "prompt": p[::-1]} for p in ids])
    assert main([*tiny.run, "--input", other, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "of its 8 rows only 0 are finished rows of this run" in capsys.readouterr().err
    assert read_lines(tmp_path / "out.jsonl.partial") == saved

    assert main([*arguments, "--max-new-tokens", "2"]) == 2
    again = damaged(tiny.folder, tmp_path / "again")
    with a_shard(again).open("r+b") as file:
        file.seek(a_shard(again).stat().st_size // 2)
        file.write(bytes(1000))
    assert main([str(tiny.path), "--model", str(again), *arguments[3:]]) == 2
    assert read_lines(tmp_path / "out.jsonl.partial") == saved

    (tmp_path / "out.jsonl.partial").write_text("notes")
    assert main(arguments) == 2
    assert (tmp_path / "out.jsonl.partial").read_text() == "notes"


def test_a_run_goes_on_from_what_is_finished(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the last row was half written, all rows are there already, or another process is at it."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": p} for p in [*prompts(*range(1, 10)), []]])
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main([*tiny.run, "--input", source, "--output", str(whole)]) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(lines[4] + lines[0] + lines[8][:20])
    capsys.readouterr()

    ran = list[Row]()
    run = Engine.run

    def noting(engine: Engine, rows: list[Row], *arguments: Any) -> None:
        ran.extend(rows)
        run(engine, rows, *arguments)

    monkeypatch.setattr(Engine, "run", noting)
    command = [*tiny.run, "--input", source, "--output", str(output)]
    assert main(command) == 0
    assert len(ran) == 7
    err = capsys.readouterr().err
    assert "2 of 10 rows are finished by an earlier run; 7 left" in err
    assert "10 rows, 1 of them refused, 2 finished by an earlier run" in err
    assert without_times(output) == without_times(whole)
    assert not partial.exists()

    partial.write_bytes(b"".join(lines[:-1]))
    with partial.open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(command) == 2
    assert "is what another klotski-run is writing" in capsys.readouterr().err
    assert main([*command, "--trace", str(tmp_path / "trace.json")]) == 0
    assert len(ran) == 7
    assert output.read_bytes() == whole.read_bytes()
    err = capsys.readouterr().err
    assert "10 rows, 1 of them refused, 9 finished by an earlier run; written to" in err
    assert "trace.json is not written" in err

    partial.write_bytes(lines[0][:20])  # killed in the midst of the first row
    assert main(command) == 0
    assert len(ran) == 16


def test_a_run_that_ends_as_another_begins_takes_no_file_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one opens what the first one is about to take away."""
    requests, ids = [Prompt(1, "line-1", [1], 1)], ["1"]
    first, flock = Results(tmp_path / "out.jsonl", requests, ids), fcntl.flock

    def ended(file: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.keep()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", ended)
    second = Results(tmp_path / "out.jsonl", requests, ids)
    second.add([(0, {"error": None})])
    assert len(read_lines(tmp_path / "out.jsonl.partial")) == 1
    second.finish()
    assert len(read_lines(tmp_path / "out.jsonl")) == 1


def without_times(path: Path) -> list[dict[str, Any]]:
    rows = read_lines(path)
    for row in rows:
        if row["response"]:
            row["response"]["body"].pop("created")
    return rows


@pytest.mark.parametrize(("policy", "signum"), [("klotski", signal.SIGTERM), ("moe_lens", signal.SIGINT)])
def test_ctrl_c(policy: str, signum: signal.Signals, tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Group after group, or in rolling order, where all rows are one run."""
    plan = compiled(tiny.folder, policy=policy)
    assert plan.decision.rolling == (policy == "moe_lens")
    plan.save(tmp_path / "plan.json")
    run = [str(tmp_path / "plan.json"), *tiny.run[1:]]
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": p} for p in prompts(*[20] * 4000)])
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "klotski_runtime.cli.run", *run, "--input", source, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "interrupted" in err
    assert "Traceback" not in err
    assert f"{len(read_lines(partial)):,} of 4,000 rows are finished and saved in {partial}" in err


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_ctrl_c_while_rows_are_saved(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Prompt(line, f"line-{line}", [line], 1) for line in (1, 2, 3)]
    results = Results(tmp_path / "out.jsonl", requests, ["1", "2", "3"])
    results.add([(0, {"error": None})])
    real = getattr(os, call)

    def interrupted(file: int, *data: bytes) -> None:
        real(file, *(rows[:5] for rows in data))  # a write ends in the midst of a row
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, call, interrupted)
        results.add([(1, {"error": None}), (2, {"error": None})])
    finished = {"write": 1, "fsync": 3}[call]
    assert results.keep().startswith(f"{finished} of 3 rows are finished and saved in")
    assert len(read_lines(tmp_path / "out.jsonl.partial")) == finished


def test_a_full_disk(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": p} for p in prompts(*[9] * 9)])
    output = tmp_path / "out.jsonl"
    with files_limited_to(2500):  # room for one group of four rows
        assert main([*tiny.run, "--input", source, "--output", str(output)]) == 5
    err = capsys.readouterr().err
    assert f"{output}.partial cannot be written: File too large" in err
    assert "4 of 9 rows are finished and saved" in err
    assert len(read_lines(tmp_path / "out.jsonl.partial")) == 4

    assert main([*tiny.run, "--input", source, "--output", "/dev/full"]) == 5
    assert "/dev/full cannot be written: No space left on device" in capsys.readouterr().err
    assert Path("/dev/full").is_char_device()


def test_standard_output_on_a_full_disk(tiny: SimpleNamespace) -> None:
    command = [sys.executable, "-m", "klotski_runtime.cli.run", *tiny.run, "--json"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'runtime'}"}
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert ran.returncode == 5
    assert ran.stderr == "klotski-run: execution failed: standard output cannot be written: No space left on device\n"


def damaged(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint whose files may be changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def a_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def remove_a_shard(folder: Path) -> None:
    a_shard(folder).unlink()


def truncate_a_shard(folder: Path) -> None:
    with a_shard(folder).open("r+b") as file:
        file.truncate(a_shard(folder).stat().st_size - 1000)


def empty_a_shard(folder: Path) -> None:
    a_shard(folder).write_bytes(b"")


def unknown_type(folder: Path) -> None:
    change_config(folder, model_type="imaginary_moe")


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, "which is not there; download that file"),
        (truncate_a_shard, "past the end of the file, which is truncated"),
        (empty_a_shard, "does not fit the file of 0 bytes"),
        (unknown_type, "imaginary_moe is not one that this version of transformers can generate with"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: is not there"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda folder: change_config(folder, hidden_size=32), "but config.json asks for"),
    ],
)
def test_a_damaged_checkpoint(
    damage: Any, message: str, tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(tiny.folder, tmp_path / "model")
    damage(folder)
    assert main([str(tiny.path), "--model", str(folder)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize("other", [{"num_experts": 8}, {"num_hidden_layers": 2}, {"moe_intermediate_size": 32}])
def test_a_plan_for_another_model(
    other: dict[str, Any], tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path / "other", **other)
    capsys.readouterr()
    assert main([str(tiny.path), "--model", str(folder)]) == 4
    assert "another model than this checkpoint" in capsys.readouterr().err


def test_a_model_without_experts(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main([str(tiny.path), "--model", str(tmp_path)]) == 4
    assert "another model than this checkpoint" in capsys.readouterr().err


def test_an_edited_plan(tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(tiny.path.read_text().replace('"gen_len": 6', '"gen_len": 5', 1))
    assert main([str(plan), "--model", str(tiny.folder)]) == 4
    assert "was changed after it was compiled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl: cannot be read (No such file or directory)"),
        (["--input", "/dev/null"], "holds no prompts"),
        (["--input", "text.txt"], "has no tokenizer"),
        (["--input", "empty.jsonl"], "none of 1 rows can be run, the first because line 1: the prompt is empty"),
        (["--input", ""], "cannot be read (No such file or directory)"),
        (["--output", "out.jsonl"], "needs --input"),
        (["--input", "empty.jsonl", "--output", "text.txt"], "line 1: the prompt is empty; text.txt stays as it was"),
        (["--input", "text.txt", "--output", "link"], "link has another use here, too"),
        (["--trace", "PLAN"], "has another use here, too"),
        (["--input", "text.txt", "--output", "out", "--trace", "out"], "out has another use here, too"),
        (["--json", "--input", "text.txt"], "give --output FILE"),
        (["--input", "text.txt", "--output", "no/such/out.jsonl"], "in a folder that exists"),
        (["--trace", "."], "cannot be a file"),
        (["--scratch", "nowhere"], "is not a folder"),
        (["--max-new-tokens", "7"], "klotski-compile --gen-len 7"),
        (["--model", "nowhere"], "neither a folder nor in the local Hugging Face cache"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    message: str,
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Once upon a time\n")
    (tmp_path / "link").symlink_to("text.txt")
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n')
    assert main([*tiny.run, *(str(tiny.path) if word == "PLAN" else word for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "text.txt").read_text() == "Once upon a time\n"
    assert not [*tmp_path.glob("*.partial")]


def test_a_plan_that_does_not_say_where_its_model_is(tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny.path)]) == 2
    assert "--model: is needed" in capsys.readouterr().err
    assert main(["nowhere.json"]) == 4
    with pytest.raises(SystemExit) as exit_:
        main([str(tiny.path), "--threads", "0"])
    assert exit_.value.code == 2
    assert "'0' is not a positive number" in capsys.readouterr().err


def test_a_plan_for_a_gpu_runs_where_there_is_none(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with a way out; with it, the same texts as those of a plan for this machine."""
    hardware = read_hardware("rtx3090")
    spec = read_model(tiny.folder)
    request = Request(
        spec,
        hardware,
        uniform(spec),
        tiny.plan.workload,
        {t: m.capacity_bytes for t, m in hardware.tiers.items()},
        tiny.plan.dtype,
    )
    path = tmp_path / "gpu.json"
    compile_plan(request).save(path)
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": p} for p in prompts(9, 5, 7)])
    command = [str(path), "--model", str(tiny.folder), "--input", source]
    assert main(command) == 2
    assert "--emulate" in capsys.readouterr().err
    texts = []
    for arguments in ([*command, "--emulate"], [*tiny.run, "--input", source]):
        assert main(arguments) == 0
        texts.append([json.loads(line)["response"]["body"]["choices"] for line in capsys.readouterr().out.splitlines()])
    assert texts[0] == texts[1]
