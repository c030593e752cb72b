"""Where every weight of a checkpoint lies on disk, module by module, and how to read a module into a slot.

The safetensors headers are parsed here (8-byte little-endian length, then JSON): a plan needs byte ranges, not
tensors. Names in the files become names in the live model through transformers' own conversion mapping.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from klotski_compiler.errors import ConfigError
from klotski_compiler.ops import PAGE_BYTES

MERGE_GAP = 2 * PAGE_BYTES
"""Widest gap, in bytes, that is read along rather than skipped: the widest with which ``layout`` keeps its bound."""

MAX_HEADER = 100_000_000
"""The safetensors format's own limit on the bytes of a header."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

FUSED_PARTS = {
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}
"""Live parameter of an experts module -> the part that one expert's slice of it is."""

AGAIN = "download the checkpoint again"


class ModuleKey(NamedTuple):
    """A part of the model with its own weights.

    kind: embedding, norm, head (``layer`` -1), attention, router, shared, dense or expert. index: the expert's number,
    else 0.
    """

    kind: str
    layer: int = -1
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which no key needs


EMBEDDING, NORM, HEAD = ModuleKey("embedding"), ModuleKey("norm"), ModuleKey("head")
SHARED = "shared_expert"  # how the names of a layer's shared expert and of its gate begin, within the MLP


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor (or one expert's slice of it) as a byte range of a file.

    name: the live parameter's name in the whole model; for an expert its part, one of gate, up, down, gate_up,
    gate_up_bias and down_bias.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, first: int, last: int) -> Segment:
        """Rows ``first:last`` of the first dimension: a page of the head, rows of the embedding."""
        row = self.nbytes // self.shape[0]
        return replace(
            self, offset=self.offset + first * row, nbytes=(last - first) * row, shape=(last - first, *self.shape[1:])
        )

    def slice(self, index: int) -> Segment:
        """Entry ``index`` of the first dimension, without that dimension: one expert of a fused tensor."""
        return replace(self.rows(index, index + 1), shape=self.shape[1:])


@dataclass(frozen=True, slots=True)
class Extent:
    """One read: ``nbytes`` at ``offset`` of ``file`` go to ``slot_offset`` of the slot; the numbers are page multiples.

    needed: bytes from ``offset`` that hold data; the rest is alignment and may lie past the end of the file.
    """

    file: Path
    offset: int
    nbytes: int
    slot_offset: int
    needed: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read segments into one slot: ``offsets[i]`` is where segment i begins inside it, in bytes."""

    extents: tuple[Extent, ...]
    offsets: tuple[int, ...]
    slot_bytes: int

    def between(self, begin: int, end: int, origin: int) -> Iterator[Extent]:
        """What reads the bytes [begin, end) of the slot, page multiples, into another one that begins at byte ``origin`` of it."""
        for extent in self.extents:
            first = max(begin, extent.slot_offset)
            nbytes = min(end, extent.slot_offset + extent.nbytes) - first
            skipped = first - extent.slot_offset
            if nbytes > 0:
                needed = max(0, min(extent.needed - skipped, nbytes))
                yield Extent(extent.file, extent.offset + skipped, nbytes, first - origin, needed)


def layout(segments: Sequence[Segment]) -> Layout:
    """Reads that bring ``segments`` into one slot without a copy; segments that are close in a file share one read.

    ``slot_bytes`` is at most sum(nbytes) + 8192 x len(segments), rounded up to a page: what the compiler reserves
    without seeing the files. A segment pays for less than two pages of alignment, or for one gap of at most MERGE_GAP.
    """
    order = sorted(range(len(segments)), key=lambda i: (segments[i].file, segments[i].offset))
    runs: list[list[int]] = []
    end = 0
    for i in order:
        segment = segments[i]
        if runs and segments[runs[-1][0]].file == segment.file and segment.offset - end <= MERGE_GAP:
            runs[-1].append(i)
            end = max(end, segment.offset + segment.nbytes)
        else:
            runs.append([i])
            end = segment.offset + segment.nbytes
    extents, offsets, slot = [], [0] * len(segments), 0
    for run in runs:
        begin = segments[run[0]].offset // PAGE_BYTES * PAGE_BYTES
        needed = max(segments[i].offset + segments[i].nbytes for i in run) - begin
        nbytes = math.ceil(needed / PAGE_BYTES) * PAGE_BYTES
        extents.append(Extent(segments[run[0]].file, begin, nbytes, slot, needed))
        for i in run:
            offsets[i] = slot + segments[i].offset - begin
        slot += nbytes
    return Layout(tuple(extents), tuple(offsets), slot)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw ``config.json`` of a checkpoint folder. Raises ConfigError where it is absent or not a model's."""
    path = Path(folder) / "config.json"
    config = _json(path, "is not there; name a folder that holds a checkpoint")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(path, "model_type", "is missing; config.json must be the one published with the model")
    return config


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: ``config`` is the raw config.json, ``modules`` has each part's segments in file order.

    A tied head has the embedding's segment under the head's own name.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[ModuleKey, tuple[Segment, ...]]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: Any) -> Checkpoint:
        """Index ``folder`` for the transformers ``model`` (its parameters may be on the meta device).

        Raises ConfigError for a missing or damaged file, and for a tensor that the model lacks or the files lack.
        """
        folder = Path(folder)
        config = read_config(folder)
        return cls(folder, config, _modules(folder, _tensors(folder), model))


