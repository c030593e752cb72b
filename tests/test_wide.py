"""16-bit matmuls through fp32: what a product is, in whatever blocks it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from klotski_compiler.cost import WIDENED_BLOCK, WIDENED_COLUMNS, WIDENED_ROWS
from klotski_runtime.skeleton import Skeleton, import_model
from klotski_runtime.wide import Widener
from tiny import make_checkpoint

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@NARROW
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(1, 8, 3), (5, 96, WIDENED_COLUMNS + 7), (WIDENED_ROWS + 3, 64, 40), (2, WIDENED_BLOCK + 8, 3)],
)
def test_a_product_is_fp32s_rounded_once(rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, width), (columns, width), (columns,))
    )
    widener, out = Widener(1, width), torch.full((rows, columns), torch.nan, dtype=dtype)
    widener.mm(x, (weight, out), bias=bias)
    exact = x.double() @ weight.double().t() + bias.double()
    error = (out.double() - exact).abs() / exact.abs().clamp(min=width**0.5 / 8)
    assert error.max() <= torch.finfo(dtype).eps  # half of one by rounding
    transposed = weight.t().contiguous().t()  # as some families store theirs
    again = torch.empty_like(out)
    widener.mm(x, (transposed, again), bias=bias)
    assert torch.equal(again, out)


def test_it_takes_what_is_worth_it() -> None:
    few, many = torch.zeros(15, 4, dtype=torch.bfloat16), torch.zeros(16, 4, dtype=torch.bfloat16)
    assert [Widener(16, 4).takes(x) for x in (few, many, many.float())] == [False, True, False]
    assert not Widener(0, 4).takes(many)


@NARROW
def test_linear_modules_go_through_it(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2_moe", tmp_path)
    skeleton = Skeleton(import_model(folder), dtype, widen_rows=4)
    module = skeleton.model.get_submodule("model.layers.0.self_attn.q_proj")
    weight = torch.randn(module.weight.shape, dtype=dtype)
    module._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    module._parameters["bias"] = torch.nn.Parameter(torch.randn(module.bias.shape, dtype=dtype), requires_grad=False)
    x = torch.randn(2, 3, weight.shape[1], dtype=dtype)
    with torch.inference_mode():
        wide, narrow = module(x), module(x[:1])
    want = x.float() @ weight.float().t() + module.bias.float()
    assert wide.dtype == dtype and wide.shape == want.shape
    torch.testing.assert_close(wide.float(), want, rtol=2e-2, atol=2e-2)
    assert torch.equal(narrow, torch.nn.functional.linear(x[:1], module.weight, module.bias))
