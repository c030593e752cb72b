"""Token ids of a plain sequential run of the ops against transformers' own generate, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from klotski_compiler.errors import ExecError
from klotski_compiler.ops import ALL
from klotski_runtime.arena import Arena, GpuArena
from klotski_runtime.checkpoint import EMBEDDING, HEAD, NORM, Checkpoint, ModuleKey, layout
from klotski_runtime.experts import ExpertKernel, runs
from klotski_runtime.kernels import Chunks, Group
from klotski_runtime.kv import KvBlock
from klotski_runtime.reader import DiskReader, RowGather
from klotski_runtime.skeleton import CACHE, HOST, Skeleton, import_model
from klotski_runtime.split import NewOnly
from tiny import FAMILIES, make_checkpoint

MARGIN = 1e-4
MODEL = Path(__file__).parents[2] / "shared" / "models" / "moe-text-28m"


class Sequential:
    """Every op in the plainest order: one module in memory at a time, all of it read again in every pass."""

    def __init__(
        self, folder: Path, prompts: list[list[list[int]]], steps: int, chunks: Chunks, whole_group: bool
    ) -> None:
        self.skeleton = Skeleton(import_model(folder), torch.float32)
        self.checkpoint = Checkpoint.open(folder, self.skeleton.model)
        self.reader = DiskReader()
        self.slot = Arena(max(layout(segments).slot_bytes for segments in self.checkpoint.modules.values()))
        rows = RowGather(self.reader, self.checkpoint.modules[EMBEDDING][0], max_rows=7)
        self.group = Group(self.skeleton, prompts, chunks, rows)
        self.scopes = [ALL] if whole_group else list(range(len(prompts)))
        self.wide = torch.empty(self.group.tokens, self.skeleton.hidden, dtype=self.skeleton.wide_dtype)
        self.x = torch.empty(self.group.tokens, self.skeleton.hidden)
        self.kv = {
            (layer, i): self._block(layer, batch.size, batch.queries + steps)
            for layer in range(self.skeleton.layers)
            for i, batch in self.group.batches.items()
        }

    def _block(self, layer: int, size: int, capacity: int) -> KvBlock:
        shape = self.skeleton.kv_shape(layer)
        return KvBlock(torch.full((size * capacity * shape.elements,), torch.nan), shape, size, capacity)

    def load(self, key: ModuleKey) -> dict[str, torch.Tensor]:
        segments = self.checkpoint.modules[key]
        plan = layout(segments)
        self.reader.read(plan.extents, self.slot.view(0, plan.slot_bytes))
        return {
            segment.name: self.slot.tensor(offset, segment.nbytes, segment.dtype, segment.shape)
            for segment, offset in zip(segments, plan.offsets, strict=True)
        }

    @contextmanager
    def bound(self, *keys: ModuleKey) -> Iterator[None]:
        present = [key for key in keys if key in self.checkpoint.modules]
        for key in present:
            self.skeleton.bind(key, {name: tensor.clone() for name, tensor in self.load(key).items()})
        yield
        for key in present:
            self.skeleton.unbind(key)

    def step(self) -> list[int]:
        group = self.group
        group.begin(self.wide, self.x)
        batches = range(len(group.batches))
        group.embed()
        for layer in range(self.skeleton.layers):
            with self.bound(ModuleKey("attention", layer)):
                for i in batches:
                    group.attention(layer, i, self.kv[layer, i])
            if self.skeleton.experts(layer) is None:
                with self.bound(ModuleKey("dense", layer)):
                    for i in batches:
                        group.dense(layer, i)
                continue
            shared = ModuleKey("shared", layer)
            # As an op of its own, once all are routed.
            apart = self.scopes == [ALL] and shared in self.checkpoint.modules
            with self.bound(ModuleKey("router", layer), *([] if apart else [shared])):
                for i in batches:
                    group.router(layer, i, shared=not apart)
            if apart:
                with self.bound(shared):
                    group.shared(layer, ALL)
            for expert in range(self.skeleton.num_experts(layer)):
                parts = self.load(ModuleKey("expert", layer, expert))
                for scope in self.scopes:
                    group.experts(layer, [(expert, parts)], scope)
        with self.bound(NORM):
            group.final()
        head = self.load(HEAD)
        weight = head["lm_head.weight"]
        half = len(weight) // 2
        for first, last in ((half, len(weight)), (0, half)):
            bias = head["lm_head.bias"][first:last] if "lm_head.bias" in head else None
            group.head(first, weight[first:last], bias)
        return group.sample().tolist()


def reference(model: Any, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of the resident model for one prompt, and at each the margin of its logit over the next best."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()


def check_same(folder: Path, prompts: list[list[list[int]]], steps: int, chunks: Chunks, whole_group: bool) -> None:
    run = Sequential(folder, prompts, steps, chunks, whole_group)
    produced = list(zip(*(run.step() for _ in range(steps)), strict=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    for prompt, tokens in zip([p for batch in prompts for p in batch], produced, strict=True):
        expected, margins = reference(model, prompt, steps)
        for token, wanted, margin in zip(tokens, expected, margins, strict=True):
            if token != wanted:
                assert margin < MARGIN, (prompt, tokens, expected, margins)
                break  # from here on the two continue different texts


def ragged(vocabulary: int, *lengths: tuple[int, ...]) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in batch] for batch in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    check_same(folder, ragged(128, (12, 9, 1), (20, 20)), 17, Chunks(2, 2, 10, 4), whole_group=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_new_token_sees_what_transformers_lets_it_see(family: str, tmp_path: Path) -> None:
    skeleton = Skeleton(import_model(make_checkpoint(family, tmp_path)), torch.float32)
    present, embeds = torch.tensor([[False, False, True, True], [True] * 4]), torch.empty(2, 1, skeleton.hidden)
    for layer in range(skeleton.layers):
        make: Any = create_sliding_window_causal_mask if skeleton.sliding(layer) else create_causal_mask
        cache = {CACHE: NewOnly(3)}
        theirs = make(config=skeleton.config, inputs_embeds=embeds, attention_mask=present, **cache)
        ours = skeleton.mask(layer, present, True, 1, NewOnly(3))
        assert ours is not None and theirs.dtype == ours.dtype and torch.equal(theirs, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_of_a_prompt_what_its_last_token_needs(family: str, tmp_path: Path) -> None:
    run = Sequential(make_checkpoint(family, tmp_path), ragged(128, (12, 9)), 1, Chunks(2, 2, 30, 4), whole_group=True)
    rows: dict[str, set[int]] = {}

    def noting(name: str, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        rows.setdefault(name[:2], set()).add(x.shape[1])
        return forward(x)

    for name, part in run.skeleton.model.model.layers[-1].self_attn.named_children():
        if isinstance(part, torch.nn.Linear):
            part.__dict__["forward"] = partial(noting, name, part.forward)
    run.step()
    assert rows.pop("o_") == rows.pop("q_") == {1}
    assert all(12 in others for others in rows.values())


def test_same_tokens_when_experts_run_batch_by_batch(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2_moe", tmp_path, dtype="bfloat16", tie_word_embeddings=True)
    check_same(folder, ragged(128, (3, 14), (5,)), 6, Chunks(8, 8, 100, 100), whole_group=False)


@pytest.mark.skipif(not MODEL.exists(), reason="the trained model is not here")
def test_same_tokens_of_a_trained_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [json.loads(line)["prompt"] for line in (MODEL / "prompts.jsonl").read_text().splitlines()[:5]]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    check_same(MODEL, [ids[:3], ids[3:]], 17, Chunks(2, 3, 64, 32), whole_group=True)


def test_same_tokens_from_fused_experts(tmp_path: Path) -> None:
    """A checkpoint saved as the live model holds it: one gate_up tensor for all experts of a layer."""
    folder = make_checkpoint("qwen3_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file(model.state_dict(), folder / "model.safetensors")
    check_same(folder, ragged(128, (3, 14), (5,)), 6, Chunks(8, 8, 100, 100), whole_group=True)


def test_same_tokens_where_a_family_has_its_own_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_gate(experts: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        out: torch.Tensor = experts.act_fn(gate) * up
        return out

    monkeypatch.setattr(MixtralExperts, "_apply_gate", apply_gate)
    folder = make_checkpoint("mixtral", tmp_path)
    check_same(folder, ragged(128, (3, 14), (5,)), 6, Chunks(8, 8, 100, 3), whole_group=True)


@pytest.fixture
def routed(tmp_path: Path) -> Sequential:
    """A run of two ragged batches, stopped after the first layer's router."""
    run = Sequential(
        make_checkpoint("mixtral", tmp_path), ragged(128, (12, 5), (9,)), 1, Chunks(2, 2, 10, 4), whole_group=True
    )
    run.group.begin(run.wide, run.x)
    run.group.embed()
    with run.bound(ModuleKey("attention", 0), ModuleKey("router", 0)):
        for i in range(2):
            run.group.attention(0, i, run.kv[0, i])
            run.group.router(0, i)
    return run


