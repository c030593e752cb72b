"""Measured routing against a direct count of the resident model's router outputs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from klotski_compiler.errors import ConfigError
from klotski_compiler.model import read_model
from klotski_compiler.routing import Routing, read_routing
from klotski_runtime import routing
from tiny import make_checkpoint

MODEL = Path(__file__).parents[2] / "shared" / "models" / "moe-text-28m"


def silent(what: str, done: float) -> None:
    """Nobody watches."""


def write_prompts(path: Path, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return prompts


def resident_picks(folder: Path, prompts: list[list[int]], top_k: int) -> list[torch.Tensor]:
    """[tokens, k] of every MoE layer, from transformers' own router logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        runs = [model(torch.tensor([prompt]), output_router_logits=True).router_logits for prompt in prompts]
    return [torch.cat(layer).topk(top_k).indices for layer in zip(*runs, strict=True)]


@pytest.mark.parametrize(("family", "top_k"), [("qwen3_moe", 4), ("mixtral", 2)])
def test_equals_a_direct_count(family: str, top_k: int, tmp_path: Path) -> None:
    folder, prompts = make_checkpoint(family, tmp_path / family), write_prompts(tmp_path / "p.jsonl", 30, 5, 1, 17)
    steps: list[tuple[str, float]] = []
    text = routing.measure(str(folder), str(tmp_path / "p.jsonl"), lambda what, done: steps.append((what, done)))
    measured = Routing.model_validate_json(text)
    picks = resident_picks(folder, prompts, top_k)
    assert measured.tokens == 53
    for layer, popularity in zip(picks, measured.popularity, strict=True):
        expected = torch.bincount(layer.flatten(), minlength=len(popularity)) / layer.numel()
        assert popularity == pytest.approx(expected.tolist())
    for this, after, successors in zip(picks, picks[1:], measured.successors, strict=False):
        for expert, found in enumerate(successors):
            tokens = [row for row, chosen in enumerate(this.tolist()) if expert in chosen]
            counts = Counter(e for row in tokens for e in after[row].tolist())
            best = sorted(((e, round(1000 * n / len(tokens))) for e, n in counts.items()), key=lambda s: (-s[1], s[0]))
            assert found == tuple(best[:8])
    assert measured.successors[-1] == ()
    assert [done for _, done in steps] == sorted(done for _, done in steps)
    assert steps[-1][1] == 1.0


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """A model with a dense layer, which has no routing."""
    folder = make_checkpoint("glm4_moe", tmp_path / "model")
    write_prompts(tmp_path / "p.jsonl", 9, 4)
    (tmp_path / "routing.json").write_text(routing.measure(str(folder), str(tmp_path / "p.jsonl"), silent))
    measured = read_routing(tmp_path / "routing.json", read_model(folder))
    assert measured.popularity[0] == ()
    assert measured.successors[0] == ()
    assert len(measured.successors[1]) == 8


def test_long_input_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAX_TOKENS", 20)
    folder = make_checkpoint("mixtral", tmp_path / "model")
    write_prompts(tmp_path / "p.jsonl", 15, 15, 15)
    measured = Routing.model_validate_json(routing.measure(str(folder), str(tmp_path / "p.jsonl"), silent))
    assert measured.tokens == 20
    assert "2 prompts" in measured.source


@pytest.mark.skipif(not MODEL.exists(), reason="the trained model is not here")
def test_a_trained_model_routes_unevenly(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("And the king said unto the people, Go.\nIn the beginning was the word.\n")
    measured = Routing.model_validate_json(routing.measure(str(MODEL), str(tmp_path / "p.txt"), silent))
    top = [sum(sorted(layer)[-8:]) for layer in measured.popularity]
    assert min(top) > 0.5  # a quarter if it were even


def test_prompts_that_cannot_be_used(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": []}\n')
    with pytest.raises(ConfigError, match="no prompt that can be used"):
        routing.measure(str(folder), str(tmp_path / "p.jsonl"), silent)
    (tmp_path / "p.txt").write_text("text\n")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        routing.measure(str(folder), str(tmp_path / "p.txt"), silent)
    with pytest.raises(ConfigError, match="neither a folder nor"):
        routing.measure(str(tmp_path / "nowhere"), str(tmp_path / "p.jsonl"), silent)
