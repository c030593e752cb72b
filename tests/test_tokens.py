"""Same tokens: whatever a plan streams, and in which order, the engine writes what transformers' resident model writes (``same``)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer

from asked import asked, decided, drawn, loaded, machine, plan_of, streaming_all, workload
from klotski_compiler import report
from klotski_compiler.cli.compile import main as klotski_compile
from klotski_compiler.hardware import to_json
from klotski_compiler.ops import Load
from klotski_compiler.plan import load
from klotski_compiler.planner import compile_plan
from klotski_compiler.policies import OURS, POLICIES, policy
from klotski_runtime.cli.run import main as klotski_run
from klotski_runtime.engine import Row
from klotski_runtime.skeleton import CACHE
from plans import edited, tiny_decision
from same import PROMPTS, STEPS, Models, Resident, Same, ragged, resident, run
from tiny import FAMILIES

TRAINED = Path(__file__).parents[2] / "shared" / "models" / "moe-text-28m"
KINDS = ("prose", "glossary", "python", "c_header")
"""The trained model's four kinds of text."""

EXPERTS = {"expert", "pick"}
MOVED = {"static": {"expert"}, "solved": EXPERTS, "picks": {"pick"}}
"""What a policy that streams everything loads: experts by name, late-bound picks, or some of each."""

ALWAYS_ROLLING = [name for name in POLICIES if policy(name).rolling == (True,)]