# ---------------------------------------------------------------------------------------------- files


def _json(path: Path, absent: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(path, "", absent) from None
    except OSError as error:
        raise ConfigError(path, "", f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, "", f"is not JSON ({error}); {AGAIN}") from None


def _tensors(folder: Path) -> dict[str, Segment]:
    """Every tensor of a checkpoint, by its name in the files."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise ConfigError(
                folder,
                "",
                "holds neither model.safetensors nor model.safetensors.index.json; convert it to safetensors",
            )
        return read_header(single)
    content = _json(index, AGAIN)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ConfigError(index, "weight_map", f"does not map tensors to shards; {AGAIN}")
    shards: dict[str, dict[str, Segment]] = {}
    for name in sorted(set(shard_of.values())):
        if not (folder / name).exists():
            raise ConfigError(index, "weight_map", f"names the shard {name}, which is not there; download that file")
        shards[name] = read_header(folder / name)
    found = {}
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise ConfigError(folder / shard, name, f"is missing, though {index.name} says that it is here; {AGAIN}")
        found[name] = shards[shard][name]
    return found


def read_header(path: Path) -> dict[str, Segment]:
    """The tensors of one safetensors file, by name. Raises ConfigError unless every byte range is plausible."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if size >= 8 and length <= min(size - 8, MAX_HEADER) else None
    except OSError as error:
        raise ConfigError(path, "", f"cannot be read: {error.strerror}") from None
    if raw is None:
        raise ConfigError(path, "header", f"of {length:,} bytes does not fit the file of {size:,} bytes; {AGAIN}")
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, "header", f"is corrupt ({error}); {AGAIN}") from None
    start = 8 + length
    found = {name: _segment(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    ordered = sorted(found.values(), key=lambda segment: segment.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise ConfigError(path, after.name, f"overlaps {before.name}; {AGAIN}")
    if ordered and ordered[-1].offset + ordered[-1].nbytes > size:
        lacking = ordered[-1].offset + ordered[-1].nbytes - size
        raise ConfigError(
            path, ordered[-1].name, f"ends {lacking:,} bytes past the end of the file, which is truncated; {AGAIN}"
        )
    return found


def _segment(path: Path, name: str, entry: Any, start: int) -> Segment:
    try:
        begin, end = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(length) for length in entry["shape"])
        stored = str(entry["dtype"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ConfigError(path, name, f"has a corrupt header entry; {AGAIN}") from None
    if stored not in DTYPES:
        raise ConfigError(
            path, name, f"has dtype {stored}, which is not supported; use a checkpoint in {', '.join(DTYPES)}"
        )
    dtype = DTYPES[stored]
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or min(shape, default=0) < 0 or end - begin != nbytes:
        raise ConfigError(
            path, name, f"has offsets {begin}:{end}, but its shape and dtype take {nbytes:,} bytes; {AGAIN}"
        )
    if (start + begin) % dtype.itemsize:
        raise ConfigError(
            path, name, f"is not aligned to its {dtype.itemsize}-byte items; write it again with save_pretrained"
        )
    return Segment(name, path, start + begin, nbytes, dtype, shape)


# ---------------------------------------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class _Names:
    """Maps a tensor's name in the files to its live name and, in a per-expert layout, to its expert and part."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    live: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any) -> _Names:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        return cls(
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
            model.base_model_prefix,
            model.state_dict(),
        )

    def resolve(self, name: str) -> tuple[str, tuple[int, str] | None]:
        """(live name, None), or (live name of the fused parameter, (expert, part)) for one expert's own tensor."""
        from transformers.core_model_loading import rename_source_key

        live, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.live)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if pattern is None or expert is None:
            return live, None
        # A converter lists the tensors that it concatenates in order: for a fused gate_up, gate first.
        sources = next(entry.source_patterns for entry in self.converters if pattern in entry.source_patterns)
        part = ("gate", "up")[sources.index(pattern)] if len(sources) == 2 else "down"
        return live, (int(expert[1]), part)


def _modules(folder: Path, tensors: dict[str, Segment], model: Any) -> dict[ModuleKey, tuple[Segment, ...]]:
    names = _Names.of(model)
    ignored = [
        re.compile(pattern) for pattern in (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$")
    ]
    tied = bool(model.config.tie_word_embeddings)
    found: defaultdict[ModuleKey, list[Segment]] = defaultdict(list)
    whole: set[str] = set()
    for name, tensor in tensors.items():
        live, own = names.resolve(name)
        if (
            _is_extra_layer(live, model)
            or any(pattern.search(live) for pattern in ignored)
            or (tied and live == "lm_head.weight")
        ):
            continue
        if live not in names.live:
            raise ConfigError(
                tensor.file,
                name,
                f"is not a part of {model.config.model_type}; use the published bf16, fp16 or fp32 checkpoint",
            )
        key, shape = _key(live, model), tuple(names.live[live].shape)
        if key.kind != "expert":
            segments, expected = [(key, replace(tensor, name=live))], shape
            whole.add(live)
        elif own is not None:
            expert, part = own
            segments = [(key._replace(index=expert), replace(tensor, name=part))]
            expected = (shape[1] // 2 if part != "down" else shape[1], *shape[2:])
        else:
            part = FUSED_PARTS[live.rpartition(".")[2]]
            segments = [(key._replace(index=e), replace(tensor.slice(e), name=part)) for e in range(tensor.shape[0])]
            expected = shape
        if tensor.shape != expected:
            raise ConfigError(
                tensor.file, name, f"has shape {list(tensor.shape)}, but config.json asks for {list(expected)}"
            )
        for owner, segment in segments:
            found[owner].append(segment)
    if tied and EMBEDDING in found:
        found[HEAD].append(replace(found[EMBEDDING][0], name="lm_head.weight"))  # there may be a bias already
        whole.add("lm_head.weight")
    _check_complete(folder, names.live, whole, found, model)
    return {key: tuple(sorted(segments, key=lambda s: (s.file, s.offset))) for key, segments in sorted(found.items())}


def _check_complete(
    folder: Path, live: Iterable[str], whole: set[str], found: dict[ModuleKey, list[Segment]], model: Any
) -> None:
    for name in live:
        key = _key(name, model)
        if key.kind != "expert":
            if name not in whole:
                raise ConfigError(folder, name, f"is in none of the files; {AGAIN}")
            continue
        fused = FUSED_PARTS[name.rpartition(".")[2]]
        alternatives = [{fused}, {"gate", "up"}] if fused == "gate_up" else [{fused}]
        for expert in range(model.get_parameter(name).shape[0]):
            parts = {segment.name for segment in found.get(key._replace(index=expert), ())}
            if not any(alternative <= parts for alternative in alternatives):
                raise ConfigError(folder, name, f"of expert {expert} is in none of the files; {AGAIN}")


def _layer_of(live: str, model: Any) -> tuple[int, str] | None:
    match = re.match(rf"{model.base_model_prefix}\.layers\.(\d+)\.(.+)$", live)
    return (int(match[1]), match[2]) if match else None


def _is_extra_layer(live: str, model: Any) -> bool:
    """Whether a tensor belongs to a layer for multi-token prediction, which transformers does not build."""
    place = _layer_of(live, model)
    return place is not None and place[0] >= model.config.num_hidden_layers


def _key(live: str, model: Any) -> ModuleKey:
    """The module that owns a live parameter; an expert's index is 0 here."""
    place = _layer_of(live, model)
    if place is None:
        head = live.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
        return {"embed_tokens": EMBEDDING, "norm": NORM, "lm_head": HEAD}[head]
    layer, rest = place
    if rest.startswith(("self_attn.", "input_layernorm.")):
        return ModuleKey("attention", layer)
    if not hasattr(model.get_submodule(model.base_model_prefix).layers[layer].mlp, "experts"):
        return ModuleKey("dense", layer)
    if rest.startswith("mlp.experts."):
        return ModuleKey("expert", layer)
    return ModuleKey("shared" if rest.startswith(f"mlp.{SHARED}") else "router", layer)
