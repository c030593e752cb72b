"""Turns a model's published ``config.json`` into a ModelSpec: the bytes and the work of each module.

A ModelSpec is all that the compiler knows of a model. It imports neither torch nor transformers: a plan is often
compiled where the model is not. Counts follow the layers that transformers builds, without multi-token prediction.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from klotski_compiler.errors import ConfigError
from klotski_compiler.ops import slot_bytes
from klotski_compiler.shipped import shipped, shipped_names


@dataclass(frozen=True, slots=True)
class Module:
    """A part with its own weights: what one load moves as a whole.

    params: number of parameters. nbytes: their size in the checkpoint's own precision, hence on every link.
    segments: number of checkpoint tensors, each of which may start and end inside a disk page.
    flops_per_token: 2 x the parameters that multiply each token (0 for an embedding, whose rows are gathered).
    """

    params: int
    nbytes: int
    segments: int
    flops_per_token: int

    @property
    def slot_bytes(self) -> int:
        """Room that it takes in an arena."""
        return slot_bytes(self.nbytes, self.segments)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: attention, then a dense MLP, or a router, routed experts and (optionally) a shared expert.

    attention: projections and the norm before them. heads: query heads. kv_elements: values per position in transformers' cache (keys and
    values of all heads; of MLA the latent and the rotated key). attention_flops: flops per query token and cached
    position (2 x heads x (key width + value width)). sliding_window: positions that attention looks back, or None.
    expand_flops, expand_elements: flops to expand one cached position to all heads at every use, and the values that this
    makes (latent attention; else 0).
    router: gate, its buffers and the norm before the MoE block. dense: dense MLP with the norm before it.
    expert: ONE routed expert.
    last: it is the model's last. Of what comes after its attention, only each sequence's last token has a use: no other is asked for
    its next one, and no layer reads its keys and values.
    """

    attention: Module
    heads: int
    kv_elements: int
    attention_flops: int
    sliding_window: int | None
    dense: Module | None = None
    router: Module | None = None
    shared: Module | None = None
    expert: Module | None = None
    num_experts: int = 0
    top_k: int = 0
    expand_flops: int = 0
    expand_elements: int = 0
    last: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole model.

    head: has its full flops and, where it shares the embedding's weights (tied), the embedding's bytes.
    """

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[Layer, ...]
    embedding: Module
    norm: Module
    head: Module
    tied: bool
    store_dtype: str
    compute_dtype: str

    @property
    def params(self) -> int:
        """Parameters of the whole model, router buffers included, a tied head's weights counted once."""
        return sum(module.params * count for module, count in self._modules()) - self.tied * self.embedding.params

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model in the checkpoint's own precision, a tied head's weights counted once."""
        return sum(module.nbytes * count for module, count in self._modules()) - self.tied * self.embedding.nbytes

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.num_experts * layer.expert.nbytes for layer in self.layers if layer.expert)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have routed experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.expert is not None)

    @property
    def digest(self) -> str:
        """SHA-256 of the architecture that a plan is made for, whatever the model is called and in which precision it is stored.

        The most positions are left out too: a model that was taught longer texts takes the same plan.
        """
        parts = ("attention", "dense", "router", "shared", "expert")
        layers = [
            [
                *(layer.heads, layer.kv_elements, layer.sliding_window, layer.num_experts, layer.top_k),
                *(module.params if (module := getattr(layer, part)) else 0 for part in parts),
            ]
            for layer in self.layers
        ]
        facts = [self.model_type, self.hidden_size, self.vocab_size, self.head.params, self.tied, layers]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _modules(self) -> list[tuple[Module, int]]:
        once = [self.embedding, self.norm, self.head]
        for layer in self.layers:
            once += [part for part in (layer.attention, layer.dense, layer.router, layer.shared) if part is not None]
        return [(m, 1) for m in once] + [(la.expert, la.num_experts) for la in self.layers if la.expert is not None]


@dataclass(frozen=True, slots=True)
class _Family:
    """What tells one model family from another.

    reads: the optional config keys that the family's code in transformers reads, with its defaults. A key that it does
    not read has no effect even if a config holds it (see _UNREAD). expert_size: the key of an expert's inner width.
    mla: latent attention. output_bias: attention_bias covers o_proj too. qk_norm: "head" (one norm for every head),
    "all heads" (one over all) or none. alternating: sliding_window holds for some layers only (layer_types).
    correction_bias: the router keeps a fp32 buffer of one number per expert. layer_norm_bias: norms have a bias.
    sinks: attention has a number per head. fused_experts: gate and up are one tensor; router and experts have biases.
    """

    reads: Mapping[str, Any]
    expert_size: str = "moe_intermediate_size"
    mla: bool = False
    output_bias: bool = True
    qk_norm: str = ""
    alternating: bool = False
    correction_bias: bool = False
    layer_norm_bias: bool = False
    sinks: bool = False
    fused_experts: bool = False


# What a key means to a family that does not read it: one generic path then needs no test for the family.
_UNREAD: Mapping[str, Any] = {
    "attention_bias": False, "qkv_bias": False, "mlp_bias": False, "lm_head_bias": False, "use_qk_norm": True,
    "first_k_dense_replace": 0, "moe_layer_freq": 1, "decoder_sparse_step": 1, "mlp_only_layers": None,
    "n_shared_experts": 0, "shared_expert_intermediate_size": 0,
    "use_sliding_window": True, "sliding_window": None, "max_window_layers": None, "layer_types": None,
}  # fmt: skip
_ANY_FAMILY: Mapping[str, Any] = {"head_dim": None, "tie_word_embeddings": False}
_QWEN: Mapping[str, Any] = {
    "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1, "mlp_only_layers": None,
}  # fmt: skip
_DEEPSEEK: Mapping[str, Any] = {"q_lora_rank": 1536, "attention_bias": False, "moe_layer_freq": 1}

_FAMILIES: Mapping[str, _Family] = {
    "mixtral": _Family({"num_key_value_heads": 8, "sliding_window": None}, expert_size="intermediate_size"),
    "qwen2_moe": _Family(
        {
            **_QWEN, "num_key_value_heads": 16, "qkv_bias": True, "shared_expert_intermediate_size": 5632,
            "max_window_layers": 28, "layer_types": None,
        },
        output_bias=False, alternating=True,
    ),
    "qwen3_moe": _Family({**_QWEN, "num_key_value_heads": 4, "attention_bias": False}, qk_norm="head"),
    "olmoe": _Family(
        {"num_key_value_heads": None, "attention_bias": False}, expert_size="intermediate_size", qk_norm="all heads"
    ),
    "deepseek_v2": _Family(
        {**_DEEPSEEK, "first_k_dense_replace": 0, "n_shared_experts": 2, "mlp_bias": False}, mla=True
    ),
    "deepseek_v3": _Family(
        {**_DEEPSEEK, "first_k_dense_replace": 3, "n_shared_experts": 1}, mla=True, correction_bias=True
    ),
    "glm4_moe": _Family(
        {
            "num_key_value_heads": 8, "attention_bias": False, "use_qk_norm": False, "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        qk_norm="head", output_bias=False, correction_bias=True,
    ),
    "phimoe": _Family(
        {"num_key_value_heads": 8, "attention_bias": False, "lm_head_bias": False, "sliding_window": None},
        expert_size="intermediate_size", layer_norm_bias=True,
    ),
    "gpt_oss": _Family(
        {
            "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True, "sliding_window": 128,
            "layer_types": None,
        },
        expert_size="intermediate_size", alternating=True, sinks=True, fused_experts=True,
    ),
}  # fmt: skip
_EXPERT_COUNT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_PLAIN_DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4)}


_STORED_BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # by the names of safetensors


@dataclass(frozen=True, slots=True)
class _Weight:
    """One checkpoint tensor. use: what it is for, which decides its precision and whether it multiplies each token."""

    rows: int
    columns: int = 1
    # vector (norms, biases), buffer (kept in fp32), gate (as ``gate_bytes`` finds it), matrix (never quantised), linear, expert
    use: str = "vector"

    @property
    def params(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class _Precision:
    """How a checkpoint stores weights. width: bytes of a plain parameter. block: rows and columns per fp8 scale. gate: bytes of a
    parameter of a gate, 0 if as any."""

    store: str
    width: int = 2
    block: tuple[int, int] = (1, 1)
    gate: int = 0

    def module(self, weights: Sequence[_Weight]) -> Module:
        """The module that consists of these tensors."""
        sizes = [self._stored(weight) for weight in weights]
        return Module(
            params=sum(weight.params for weight in weights),
            nbytes=sum(nbytes for nbytes, _ in sizes),
            segments=sum(segments for _, segments in sizes),
            flops_per_token=2 * sum(w.params for w in weights if w.use in ("gate", "matrix", "linear", "expert")),
        )

    def _stored(self, weight: _Weight) -> tuple[int, int]:
        """Bytes and number of tensors in the file: a quantised weight has its scales in a second tensor."""
        if weight.use == "buffer":
            return 4 * weight.params, 1
        if self.gate and weight.use == "gate":
            return self.gate * weight.params, 1
        if self.store == "fp8" and weight.use in ("linear", "expert"):
            scales = ceil(weight.rows / self.block[0]) * ceil(weight.columns / self.block[1])
            return weight.params + 4 * scales, 2
        if self.store == "mxfp4" and weight.use == "expert":
            return weight.rows * ceil(weight.columns / 32) * 17, 2  # 32 values of 4 bits and one scale of 8
        return self.width * weight.params, 1


@dataclass(frozen=True, slots=True)
class _Config:
    """Typed access to a raw ``config.json``; every method raises ConfigError with the field and its value."""

    raw: Mapping[str, Any]
    where: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        if key in _UNREAD and key not in self.defaults:
            return _UNREAD[key]
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def integer(self, *keys: str, minimum: int = 1) -> int:
        """The first of ``keys`` that is there, at least ``minimum``."""
        key = next((key for key in keys if self.get(key) is not None), None)
        if key is None:
            raise self.error(" / ".join(keys), "is missing, and no size can be computed without it")
        value = self.get(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"is {value!r}, not an integer of {minimum} or more")
        return value

    def integer_or_none(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}, not true or false")
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """A list whose elements are of ``kind``; empty where the key is absent or null."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.error(key, f"is {value!r}, not a list of {kind.__name__}")
        return value

    def error(self, key: str, why: str) -> ConfigError:
        return ConfigError(self.where, key, f"{why}; supported families: {', '.join(_FAMILIES)}")


