"""What the package's own kernel computes of each row alone, norms and rotary embeddings, and in which families it does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from klotski_runtime import own_kernels
from klotski_runtime.checkpoint import ModuleKey
from klotski_runtime.kv import KvBlock
from klotski_runtime.native import SOURCE, compile_library
from klotski_runtime.own_kernels import OwnKernels
from klotski_runtime.skeleton import Skeleton, import_model
from klotski_runtime.usual import ROTATION, is_usual_norm, usual_rotation
from klotski_runtime.workers import Workers
from tiny import FAMILIES, make_checkpoint

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=["4", "8", "16", "16 -DNO_PAIRS"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of any processor: compilers make them of what this one has."""
    library = compile_library(SOURCE, *f"-DLANES={request.param}".split(), "-DIN_REGISTER(v)=")
    monkeypatch.setattr(own_kernels, "kernel_library", lambda: library)


@pytest.fixture(params=[1, 2])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels of one thread, and of two that share whatever there is."""
    monkeypatch.setattr(own_kernels, "WORTH_SHARING_ELEMENTS", 1)
    workers = Workers(request.param)
    yield OwnKernels(1, 8, workers)
    workers.close()


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of their type lie between them, of one sign."""
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("width", [1, 7, 48, 128, 200, 2048])
def test_a_norm_is_transformers(width: int, dtype: torch.dtype, own: OwnKernels) -> None:
    """Of rows in one piece and of some that are apart; each sum of squares may be rounded otherwise, and nothing else."""
    draw = torch.Generator().manual_seed(width)
    norm = modeling_llama.LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(width, generator=draw).to(dtype)
    x = torch.randn(40, 3, width + 8, generator=draw).to(dtype)
    for rows in (x[:, :, :width].contiguous(), x[:, 1:2, 3 : 3 + width], x[0, 0, :width]):
        with torch.inference_mode():
            found, want = own.norm(rows, norm.weight, 1e-5), norm(rows)
        assert found.shape == want.shape and found.dtype == dtype
        apart = ulps(found, want)
        assert apart.max() <= 2 and (apart > 0).float().mean() < 0.02


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("width", [2, 16, 48, 66, 128])
def test_a_rotation_is_transformers(width: int, dtype: torch.dtype, own: OwnKernels) -> None:
    """To the bit, of queries as attention modules have them and of others; with angles of each sequence, or of all."""
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(3, 40, 5, width, generator=draw).to(dtype)
    for query in (x.transpose(1, 2), x, x[:, 3:9:2]):
        positions = query.shape[2]
        cosine, sine = torch.randn(2, 3, positions, width, generator=draw).to(dtype)
        for angles in ((cosine, sine), (cosine[:1], sine[:1]), (cosine[:1], sine)):
            found = own.rotate(query, *angles)
            want, _ = modeling_llama.apply_rotary_pos_emb(query, query, *angles)
            assert torch.equal(found, want)
            if query.is_contiguous():
                assert found.is_contiguous()


@NARROW
@pytest.mark.usefixtures("vectors")
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    own = OwnKernels(1, 8)
    x = torch.ones(3, 64, dtype=dtype)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    found = own.norm(x, torch.ones(64, dtype=dtype), 0.0)
    assert (found[0] == 1).all() and found[1].isnan().all() and found[2, 6].isnan() and not found[2, :6].any()
    turned = own.rotate(x.view(1, 1, 3, 64), *torch.ones(2, 1, 3, 64, dtype=dtype))[0, 0]
    assert turned[1].isnan().nonzero().flatten().tolist() == [5, 37]
    assert turned[2].isinf().nonzero().flatten().tolist() == [6, 38]


def test_other_shapes_and_types_are_refused() -> None:
    own, x = OwnKernels(1, 8), torch.zeros(2, 3, 4, 8).bfloat16()
    assert own.knows(x) and not own.knows(x.float()) and not own.knows(x.transpose(2, 3))
    assert not OwnKernels(0, 8).knows(x)
    for weight in (torch.ones(7).bfloat16(), torch.ones(8), torch.ones(16).bfloat16()[::2]):
        with pytest.raises(ValueError, match="for"):
            own.norm(x, weight, 0.0)
    with pytest.raises(ValueError, match="for"):
        own.norm(x.transpose(2, 3), torch.ones(4).bfloat16(), 0.0)
    angles = torch.zeros(2, 4, 8).bfloat16()
    with pytest.raises(ValueError, match="in one piece"):
        own.rotate(x.transpose(2, 3), angles.transpose(1, 2).contiguous(), angles.transpose(1, 2).contiguous())
    for wrong in (angles[:, :3], angles[:, :, :6], angles.half(), torch.zeros(2, 4, 16).bfloat16()[:, :, ::2]):
        with pytest.raises((ValueError, RuntimeError)):
            own.rotate(x, angles, wrong)
    with pytest.raises(ValueError, match="of pairs"):
        own.rotate(x[..., :7], angles[..., :7], angles[..., :7])


