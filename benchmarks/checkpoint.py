"""Writes a random Qwen3-MoE checkpoint of any size: a model to measure with where no real one is at hand.

Files are as published: bf16 safetensors shards with one tensor per expert and projection, their index, ``config.json``.
Every weight is an independent draw (16 random bits, looked up in a table of normal quantiles), written as it is made, a file on
every core: memory stays small at any size. There is no tokenizer and no end token: prompts are token ids, rows run to their limit.

Routing is skewed as in trained models: a quarter of the experts take 60 to 80 % of a layer's picks, other experts in
each layer. A quarter of each embedding lies along one direction that all tokens share, and layers add little to it, so
every router sees it. A router's rows have popularities along that direction; the rest of a row is each token's taste.

    python benchmarks/checkpoint.py demo-model                                          1.5 GB
    python benchmarks/checkpoint.py big-model --shape qwen3-30b-a3b --layers 6          8.7 GB
    python benchmarks/checkpoint.py wide-model --shape mixtral-8x7b --layers 6          17.9 GB, Mixtral's layers
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 1 << 30
BLOCK_VALUES = 1 << 22  # made and written at a time
GAIN = 0.9  # of a projection: deviation of an output over that of its inputs (a deviation of 0.02 at 2,048 inputs)
BRANCHES = 2.5  # the same of all output projections of a model together
SHARED = 0.25  # of an embedding's energy that all tokens share

Floats = NDArray[np.float32]
Bits = NDArray[np.uint16]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. ``skew``: deviation of an expert's popularity over that of a token's own taste; 0 is uniform."""

    layers: int = 18
    hidden: int = 2048
    experts: int = 16
    top_k: int = 2
    moe_intermediate: int = 384
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 8192
    skew: float = 0.8


SHAPES = {
    "demo": Shape(),
    "qwen3-30b-a3b": Shape(
        layers=48, experts=128, top_k=8, moe_intermediate=768, heads=32, kv_heads=4, head_dim=128, vocab=151936
    ),
    "mixtral-8x7b": Shape(
        layers=32,
        hidden=4096,
        experts=8,
        top_k=2,
        moe_intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=32000,
    ),
}


class Weight(NamedTuple):
    """One tensor. std: deviation of its values; 0 for a norm, which is ones.

    along: component of each row along the shared direction (one number for all rows, or one per row); None: by chance.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    along: Floats | float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return 2 * int(np.prod(self.shape))


def make_checkpoint(
    folder: str | Path, shape: Shape, seed: int = 0, progress: Callable[[float], None] = lambda done: None
) -> Path:
    """Write the model of that shape and seed into ``folder``, unless it is there already; returns the folder.

    Raises FileExistsError where the folder holds a model that this function did not write.
    """
    folder = Path(folder)
    config = _config(shape, seed)
    complete = folder / "config.json"  # written last
    if complete.exists():
        present = json.loads(complete.read_text())
        if present == config:
            return folder
        if "_random" not in present:
            raise FileExistsError(f"{folder} holds another model; name another folder")
        for old in (complete, *folder.glob("model*.safetensors*")):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)

    weights = list(_weights(shape, seed))
    shards = _shards(weights)
    total, done = sum(w.nbytes for w in weights), 0
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    firsts = accumulate(map(len, shards), initial=0)
    with ProcessPoolExecutor(min(len(shards), len(os.sched_getaffinity(0)))) as pool:
        written = [
            pool.submit(_write_shard, folder / name, shard, shape.hidden, seed, first)
            for name, shard, first in zip(names, shards, firsts, strict=False)
        ]
        for shard_written in as_completed(written):
            done += shard_written.result()
            progress(done / total)
    places = {weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "pad_token_id": 0, "do_sample": False})
    _write_json(complete, config)
    return folder


def make_config(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write what a plan is compiled from; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape, seed))
    return folder / "config.json"


def _write_shard(path: Path, shard: list[Weight], hidden: int, seed: int, first: int) -> int:
    """One file, whose first tensor is the model's number ``first``; returns the bytes of its tensors."""
    direction = _direction(hidden, seed)
    with open(path, "wb") as file:
        file.write(_header(shard))
        for number, weight in enumerate(shard, first):
            for block in _values(weight, direction, seed, number):
                file.write(block.data)
    return sum(weight.nbytes for weight in shard)


