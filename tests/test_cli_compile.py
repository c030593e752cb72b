"""klotski-compile: arguments, workload files, refusals, and a whole compilation of a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from klotski_compiler import planner
from klotski_compiler.cli.compile import main, parse_size
from klotski_compiler.decision import Workload
from klotski_compiler.errors import Infeasible
from klotski_compiler.hardware import read_hardware, to_json
from klotski_compiler.model import read_model
from klotski_compiler.plan import Plan, load
from klotski_compiler.planner import Request
from klotski_compiler.policies import POLICIES
from klotski_compiler.verify import verify
from plans import WORKLOAD, make_plan, tiny_decision, tiny_hardware, tiny_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128, "max_position_embeddings": 128,
    "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    text = to_json(tiny_hardware()).replace('"bf16"', '"fp32"')
    (tmp_path / "hw.json").write_text(text)
    return tmp_path / "hw.json"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that reach the planner, which answers with a plan made beforehand."""
    requests: list[Request] = []

    def compile_plan(request: Request, progress: Callable[[str, float], None] | None = None) -> Plan:
        requests.append(request)
        return tiny_plan("joint")

    monkeypatch.setattr(planner, "compile_plan", compile_plan)
    return requests


SHORT = ["--prompt-len", "16", "--gen-len", "4", "--num-sequences", "6"]


def test_a_whole_compilation_writes_a_legal_plan_and_says_what_it_decided(
    model: Path, machine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "klotski_compiler.cli.compile", str(model), str(machine), "-o", str(out), *SHORT]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    for words in (
        "small in fp32 on tiny-cpu",
        "Decided (policy ",
        "tokens/s",
        "against best",
        "Where the time",
        f"written to {out}",
    ):
        assert words in run.stdout
    plan = load(out)
    verify(plan)
    assert {c.policy for c in plan.candidates} == set(POLICIES)
    assert (plan.workload.prompt_len, plan.workload.gen_len, plan.workload.num_sequences) == (16, 4, 6)