def read_model(source: str | Path) -> ModelSpec:
    """Reads a checkpoint folder, a ``config.json``, a shipped profile name or a Hugging Face id in the local cache.

    Raises ConfigError where there is no such thing, or its config cannot be used.
    """
    path = located(source)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(path, "", f"is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(path, "", f"holds a {type(raw).__name__}, not the JSON object of a model's config")
    return spec_from_config(raw, _name(raw, path), where=path, gate=gate_bytes(path.parent))


def gate_bytes(folder: Path) -> int:
    """Bytes of a parameter of a router's gate in a checkpoint folder, 0 where there is none to look at: some families' gates are
    published in bf16, and written in fp32 by transformers, which computes with them so."""
    index = folder / "model.safetensors.index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        files = [folder / file for name, file in found.items() if _is_gate(name)] or [folder / "model.safetensors"]
        with files[0].open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return next((_STORED_BYTES.get(entry["dtype"], 0) for name, entry in header.items() if _is_gate(name)), 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return 0  # what is wrong with the files, the runtime says when it reads them


def _is_gate(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight"))


def _name(raw: Mapping[str, Any], path: Path) -> str:
    """What to call the model: as its profile says, by its Hugging Face id, or by its folder or file."""
    profile = raw.get("_klotski")
    if isinstance(profile, dict) and isinstance(profile.get("name"), str):
        return str(profile["name"])
    if path.name != "config.json":
        return path.stem
    folder = path.parent.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def spec_from_config(
    config: Mapping[str, Any], name: str, where: str | Path = "config.json", gate: int = 0
) -> ModelSpec:
    """The ModelSpec of a raw ``config.json``. ``where`` is what errors call the file; gate: see ``gate_bytes``. Raises ConfigError."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise _Config(config, str(where)).error("model_type", f"is {model_type!r}, which is not supported")
    family = _FAMILIES[model_type]
    cfg = _Config(config, str(where), {**_ANY_FAMILY, **family.reads})
    precision = replace(_precision(cfg), gate=gate)
    hidden, vocab = cfg.integer("hidden_size"), cfg.integer("vocab_size")
    embedding = precision.module([_Weight(vocab, hidden, "matrix")])
    head_bias = [_Weight(vocab)] if cfg.flag("lm_head_bias") else []
    return ModelSpec(
        name=name,
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=cfg.integer("max_position_embeddings"),
        layers=_layers(cfg, family, precision),
        embedding=replace(embedding, flops_per_token=0),
        norm=precision.module(_norm(hidden, family)),
        head=precision.module([_Weight(vocab, hidden, "matrix"), *head_bias]),
        tied=cfg.flag("tie_word_embeddings"),
        store_dtype=precision.store,
        compute_dtype="bf16" if precision.store in ("fp8", "mxfp4") else precision.store,
    )


def located(source: str | Path) -> Path:
    """The config of what ``read_model`` reads. Raises ConfigError where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    profile = shipped("models", str(source))
    if profile is not None:
        return profile
    cache = _hub_cache()
    folder = cache / f"models--{str(source).replace('/', '--')}"
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):
        main = folder / "refs" / "main"
        revision = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        return next((config for config in snapshots if config.parent.name == revision), snapshots[-1])
    raise ConfigError(
        source,
        "",
        f"is no config.json, no folder that holds one, no shipped profile ({', '.join(shipped_names('models'))}) and "
        f"not in the Hugging Face cache {cache}; nothing is downloaded here: `hf download ORG/NAME` puts a model there",
    )


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _precision(cfg: _Config) -> _Precision:
    quantization = cfg.get("quantization_config")
    if quantization is None:
        dtype = cfg.get("dtype") or cfg.get("torch_dtype")
        if not isinstance(dtype, str) or dtype not in _PLAIN_DTYPES:
            raise cfg.error("dtype", f"is {dtype!r}; set it to the checkpoint's own: {', '.join(_PLAIN_DTYPES)}")
        return _Precision(*_PLAIN_DTYPES[dtype])
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "mxfp4":
        return _Precision("mxfp4")
    if method != "fp8":
        raise cfg.error("quantization_config.quant_method", f"is {method!r}, not fp8 or mxfp4")
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise cfg.error("quantization_config.weight_block_size", f"is {block!r}, not two positive integers")
    return _Precision("fp8", block=(block[0], block[1]))


def _layers(cfg: _Config, family: _Family, precision: _Precision) -> tuple[Layer, ...]:
    count = cfg.integer("num_hidden_layers")
    routed = _routed_layers(cfg, count)
    blocks = {with_experts: _mlp_block(cfg, family, precision, with_experts) for with_experts in set(routed)}
    attention = _attention(cfg, family, precision)
    windows = _windows(cfg, family, count)
    layers = (replace(attention, sliding_window=windows[i], **blocks[routed[i]]) for i in range(count))
    return tuple(replace(layer, last=i == count - 1) for i, layer in enumerate(layers))


def _routed_layers(cfg: _Config, count: int) -> list[bool]:
    """For each layer, whether it has routed experts (or else a dense MLP)."""
    if (frequency := cfg.integer("moe_layer_freq")) != 1:
        raise cfg.error("moe_layer_freq", f"is {frequency}, but transformers knows no dense layer after the first ones")
    first, step = cfg.integer("first_k_dense_replace", minimum=0), cfg.integer("decoder_sparse_step")
    dense = set(cfg.items("mlp_only_layers", int))
    routed = [i >= first and i not in dense and (i + 1) % step == 0 for i in range(count)]
    if not any(routed):
        key = "mlp_only_layers" if dense else "decoder_sparse_step" if step > 1 else "first_k_dense_replace"
        raise cfg.error(key, f"is {cfg.get(key)!r}, which leaves no layer of {count} with experts")
    return routed


def _windows(cfg: _Config, family: _Family, count: int) -> list[int | None]:
    """For each layer, the positions that attention looks back, or None for all."""
    window = cfg.integer_or_none("sliding_window") if cfg.flag("use_sliding_window") else None
    if window is None or not family.alternating:
        return [window] * count
    last = cfg.integer_or_none("max_window_layers") or count
    types = cfg.items("layer_types", str) or [
        "full_attention" if i % 2 or i >= last else "sliding_attention" for i in range(count)
    ]
    if len(types) != count or not set(types) <= {"sliding_attention", "full_attention"}:
        raise cfg.error("layer_types", f"is {types!r}, not {count} of sliding_attention and full_attention")
    return [window if kind == "sliding_attention" else None for kind in types]


def _attention(cfg: _Config, family: _Family, precision: _Precision) -> Layer:
    """A layer with its attention only."""
    hidden, heads = cfg.integer("hidden_size"), cfg.integer("num_attention_heads")
    weights = _norm(hidden, family)
    bias = cfg.flag("attention_bias")
    expand_flops = expand_elements = 0
    if family.mla:
        latent, rope = cfg.integer("kv_lora_rank"), cfg.integer("qk_rope_head_dim")
        nope, value_dim = cfg.integer("qk_nope_head_dim"), cfg.integer("v_head_dim")
        query_rank, query = cfg.integer_or_none("q_lora_rank"), heads * (nope + rope)
        if query_rank is None:
            weights += _linear(query, hidden)
        else:
            weights += [*_linear(query_rank, hidden, bias), _Weight(query_rank), *_linear(query, query_rank)]
        weights += [*_linear(latent + rope, hidden, bias), _Weight(latent)]
        weights += _linear(heads * (nope + value_dim), latent)
        weights += _linear(hidden, heads * value_dim, bias)
        # transformers caches the latent and the rotated key, one head each, and expands them to all heads at every use.
        kv_elements, widths = latent + rope, nope + rope + value_dim
        expand_elements = heads * (nope + rope + value_dim)
        expand_flops = 2 * latent * heads * (nope + value_dim)
    else:
        kv_heads = cfg.integer_or_none("num_key_value_heads") or heads
        head_dim = cfg.integer_or_none("head_dim") or hidden // heads
        projection_bias = bias or cfg.flag("qkv_bias")
        weights += _linear(heads * head_dim, hidden, projection_bias)
        weights += 2 * _linear(kv_heads * head_dim, hidden, projection_bias)
        weights += _linear(hidden, heads * head_dim, bias and family.output_bias)
        if family.qk_norm == "head" and cfg.flag("use_qk_norm"):
            weights += 2 * [_Weight(head_dim)]
        elif family.qk_norm == "all heads":
            weights += [_Weight(hidden), _Weight(hidden // heads * kv_heads)]
        if family.sinks:
            weights.append(_Weight(heads))
        kv_elements, widths = 2 * kv_heads * head_dim, 2 * head_dim
    return Layer(
        precision.module(weights),
        heads,
        kv_elements,
        attention_flops=2 * heads * widths,
        sliding_window=None,
        expand_flops=expand_flops,
        expand_elements=expand_elements,
    )


def _mlp_block(cfg: _Config, family: _Family, precision: _Precision, routed: bool) -> dict[str, Any]:
    """The fields of Layer for what follows attention: a dense MLP, or router, shared and routed experts."""
    hidden, norm, mlp_bias = cfg.integer("hidden_size"), _norm(cfg.integer("hidden_size"), family), cfg.flag("mlp_bias")
    if not routed:
        return {"dense": precision.module(norm + _mlp(hidden, cfg.integer("intermediate_size"), mlp_bias))}
    experts, top_k = cfg.integer(*_EXPERT_COUNT_KEYS), cfg.integer("num_experts_per_tok")
    if top_k > experts:
        raise cfg.error("num_experts_per_tok", f"is {top_k}, more than the {experts} experts")
    inner = cfg.integer(family.expert_size)
    gate = [_Weight(experts, hidden, "gate")]
    if family.correction_bias:
        gate.append(_Weight(experts, use="buffer"))
    if family.fused_experts:
        gate.append(_Weight(experts))
        expert = [_Weight(2 * inner, hidden, "expert"), _Weight(2 * inner)]
        expert += [_Weight(hidden, inner, "expert"), _Weight(hidden)]
    else:
        expert = [*2 * [_Weight(inner, hidden, "expert")], _Weight(hidden, inner, "expert")]
    shared: list[_Weight] = []
    if counted := cfg.integer("n_shared_experts", minimum=0):
        shared = _mlp(hidden, counted * inner, mlp_bias)
    elif gated := cfg.integer("shared_expert_intermediate_size", minimum=0):
        shared = [*_mlp(hidden, gated, mlp_bias), _Weight(1, hidden, "matrix")]
    return {
        "router": precision.module(norm + gate),
        "shared": precision.module(shared) if shared else None,
        "expert": precision.module(expert),
        "num_experts": experts,
        "top_k": top_k,
    }


def _linear(rows: int, columns: int, bias: bool = False) -> list[_Weight]:
    return [_Weight(rows, columns, "linear")] + bias * [_Weight(rows)]


def _mlp(hidden: int, inner: int, bias: bool) -> list[_Weight]:
    return 2 * _linear(inner, hidden, bias) + _linear(hidden, inner, bias)


def _norm(hidden: int, family: _Family) -> list[_Weight]:
    return (1 + family.layer_norm_bias) * [_Weight(hidden)]
