"""klotski-inspect --html: one page that holds the whole plan, and nothing that a plan says can break out of it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from klotski_compiler import html, report
from klotski_compiler.cli.inspect import main
from klotski_compiler.ops import Compute, Load
from klotski_compiler.plan import Candidate, Plan
from klotski_compiler.timeline import timeline
from klotski_compiler.words import size, span
from plans import edited, tiny_plan

VOID = ("meta", "link", "input", "br", "hr", "img")
HOSTILE = "</script><script>alert('1')</script>\"&<img src=x onerror=y> {{data}}"


class Page(HTMLParser):
    """The page's elements, its text and its data. Fails where an element is closed that is not the open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.scripts = "", [""]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        return json.loads(gzip.decompress(b64decode(self.scripts[1])))  # type: ignore[no-any-return]


def page(plan: Plan, phase: str = "decode", layer: int | None = None) -> Page:
    return Page(html.page(plan, phase, layer))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny_plan("joint", gpu=True, kv="host", cpu_batches=1)


@pytest.mark.parametrize("policy", ["joint", "klotski", "flexgen", "accelerate"])
@pytest.mark.parametrize("gpu", [False, True])
def test_every_op_of_every_phase_is_in_the_page(policy: str, gpu: bool) -> None:
    plan = tiny_plan(policy, gpu)
    data = page(plan).data
    assert [p["name"] for p in data["phases"]] == [p.name for p in plan.phases]
    for shown, phase in zip(data["phases"], plan.phases, strict=True):
        assert tuple(shown["lines"]) == phase.lines
        assert len(shown["kinds"]) == len(phase.lines)
        assert set(shown["lanes"]) == {step.op.stream for step in plan.steps[phase.name]}
        assert shown["passes"] == phase.passes
        assert shown["pass_us"] == {**plan.forecast.pass_us, "load": plan.forecast.load_us}[phase.name]
    assert data["compute"] == ("gpu" if gpu else "cpu")


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_reads_lines_as_the_compiler_does(plan: Plan) -> None:
    script = html.TEMPLATE.read_text()
    found = re.search(r"^function parsed\(.*?^}", script, re.DOTALL | re.MULTILINE)
    assert found
    lines = [line for phase in plan.phases for line in phase.lines]
    code = f"{found[0]}\nconsole.log(JSON.stringify({json.dumps(lines)}.map(parsed)))"
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, check=True)
    steps = [step for phase in plan.phases for step in plan.steps[phase.name]]
    assert any(wait.back for step in steps for wait in step.waits)
    for op, step in zip(json.loads(done.stdout), steps, strict=True):
        assert (op["stream"], op["start"], op["end"]) == (step.op.stream, step.start_us, step.end_us)
        assert [(wait["op"], wait["back"]) for wait in op["waits"]] == list(step.waits)
        assert (op["slots"], op["sources"]) == ([*map(str, step.slots)], [*map(str, step.sources)])