def test_json_is_one_object_and_equal_inputs_give_an_equal_plan(
    model: Path, machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for name in ("a.json", "b.json"):
        assert (
            main([str(model), str(machine), "-o", str(tmp_path / name), "--json", "--policy", "flexgen", *SHORT]) == 0
        )
        texts.append((tmp_path / name).read_text())
    out = capsys.readouterr()
    first, second = (json.loads(line) for line in out.out.splitlines())
    assert first == second and first["policy"] == "flexgen" and first["digest"] == load(tmp_path / "a.json").digest
    assert texts[0] == texts[1] and out.err == ""


def test_arguments_reach_the_planner(model: Path, machine: Path, asked: list[Request]) -> None:
    options = (
        "--batch-size 4 --num-batches auto --policy joint --memory host=1.5MiB disk=2G --max-latency 3 --time-limit 7.5"
    )
    assert main([str(model), str(machine), *SHORT, *options.split()]) == 0
    (request,) = asked
    assert (request.batch_size, request.num_batches, request.policy) == (4, None, "joint")
    assert request.budgets == {"host": 3 << 19, "disk": 2 << 30}
    assert (request.max_latency_s, request.time_limit_s, request.dtype) == (3.0, 7.5, "fp32")
    assert request.routing.source.startswith("uniform") and len(request.model_digest) == 64


def test_budgets_are_the_machine_unless_told(model: Path, machine: Path, asked: list[Request]) -> None:
    assert main([str(model), str(machine), *SHORT, "--dtype", "fp32"]) == 0
    assert asked[0].budgets == {"host": 1 << 30, "disk": 1 << 30}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 << 30),
        ("375MB", 375_000_000),
        ("1.5G", 3 << 29),
        ("1000", 1000),
        ("2k", 2048),
        ("7 B", 7),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "1e9", "0", "1 gallon", "nan", "1.2.3M"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 24GiB"):
        parse_size(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lengths_and_count_come_from_the_input(
    encoding: str, model: Path, machine: Path, tmp_path: Path, asked: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "prompts.txt"
    text.write_bytes(("short\n\n" + "\u010a" * 41 + "\n").encode(encoding))
    assert main([str(model), str(machine), "--input", str(text)]) == 0
    assert asked[0].workload == Workload(prompt_len=11, gen_len=32, num_sequences=2)
    out = capsys.readouterr().out
    assert "prompts.txt: 2 prompts, the longest 11 tokens (line 3), estimated as 1 per 4 characters" in out
    assert "prompts.txt: 1 of 3 rows cannot be run, the first because line 2: the prompt is empty" in out


@pytest.mark.parametrize(
    ("given", "gen_len", "count", "refused"),
    [
        ([], 20, 3, "1 of 4 rows cannot be run, the first because line 4: temperature"),
        (["--gen-len", "25"], 25, 3, "1 of 4 rows cannot be run"),
        (["--gen-len", "10"], 10, 2, "2 of 4 rows cannot be run, the first because line 2: max_tokens is 20"),
    ],
)
def test_rows_say_how_many_tokens_they_want(
    given: list[str], gen_len: int, count: int, refused: str,
    model: Path, machine: Path, tmp_path: Path, asked: list[Request], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What klotski-run would refuse counts for nothing."""
    bodies: list[dict[str, Any]] = [
        {"prompt": [1] * 5, "max_tokens": 10},
        {"messages": [{"role": "user", "content": "c"}], "max_tokens": 20},
        {"prompt": "abc", "max_completion_tokens": 1},
        {"prompt": [1] * 50, "temperature": 1},
    ]
    rows = tmp_path / "batch.jsonl"
    rows.write_text("\n".join(json.dumps({"custom_id": str(n), "body": body}) for n, body in enumerate(bodies)))
    assert main([str(model), str(machine), "--input", str(rows), *given]) == 0
    assert (asked[0].workload.gen_len, asked[0].workload.num_sequences) == (gen_len, count)
    assert refused in capsys.readouterr().out


def test_tokens_are_counted_as_the_run_counts_them(
    model: Path, machine: Path, tmp_path: Path, asked: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the tokenizer adds by itself, and what the chat template does."""
    words = ("a", "?", "<s>", "user", ":", "model")
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(model / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}model :"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    rows = tmp_path / "batch.jsonl"
    rows.write_text('{"prompt": "a b c d e"}\n{"custom_id": "x", "prompt": "a"}\n')
    assert main([str(model), str(machine), "--input", str(rows)]) == 0
    rows.write_text('{"messages": [{"role": "user", "content": "a a a"}]}\n')
    assert main([str(model), str(machine), "--input", str(rows)]) == 0
    assert [request.workload.prompt_len for request in asked] == [6, 7]
    assert "1 prompt, the longest 7 tokens (line 1), counted by the model's tokenizer" in capsys.readouterr().out
    rows.write_text('{"prompt": [1, 2, 3]}\n')
    assert main([str(model), str(machine), "--input", str(rows)]) == 0
    assert "1 prompt, the longest 3 tokens (line 1), given as token ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "gpu=24GiB"], "--memory: gpu: tiny-cpu has no such tier; choose one of"),
        (["--prompt-len", "128"], "exceed the 128 positions"),
        (["--routing", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--input", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--input", "none.txt"], "holds no prompts"),
        (["--input", "empty.txt"], "none of 1 rows can be run, the first because line 1: the prompt is empty"),
        (
            ["--input", "odd.jsonl"],
            "none of 2 rows can be run, the first because line 1: has neither prompt nor messages",
        ),
        (["--output", "text.txt", "--input", "text.txt"], "text.txt has another use here, too"),
        (
            ["--input", "long.txt"],
            "long.txt: its longest prompt (125 tokens, line 1) and its most new tokens (32, line 1) exceed the 128 positions",
        ),
        (["--input", "odd.jsonl", "--prompt-len", "3"], "leave out --prompt-len"),
        (["--json", "--dump-after", "slots"], "choose one of them"),
        (["-o", "nowhere/plan.json"], "in a folder that exists"),
        (["-o", "-"], "- cannot be a file"),
    ],
)
def test_bad_input_is_a_line_and_exit_code_2(
    arguments: list[str], words: str, model: Path, machine: Path, asked: list[Request],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("none.txt").write_text("")
    Path("empty.txt").write_text("\n")
    Path("odd.jsonl").write_text('{"text": "a"}\nb\n')
    Path("long.txt").write_text("a" * 500)
    Path("text.txt").write_text("a")
    lengths = [] if "--input" in arguments else ["--prompt-len", "16"]
    assert main([str(model), str(machine), *lengths, *arguments]) == 2
    out = capsys.readouterr()
    assert words in out.err and out.err.startswith("klotski-compile: ") and out.out == "" and not asked


@pytest.mark.parametrize(
    "arguments",
    [["--memory", "24GiB"], ["--memory", "host=lots"], ["--gen-len", "0"], ["--batch-size", "many"], ["--max-latency", "-1"],
     ["--policy", "magic"], ["--time-limit", "nan"], ["--dump-after", "magic"]],
)  # fmt: skip
def test_bad_usage_is_exit_code_2(
    arguments: list[str], model: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(model), str(machine), *arguments])
    assert stop.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


def test_what_cannot_fit_is_exit_code_3_with_the_shortfall(
    model: Path, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), str(machine), *SHORT, "--memory", "host=1MiB"]) == 3
    out = capsys.readouterr()
    assert "host is short by" in out.err and "bytes" in out.err and "--memory host=" in out.err and out.out == ""


