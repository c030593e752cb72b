"""The index of a checkpoint, its errors, the layout's bound, and reading into an arena."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from klotski_compiler.errors import ConfigError, ExecError
from klotski_compiler.kernel_facts import ROW_SPAN_BYTES
from klotski_compiler.ops import PAGE_BYTES
from klotski_runtime.arena import Arena
from klotski_runtime.checkpoint import EMBEDDING, HEAD, NORM, Checkpoint, ModuleKey, Segment, layout, read_header
from klotski_runtime.memory import rss_bytes
from klotski_runtime.reader import DiskReader, RowGather
from klotski_runtime.skeleton import Skeleton, import_model
from tiny import FAMILIES, make_checkpoint


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, Skeleton(import_model(folder), torch.float32).model)


def edit_header(path: Path, change: object) -> None:
    """Rewrite one safetensors file with its header passed through ``change``."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def read(checkpoint: Checkpoint, key: ModuleKey, reader: DiskReader) -> dict[str, torch.Tensor]:
    segments = checkpoint.modules[key]
    plan = layout(segments)
    arena = Arena(plan.slot_bytes)
    reader.read(plan.extents, arena.view(0, plan.slot_bytes))
    return {s.name: arena.tensor(at, s.nbytes, s.dtype, s.shape) for s, at in zip(segments, plan.offsets, strict=True)}


# ---------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_in_one_module(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    checkpoint = opened(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a mapping)
    assert sum(segment.nbytes for segments in checkpoint.modules.values() for segment in segments) == total
    kinds = {key.kind for key in checkpoint.modules}
    assert {"embedding", "norm", "head", "attention", "router", "expert"} <= kinds
    assert ("shared" in kinds) == (family in {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"})
    assert ("dense" in kinds) == (family in {"deepseek_v2", "deepseek_v3", "glm4_moe"})
    parts = {segment.name for segment in checkpoint.modules[ModuleKey("expert", 2, 3)]}
    assert parts == (
        {"gate_up", "gate_up_bias", "down", "down_bias"} if family == "gpt_oss" else {"gate", "up", "down"}
    )
    names = {segment.name.rpartition("layers.2.")[2] for segment in checkpoint.modules[ModuleKey("router", 2)]}
    assert "post_attention_layernorm.weight" in names
    assert ("mlp.gate.e_score_correction_bias" in names) == (family in {"deepseek_v3", "glm4_moe"})


def test_an_expert_is_read_part_by_part(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    parts = read(opened(folder), ModuleKey("expert", 1, 5), DiskReader())
    prefix = "model.layers.1.block_sparse_moe.experts.5"
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        assert torch.equal(parts[part], stored[f"{prefix}.{name}.weight"])


def test_an_expert_of_a_fused_tensor_is_its_slice(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt_oss", tmp_path)
    stored = load_file(folder / "model.safetensors")
    parts = read(opened(folder), ModuleKey("expert", 1, 2), DiskReader())
    assert torch.equal(parts["gate_up"], stored["model.layers.1.mlp.experts.gate_up_proj"][2])
    assert torch.equal(parts["down_bias"], stored["model.layers.1.mlp.experts.down_proj_bias"][2])


def test_shards_hold_the_same_modules(tmp_path: Path) -> None:
    one = opened(make_checkpoint("qwen3_moe", tmp_path / "one"))
    many = opened(make_checkpoint("qwen3_moe", tmp_path / "many", max_shard_size="200KB"))
    assert len({segment.file for segments in many.modules.values() for segment in segments}) > 3
    assert one.modules.keys() == many.modules.keys()
    reader = DiskReader()
    for key in one.modules:
        expected, got = read(one, key, reader), read(many, key, reader)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    modules = opened(make_checkpoint("qwen3_moe", tmp_path, tie_word_embeddings=True)).modules
    assert modules[HEAD] == (replace(modules[EMBEDDING][0], name="lm_head.weight"),)
    assert [segment.name for segment in modules[NORM]] == ["model.norm.weight"]


def test_layers_for_multi_token_prediction_are_ignored(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path)
    before = opened(folder).modules
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors")
    assert opened(folder).modules.keys() == before.keys()


# ---------------------------------------------------------------------------------------------- errors


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_checkpoint("mixtral", tmp_path)


def test_no_checkpoint_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        import_model(tmp_path)


def test_unknown_model(tiny: Path) -> None:
    (tiny / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ConfigError, match="abacus"):
        import_model(tiny)


def test_unsupported_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "flex_olmo", "hidden_size": 64, "num_hidden_layers": 1}')
    with pytest.raises(ConfigError, match="flex_olmo is not supported: layer 0"):
        Skeleton(import_model(tmp_path), torch.float32)


def test_no_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="convert it to safetensors"):
        opened(tiny)


def test_truncated(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="100 bytes past the end of the file"):
        opened(tiny)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 40).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"{,,}",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_corrupt_header(tiny: Path, content: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors: header.*download"):
        opened(tiny)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_offsets": [0, 64]}, "take 256 bytes"),
        ({"data_offsets": [-256, 0]}, "offsets"),
        ({"data_offsets": [256, 512]}, "overlaps"),
        ({"data_offsets": [2, 258]}, "not aligned"),
        ({"data_offsets": "abc"}, "corrupt header entry"),
        ({"dtype": "F4"}, "not supported"),
        ({"shape": [-64]}, "shape"),
    ],
)
def test_absurd_entry(tiny: Path, entry: dict[str, object], message: str) -> None:
    edit_header(tiny / "model.safetensors", lambda header: header["model.norm.weight"].update(entry))
    with pytest.raises(ConfigError, match=message):
        opened(tiny)


