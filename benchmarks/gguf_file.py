"""Writes a Qwen3-MoE checkpoint as a GGUF file, for llama.cpp: the same bf16 weights, byte by byte.

Experts of a layer and projection become one tensor. Norms and routers are widened to fp32, as llama.cpp's own converter does.
There is no tokenizer in the file: prompts are token ids. Tensors are written as they are read: memory stays small.

    python benchmarks/gguf_file.py demo-model demo-model.gguf
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]

WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


class Target(NamedTuple):
    """A tensor of the GGUF file. sources: its parts; one per expert where it is ``stacked``."""

    name: str
    sources: list[str]
    stacked: bool

    @property
    def wide(self) -> bool:
        """Whether it becomes fp32."""
        return self.name.endswith(("norm.weight", "ffn_gate_inp.weight"))


def write_gguf(model: Path, path: Path) -> None:
    """Write the file, whole or not at all. Raises ValueError for a model that is not a Qwen3-MoE in bf16."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    if config.get("model_type") != "qwen3_moe" or config.get("mlp_only_layers"):
        raise ValueError(f"{model} is a {config.get('model_type')}; only qwen3_moe without dense layers can be written")
    tensors = checkpoint_tensors(model)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    describe(writer, config)
    wanted = list(targets(config, tensors))
    for target in wanted:
        first = tensors[target.sources[0]]
        shape = (len(target.sources), *first.shape) if target.stacked else first.shape
        kind, size = (np.dtype(np.float32), 4) if target.wide else (np.dtype(np.uint16), 2)
        raw = None if target.wide else gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(target.name, shape, kind, size * int(np.prod(shape)), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target in wanted:
        parts = [tensors[source] for source in target.sources]
        data: Any = np.stack(parts) if target.stacked else np.ascontiguousarray(parts[0])
        writer.write_tensor_data(widened(data) if target.wide else data)
    writer.close()
    partial.replace(path)


def describe(writer: Any, config: dict[str, Any]) -> None:
    """What llama.cpp must know of the model."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def targets(config: dict[str, Any], tensors: dict[str, Bits]) -> Iterator[Target]:
    """What the file holds, in order."""
    for name, source in WHOLE.items():
        if f"{source}.weight" in tensors:  # a tied head is not in the files, and llama.cpp then takes the embedding
            yield Target(f"{name}.weight", [f"{source}.weight"], False)
    experts = config.get("num_experts") or config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        before = f"model.layers.{layer}"
        for name, source in LAYER.items():
            yield Target(f"blk.{layer}.{name}.weight", [f"{before}.{source}.weight"], False)
        for name, source in EXPERTS.items():
            sources = [f"{before}.mlp.experts.{expert}.{source}.weight" for expert in range(experts)]
            yield Target(f"blk.{layer}.{name}.weight", sources, True)


def checkpoint_tensors(model: Path) -> dict[str, Bits]:
    """All tensors of a folder of safetensors files, mapped and not read. Raises ValueError where one is not bf16."""
    tensors: dict[str, Bits] = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} in {file} is {entry['dtype']}; only bf16 can be written")
            offset = 8 + length + entry["data_offsets"][0]
            tensors[name] = np.memmap(file, np.uint16, "r", offset, tuple(entry["shape"]))
    return tensors


def widened(bits: Bits) -> NDArray[np.float32]:
    """bf16 as fp32: the same numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def main() -> int:
    """Writes one file."""
    parser = argparse.ArgumentParser(description="Write a Qwen3-MoE checkpoint in bf16 as a GGUF file.")
    parser.add_argument("model", type=Path)
    parser.add_argument("gguf", type=Path)
    arguments = parser.parse_args()
    write_gguf(arguments.model, arguments.gguf)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