def _weights(shape: Shape, seed: int) -> Iterator[Weight]:
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    common = float(np.sqrt(SHARED * hidden))  # what a normed hidden state has along the shared direction
    residual = BRANCHES / np.sqrt(2 * shape.layers)

    def linear(name: str, rows: int, columns: int, gain: float = GAIN, along: float | None = None) -> Weight:
        return Weight(f"{name}.weight", (rows, columns), float(gain / np.sqrt(columns)), along)

    def norm(name: str, size: int = hidden) -> Weight:
        return Weight(f"{name}.weight", (size,), 0.0)

    yield Weight("model.embed_tokens.weight", (shape.vocab, hidden), float(np.sqrt(1 - SHARED)), common)
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        yield norm(f"{name}.input_layernorm")
        yield linear(f"{name}.self_attn.q_proj", queries, hidden)
        yield linear(f"{name}.self_attn.k_proj", keys, hidden)
        # Blind to what all tokens share, else attention would add the same vector to all, layer after layer.
        yield linear(f"{name}.self_attn.v_proj", keys, hidden, along=0.0)
        yield linear(f"{name}.self_attn.o_proj", hidden, queries, residual)
        yield norm(f"{name}.self_attn.q_norm", shape.head_dim)
        yield norm(f"{name}.self_attn.k_norm", shape.head_dim)
        yield norm(f"{name}.post_attention_layernorm")
        popularity = _popularity(shape, seed, layer) / common
        yield Weight(f"{name}.mlp.gate.weight", (shape.experts, hidden), float(1 / np.sqrt(hidden)), popularity)
        for expert in range(shape.experts):
            yield linear(f"{name}.mlp.experts.{expert}.gate_proj", shape.moe_intermediate, hidden)
            yield linear(f"{name}.mlp.experts.{expert}.up_proj", shape.moe_intermediate, hidden)
            yield linear(f"{name}.mlp.experts.{expert}.down_proj", hidden, shape.moe_intermediate, residual)
    yield norm("model.norm")
    # Blind to it too, else every row would generate the same few tokens.
    yield linear("lm_head", shape.vocab, hidden, along=0.0)


def _popularity(shape: Shape, seed: int, layer: int) -> Floats:
    """Mean logit of each expert: evenly spread normal quantiles, in another order in each layer."""
    normal = NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / shape.experts) for i in range(shape.experts)]
    order = np.random.default_rng((seed, 1, layer)).permutation(shape.experts)
    return np.float32(shape.skew) * np.array(quantiles, np.float32)[order]


def _direction(hidden: int, seed: int) -> Floats:
    """The unit vector that all tokens share: equal magnitudes, random signs."""
    bits = np.random.default_rng((seed, 2)).integers(0, 2, hidden).astype(np.float32)
    return (2 * bits - 1) * np.float32(hidden**-0.5)


@cache
def _quantiles() -> Floats:
    """The standard normal distribution as 65,536 equally likely values."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


def _values(weight: Weight, direction: Floats, seed: int, number: int) -> Iterator[Bits]:
    """The tensor's bf16 values, block of rows by block of rows."""
    if weight.std == 0:
        yield _bf16(np.ones(weight.shape, np.float32))
        return
    rows, columns = weight.shape
    random = np.random.Generator(np.random.SFC64((seed, 3, number)))
    step = max(1, BLOCK_VALUES // columns)
    table = weight.std * _quantiles()
    stored = _bf16(table)
    for first in range(0, rows, step):
        drawn = random.integers(0, 65536, (min(step, rows - first), columns), np.uint16)
        if weight.along is None:
            yield stored[drawn]
            continue
        block = table[drawn]
        along = weight.along if isinstance(weight.along, float) else weight.along[first : first + step]
        yield _bf16(block + np.outer(along - block @ direction, direction))


def _bf16(values: Floats) -> Bits:
    """Rounded to bf16, as its bits (of finite values; halves away from zero)."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def _shards(weights: list[Weight]) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if shards[-1] and size + weight.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += weight.nbytes
    return shards


def _header(shard: list[Weight]) -> bytes:
    """What a safetensors file begins with: the length of a JSON object (8 bytes, little endian), and the object."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in shard:
        end = offset + weight.nbytes
        header[weight.name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _config(shape: Shape, seed: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": shape.moe_intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "_random": {"seed": seed, **asdict(shape)},
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Writes one model and says how large it is."""
    parser = argparse.ArgumentParser(description="Write a random Qwen3-MoE checkpoint, in bf16, with skewed routing.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="demo", help="start from these sizes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(Shape):
        kind = float if field.name == "skew" else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, metavar="N", help="instead of the shape's")
    arguments = vars(parser.parse_args(argv))
    folder, seed, shape = arguments.pop("folder"), arguments.pop("seed"), SHAPES[arguments.pop("shape")]
    shape = replace(shape, **{name: value for name, value in arguments.items() if value is not None})

    def bar(done: float) -> None:
        sys.stderr.write(f"\r{folder}: {done:4.0%}" + "\n" * (done == 1))

    began = time.perf_counter()
    try:
        make_checkpoint(folder, shape, seed, bar if sys.stderr.isatty() else lambda done: None)
    except OSError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {size / 1e9:.2f} GB of weights in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
