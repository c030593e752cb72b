"""Checks a ModelSpec against what was published and against the same model built by transformers."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from klotski_compiler.errors import ConfigError
from klotski_compiler.model import Module, gate_bytes, read_model, spec_from_config
from klotski_compiler.shipped import shipped, shipped_names
from klotski_runtime.skeleton import CACHE

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 16,
    "max_position_embeddings": 96, "num_experts_per_tok": 2,
}  # fmt: skip
MLA = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
TWO_WIDTHS = {"intermediate_size": 112, "moe_intermediate_size": 48}
# Only keys without which no size is known: the rest must get the defaults that transformers gives.
REQUIRED: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 80, "num_local_experts": 8},
    "qwen2_moe": {**TWO_WIDTHS, "num_experts": 8},
    "qwen3_moe": {**TWO_WIDTHS, "num_experts": 8},
    "olmoe": {"intermediate_size": 48, "num_experts": 8},
    "deepseek_v2": {**TWO_WIDTHS, **MLA, "n_routed_experts": 8},
    "deepseek_v3": {**TWO_WIDTHS, **MLA, "n_routed_experts": 8},
    "glm4_moe": {**TWO_WIDTHS, "n_routed_experts": 8},
    "phimoe": {"intermediate_size": 80, "num_local_experts": 4},
    "gpt_oss": {"intermediate_size": 48, "num_local_experts": 4},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 4, "sliding_window": 16}),
    ("qwen2_moe", {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False, "shared_expert_intermediate_size": 40}),
    ("qwen2_moe", {"use_sliding_window": True}),
    ("qwen3_moe", {"attention_bias": True, "head_dim": 24, "use_sliding_window": True, "sliding_window": 16}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": True}),
    ("olmoe", {"attention_bias": True, "num_key_value_heads": 4}),
    ("deepseek_v2", {"q_lora_rank": None, "mlp_bias": True, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    ("deepseek_v2", {"q_lora_rank": 20, "attention_bias": True}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 3}),
    ("deepseek_v3", {"q_lora_rank": 20, "first_k_dense_replace": 1}),
    ("glm4_moe", {"attention_bias": True, "use_qk_norm": True, "head_dim": 24, "first_k_dense_replace": 2}),
    ("phimoe", {"attention_bias": True, "lm_head_bias": True, "sliding_window": 16}),
    ("phimoe", {"lm_head_bias": True, "tie_word_embeddings": True}),
    ("gpt_oss", {"attention_bias": False, "sliding_window": 16, "layer_types": ["full_attention"] * 4}),
]  # fmt: skip
# Every family gets every key: one that it does not read must have no effect.
SMALL = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 40,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip


def raw_config(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, "dtype": "bfloat16", **SIZES, **REQUIRED[family], **changes}


def small_config(family: str) -> dict[str, Any]:
    """A config as transformers writes it, of a model small enough to run."""
    changes = {**SMALL, "num_key_value_heads": 16} if family.startswith("deepseek") else SMALL
    config = AutoConfig.for_model(**raw_config(family, **changes, pad_token_id=0))
    written: dict[str, Any] = json.loads(config.to_json_string())
    return written


def build(config: dict[str, Any], device: str) -> PreTrainedModel:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def part_of(key: str, routed: bool) -> str:
    """The module, in our sense, that a tensor name of a decoder layer belongs to."""
    if re.match(r"self_attn\.|input_layernorm\.", key):
        return "attention"
    if not routed:
        return "dense"
    return "expert" if ".experts." in key else "shared" if "shared_expert" in key else "router"


def in_parts(sizes: dict[str, int], routed: tuple[int, ...]) -> Counter[tuple[int | str, str]]:
    """Sums ``sizes`` by (layer, part); what is outside the layers has its own name and no layer."""
    sums: Counter[tuple[int | str, str]] = Counter()
    for name, size in sizes.items():
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if inside:
            sums[int(inside[1]), part_of(inside[2], int(inside[1]) in routed)] += size
        else:
            sums["", name.split(".")[-2]] += size
    return sums


def spec_parts(
    config: dict[str, Any], field: str, gate: int = 0
) -> tuple[dict[tuple[int | str, str], int], tuple[int, ...]]:
    """One field of each Module of the ModelSpec, by (layer, part), all experts of a layer together."""
    spec = spec_from_config(config, "tiny", gate=gate)
    modules: list[tuple[int | str, str, Module | None, int]] = [
        ("", "embed_tokens", spec.embedding, 1), ("", "norm", spec.norm, 1), ("", "lm_head", spec.head, 1)
    ]  # fmt: skip
    for index, layer in enumerate(spec.layers):
        modules.append((index, "expert", layer.expert, layer.num_experts))
        modules += [(index, part, getattr(layer, part), 1) for part in ("attention", "dense", "router", "shared")]
    parts = {(index, part): getattr(m, field) * count for index, part, m, count in modules if m is not None}
    return parts, spec.moe_layers


@pytest.mark.parametrize("name", shipped_names("models"))
def test_shipped_profiles_have_their_published_parameter_count(name: str) -> None:
    path = shipped("models", name)
    assert path is not None
    profile = json.loads(path.read_text())["_klotski"]
    spec = read_model(name)
    assert spec.name == profile["name"] == name
    assert spec.params == pytest.approx(profile["published_parameters"], rel=0.01)


def test_quantised_checkpoints_have_their_published_size() -> None:
    gpt_oss = read_model("gpt-oss-120b")
    assert gpt_oss.nbytes / 2**30 == pytest.approx(60.8, abs=0.05)  # model card, table 1
    assert (gpt_oss.store_dtype, gpt_oss.compute_dtype) == ("mxfp4", "bf16")

    deepseek = read_model("deepseek-v3")
    layer = deepseek.layers[-1]
    assert layer.router and layer.shared and layer.expert
    # The published files also hold a multi-token-prediction layer: a decoder layer, copies of embedding and head, a
    # projection of two hidden states to one and three norms. 688,586,727,753 bytes include about 12 MB of file headers.
    extra = layer.attention.nbytes + layer.router.nbytes + layer.shared.nbytes + 256 * layer.expert.nbytes
    extra += 2 * deepseek.embedding.nbytes + 2 * (2 * 7168 * 7168 + 3 * 7168)
    assert 0 < 688_586_727_753 - (deepseek.nbytes + extra) < 13_000_000
    assert (deepseek.store_dtype, deepseek.compute_dtype) == ("fp8", "bf16")


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in REQUIRED), *VARIANTS])
def test_parameters_equal_those_that_transformers_builds(family: str, changes: dict[str, Any]) -> None:
    config = raw_config(family, **changes)
    model = build(config, "meta")
    built = {name: tensor.numel() for name, tensor in model.state_dict().items()}

    parts, routed = spec_parts(config, "params")
    assert parts == in_parts(built, routed)
    assert routed == tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))

    spec = spec_from_config(config, "tiny")
    own = dict(model.named_parameters())
    buffers = sum(size for name, size in built.items() if name.endswith("e_score_correction_bias"))
    assert spec.params == sum(parameter.numel() for parameter in own.values()) + buffers
    assert spec.tied == ("lm_head.weight" not in own)

    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    assert [layer.sliding_window for layer in spec.layers] == windows


@pytest.mark.parametrize(("dtype", "nbytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_gates_may_be_stored_wider_than_the_rest(dtype: torch.dtype, nbytes: int, tmp_path: Path) -> None:
    """As published, or as transformers writes those that it computes with in fp32: one file, or several by an index."""
    config = raw_config("deepseek_v3")
    (tmp_path / "config.json").write_text(json.dumps(config))
    as_any = read_model(tmp_path)
    save_file({"model.layers.3.mlp.gate.weight": torch.zeros(8, 64, dtype=dtype)}, tmp_path / "model.safetensors")
    routers = [spec.layers[-1].router for spec in (as_any, read_model(tmp_path))]
    assert routers[0] and routers[1] and routers[1].nbytes - routers[0].nbytes == (nbytes - 2) * 8 * 64
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"model.layers.3.mlp.gate.weight": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(tmp_path).layers[-1].router == routers[1]
    (tmp_path / "model-1.safetensors").write_bytes(b"damaged")
    assert read_model(tmp_path) == as_any


@pytest.mark.parametrize("family", REQUIRED)
def test_bytes_segments_and_cache_equal_those_of_a_saved_and_run_model(family: str, tmp_path: Path) -> None:
    config = small_config(family)
    model = build(config, "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as transformers keeps it when it loads a checkpoint
    model.save_pretrained(tmp_path)

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    slices = config["num_local_experts"] if family == "gpt_oss" else 1  # one tensor of all experts
    for field, sizes in {
        "nbytes": {name: tensor.nbytes for name, tensor in tensors.items()},
        "segments": {name: slices if ".experts." in name else 1 for name in tensors},
    }.items():
        parts, routed = spec_parts(config, field, gate_bytes(tmp_path))
        assert parts == in_parts(sizes, routed)
    spec = read_model(tmp_path)
    assert spec == spec_from_config(config, tmp_path.name, gate=gate_bytes(tmp_path))
    assert spec.nbytes == sum(tensor.nbytes for tensor in tensors.values())

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(1, 6)[None], use_cache=True, **{CACHE: cache})
    tensors_held: list[tuple[torch.Tensor, torch.Tensor]] = [(la.keys, la.values) for la in cache.layers]
    held = [keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3] for keys, values in tensors_held]
    assert [layer.kv_elements for layer in spec.layers] == held


def test_flops_count_every_matrix_and_nothing_else() -> None:
    spec = spec_from_config(raw_config("glm4_moe", attention_bias=True, head_dim=24, use_qk_norm=True), "tiny")
    layer = spec.layers[-1]
    assert layer.expert and layer.router
    assert spec.embedding.flops_per_token == 0 and spec.head.flops_per_token == 2 * 128 * 64
    assert layer.attention.flops_per_token == 2 * 64 * 24 * (16 + 8 + 8 + 16)
    assert layer.router.flops_per_token == 2 * 8 * 64 and layer.expert.flops_per_token == 2 * 3 * 64 * 48
    assert layer.attention_flops == 2 * 16 * (24 + 24)
    latent = spec_from_config(raw_config("deepseek_v2"), "tiny").layers[0]
    assert latent.attention_flops == 2 * 16 * (12 + 8 + 20)


def test_fp8_stores_one_scale_per_block_of_every_projection() -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [32, 40]}
    plain = spec_from_config(raw_config("deepseek_v3", first_k_dense_replace=1), "tiny")
    spec = spec_from_config(raw_config("deepseek_v3", first_k_dense_replace=1, quantization_config=quantised), "tiny")
    layer, before = spec.layers[1], plain.layers[1]
    assert layer.expert and before.expert and spec.layers[0].dense
    assert layer.expert.params == before.expert.params and layer.expert.segments == 2 * before.expert.segments
    assert layer.expert.nbytes == 3 * 48 * 64 + 4 * (2 * 2 * 2 + 2 * 2)  # 48 x 64 twice and 64 x 48
    assert spec.layers[0].dense.nbytes == 3 * 112 * 64 + 4 * (2 * 4 * 2 + 2 * 3) + 2 * 64
    assert (layer.router, spec.embedding, spec.head) == (before.router, plain.embedding, plain.head)


def test_mxfp4_stores_experts_in_four_and_a_quarter_bits() -> None:
    config = raw_config("gpt_oss", intermediate_size=96, quantization_config={"quant_method": "mxfp4"})
    layer = spec_from_config(config, "tiny").layers[0]
    assert layer.expert
    assert layer.expert.nbytes == 3 * 96 * 64 * 17 // 32 + 2 * (2 * 96 + 64) and layer.expert.segments == 6


@pytest.mark.parametrize("key", ["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"])
def test_every_name_of_the_expert_count_is_read(key: str) -> None:
    config = raw_config("qwen3_moe", num_experts=None)
    assert spec_from_config({**config, key: 6}, "tiny").layers[0].num_experts == 6


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("mixtral", {"model_type": "llama"}, "model_type"),
        ("mixtral", {"model_type": None}, "model_type"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("mixtral", {"hidden_size": "64"}, "hidden_size"),
        ("mixtral", {"vocab_size": True}, "vocab_size"),
        ("mixtral", {"num_hidden_layers": -1}, "num_hidden_layers"),
        ("mixtral", {"intermediate_size": 1.5}, "intermediate_size"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("mixtral", {"dtype": None}, "dtype"),
        ("mixtral", {"dtype": "int8"}, "dtype"),
        ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": 0}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 5}, "decoder_sparse_step"),
        ("deepseek_v3", {"first_k_dense_replace": 4}, "first_k_dense_replace"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_cannot_be_used_names_path_field_and_value(
    family: str, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw_config(family, **changes)))
    with pytest.raises(ConfigError) as caught:
        read_model(path)
    message = str(caught.value)
    assert field in caught.value.field and message.startswith(str(path)) and "mixtral, qwen2_moe" in message
    value = next(iter(changes.values()))
    assert "missing" in message or repr(value) in message or field in ("quant_method", "weight_block_size")


@pytest.mark.parametrize("text", ["{", "[]", b"\xff\xfe{"])
def test_a_file_that_is_no_config_is_refused(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_model(tmp_path)


def test_sources_are_folder_file_shipped_name_and_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_config("olmoe")))
    assert read_model(folder).name == read_model(str(folder / "config.json")).name == "my-model"
    assert read_model("OLMoE-1B-7B") == read_model("olmoe-1b-7b")

    model = tmp_path / "hub" / "models--org--a--b"
    for revision, hidden in (("aaa", 64), ("bbb", 128)):
        snapshot = model / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(raw_config("olmoe", hidden_size=hidden)))
    assert read_model("org/a--b").hidden_size == 128
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("aaa")
    assert read_model("org/a--b").hidden_size == 64 and read_model("org/a--b").name == "org/a--b"
    assert read_model(model / "snapshots" / "aaa").name == "org/a--b"

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"org/a--b.*elsewhere.*hf download"):
        read_model("org/a--b")
