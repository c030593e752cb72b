"""Same tokens: whatever a plan streams, and in which order, the engine writes what transformers' resident model writes.

The rule (README, "Same tokens"): in fp32, token ids are equal. A row may part from the reference only where the reference's own two
best logits are less than 1e-4 apart; such rows are counted, and shown as a warning.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from klotski_compiler.cli.compile import main as klotski_compile
from klotski_compiler.hardware import Hardware, to_json
from klotski_compiler.model import Layer, ModelSpec, read_model
from klotski_compiler.pipeline import lower
from klotski_compiler.plan import Decision, LayerDecision, Load, Plan, Tensor, Workload, load
from klotski_compiler.planner import Request, compile_plan
from klotski_compiler.policies import OURS, POLICIES, policy
from klotski_compiler.routing import Routing, uniform
from klotski_compiler.search import Search
from klotski_runtime.cli.run import main as klotski_run
from klotski_runtime.engine import Engine, Row
from klotski_runtime.skeleton import CACHE, import_model
from plans import edited, make_plan, tiny_decision, tiny_hardware
from tiny import FAMILIES, make_checkpoint

MARGIN = 1e-4
STEPS = 18
LENGTHS = (12, 9, 1, 20, 20, 5, 3, 17, 8)
TRAINED = Path(__file__).parents[2] / "shared" / "models" / "moe-text-28m"
KINDS = ("prose", "glossary", "python", "c_header")
"""The trained model's four kinds of text."""

EXPERTS = {"expert", "pick"}
MOVED = {"static": {"expert"}, "solved": EXPERTS, "picks": {"pick"}}
"""What a policy that streams everything loads: experts by name, late-bound picks, or some of each."""

ALWAYS_ROLLING = [name for name in POLICIES if getattr(policy(name), "ROLLING", (False,)) == (True,)]