@pytest.mark.parametrize(("fault", "code", "words"), [
    (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    (Infeasible({"gpu": 5}, "buy more"), 3, "gpu is short by 5 bytes"),
    (ZeroDivisionError("by zero"), 5, "internal fault, please report it: ZeroDivisionError at test_cli_compile.py:"),
])  # fmt: skip
def test_no_failure_is_a_traceback(
    fault: BaseException, code: int, words: str, model: Path, machine: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(request: Request, progress: object = None) -> Plan:
        raise fault

    monkeypatch.setattr(planner, "compile_plan", fail)
    assert main([str(model), str(machine), *SHORT, "-o", str(tmp_path / "plan.json")]) == code
    out = capsys.readouterr()
    assert words in out.err and "Traceback" not in out.err and out.out == "" and not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("name", "words"), [("build", "evict host"), ("slots", ">"), ("waits", "<"), ("schedule", "+")]
)
def test_the_program_prints_after_a_pass(
    name: str,
    words: str,
    model: Path,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec, hardware = read_model(model), read_hardware(machine)
    plan = make_plan(spec, hardware, "flexgen", tiny_decision("flexgen", spec, "host"), WORKLOAD)
    monkeypatch.setattr(planner, "compile_plan", lambda request, progress: plan)
    assert main([str(model), str(machine), *SHORT, "--dump-after", name]) == 0
    dumped = capsys.readouterr().out.split("Decided")[0]
    assert f"decode after {name}\n" in dumped and words in dumped


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert (
        stop.value.code == 0 and "examples:" in shown and "klotski-inspect plan.json" in shown and "Exit codes" in shown
    )


def test_a_sweep_prints_a_table_and_draws_a_picture(model: Path, machine: Path, tmp_path: Path, capsys: Any) -> None:
    picture = tmp_path / "sweep.svg"
    asked = [str(model), str(machine), *SHORT, "--policy", "joint", "--sweep", "prompt-len"]
    assert main([*asked, "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "prompt, tokens" in out and "--prompt-len does not count: the sweep sets that" in out
    assert f"drawn to {picture}" in out
    assert picture.read_text().startswith("<?xml")
    assert main([*asked, "-o", str(tmp_path / "plan.json")]) == 2
    assert "is no picture" in capsys.readouterr().err
    assert main([*asked, "--json"]) == 2
    assert "--sweep" in capsys.readouterr().err