each_policy = pytest.mark.parametrize("policy_name", POLICIES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def some_pairs(third: int) -> pytest.MarkDecorator:
    """A third of all pairs of a family and a policy: each with a third of the others."""
    pairs = [(f, p) for i, f in enumerate(FAMILIES) for j, p in enumerate(POLICIES) if (i + j) % 3 == third]
    return pytest.mark.parametrize(("family", "policy_name"), pairs)


trained_model = pytest.mark.skipif(not TRAINED.exists(), reason="the trained model is not here")


# ------------------------------------------------------------------------------------------- every policy, every family


@some_pairs(0)
def test_a_compiled_plan_that_streams_experts(
    family: str, policy_name: str, models: Models, same: Same, tmp_path: Path
) -> None:
    """Ragged prompts, in a full group and one that lacks a batch and a half."""
    model = models(family)
    plan = compile_plan(asked(model, policy_name, PROMPTS))
    assert loaded(plan) & EXPERTS
    assert any(layer.resident_experts for layer in plan.decision.layers)
    rolling = plan.decision.rolling
    assert (plan.envelope.sequences, plan.phase("decode").passes) == (6, STEPS // 3 - 1 if rolling else STEPS - 1)
    same(model, run(plan, model, tmp_path).rows)


@some_pairs(2)
def test_a_plan_that_streams_everything(
    family: str, policy_name: str, models: Models, same: Same, tmp_path: Path
) -> None:
    """Nothing resident but the norm: KV on disk, the head in pages, embedding rows gathered, prefill in two sub-groups."""
    model = models(family)
    parts = 1 if policy(policy_name).one_batch else 2
    plan = decided(model, policy_name, "disk", 8, unit=2, head_pages=3, embedding=False, prefill_groups=parts)
    assert {plan.tensors[t].kind for t, _ in plan.placed} == {"norm"}
    assert loaded(plan) >= {"kv", "head", "attention", "router"}
    assert loaded(plan) & EXPERTS == MOVED[policy(policy_name).experts]
    same(model, run(plan, model, tmp_path).rows)


@some_pairs(1)
def test_a_plan_for_a_gpu(
    family: str, policy_name: str, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    helped(models(family), policy_name, device, same, tmp_path)


@pytest.mark.parametrize("policy_name", ["moe_lightning", "hybrimoe"])
@each_family
def test_the_cpu_helps_a_gpu(
    family: str, policy_name: str, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """One policy with attention on the CPU, one with experts."""
    helped(models(family), policy_name, device, same, tmp_path)


def helped(model: Resident, policy_name: str, device: torch.device, same: Same, tmp_path: Path) -> None:
    """Every weight and all KV in host memory, the CPU at work beside the GPU."""
    plan = decided(model, policy_name, gen_len=8, gpu=True, unit=2, head_pages=3, embedding=False)
    kinds = {"head", "attention", "router"} | (
        {"kv"} if plan.decision.cpu_batches < plan.decision.num_batches else {"query"}
    )
    assert loaded(plan) >= kinds
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize(
    ("policy_name", "pages"), [("joint", 2), ("joint", 7), ("flexgen", 3), ("moe_lightning", 7), ("accelerate", 2)]
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_pages(
    family: str,
    policy_name: str,
    pages: int,
    device: torch.device,
    models: Models,
    same: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their last page on disk, the others in host memory: its own matrices, or slices of fused ones, cut anywhere. Residents of the
    GPU are loaded in pages, too."""
    monkeypatch.setattr("klotski_compiler.layout.LOAD_BYTES", 32 << 10)
    model = models(family, intermediate_size=512)
    decision = tiny_decision(policy_name, replace(model.spec, compute_dtype="fp32"), "gpu")
    layers = [layer.model_copy(update={"on_disk": layer.static[:2]}) for layer in decision.layers]
    decision = decision.model_copy(update={"layers": tuple(layers), "pages": pages})
    plan = plan_of(replace(model.spec, compute_dtype="fp32"), policy_name, decision, workload(PROMPTS, 8), True)
    for phase, kinds in (("load", {"expert", "attention"}), ("decode", {"expert"})):
        paged = {
            plan.tensors[t].kind
            for s in plan.steps[phase]
            if isinstance(s.op, Load) and s.op.pages
            for t in s.op.tensors
        }
        assert paged & kinds
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize("policy_name", ["moe_lightning", "joint"])
def test_pages_of_experts_batch_by_batch(
    policy_name: str, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """CGOPipe, or joint where it computes experts so: more micro-batches than weights, so that halves of experts follow their mixed
    values; and the last group lacks some."""
    model = models("phimoe", intermediate_size=512)
    spec, by_batch = replace(model.spec, compute_dtype="fp32"), policy_name == "joint"
    decision = tiny_decision("moe_lightning", spec, "host", 8, 1, cpu_batches=8, by_batch=by_batch)
    plan = plan_of(spec, policy_name, decision, workload(PROMPTS, 8), True)
    assert any(isinstance(step.op, Load) and step.op.pages for step in plan.steps["decode"])
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize("seed", range(3))
@each_policy
def test_any_decision(policy_name: str, seed: int, models: Models, same: Same, tmp_path: Path) -> None:
    """Random residency, KV tiers, sizes, orders, pages and chunks, on one family after the other."""
    rng = random.Random(f"{policy_name} {seed}")
    model = models(list(FAMILIES)[(seed + 3 * POLICIES.index(policy_name)) % len(FAMILIES)])
    decision, work = drawn(model.spec, policy_name, rng)
    plan = plan_of(model.spec, policy_name, decision, work)
    same(model, run(plan, model, tmp_path, PROMPTS[: work.num_sequences]).rows)


# ------------------------------------------------------------------------------------------------ every policy, one case


@each_policy
def test_the_compiler_spills_kv_that_does_not_fit(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    model = models("mixtral", num_hidden_layers=8, num_key_value_heads=4, head_dim=256)
    request = asked(model, policy_name, PROMPTS)
    host, disk = (streaming_all(request, kv)[0] for kv in ("host", "disk"))
    plan = compile_plan(replace(request, budgets=request.budgets | {"host": (host + disk) // 2}))
    assert loaded(plan) >= {"kv"} | MOVED[policy(policy_name).experts]
    same(model, run(plan, model, tmp_path, PROMPTS[:7]).rows)


@pytest.mark.parametrize(("family", "layers"), [("qwen2_moe", 1), ("deepseek_v3", 2)])
@each_policy
def test_a_model_of_one_or_two_layers(
    policy_name: str, family: str, layers: int, models: Models, same: Same, tmp_path: Path
) -> None:
    """Streamed whole, and where some of it is resident."""
    model = models(family, num_hidden_layers=layers)
    compiled = (POLICIES.index(policy_name) + layers) % 2
    plan = compile_plan(asked(model, policy_name, PROMPTS)) if compiled else decided(model, policy_name, "disk")
    # Ours keeps all experts of one layer in the room that streaming them would take.
    if policy_name != OURS or layers > 1:
        assert loaded(plan) & EXPERTS
    same(model, run(plan, model, tmp_path).rows)


@each_policy
def test_batches_of_one_sequence(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    model = models("phimoe")
    request = asked(model, policy_name, PROMPTS, 1 if policy(policy_name).one_batch else 4, 1)
    plan = compile_plan(request)
    assert plan.decision.batch_size == 1
    assert loaded(plan) & EXPERTS
    same(model, run(plan, model, tmp_path, PROMPTS[:6]).rows)


@each_policy
def test_one_new_token(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    model = models("glm4_moe")
    plan = compile_plan(asked(model, policy_name, PROMPTS, gen_len=1))
    assert [phase.name for phase in plan.phases] == ["load", "prefill"]
    assert loaded(plan, "prefill") & EXPERTS
    same(model, run(plan, model, tmp_path).rows)


@pytest.mark.parametrize("policy_name", [n for n in POLICIES if not policy(n).one_batch and n not in ALWAYS_ROLLING])
def test_prefill_batch_by_batch(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    """As many sub-groups as batches; the last group has none for the last of them."""
    model = models("gpt_oss")
    plan = decided(model, policy_name, prefill_groups=3)
    assert (plan.phase("prefill").passes, plan.phase("prefill").batches) == (3, 1)
    same(model, run(plan, model, tmp_path, PROMPTS[:8]).rows)


def test_a_short_group_runs_no_pass_for_parts_of_prefill_that_are_not_there(
    models: Models, same: Same, tmp_path: Path
) -> None:
    model = models("mixtral")
    plan = decided(model, "flexgen", prefill_groups=3)
    for prompts, parts in ((PROMPTS[:1], 1), (PROMPTS[:4], 2), (PROMPTS[:6], 3)):
        ran = run(plan, model, tmp_path, prompts)
        assert ran.prefills == [parts]
        same(model, ran.rows)


each_rolling = pytest.mark.parametrize(("num_batches", "ages", "gen_len"), [(2, 2, 2), (4, 4, 4), (4, 2, 9), (6, 3, 7)])


@pytest.mark.parametrize("kv", ["host", "disk"])
@each_rolling
def test_rolling_order(
    num_batches: int, ages: int, gen_len: int, kv: str, models: Models, same: Same, tmp_path: Path
) -> None:
    """Batches of several ages in one pass, with and without passes between two that join; the last cohort is not full."""
    model = models("qwen2_moe")
    plan = decided(model, "joint", kv, gen_len, num_batches=num_batches, prefill_groups=ages, rolling=True)
    assert {p.name: p.batches for p in plan.phases if p.name != "load"} == dict.fromkeys(
        ["prefill", "decode"][: 1 + (gen_len > ages)], num_batches
    )
    same(model, run(plan, model, tmp_path).rows)


@pytest.mark.parametrize("kv", ["gpu", "host"])
@each_rolling
def test_rolling_order_beside_a_gpu(
    num_batches: int,
    ages: int,
    gen_len: int,
    kv: str,
    device: torch.device,
    models: Models,
    same: Same,
    tmp_path: Path,
) -> None:
    """Where keys and values are in host memory, the CPU attends to one batch of each age."""
    model = models("qwen2_moe")
    sizes = {"num_batches": num_batches, "prefill_groups": ages, "cpu_batches": ages if kv == "host" else 0}
    plan = decided(model, "joint", kv, gen_len, True, rolling=True, **sizes)
    assert any(plan.decision.attended(layer) for layer in range(len(plan.decision.layers))) == (kv == "host")
    same(model, run(plan, model, tmp_path, device=device).rows)


def test_prefill_in_parts_beside_a_gpu(device: torch.device, models: Models, same: Same, tmp_path: Path) -> None:
    """Every sub-group's KV goes to host memory, to a place of its own."""
    model = models("mixtral")
    plan = decided(model, "flexgen", "host", gpu=True, prefill_groups=3, cpu_batches=1)
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize("ahead", [2, 3])
def test_keys_and_values_sent_ahead(
    ahead: int, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """Of so many batches at once, each in a slot of its own in the GPU's memory."""
    model = models("mixtral")
    plan = decided(model, "joint", "host", 7, gpu=True, num_batches=4, kv_ahead=ahead)
    kv = {t.id for t in plan.tensors if t.kind == "kv"}
    loads = ((s.slots[0], s.op.tensors[0]) for s in plan.steps["decode"] if isinstance(s.op, Load) and s.slots)
    assert len({slot for slot, tensor in loads if tensor in kv}) == ahead
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_what_surrounds_attention_is_one_op_or_several(
    together: bool, rolling: bool, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """For all batches that decode, of whatever age, and for the few tokens that an op takes at a time; or batch by batch."""
    model = models("qwen3_moe")
    parts = 2 if rolling else 1
    sizes = {"num_batches": 4, "prefill_groups": parts, "cpu_batches": parts, "rolling": rolling, "expert_rows": 3}
    plan = decided(model, "joint", "host", 7, gpu=True, decode_batch=1, together=together, **sizes)
    lines = [line for phase in plan.phases for line in phase.lines if " project " in line]
    assert lines
    assert any(" b*" in line or ":" in line.split()[4] for line in lines) == together
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize("cpu_batches", [0, 2])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
def test_a_shared_expert_that_nobody_waits_for(
    family: str, cpu_batches: int, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """Those that leave attention last have it after the CPU's experts have begun; others, while the CPU attends, with the router."""
    model = models(family)
    if cpu_batches and family == "deepseek_v2":
        pytest.skip("no CPU attends to a latent cache")
    spec = replace(model.spec, compute_dtype="fp32")
    decision = tiny_decision("joint", spec, "host", 4, cpu_batches=cpu_batches, together=cpu_batches > 0)
    plan = plan_of(spec, "joint", decision, workload(PROMPTS, 7), True, attends=1e-3)
    decode = plan.phase("decode").lines
    routers, shared = ([line for line in decode if f" {fn} " in line] for fn in ("router", "shared"))
    assert len(shared) == len(spec.moe_layers)
    assert {"shared" in line for line in routers} == ({True, False} if cpu_batches else {False})
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize(("num_batches", "ages", "last"), [(4, 4, 0), (6, 3, 0), (4, 2, 1)])
def test_residents_compute_over_prompts_while_the_cpu_attends(
    num_batches: int, ages: int, last: int, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """And over the others later; in the last passes of the run no prompts are there."""
    model = models("qwen2_moe")
    spec = replace(model.spec, compute_dtype="fp32")
    sizes = {"prefill_groups": ages, "rolling": True, "last_batch": last, "cpu_batches": num_batches, "together": True}
    decision = tiny_decision("joint", spec, "host", num_batches, **sizes)
    plan = plan_of(spec, "joint", decision, workload(PROMPTS, 7), True, attends=1e-3)
    scopes = {line.split()[3] for line in plan.phases[1].lines if " experts " in line}
    prompts = num_batches // ages
    assert scopes == {"b*", f"b0:{prompts}", f"b{prompts}*"}
    assert "experts compute over prompts while" in report.decision(plan)
    same(model, run(plan, model, tmp_path, device=device).rows)


@pytest.mark.parametrize(("parts", "rolling"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("last", [1, 3])
def test_a_batch_of_the_cpus_own(
    last: int, parts: int, rolling: bool, device: torch.device, models: Models, same: Same, tmp_path: Path
) -> None:
    """Smaller or larger than the others, one in each sub-group of prefill; the run is short of sequences for the last of them."""
    model = models("qwen2_moe")
    sizes = {"num_batches": 4, "last_batch": last, "prefill_groups": parts, "rolling": rolling}
    plan = decided(model, "joint", "host", 7, gpu=True, cpu_batches=parts, **sizes)
    assert plan.decision.sequences == 2 * (4 - parts) + last * parts
    same(model, run(plan, model, tmp_path, device=device).rows)


def test_a_head_tied_to_the_embedding_in_a_narrower_type(models: Models, same: Same, tmp_path: Path) -> None:
    """Computed in fp32 from bf16 files: pages of the head are pieces of the table from which rows are gathered."""
    model = models("olmoe", dtype="bfloat16", tie_word_embeddings=True)
    plan = decided(model, "joint", head_pages=5, embedding=False)
    assert (plan.dtype, model.spec.store_dtype, model.spec.tied) == ("fp32", "bf16", True)
    same(model, run(plan, model, tmp_path).rows)


@each_policy
def test_rows_stop_at_their_end_tokens(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    model = models("qwen3_moe")
    end = frozenset({model.text(PROMPTS[0]).tokens[4], model.text(PROMPTS[7]).tokens[9]})
    ran = run(decided(model, policy_name, "disk"), model, tmp_path, end=end)
    assert {row.reason for row in ran.rows} == {"stop", "length"}
    assert len({len(row.tokens) for row in ran.rows}) > 2
    same(model, ran.rows, end)


@pytest.mark.parametrize("policy_name", [name for name in POLICIES if name not in ALWAYS_ROLLING])
def test_a_group_stops_with_its_last_row(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    """Whatever the streams had in flight then, the next group starts clean."""
    model = models("qwen3_moe")
    end = frozenset(model.text(prompt).tokens[5] for prompt in PROMPTS[:6])
    ran = run(decided(model, policy_name, "disk"), model, tmp_path, end=end)
    assert ran.passes[0] == max(len(row.tokens) for row in ran.rows[:6]) - 1 <= 5
    assert ran.passes[1] == max(len(row.tokens) for row in ran.rows[6:]) - 1
    same(model, ran.rows, end)


# --------------------------------------------------------------------------------------------------------------- bf16


def likeliest(model: Any, rows: Sequence[Row]) -> list[int]:
    """The likeliest token before each token of the rows, teacher-forced, all rows in one batch."""
    width = max(len(row.prompt) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows])
    mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
    found, cache = [], None
    for coming in zip(*(row.tokens for row in rows), strict=True):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache})
        found.append(out.logits[:, -1].argmax(-1))
        cache, ids = out[CACHE], torch.tensor(coming)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(found, dim=1).flatten().tolist()


def no_worse(ours: Sequence[int], theirs: Sequence[int], right: Sequence[int]) -> bool:
    """Whether ours agree no less often with what is right than theirs do, by a sign test at two standard deviations."""
    lost = sum(b == c != a for a, b, c in zip(ours, theirs, right, strict=True))
    won = sum(a == c != b for a, b, c in zip(ours, theirs, right, strict=True))
    return lost - won <= 2 * sqrt(lost + won)


class Bf16(NamedTuple):
    """Likeliest tokens at the same places of the same texts: the engine's, the bf16 reference's for each row alone and for all in
    one batch, and those of the same weights in fp32."""

    engine: list[int]
    alone: list[int]
    batch: list[int]
    fp32: list[int]


def in_bf16(model: Resident, prompts: Sequence[list[int]], gen_len: int, scratch: Path, own_rows: int = 0) -> Bf16:
    decision = tiny_decision("joint", model.spec, "host", 2, len(prompts) // 2)
    plan = plan_of(model.spec, "joint", decision, workload(prompts, gen_len))
    plan = edited(plan, least_own_rows=own_rows).sealed()
    assert plan.dtype == "bf16"
    rows, reference = run(plan, model, scratch, prompts).rows, resident(model.folder, torch.bfloat16)
    return Bf16(
        engine=[token for row in rows for token in row.tokens],
        alone=[token for row in rows for token in likeliest(reference, [row])],
        batch=likeliest(reference, rows),
        fp32=likeliest(model.model, rows),
    )


@pytest.fixture(scope="module", params=[0, 1], ids=["PyTorch's kernels", "our kernel"])
def bf16(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Bf16:
    """Of two tiny models together."""
    prompts = ragged(*(1 + 5 * i % 19 for i in range(24)), seed=2)
    found = [
        in_bf16(models(family, dtype="bfloat16"), prompts, 16, tmp_path_factory.mktemp("scratch"), request.param)
        for family in ("mixtral", "deepseek_v2")
    ]
    return Bf16(*(first + second for first, second in zip(*found, strict=True)))


def test_bf16_is_as_near_to_fp32_as_the_reference_is(bf16: Bf16) -> None:
    assert no_worse(bf16.engine, bf16.alone, bf16.fp32)


@pytest.mark.xfail(
    strict=False,  # it failed on one machine with transformers 5.23 and passed on another with 5.24: which of these decides is not known
    reason="the engine rounds the sum of experts and residual once, the reference each of them: where margins are as small as a "
    "random model's, that shows more often than a batch size does",
)
def test_bf16_agrees_with_the_reference_as_often_as_that_does_with_itself(bf16: Bf16) -> None:
    assert no_worse(bf16.engine, bf16.batch, bf16.alone)


# --------------------------------------------------------------------------------------------------- the trained model


@pytest.fixture(scope="module")
def lines() -> list[dict[str, str]]:
    """Of each kind of text, two prompts of its shorter half."""
    rows = sorted(map(json.loads, (TRAINED / "prompts.jsonl").read_text().splitlines()), key=lambda r: len(r["prompt"]))
    return [row for kind in KINDS for row in [r for r in rows if r["custom_id"].startswith(kind)][4:10:5]]


@pytest.fixture(scope="session")
def trained() -> Resident:
    return Resident(TRAINED)


@pytest.fixture(scope="module")
def ids(lines: list[dict[str, str]]) -> dict[str, list[int]]:
    """Their prompts as the tokenizer writes them, by ``custom_id``."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TRAINED)
    return {line["custom_id"]: tokenizer(line["prompt"])["input_ids"] for line in lines}


@trained_model
@each_policy
def test_real_routing_and_text(
    policy_name: str, trained: Resident, ids: dict[str, list[int]], same: Same, tmp_path: Path
) -> None:
    every = list(ids.values())
    prompts = [*every[::2], *every[1::4]]  # of each kind, of some two: as many cohorts as rolling order has ages
    plan = compile_plan(asked(trained, policy_name, prompts))
    assert loaded(plan) & EXPERTS
    same(trained, run(plan, trained, tmp_path, prompts).rows)


@trained_model
def test_bf16_of_a_trained_model_agrees_with_the_reference_as_often_as_that_does_with_itself(
    trained: Resident, ids: dict[str, list[int]], tmp_path: Path
) -> None:
    found = in_bf16(trained, list(ids.values()), STEPS, tmp_path)
    assert no_worse(found.engine, found.batch, found.alone)


@trained_model
def test_what_the_commands_write_is_the_references_text_and_readable(
    trained: Resident, lines: list[dict[str, str]], ids: dict[str, list[int]], tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(TRAINED)
    source, hardware, plan, output = (tmp_path / name for name in ("in.jsonl", "hw.json", "plan.json", "out.jsonl"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    hardware.write_text(to_json(machine()))
    memory = f"host={asked(trained, 'joint', list(ids.values())).budgets['host']}"
    asking = [TRAINED, hardware, "--input", source, "--gen-len", STEPS, "--dtype", "fp32", "--policy", "joint"]
    assert klotski_compile([str(word) for word in (*asking, "--memory", memory, "-o", plan)]) == 0
    assert loaded(load(plan)) & EXPERTS
    running = [plan, "--model", TRAINED, "--input", source, "--output", output, "--scratch", tmp_path, "--threads", 1]
    assert klotski_run([str(word) for word in running]) == 0

    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["custom_id"] for row in written] == list(ids)
    texts = [row["response"]["body"]["choices"][0]["text"] for row in written]
    for text, prompt in zip(texts, ids.values(), strict=True):
        expected = trained.generate(prompt, STEPS, frozenset({tokenizer.eos_token_id}))
        assert text == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert text.strip()
        assert "\ufffd" not in text
    random_ids = torch.randint(3, len(tokenizer), (1000,), generator=torch.Generator().manual_seed(1))
    assert known("".join(texts)) > 0.5 > 0.25 > known(tokenizer.decode(random_ids.tolist()))


def known(text: str) -> float:
    """The share of its words that are in the prompts of the model's own four kinds of text."""
    corpus, found = (re.findall("[a-z]{3,}", t.lower()) for t in ((TRAINED / "prompts.jsonl").read_text(), text))
    return sum(word in set(corpus) for word in found) / len(found)