each_policy = pytest.mark.parametrize("policy_name", POLICIES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def some_pairs(third: int) -> pytest.MarkDecorator:
    """A third of all pairs of a family and a policy: each with a third of the others."""
    pairs = [(f, p) for i, f in enumerate(FAMILIES) for j, p in enumerate(POLICIES) if (i + j) % 3 == third]
    return pytest.mark.parametrize(("family", "policy_name"), pairs)


trained_model = pytest.mark.skipif(not TRAINED.exists(), reason="the trained model is not here")


def ragged(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = ragged(*LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matmuls of tiny models gain nothing from a second thread, and wait for it long where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- the reference


class Text(NamedTuple):
    """What the reference wrote after a prompt, and at each token how far its logit was above the next best."""

    tokens: list[int]
    margins: list[float]


class Resident:
    """A checkpoint on disk, and transformers' model of it with all weights in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, read_model(folder)
        self._texts: dict[tuple[int, ...], Text] = {}

    @cached_property
    def model(self) -> Any:
        return resident(self.folder, torch.float32)

    def text(self, prompt: Sequence[int]) -> Text:
        """STEPS tokens, greedy, this prompt alone; nothing ends it."""
        key = tuple(prompt)
        if key not in self._texts:
            self._texts[key] = self.generate(prompt, STEPS, frozenset())
        return self._texts[key]

    def generate(self, prompt: Sequence[int], steps: int, end: frozenset[int]) -> Text:
        """Up to ``steps`` tokens, greedy, this prompt alone; a token of ``end`` is the last."""
        out = self.model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=sorted(end) or None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.cat(out.logits).topk(2).values
        return Text(out.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist())


def resident(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model, with eager experts and no end token of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


Models = Callable[..., Resident]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tiny models by family and further arguments of ``make_checkpoint``, each made once."""

    @lru_cache
    def make(family: str, **options: Any) -> Resident:
        return Resident(make_checkpoint(family, tmp_path_factory.mktemp(family), **options))

    return make


class Same:
    """The rule, over the rows of one test."""

    def __init__(self) -> None:
        self.parted = self.equal = self.tokens = 0

    def __call__(self, model: Resident, rows: Sequence[Row], end: frozenset[int] = frozenset()) -> None:
        """Assert it."""
        for row in rows:
            want = model.generate(row.prompt, row.max_new_tokens, end) if end else model.text(row.prompt)
            expected = want.tokens[: row.max_new_tokens]
            pairs = enumerate(zip(row.tokens, expected, strict=False))
            equal = next((i for i, (token, wanted) in pairs if token != wanted), min(len(row.tokens), len(expected)))
            if row.tokens != expected:
                margin = want.margins[equal]
                assert margin < MARGIN, f"token {equal} of {row}, expected {expected} with a margin of {margin}"
                self.parted += 1  # from here on the two continue different texts
            self.equal += equal
            self.tokens += len(expected)
        assert self.equal > 0.9 * self.tokens > 0  # else nearly nothing was compared


@pytest.fixture
def same(record_property: Callable[[str, object], None]) -> Iterator[Same]:
    """Counts, and shows, the rows that part from the reference."""
    rule = Same()
    yield rule
    record_property("rows that part from the reference", rule.parted)
    if rule.parted:
        warnings.warn(f"{rule.parted} rows part from the reference where it hardly decides", stacklevel=1)


# --------------------------------------------------------------------------------------------------------------- plans


def machine(gpu: bool = False) -> Hardware:
    """A slow machine, as fast in fp32 as in bf16."""
    hardware = tiny_hardware(gpu)
    processors = {
        name: processor.model_copy(update={"matmul": dict.fromkeys(("bf16", "fp32"), processor.matmul["bf16"])})
        for name, processor in hardware.processors.items()
    }
    return hardware.model_copy(update={"processors": processors})


def skewed(spec: ModelSpec) -> Routing:
    """A quarter of the experts and one more, others in each layer, are eight times as popular as the rest."""

    def shares(number: int, layer: Layer) -> tuple[float, ...]:
        popular = layer.num_experts // 4 + 1
        weights = [8.0 if (e + 3 * number) % layer.num_experts < popular else 1.0 for e in range(layer.num_experts)]
        return tuple(w / sum(weights) for w in weights)

    popularity = tuple(shares(number, layer) for number, layer in enumerate(spec.layers))
    return uniform(spec).model_copy(update={"popularity": popularity})


def asked(
    model: Resident,
    policy_name: str,
    prompts: Sequence[list[int]],
    num_batches: int = 3,
    batch_size: int = 2,
    gen_len: int = STEPS,
    share: float = 0.25,
) -> Request:
    """A compilation with memory for all modules but the routed experts, and for ``share`` of those, beyond what streaming takes; for
    joint, which would stream other modules rather, for none of those."""
    if policy(policy_name).ONE_BATCH:
        num_batches, batch_size = 1, num_batches * batch_size
    spec, budgets = model.spec, {"host": 1 << 40, "disk": 1 << 40}
    work = workload(prompts, gen_len)
    request = Request(spec, machine(), skewed(spec), work, budgets, "fp32", policy_name, batch_size, num_batches)
    bare, weights = streaming_all(request)
    share = 0.0 if policy_name == OURS else share
    room = sum(t.slot_bytes * (share if t.kind == "expert" else 1) for t in weights)
    return replace(request, budgets=budgets | {"host": bare + round(room)})


def streaming_all(request: Request, kv: str = "host") -> tuple[int, list[Tensor]]:
    """What a schedule takes that keeps no weight of a layer in memory; and these weights. kv: where all of it lives."""
    search = Search(request)
    base = next(search.bases(request.policy))
    layers = tuple(layer.model_copy(update={"kv": kv}) for layer in base.layers)
    lowered = lower(search.cost, request.policy, base.model_copy(update={"layers": layers}), request.workload)
    weights = [t for t in lowered.tensors if t.layer >= 0 and t.kind not in ("kv", "pick")]
    return lowered.peak_bytes["host"], weights


def workload(prompts: Sequence[list[int]], gen_len: int) -> Workload:
    return Workload(prompt_len=max(map(len, prompts)), gen_len=gen_len, num_sequences=len(prompts))


def decided(
    model: Resident, policy_name: str, kv: str = "host", gen_len: int = STEPS, gpu: bool = False, **changes: Any
) -> Plan:
    """A plan in which every layer streams all of its weights; joint loads half of the experts by name and half by rank. On a GPU
    the CPU has as much of the work as the policy gives it, and joint a named expert of every layer."""
    spec = replace(model.spec, compute_dtype="fp32")
    batch_size = 6 if policy(policy_name).ONE_BATCH else 2
    decision = tiny_decision(policy_name, spec, kv, batch_size=batch_size, **changes)
    group = "late" if policy(policy_name).EXPERTS == "picks" else "static"
    layers = tuple(
        layer.model_copy(
            update={"resident": (), "resident_experts": (), group: (*layer.resident_experts, *getattr(layer, group))}
        )
        for layer in decision.layers
    )
    if any(layer.expand_flops for layer in spec.layers):  # such a cache is for GPUs
        decision = decision.model_copy(update={"cpu_batches": 0})
    if gpu and policy_name == "joint":
        layers = tuple(x.model_copy(update={"static": x.static[1:], "cpu": x.static[:1]}) for x in layers)
    if policy_name == "joint" and gpu and kv == "host":  # some KV in either place
        layers = tuple(x.model_copy(update={"kv_batches": n % 2}) for n, x in enumerate(layers))
    decision = decision.model_copy(update={"layers": layers})
    return plan_of(spec, policy_name, decision, workload(PROMPTS, gen_len), gpu)


def drawn(spec: ModelSpec, policy_name: str, rng: random.Random) -> tuple[Decision, Workload]:
    """A random decision that the policy can take, for a random workload."""
    module, layers = policy(policy_name), list[LayerDecision]()
    for layer in spec.layers:
        order = rng.sample(range(layer.num_experts), layer.num_experts)
        kept = rng.randint(0, len(order) - 1) if order else 0
        picks = {"static": 0, "solved": rng.randint(0, len(order) - kept), "picks": len(order) - kept}[module.EXPERTS]
        named = len(order) - picks
        modules = [k for k in ("attention", "router", "shared", "dense") if getattr(layer, k) and rng.random() < 0.4]
        layers.append(
            LayerDecision(
                resident=tuple(modules),
                resident_experts=tuple(order[:kept]),
                static=tuple(order[kept:named]),
                late=tuple(order[named:]),
                kv=rng.choice(["host", "disk"]),
                kv_batches=rng.randint(0, 1) if module.EXPERTS == "solved" else 0,
            )
        )
    most, top_k = max(layer.num_experts for layer in spec.layers), max(layer.top_k for layer in spec.layers)
    num_batches = 1 if module.ONE_BATCH else rng.randint(1, 4)
    batch_size, unit, parts = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, num_batches)
    decision = Decision(
        num_batches=num_batches,
        batch_size=batch_size,
        lead={"static": most, "solved": unit * rng.randint(2, 5), "picks": rng.randint(min(most, top_k + unit), most)}[
            module.EXPERTS
        ],
        unit=unit,
        head_pages=rng.choice([0, 1, 2, 5]),
        prefill_groups=parts,
        rolling=num_batches % parts == 0 and parts > 1 and rng.random() < 0.7,
        attention_batch=rng.randint(1, batch_size),
        decode_batch=rng.randint(1, batch_size),
        expert_rows=rng.choice([1, 7, 64]),
        hot=rng.randint(0, top_k) if module.EXPERTS == "picks" else 0,
        embedding=rng.random() < 0.5,
        layers=tuple(layers),
    )
    prompts = PROMPTS[: decision.sequences + rng.randint(0, decision.sequences)]
    return decision, workload(prompts, rng.choice([2, 3, 9] if decision.rolling else [1, 2, 3, 9]))


def plan_of(spec: ModelSpec, policy_name: str, decision: Decision, work: Workload, gpu: bool = False) -> Plan:
    """The plan of a decision."""
    return edited(make_plan(spec, machine(gpu), policy_name, decision, work), model_digest="").sealed()


def loaded(plan: Plan, phase: str = "decode") -> set[str]:
    """Kinds of tensors that a pass of the phase loads."""
    return {plan.tensors[t].kind for step in plan.steps[phase] if isinstance(step.op, Load) for t in step.op.tensors}


# ------------------------------------------------------------------------------------------------------------- running


class Ran(NamedTuple):
    """rows: all of them, done. passes: decode passes of each group that were run to their end."""

    rows: list[Row]
    passes: list[int]


def run(
    plan: Plan,
    model: Resident,
    scratch: Path,
    prompts: Sequence[list[int]] = PROMPTS,
    end: frozenset[int] = frozenset(),
) -> Ran:
    """All prompts through one engine, group after group."""
    rows, passes = [Row(prompt, plan.envelope.gen_len) for prompt in prompts], list[int]()
    engine = Engine(plan, model.folder, import_model(model.folder), scratch, threads=1, emulate=True)
    try:
        engine.load()
        size = len(rows) if plan.decision.rolling else plan.envelope.sequences
        for first in range(0, len(rows), size):
            before = len(engine.measured.passes_us.get("decode", []))
            engine.run(rows[first : first + size], end)
            passes.append(len(engine.measured.passes_us.get("decode", [])) - before)
    finally:
        engine.close()
    assert all(row.done for row in rows)
    return Ran(rows, passes)


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


@each_policy
@each_family
def test_a_plan_that_streams_everything(
    family: str, policy_name: str, models: Models, same: Same, tmp_path: Path
) -> None:
    """Nothing resident but the norm: KV on disk, the head in pages, embedding rows gathered, prefill in two sub-groups."""
    model = models(family)
    parts = 1 if policy(policy_name).ONE_BATCH else 2
    plan = decided(model, policy_name, "disk", 8, unit=2, head_pages=3, embedding=False, prefill_groups=parts)
    assert {plan.tensors[t].kind for t, _ in plan.placed} == {"norm"}
    assert loaded(plan) >= {"kv", "head", "attention", "router"}
    assert loaded(plan) & EXPERTS == MOVED[policy(policy_name).EXPERTS]
    same(model, run(plan, model, tmp_path).rows)


@some_pairs(1)
def test_a_plan_for_a_gpu(family: str, policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    helped(models(family), policy_name, same, tmp_path)


@pytest.mark.parametrize("policy_name", ["moe_lightning", "hybrimoe"])
@each_family
def test_the_cpu_helps_a_gpu(family: str, policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    """One policy with attention on the CPU, one with experts."""
    helped(models(family), policy_name, same, tmp_path)


def helped(model: Resident, policy_name: str, same: Same, tmp_path: Path) -> None:
    """With host memory in the GPU's place: every weight and all KV in host memory, the CPU at work beside the GPU."""
    plan = decided(model, policy_name, gen_len=8, gpu=True, unit=2, head_pages=3, embedding=False)
    kinds = {"head", "attention", "router"} | (
        {"kv"} if plan.decision.cpu_batches < plan.decision.num_batches else {"query"}
    )
    assert loaded(plan) >= kinds
    same(model, run(plan, model, tmp_path).rows)


@pytest.mark.parametrize("pages", [2, 3, 7])
@pytest.mark.parametrize("policy_name", ["joint", "flexgen", "moe_lightning", "accelerate"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_pages(
    family: str,
    policy_name: str,
    pages: int,
    models: Models,
    same: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their last page on disk, the others in host memory: its own matrices, or slices of fused ones, cut anywhere. Residents of the
    GPU are loaded in pages, too."""
    monkeypatch.setattr("klotski_compiler.pipeline.LOAD_BYTES", 32 << 10)
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
    same(model, run(plan, model, tmp_path).rows)


def test_moe_lightning_in_pages_of_experts(models: Models, same: Same, tmp_path: Path) -> None:
    """More micro-batches than weights: halves of experts follow their mixed values, and the last group lacks some."""
    model = models("phimoe", intermediate_size=512)
    decision = tiny_decision("moe_lightning", replace(model.spec, compute_dtype="fp32"), "host", 8, 1, cpu_batches=8)
    plan = plan_of(replace(model.spec, compute_dtype="fp32"), "moe_lightning", decision, workload(PROMPTS, 8), True)
    assert any(isinstance(step.op, Load) and step.op.pages for step in plan.steps["decode"])
    same(model, run(plan, model, tmp_path).rows)


@pytest.mark.parametrize("seed", range(6))
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
    plan = compile_plan(replace(request, budgets=request.budgets | {"host": (host + 3 * disk) // 4}))
    assert loaded(plan) >= {"kv"} | MOVED[policy(policy_name).EXPERTS]
    same(model, run(plan, model, tmp_path, PROMPTS[:7]).rows)


@pytest.mark.parametrize(("family", "layers"), [("qwen2_moe", 1), ("deepseek_v3", 2)])
@each_policy
def test_a_model_of_one_or_two_layers(
    policy_name: str, family: str, layers: int, models: Models, same: Same, tmp_path: Path
) -> None:
    model = models(family, num_hidden_layers=layers)
    for plan in (compile_plan(asked(model, policy_name, PROMPTS)), decided(model, policy_name, "disk")):
        assert loaded(plan) & EXPERTS
        same(model, run(plan, model, tmp_path).rows)


@each_policy
def test_batches_of_one_sequence(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    model = models("phimoe")
    request = asked(model, policy_name, PROMPTS, 1 if policy(policy_name).ONE_BATCH else 4, 1)
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


@pytest.mark.parametrize("policy_name", [n for n in POLICIES if not policy(n).ONE_BATCH and n not in ALWAYS_ROLLING])
def test_prefill_batch_by_batch(policy_name: str, models: Models, same: Same, tmp_path: Path) -> None:
    """As many sub-groups as batches; the last group has none for the last of them."""
    model = models("gpt_oss")
    plan = decided(model, policy_name, prefill_groups=3)
    assert (plan.phase("prefill").passes, plan.phase("prefill").batches) == (3, 1)
    same(model, run(plan, model, tmp_path, PROMPTS[:8]).rows)


@pytest.mark.parametrize(("kv", "gpu"), [("host", False), ("disk", False), ("gpu", True), ("host", True)])
@pytest.mark.parametrize(("num_batches", "ages", "gen_len"), [(2, 2, 2), (4, 4, 4), (4, 2, 9), (6, 3, 7)])
def test_rolling_order(
    num_batches: int, ages: int, gen_len: int, kv: str, gpu: bool, models: Models, same: Same, tmp_path: Path
) -> None:
    """Batches of several ages in one pass, with and without passes between two that join; the last cohort is not full."""
    model = models("qwen2_moe")
    sizes = {"num_batches": num_batches, "prefill_groups": ages, "rolling": True}
    plan = decided(model, "joint", kv, gen_len, gpu, **sizes)
    assert {p.name: p.batches for p in plan.phases if p.name != "load"} == dict.fromkeys(
        ["prefill", "decode"][: 1 + (gen_len > ages)], num_batches
    )
    same(model, run(plan, model, tmp_path).rows)


def test_prefill_in_parts_beside_a_gpu(models: Models, same: Same, tmp_path: Path) -> None:
    """Every sub-group's KV goes to host memory, to a place of its own."""
    model = models("mixtral")
    same(model, run(decided(model, "flexgen", "host", gpu=True, prefill_groups=3, cpu_batches=1), model, tmp_path).rows)


@pytest.mark.parametrize(("parts", "rolling"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("last", [1, 3])
def test_a_batch_of_the_cpus_own(
    last: int, parts: int, rolling: bool, models: Models, same: Same, tmp_path: Path
) -> None:
    """Smaller or larger than the others, one in each sub-group of prefill; the run is short of sequences for the last of them."""
    model = models("qwen2_moe")
    sizes = {"num_batches": 4, "last_batch": last, "prefill_groups": parts, "rolling": rolling}
    plan = decided(model, "joint", "host", 7, gpu=True, cpu_batches=parts, **sizes)
    assert plan.decision.sequences == 2 * (4 - parts) + last * parts
    same(model, run(plan, model, tmp_path).rows)


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


def in_bf16(model: Resident, prompts: Sequence[list[int]], gen_len: int, scratch: Path) -> Bf16:
    decision = tiny_decision("joint", model.spec, "host", 2, len(prompts) // 2)
    plan = plan_of(model.spec, "joint", decision, workload(prompts, gen_len))
    assert plan.dtype == "bf16"
    rows, reference = run(plan, model, scratch, prompts).rows, resident(model.folder, torch.bfloat16)
    return Bf16(
        engine=[token for row in rows for token in row.tokens],
        alone=[token for row in rows for token in likeliest(reference, [row])],
        batch=likeliest(reference, rows),
        fp32=likeliest(model.model, rows),
    )


@pytest.fixture(scope="module")
def bf16(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Bf16:
    """Of two tiny models together."""
    prompts = ragged(*(1 + 5 * i % 19 for i in range(24)), seed=2)
    found = [
        in_bf16(models(family, dtype="bfloat16"), prompts, 32, tmp_path_factory.mktemp("scratch"))
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
    prompts = list(ids.values())
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
