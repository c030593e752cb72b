"""klotski-inspect: what a plan reads like, as text, JSON and trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

from klotski_compiler import report
from klotski_compiler.cli.inspect import main
from klotski_compiler.plan import Plan, load
from klotski_compiler.timeline import timeline
from klotski_compiler.trace import Row, chrome_trace, predicted
from klotski_compiler.words import size
from plans import edited, tiny_plan

ROOT = Path(__file__).resolve().parent.parent
PLAN = tiny_plan("joint")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def timed(plan: Plan) -> Plan:
    """Decode with round times, so that the golden text does not depend on what an op costs: 100 us each, one after the other."""
    decode = plan.phase("decode")
    lines = tuple(f"{line.rpartition('@')[0]}@{100 * n}+100" for n, line in enumerate(decode.lines))
    phases = tuple(p.model_copy(update={"lines": lines}) if p is decode else p for p in plan.phases)
    pass_us = {**plan.forecast.pass_us, "decode": 100 * len(lines)}
    return edited(plan, phases=phases, forecast=plan.forecast.model_copy(update={"pass_us": pass_us}))


def test_the_timeline_of_a_small_plan() -> None:
    plan = timed(tiny_plan("klotski", num_batches=1))
    assert timeline(plan, "decode", 2, width=60) == GOLDEN.strip("\n")


GOLDEN = """
Timeline of decode, layer 2 (L0 to L3): 1.8 ms of the 6.3 ms of a pass; a column is 30 us
            |0          |360 us     |720 us     |1.1 ms     |1.4 ms     | busy
  disk>host |L2|L2=...|L2 lat.........|L2 lat|L3=......|L2=.............  44%
  cpu       ......|bin......|att|ro|bin.........|exp|la...|late experts=  56%
  disk>host 1 x L2 router 100 us, 1 x L2 shared 100 us, 5 x L2 late experts 500 us, 1 x L3 attention 100 us;
            idle 1.0 ms
  cpu       2 x bind 200 us, 1 x attention 100 us, 1 x router 100 us, 1 x experts 100 us, 5 x late experts 500
            us; idle 800 us
"""


@pytest.mark.parametrize("policy", ["joint", "klotski", "flexgen", "accelerate"])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_overview_has_every_section_within_its_width(policy: str, gpu: bool) -> None:
    plan = tiny_plan(policy, gpu, kv="host" if gpu else "disk")
    text = report.overview(plan)
    for section in (
        "Decided",
        "Predicted",
        "Policies",
        "Where the time",
        "Bubbles",
        "Timeline of decode, layer 2",
        "Memory of host",
    ):
        assert section in text
    lanes = text.split("Timeline")[1].split("Memory")[0].splitlines()
    assert max(map(len, lanes)) < 125
    assert sum(stream in "\n".join(lanes) for stream in plan.streams) == len(
        {s.op.stream for s in plan.steps["decode"]}
    )


def test_the_memory_table_adds_up_to_the_budget() -> None:
    plan = tiny_plan("joint", gpu=True, kv="host")
    for tier, table in ((part.split(":")[0], part) for part in report.memory(plan).split("Memory of ")[1:]):
        free = plan.budgets[tier] - plan.forecast.peak_bytes[tier]
        assert size(free) in table.splitlines()[-1]


def test_json_has_what_the_contract_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--json"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert {"policy", "decision", "forecast", "candidates"} <= set(found)
    assert {
        "makespan_us", "pass_us", "bound_us", "tokens_per_s", "bound_tokens_per_s", "gap", "bubble_fraction", "busy_us", "peak_bytes",
    } <= set(found["forecast"])  # fmt: skip
    assert {"policy", "tokens_per_s", "feasible", "why_not"} <= set(found["candidates"][0])
    assert out.out.count("\n") == 1 and out.err == ""


def test_ops_print_as_the_plan_holds_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--ops", "3:6"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in shown] == [[str(n), PLAN.phase("decode").lines[n]] for n in (3, 4, 5)]
    assert main([str(path), "--ops", ":2", "--phase", "load"]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_two_plans_side_by_side(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_plan("flexgen").save(tmp_path / "other.json")
    assert main([str(path), "--compare", str(tmp_path / "other.json")]) == 0
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "joint" in rows["policy"] and "flexgen" in rows["policy"] and rows["policy"].endswith("differs")
    assert rows["tokens/s"].endswith(" x") and not rows["model"].endswith("differs")


def test_the_trace_holds_every_op_of_a_pass(path: Path, tmp_path: Path) -> None:
    assert main([str(path), "--trace", str(tmp_path / "trace.json")]) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == sum(len(phase.lines) for phase in PLAN.phases)
    named = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named == {"load", "prefill", "decode", *PLAN.streams}
    assert len({event["tid"] for event in spans}) == len({(row[0], row[1]) for row in predicted(PLAN)})


def test_a_trace_of_measured_rows() -> None:
    trace = chrome_trace([Row("decode", "cpu", "attention L0 b0", 1.5, 2.0)])
    assert trace["traceEvents"][-1] == {"ph": "X", "name": "attention L0 b0", "pid": 0, "tid": 0, "ts": 1.5, "dur": 2.0}  # type: ignore[index]


def test_the_graph_of_a_pass() -> None:
    graph = PLAN.graph()
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.nodes[0]["text"] in PLAN.phase("decode").lines[0] and len(graph) == len(PLAN.steps["decode"])
    waits = sum(wait.back == 0 for step in PLAN.steps["decode"] for wait in step.waits)
    assert sum(why == "wait" for _, _, why in graph.edges(data="why")) == waits > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.json"], 4, "missing.json cannot be read"),
        (["PLAN", "--layer", "4"], 2, "tiny has 0 to 3"),
        (["PLAN", "--trace", "/nowhere/t.json"], 2, "/nowhere/t.json cannot be a file"),
        (["PLAN", "--html", "/nowhere/r.html"], 2, "/nowhere/r.html cannot be a file"),
        (["PLAN", "--html", "/proc/r.html"], 2, "/proc/r.html cannot be written"),
        (["PLAN", "--compare", "missing.json"], 4, "missing.json"),
    ],
)
def test_refusals_are_lines_with_an_exit_code(
    arguments: list[str], code: int, words: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(path) if a == "PLAN" else a for a in arguments]) == code
    out = capsys.readouterr()
    assert words in out.err and out.out == "" and len(out.err.splitlines()) <= 3


def test_an_edited_plan_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text().replace('"lead": 4', '"lead": 5'))
    assert main([str(path)]) == 4
    assert "was changed after it was compiled" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["3", "a:b", "3-5"])
def test_a_range_that_is_none_is_a_usage_error(wrong: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--ops", wrong])
    assert stop.value.code == 2 and "such as 100:140" in capsys.readouterr().err


def test_it_reads_plans_where_no_solver_is_installed(path: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['ortools', 'networkx', 'torch', 'highspy']))\n"
    script = blocked + f"from klotski_compiler.cli.inspect import main; sys.exit(main([{str(path)!r}]))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "") and "Timeline of decode" in run.stdout


def test_a_reader_that_stops_early_is_no_error(path: Path) -> None:
    command = f"{sys.executable} -m klotski_compiler.cli.inspect {path} --ops : | head -1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stderr == "" and run.stdout.splitlines()[-1] == "0"


def test_saved_plans_load_equal(path: Path) -> None:
    assert load(path) == PLAN