class Other(nn.Module):
    """A norm that looks like the usual one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(64)), 1e-6, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        epsilon = 1.2 * self.eps if self.kind == "another epsilon" else self.eps
        if self.kind == "less the mean":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        if self.kind == "weights from 0":
            return (1 + self.weight) * wide.to(x.dtype)
        if self.kind == "rounded once":
            return (self.weight.float() * wide).to(x.dtype)
        return self.weight * wide.to(x.dtype)


@NARROW
def test_a_norm_is_known_by_what_it_computes(dtype: torch.dtype) -> None:
    own = OwnKernels(1, 8)
    kinds = ["usual", "another epsilon", "less the mean", "weights from 0", "rounded once"]
    assert [kind for kind in kinds if is_usual_norm(Other(kind).to(dtype), own, dtype)] == ["usual"]
    assert not is_usual_norm(nn.LayerNorm(64).to(dtype), own, dtype)


def test_a_rotation_is_known_by_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    own, family, theirs = OwnKernels(1, 8), vars(sys.modules[Other.__module__]), modeling_llama.apply_rotary_pos_emb
    assert usual_rotation(Other(""), own, torch.bfloat16) is None, "there is none"

    def in_pairs(q: torch.Tensor, k: torch.Tensor, *angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        apart = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).reshape(x.shape) for x in (q, k))
        turned: tuple[torch.Tensor, torch.Tensor] = theirs(*apart, *angles)
        return turned

    for function, known in ((theirs, True), (in_pairs, False)):
        monkeypatch.setitem(family, ROTATION, function)
        assert (usual_rotation(Other(""), own, torch.bfloat16) is function) == known


def attended(skeleton: Skeleton, layer: int, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What attention makes of sequences but for their last tokens, and then of those."""
    (count, length, _), shape = x.shape, skeleton.kv_shape(layer)
    skeleton.bind(ModuleKey("attention", layer), weights)
    kv = KvBlock(x.new_zeros(count * length * shape.elements), shape, count, length)
    parts = []
    for past, new in ((0, x[:, :-1]), (length - 1, x[:, -1:])):
        positions = torch.arange(past, past + new.shape[1]).expand(count, -1)
        cache, present = kv.cache(slice(None), past), torch.ones(count, past + new.shape[1], dtype=torch.bool)
        mask = skeleton.mask(layer, present, False, new.shape[1], cache)
        with torch.inference_mode():
            parts.append(skeleton.attention(layer, new, mask, positions, skeleton.rotary(positions), cache))
    return torch.cat(parts, dim=1)


@NARROW
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_a_family_is_its_own(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norm and attention of each family's last layer, beside the same by PyTorch's ops, which are as far from fp32 as ours."""
    config = import_model(make_checkpoint(family, tmp_path))
    ours = Skeleton(config, dtype, own_rows=(1, 0))
    for rows, kind in (((1, 0), dtype), ((2, 0), dtype), ((1, 9), dtype), ((0, 0), dtype), ((1, 0), torch.float32)):
        all_own = rows == (1, 0) and kind == dtype and family != "gpt_oss"  # whose sinks PyTorch attends with
        assert Skeleton(config, kind, own_rows=rows).own_attention == all_own
    usual = ours._usual
    assert usual and bool(usual.norms) == (family not in ("phimoe", "gpt_oss")), "these have others"
    assert (usual.rotate is not None) == (family not in ("deepseek_v2", "gpt_oss")), "likewise"

    draw, layer = torch.Generator().manual_seed(1), ours.layers - 1
    parts = f"layers.{layer}.self_attn.", f"layers.{layer}.input_layernorm."
    shapes = {n: p.shape for n, p in ours.model.named_parameters() if any(part in n for part in parts)}
    weights = {n: (torch.randn(s, generator=draw) / 8 + ("norm" in n)).to(dtype) for n, s in shapes.items()}
    x = torch.randn(3, 9, ours.hidden, generator=draw).to(dtype)
    module = vars(sys.modules[type(ours.model.get_submodule(f"model.layers.{layer}.self_attn")).__module__])
    rotation, found = module.get(ROTATION), []
    for skeleton in (ours, Skeleton(config, dtype), Skeleton(config, torch.float32)):
        found.append(attended(skeleton, layer, weights, x.to(skeleton.compute_dtype)).float())
        assert module.get(ROTATION) is rotation, "whoever else calls it finds it as it was"
    lost, theirs = ((part - found[2]).abs().mean() for part in found[:2])
    assert 0 < lost < 1.3 * theirs