def test_padding_is_not_routed(routed: Sequential) -> None:
    assert sum(routed.group.counts(0)) == 2 * (12 + 5 + 9)
    assert sum(routed.group.counts(0, 0)) == 2 * (12 + 5)


def test_order_of_experts_does_not_change_a_result(routed: Sequential) -> None:
    base, results = routed.wide.clone(), []
    for order in (range(8), reversed(range(8))):
        routed.wide.copy_(base)
        for expert in order:
            routed.group.experts(0, [(expert, routed.load(ModuleKey("expert", 0, expert)))])
        results.append(routed.wide.float())
    assert torch.equal(*results)
    assert not torch.equal(results[0], base.float())


def test_a_tie_goes_to_the_lowest_word_whatever_the_order_of_pages(routed: Sequential) -> None:
    with routed.bound(NORM):
        routed.group.final()
    weight = routed.load(HEAD)["lm_head.weight"].clone()
    for first in (8, 4, 0):
        routed.group.head(first, weight[:4])
    assert max(routed.group.sample().tolist()) < 4


def test_logits_that_are_not_finite(routed: Sequential) -> None:
    with routed.bound(NORM):
        routed.group.final()
    routed.group.head(0, torch.full_like(routed.load(HEAD)["lm_head.weight"], torch.nan))
    with pytest.raises(ExecError, match="not finite"):
        routed.group.sample()