def test_missing_and_unknown_tensors(tiny: Path) -> None:
    path, name = tiny / "model.safetensors", "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    edit_header(path, lambda header: header.update(strange=header.pop(name)))
    with pytest.raises(ConfigError, match="strange: is not a part of mixtral"):
        opened(tiny)
    edit_header(path, lambda header: header.pop("strange"))
    with pytest.raises(ConfigError, match="of expert 3 is in none of the files"):
        opened(tiny)


def test_missing_norm(tiny: Path) -> None:
    edit_header(tiny / "model.safetensors", lambda header: header.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: is in none of the files"):
        opened(tiny)


def test_another_models_shape(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(ConfigError, match=r"has shape \[96, 64\], but config.json asks for \[80, 64\]"):
        opened(tiny)


def test_shard_missing_or_without_its_tensor(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path, max_shard_size="200KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.norm.weight"]
    edit_header(folder / shard, lambda header: header.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match=rf"{shard}: model.norm.weight: is missing"):
        opened(folder)
    (folder / shard).unlink()
    with pytest.raises(ConfigError, match=f"names the shard {shard}, which is not there"):
        opened(folder)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        opened(folder)


# ---------------------------------------------------------------------------------------------- layout and reading


@pytest.mark.parametrize("seed", range(50))
def test_layout_keeps_its_bound(seed: int) -> None:
    rng = random.Random(seed)
    segments, end = [], 0
    for i in range(rng.randint(1, 12)):
        end += rng.choice([0, 0, 8, 5000, 8192, 8193, 100_000])
        nbytes = 8 * rng.choice([1, 13, 512, 5000])
        segments.append(Segment(str(i), Path(rng.choice("ab")), end, nbytes, torch.uint8, (nbytes,)))
        end += nbytes
    rng.shuffle(segments)
    plan = layout(segments)
    bound = sum(segment.nbytes for segment in segments) + 2 * PAGE_BYTES * len(segments)
    assert plan.slot_bytes <= -(-bound // PAGE_BYTES) * PAGE_BYTES
    free = 0
    for extent in plan.extents:
        assert not any(number % PAGE_BYTES for number in (extent.offset, extent.nbytes, extent.slot_offset))
        assert extent.slot_offset == free and 0 < extent.needed <= extent.nbytes
        free += extent.nbytes
    assert free == plan.slot_bytes
    for segment, offset in zip(segments, plan.offsets, strict=True):
        home = next(e for e in plan.extents if e.slot_offset <= offset < e.slot_offset + e.nbytes)
        assert home.file == segment.file and offset - home.slot_offset == segment.offset - home.offset
        assert offset + segment.nbytes <= home.slot_offset + home.needed


def numbered(path: Path, count: int) -> torch.Tensor:
    values = torch.arange(count, dtype=torch.int64)
    save_file({"a": values.view(-1, 25)}, path)
    return values


@pytest.mark.parametrize("threads", [1, 3])
def test_reads_in_chunks(tmp_path: Path, threads: int) -> None:
    values = numbered(tmp_path / "f", 10_000)
    segment = read_header(tmp_path / "f")["a"]
    plan, arena, reader = layout([segment]), Arena(1 << 20), DiskReader(threads, PAGE_BYTES)
    got = reader.read(plan.extents, arena.view(2 * PAGE_BYTES, plan.slot_bytes))
    assert segment.nbytes <= got == reader.bytes_read <= plan.slot_bytes
    assert torch.equal(arena.tensor(2 * PAGE_BYTES + plan.offsets[0], 80_000, torch.int64, (10_000,)), values)
    reader.close()


def test_several_slots_are_filled_in_one_read(tmp_path: Path) -> None:
    """One of them in vain: the others are complete all the same when the failure is told."""
    arena, reader, parts, expected = Arena(1 << 20), DiskReader(2, PAGE_BYTES), [], []
    for name, first in (("f", 0), ("g", 1 << 18)):
        values = numbered(tmp_path / name, 5_000)
        plan = layout([read_header(tmp_path / name)["a"]])
        parts.append((plan.extents, arena.view(first, plan.slot_bytes)))
        expected.append((first + plan.offsets[0], values))
    assert reader.read_all(parts) == reader.bytes_read >= 80_000

    for offset, values in expected:
        assert torch.equal(arena.tensor(offset, 40_000, torch.int64, (5_000,)), values)
        arena.tensor(offset, 40_000, torch.int64, (5_000,)).zero_()
    (tmp_path / "g").unlink()
    fresh = DiskReader(2, PAGE_BYTES)
    with pytest.raises(ExecError, match="g: cannot be read"):
        fresh.read_all(parts)
    offset, values = expected[0]
    assert torch.equal(arena.tensor(offset, 40_000, torch.int64, (5_000,)), values)


def test_a_populated_arena_has_its_pages() -> None:
    arena = Arena(32 << 20)
    before = rss_bytes()
    arena.populate()
    if rss_bytes() - before > 0:  # an old kernel leaves it to the first touch
        assert rss_bytes() - before == pytest.approx(32 << 20, rel=0.05)
    assert not any(arena.view(0, 1 << 16))


@pytest.mark.parametrize("refused", ["open", "read"])
def test_reads_where_direct_io_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    values = numbered(tmp_path / "f", 10_000)
    plan, arena, reader = layout([read_header(tmp_path / "f")["a"]]), Arena(1 << 20), DiskReader()
    real_open, real_read = os.open, os.preadv

    def open_file(path: Path, flags: int) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real_open(path, flags)

    def read_file(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read_file)
    reader.read(plan.extents, arena.view(0, plan.slot_bytes))
    assert torch.equal(arena.tensor(plan.offsets[0], 80_000, torch.int64, (10_000,)), values)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    numbered(tmp_path / "f", 10_000)
    plan, arena, reader = layout([read_header(tmp_path / "f")["a"]]), Arena(1 << 20), DiskReader()
    with (tmp_path / "f").open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(ExecError, match="ends at byte 50,000"):
        reader.read(plan.extents, arena.view(0, plan.slot_bytes))
    (tmp_path / "f").unlink()
    with pytest.raises(ExecError, match="No such file"):
        DiskReader().read(plan.extents, arena.view(0, plan.slot_bytes))


@pytest.mark.parametrize("threads", [1, 3])
def test_gathers_rows(tmp_path: Path, threads: int) -> None:
    values = numbered(tmp_path / "f", 1_000_000).view(-1, 25)
    gather = RowGather(DiskReader(threads), read_header(tmp_path / "f")["a"], max_rows=2000)
    rng = random.Random(0)
    for count in (0, 1, 2, 10, 100, 2000):
        ids = sorted(rng.sample(range(len(values)), count))
        assert torch.equal(gather.gather(ids), values[ids])
    ends = [0, 1, len(values) - 1]
    assert torch.equal(gather.gather(ends), values[ends])


def test_gathers_near_rows_together(tmp_path: Path) -> None:
    values = numbered(tmp_path / "f", 1_000_000).view(-1, 25)
    row_bytes = values[0].nbytes
    reader = DiskReader(1)
    gather = RowGather(reader, read_header(tmp_path / "f")["a"], max_rows=2000)
    gather.gather([0, len(values) // 2, len(values) - 1])
    assert reader.bytes_read <= 3 * 2 * PAGE_BYTES  # not what lies between
    before = reader.bytes_read
    every = range(0, len(values), 20)
    gather.gather(every)
    requests = -(-values.nbytes // (ROW_SPAN_BYTES - 20 * row_bytes))
    assert values.nbytes - 20 * row_bytes <= reader.bytes_read - before <= values.nbytes + 2 * PAGE_BYTES * requests


# ---------------------------------------------------------------------------------------------- arena


def test_untouched_pages_cost_nothing() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    arena = Arena(1 << 30)
    arena.tensor(1 << 29, 4096, torch.float32, (1024,)).fill_(1)
    assert resident() - before < 64 << 20


def test_views_share_their_bytes() -> None:
    arena = Arena(PAGE_BYTES)
    tensor = arena.tensor(2, 8, torch.bfloat16, (2, 2))
    tensor.fill_(1)
    assert bytes(arena.view(2, 2)) == b"\x80\x3f"
    arena.view(2, 8)[:] = bytes(8)
    assert not tensor.any()
    assert arena.tensor(0, 0, torch.float32, (0,)).numel() == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(1, 4), (0, 8), (PAGE_BYTES, 4), (-4, 4)])
def test_impossible_views(offset: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Arena(PAGE_BYTES).tensor(offset, nbytes, torch.float32, (1,))