def test_the_script_is_javascript(tmp_path: Path, plan: Plan) -> None:
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node")
    (tmp_path / "script.js").write_text(page(plan).scripts[2])
    done = subprocess.run([node, "--check", str(tmp_path / "script.js")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_colour_of_an_op_says_what_it_is_about(plan: Plan) -> None:
    names = list(html.KINDS)
    seen = set()
    for phase in plan.phases:
        for step, digit in zip(plan.steps[phase.name], html.op_kinds(plan, phase.name), strict=True):
            kind = names[int(digit)]
            seen.add(kind)
            if isinstance(step.op, Compute) and step.op.fn == "experts":
                layer = plan.decision.layers[step.op.layer]
                experts = {plan.tensors[t].index for t in step.op.tensors if plan.tensors[t].kind == "expert"}
                assert (kind == "resident") == bool(experts & set(layer.resident_experts))
                assert (kind == "late") == any(plan.tensors[t].kind == "pick" for t in step.op.tensors)
            if isinstance(step.op, Load) and {plan.tensors[t].kind for t in step.op.tensors} == {"kv"}:
                assert kind == "kv"
    assert seen >= {"attention", "router", "resident", "named", "late", "kv", "exchange", "head"}
    for name in names:
        assert html.TEMPLATE.read_text().count(f"--{name}: ") == 2, "a colour for light and one for dark"


def test_every_section_of_the_report_is_there(plan: Plan) -> None:
    text = page(plan).text
    for _, words in (*report.decision_rows(plan), *report.forecast_rows(plan)):
        assert words in text
    for held in report.holdings(plan).values():
        for holding in held:
            assert holding.name in text and all(size(n) in text for n in holding.nbytes if n)
    for candidate in plan.candidates:
        assert candidate.policy in text
    for line in report.headline(plan).splitlines():
        assert line in text
    for _, us in report.bubble_causes(plan):
        assert span(us) in text
    assert timeline(plan, "decode") in text and plan.digest in text


def test_nothing_that_a_plan_says_becomes_markup(plan: Plan) -> None:
    hostile = Candidate(policy=HOSTILE, tokens_per_s=0, feasible=False, why_not=HOSTILE)
    forecast = plan.forecast.model_copy(
        update={"schedule_class": HOSTILE, "class_bounds": {HOSTILE: 1.0}, "bubble_us": {HOSTILE: 1}}
    )
    tiers = {"budgets": plan.budgets, "workspace": {"gpu": {HOSTILE: 1}}}
    names = dict.fromkeys(("model", "dtype", "hardware", "policy", "digest"), HOSTILE)
    feasible = hostile.model_copy(update={"feasible": True})
    said = edited(plan, **names, **tiers, notes=(HOSTILE,), candidates=(hostile, feasible), forecast=forecast)
    clean, found = page(plan), page(said)
    assert set(found.tags) == set(clean.tags)
    assert found.tags.count("script") == 2 and "img" not in found.tags
    assert {name for name, _ in found.attributes} == {name for name, _ in clean.attributes}
    assert found.text.count(HOSTILE) >= 10
    assert found.data == clean.data
    assert not re.search(r"innerHTML|outerHTML|document\.write|insertAdjacent", found.scripts[2])


def test_it_needs_no_network(plan: Plan) -> None:
    found = page(plan)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in found.attributes}
    assert "link" not in found.tags
    policy = next(value for name, value in found.attributes if name == "content" and value and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "http" not in html.TEMPLATE.read_text().replace("http-equiv", "") and "@import" not in found.text


def test_the_page_of_a_large_plan_stays_small(plan: Plan) -> None:
    steps = 20_000
    decode = plan.phase("decode")
    lines = [decode.lines[n % len(decode.lines)].rpartition("@")[0] + f"@{n * 977}+{n % 977}" for n in range(steps)]
    large = edited(
        plan, phases=tuple(p.model_copy(update={"lines": tuple(lines)}) if p is decode else p for p in plan.phases)
    )
    assert len(html.page(large, "decode")) < 80_000 + 25 * steps


def test_equal_plans_give_equal_pages(plan: Plan) -> None:
    assert html.page(plan, "decode") == html.page(edited(plan), "decode")


def test_the_command_writes_it_where_it_is_told(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    plan.save(tmp_path / "plan.json")
    target = tmp_path / "report.html"
    assert main([str(tmp_path / "plan.json"), "--html", str(target), "--phase", "prefill", "--layer", "3"]) == 0
    out = capsys.readouterr().out
    assert "Timeline of prefill, layer 3" in out and out.endswith(f"\n\nwritten to {target}\n")
    data = Page(target.read_text(encoding="utf-8")).data
    assert data["phases"][data["phase"]]["name"] == "prefill" and data["layer"] == 3


def test_what_cannot_be_written_is_refused_before_the_plan_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["missing.json", "--html", str(tmp_path)]) == 2
    assert "cannot be a file" in capsys.readouterr().err