def laid_out(
    experts: int, hidden: int, inner: int, apart: int, phase: int = 0, device: torch.device = HOST
) -> list[dict[str, torch.Tensor]]:
    """Random experts, ``apart`` bytes from one to the next, the first at byte ``phase``."""
    size, generator = experts * apart + 4096, torch.Generator().manual_seed(1)
    arena = Arena(size) if device == HOST else GpuArena(size, device)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    found = []
    for expert in range(experts):
        offset, parts = expert * apart + phase, dict[str, torch.Tensor]()
        for name, shape in shapes.items():
            parts[name] = arena.tensor(offset, 2 * inner * hidden, torch.bfloat16, shape)
            parts[name].copy_(torch.randn(shape, generator=generator) / 8)
            offset += 2 * inner * hidden
        found.append(parts)
    return found


def test_experts_that_lie_at_equal_distances_are_one_matrix_each() -> None:
    """Four of them at equal distances, of which the last two come first, and two elsewhere; one that begins where no kernel can."""
    four, two = laid_out(4, 32, 16, 4096), laid_out(2, 32, 16, 8192)
    parts = [four[2], four[3], *two, *four[:2]]
    (found, alone), places = runs(parts), [4, 5, 0, 1]
    assert sorted([tuple(run) for run, _ in found]) == sorted([tuple(places), (2, 3)])
    assert not alone
    for run, together in found:
        for number, place in enumerate(run):
            assert all(torch.equal(together[name][number], parts[place][name]) for name in parts[place])
    assert runs(laid_out(2, 32, 16, 4096, phase=8)) == ([], [0, 1])
    assert runs(laid_out(2, 32, 16, 4096 + 8)) == ([], [0, 1])
    assert runs(four[:1]) == ([], [0])


def test_experts_together_give_what_they_give_one_by_one(device: torch.device) -> None:
    """One of them has no token."""
    hidden, inner, sizes = 32, 16, [3, 0, 5]
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=3)
    with torch.device("meta"):
        module = MixtralExperts(config)
    parts, generator = laid_out(3, hidden, inner, 8192, device=device), torch.Generator().manual_seed(2)
    x = torch.randn(8, hidden, generator=generator).bfloat16().to(device)
    rows, weights = torch.tensor([7, 1, 3, 0, 2, 3, 4, 6]).to(device), torch.rand(8, generator=generator).to(device)
    kernel = ExpertKernel(8, hidden, inner, torch.bfloat16, torch.float32, device)
    ((_, together),), _ = runs(parts)
    ends = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    found = kernel.run_together(module, together, x, rows, weights, ends).clone()
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        own = slice(first, first + size)
        if size:
            alone = kernel.run(module, part, x, rows[own], weights[own])
            torch.testing.assert_close(found[own], alone, rtol=2e-2, atol=2e-3)
        first += size
