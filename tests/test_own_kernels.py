"""16-bit matmuls, feed-forwards and attention by the package's own kernel: what comes out, in whatever blocks it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from klotski_compiler.errors import ConfigError
from klotski_compiler.kernel_facts import BLOCK_COLUMNS, BLOCK_ROWS, inner_bytes
from klotski_runtime import own_kernels
from klotski_runtime.checkpoint import ModuleKey
from klotski_runtime.experts import OwnExperts
from klotski_runtime.native import SOURCE, compile_library
from klotski_runtime.own_kernels import OwnKernels
from klotski_runtime.skeleton import Routed, Skeleton, import_model
from klotski_runtime.workers import WORTH_SHARING, Workers
from tiny import FAMILIES, make_checkpoint

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=["4", "8", "16", "16 -DNO_PAIRS", "16 -DNO_BYTES"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of any processor: compilers make them of what this one has."""
    library = compile_library(SOURCE, *f"-DLANES={request.param}".split(), "-DIN_REGISTER(v)=")
    monkeypatch.setattr(own_kernels, "kernel_library", lambda: library)


def operands(rows: int, width: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows, a weight and a bias."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype) for s in ((rows, width), (columns, width), (columns,))]


def product(own: OwnKernels, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    own.mm(x, (weight, out), bias=bias)
    return out


def greatest(
    own: OwnKernels, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all columns of a weight."""
    worst, nowhere = torch.full((len(x),), -torch.inf, dtype=x.dtype), torch.zeros(len(x), dtype=torch.long)
    return own.greatest(x, weight, bias, worst, nowhere)


def sideways(weight: torch.Tensor) -> torch.Tensor:
    """The same, stored as some families do."""
    return weight.t().contiguous().t()


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(1, 8, 3), (2, 5, 1), (5, 96, BLOCK_COLUMNS + 7), (BLOCK_ROWS + 3, 67, 40), (10, 1024 + 8, 18)],
)
def test_a_product_is_fp32s_rounded_once(rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, width, columns, dtype)
    own, exact = OwnKernels(1, width), x.double() @ weight.double().t()
    for biased in (None, bias):
        want = exact if biased is None else exact + bias.double()
        error = (product(own, x, weight, biased).double() - want).abs() / want.abs().clamp(min=width**0.5 / 8)
        assert error.max() <= torch.finfo(dtype).eps  # half of one by rounding
        assert torch.equal(product(own, x, sideways(weight), biased), product(own, x, weight, biased))


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("rows", "width", "columns", "threads"),
    [(1, 8, 3, 1), (5, 96, BLOCK_COLUMNS + 7, 2), (BLOCK_ROWS + 3, 67, 2000, 3), (4 * BLOCK_ROWS + 70, 144, 3000, 2)],
)
def test_the_greatest_product_of_a_row(rows: int, width: int, columns: int, threads: int, dtype: torch.dtype) -> None:
    """As it is among all of them, in whatever parts they come; in a tie the first; not a number where any of them is none."""
    x, weight, bias = operands(rows, width, columns, dtype)
    workers = Workers(threads)
    own = OwnKernels(1, width, workers)
    for biased in (None, bias):
        every = product(own, x, weight, biased)
        value, column = greatest(own, x, weight, biased)
        assert torch.equal(value, every.amax(dim=1))
        assert torch.equal(column, (every == value[:, None]).int().argmax(dim=1))
        half = columns // 2
        value, later = greatest(own, x, weight[half:], biased if biased is None else biased[half:])
        value, later = own.greatest(x, weight[:half], biased if biased is None else biased[:half], value, later + half)
        assert torch.equal(later, column)
        assert torch.equal(value, every.amax(dim=1))
    alike = weight[:1].expand(columns, width).contiguous()
    assert not greatest(own, x, alike)[1].any()
    weight[columns // 2, 0] = torch.nan
    assert greatest(own, x, weight)[0].isnan().all()
    workers.close()


def lose(lost: torch.Tensor, held: torch.Tensor) -> None:
    """Bytes hold one operand as it is, and of the other only a term that is nothing in their products."""
    held.mul_(40).round_().clamp_(-126, 126)
    held[:, 3], held[:, 5] = 0, 127
    lost[:, 3], lost[:, 5] = 1000, 0


UNEVEN: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "one large term": lambda x, weight: x[:, 3].mul_(1000),
    "all that bytes of rows lose": lose,
    "all that bytes of columns lose": lambda x, weight: lose(weight, x),
    "large terms in rows and columns": lambda x, weight: (x[:, ::7].mul_(300), weight[:, 3].mul_(300)),
    "all but zero": lambda x, weight: (x.mul_(1e-20), weight.mul_(1e-20)),
    "zeros": lambda x, weight: (x[::2].zero_(), weight[1::2].zero_()),
    "one value": lambda x, weight: weight.fill_(0.5),
    "no finite product": lambda x, weight: x[1].fill_(torch.inf),
    "less than nothing": lambda x, weight: (x.abs_(), weight.abs_().neg_()),
    "an answer that stands out": lambda x, weight: weight[-1].mul_(30),
}


@NARROW
@pytest.mark.parametrize("case", UNEVEN)
def test_the_greatest_product_of_terms_that_bytes_do_not_hold(case: str, dtype: torch.dtype) -> None:
    """Rounding rows and columns to bytes decides only what need not be computed."""
    x, weight, _ = operands(2 * BLOCK_ROWS + 9, 96, 40 * BLOCK_COLUMNS + 5, dtype)
    UNEVEN[case](x, weight)
    own = OwnKernels(1, x.shape[1])
    every, (value, column) = product(own, x, weight), greatest(own, x, weight)
    most = every.amax(dim=1)
    assert torch.equal(value.nan_to_num(), most.nan_to_num())
    assert torch.equal(value.isnan(), most.isnan())
    there = ~most.isnan()
    assert torch.equal(column[there], (every == most[:, None]).int().argmax(dim=1)[there])


@NARROW
def test_a_rows_product_depends_on_nothing_else(dtype: torch.dtype) -> None:
    """Not on rows beside it, nor on whose task it is, nor on how many threads share columns: to the bit."""
    x, weight, bias = operands(BLOCK_ROWS + 5, 1024 + 24, 777, dtype)
    assert 2 * x.numel() * len(weight) > WORTH_SHARING
    want = product(OwnKernels(1, x.shape[1]), x, weight, bias)
    for threads in (2, 5):
        workers = Workers(threads)
        own = OwnKernels(1, x.shape[1], workers)
        out = torch.empty_like(want)
        workers.run([lambda worker: own.mm(x, (weight, out), bias=bias, worker=worker)] * 2)  # noqa: B023
        assert torch.equal(out, want)
        assert torch.equal(product(own, x, weight, bias), want)
        for rows in (slice(0, 1), slice(3, 7), slice(1, BLOCK_ROWS + 2)):
            assert torch.equal(product(own, x[rows], weight, bias), want[rows])
        workers.close()


Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def experts_of(hidden: int, inner: int, tokens: int, counts: Sequence[int], dtype: torch.dtype) -> list[Chosen]:
    """Experts, each with so many of the tokens."""
    generator = torch.Generator().manual_seed(2)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
        return drawn.to(dtype)

    return [
        (
            matrix(inner, hidden),
            matrix(inner, hidden),
            matrix(hidden, inner),
            torch.randperm(tokens, generator=generator)[:count].sort().values,
            torch.rand(count, generator=generator),
        )
        for count in counts
    ]


def fed(x: torch.Tensor, experts: Sequence[Chosen], workers: Workers | None = None) -> torch.Tensor:
    """What a feed-forward adds to ones."""
    hidden, inner = x.shape[1], len(experts[0][0])
    out = torch.ones(x.shape)
    own = OwnKernels(1, max(hidden, inner), workers)
    own.feed_forward(x, out, experts, torch.empty(inner_bytes(inner), dtype=torch.uint8))
    return out


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("hidden", "inner", "tokens", "counts"),
    [
        (64, 32, 9, (1, 9, 0, 3)),
        (67, 33, 40, (40, 7)),
        (96, 2 * BLOCK_COLUMNS + 10, 300, (BLOCK_ROWS + 9, 300, 2, 65, 64)),
    ],
)
def test_a_feed_forward_is_rounded_as_pytorchs_ops(
    hidden: int, inner: int, tokens: int, counts: Sequence[int], dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    experts = experts_of(hidden, inner, tokens, counts, dtype)
    want = torch.ones(x.shape, dtype=torch.float64)
    for gate, up, down, rows, weights in experts:
        gated, other = ((x[rows].double() @ part.double().t()).to(dtype) for part in (gate, up))
        product = (functional.silu(gated) * other).double() @ down.double().t()
        want.index_add_(0, rows, product.to(dtype).double() * weights[:, None])
    torch.testing.assert_close(fed(x, experts).double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)


@NARROW
def test_threads_share_a_feed_forward(dtype: torch.dtype) -> None:
    """Whoever computes what, and whatever is computed beside it: only the order in which experts are added up may differ."""
    counts = (90, 200, 1, 17, 128, 64)
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    experts = experts_of(256, 192, 200, counts, dtype)
    assert 6 * 256 * 192 * sum(counts) > WORTH_SHARING
    want = fed(x, experts)
    for threads in (2, 5):
        workers = Workers(threads)
        torch.testing.assert_close(fed(x, experts, workers), want, rtol=1e-6, atol=1e-6)
        workers.close()
    alone = [fed(x, [expert]) - 1 for expert in experts]
    torch.testing.assert_close(sum(alone, torch.ones(x.shape)), want, rtol=1e-6, atol=1e-6)


def test_silu_is_pytorchs_over_its_whole_range() -> None:
    """Gate values of all sizes, which one row has, against an up of ones: what comes through a down that picks them out."""
    values = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-3e38, -1e4, -88, -1e-30, 0, 1e-30, 1e4, 3e38])])
    gate = torch.zeros(len(values), 8).bfloat16()
    gate[:, 0], up = values, torch.zeros(len(values), 8).bfloat16()
    up[:, 1] = 1
    x, down = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]]).bfloat16(), torch.zeros(8, len(values)).bfloat16()
    for number in range(0, len(values), 97):
        down[0] = functional.one_hot(torch.tensor(number), len(values))
        found = fed(x, [(gate, up, down, torch.tensor([0]), torch.tensor([1.0]))])[0, 0] - 1
        want = functional.silu(gate[number, 0]).float()
        assert abs(found - want) <= abs(want) * 2**-8 + 1e-7


def test_a_feed_forward_refuses_what_it_would_read_beside() -> None:
    x = torch.randn(9, 64).bfloat16()
    [(gate, up, down, rows, weights)] = experts_of(64, 32, 9, (4,), torch.bfloat16)
    for wrong in (
        (gate[:, :60], up, down, rows, weights),
        (gate, up[:20], down, rows, weights),
        (gate, up, down.half(), rows, weights),
        (gate, up, down, rows.int(), weights),
        (gate, up, down, rows, weights[:3]),
        (gate, up, down.t().contiguous().t(), rows, weights),
    ):
        with pytest.raises(ValueError, match=r"other shapes|one type|as many rows|in one piece"):
            fed(x, [wrong])
    with pytest.raises(ValueError, match="other sizes"):
        OwnKernels(1, 64).feed_forward(x, torch.ones(9, 64), [(gate, up, down, rows, weights)], torch.empty(8))


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "context", "width", "value_width"),
    [(8, 2, 5, 16, 16), (6, 6, 2 * BLOCK_COLUMNS, 64, 48), (40, 1, 3 * BLOCK_COLUMNS + 1, 96, 70), (70, 1, 49, 67, 33)],
)
def test_decode_attention_is_softmaxs(
    heads: int, kv_heads: int, context: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    """Of sequences in parts of larger blocks, with padding before some of them, which makes whole blocks of positions unseen."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = (
        (scale * torch.randn(shape, generator=generator)).to(dtype)
        for scale, shape in (
            (3, (3, heads, 1, width)),
            (1, (3, kv_heads, context + 7, width)),
            (1, (3, context + 2, kv_heads, value_width)),
        )
    )
    key, value = key[:, :, :context], value.transpose(1, 2)[:, :, :context]
    present = torch.arange(context) >= torch.tensor([0, context - 1, context // 2])[:, None]
    for mask in (None, present[:, None, None]):
        scores = query.double().view(3, kv_heads, -1, width) @ key.double().transpose(2, 3) / width**0.5
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        want = (scores.softmax(-1) @ value.double()).view(3, 1, heads, value_width)
        workers = Workers(2)
        for own in (OwnKernels(1, 128), OwnKernels(1, 128, workers)):
            assert own.attends(query, key, mask)
            found = own.attend(query, key, value, mask, width**-0.5)
            torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
        workers.close()


@NARROW
@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "context", "width", "value_width"),
    [(4, 2, 5, 5, 16, 16), (2, 1, 70, 70, 67, 33), (3, 3, 2 * BLOCK_COLUMNS + 40, 3 * BLOCK_COLUMNS, 96, 64)],
)
def test_prefill_attention_is_softmaxs(
    heads: int, kv_heads: int, queries: int, context: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    """Without a mask positions up to a query's own; with one, of prompts with padding before them, and in a window."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        (scale * torch.randn(shape, generator=generator)).to(dtype)
        for scale, shape in (
            (3, (3, queries, heads, width)),
            (1, (3, kv_heads, context, width)),
            (1, (3, kv_heads, context, value_width)),
        )
    )
    query = query.transpose(1, 2)
    positions = torch.arange(context)
    own_position = positions[-queries:, None]
    causal = (positions <= own_position).expand(3, 1, -1, -1)
    padded = causal & (positions >= torch.tensor([0, context - 1, context // 2])[:, None, None, None])
    scores = query.double().reshape(3, kv_heads, -1, width) @ key.double().transpose(2, 3) / width**0.5
    scores = scores.view(3, heads, queries, context)
    values = value.double().repeat_interleave(heads // kv_heads, 1)
    for mask in (None, padded, causal & (positions > own_position - 7)):
        sees = causal if mask is None else mask
        want = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values
        there = sees.any(-1).expand(3, heads, -1)
        workers = Workers(2)
        for own in (OwnKernels(1, 128), OwnKernels(1, 128, workers)):
            assert own.attends(query, key, mask)
            found = own.attend(query, key, value, mask, width**-0.5).transpose(1, 2).double()
            torch.testing.assert_close(found[there], want[there], rtol=torch.finfo(dtype).eps, atol=1e-5)
            assert found.isfinite().all(), "also of padding, which later layers have to do with"
        workers.close()


def test_attention_refuses_what_it_would_read_beside() -> None:
    query, key, value = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    q, k, v = query.bfloat16(), key.bfloat16(), value.bfloat16()
    own, short = OwnKernels(1, 16), torch.ones(2, 1, 1, 4, dtype=torch.bool)
    assert own.attends(q, k, None) and not own.attends(query, key, None)
    assert not own.attends(q, k, torch.zeros(2, 1, 1, 5)), "scores that are added to are not masks"
    assert not own.attends(q, k, short)
    assert not OwnKernels(0, 16).attends(q, k, None)
    sideways_v = v.transpose(2, 3).contiguous().transpose(2, 3)
    wrong: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = [
        (q[:, :3], k, v, None),
        (q.expand(2, 4, 6, 16), k, v, None),
        (q, k[:, :, :4], v, None),
        (q, key, v, None),
        (q, k, sideways_v, None),
        (q, k, v, short),
    ]
    for parts in wrong:
        with pytest.raises(ValueError, match=r"other shapes|one type|in one piece|a mask of"):
            own.attend(*parts, 0.25)
    with pytest.raises(ValueError, match="in one piece"):
        OwnKernels(1, 15).attend(q, k, v, None, 0.25)


def test_what_is_not_a_number_stays_so() -> None:
    x, weight = torch.eye(4, 8).bfloat16(), torch.zeros(4, 8).bfloat16()
    weight[:, 1], weight[:, 2], weight[:, 3] = torch.nan, torch.inf, 3e38
    x[3, 3] = 4
    found = product(OwnKernels(1, 8), x, torch.where(torch.eye(4, 8).bool(), weight, 0))
    assert found[0, 0] == 0 and found[1, 1].isnan() and found[2, 2].isinf() and found[3, 3].isinf()


def test_other_shapes_and_types_are_refused() -> None:
    x, weight, _ = operands(4, 8, 4, torch.bfloat16)
    own = OwnKernels(1, 8)
    with pytest.raises(ValueError, match="float16"):
        product(own, x, weight.half())
    with pytest.raises(ValueError, match="in one piece"):
        product(own, sideways(x), weight)
    with pytest.raises(ValueError, match="other shapes"):
        product(own, x[:, :7].contiguous(), weight)
    with pytest.raises(ValueError, match="other shapes"):
        product(OwnKernels(1, 7), x, weight)
    with pytest.raises(ValueError, match="a bias of"):
        product(own, x, weight, torch.zeros(3).bfloat16())


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler.*install gcc"):
        compile_library(SOURCE)
    assert list((tmp_path / "klotski").iterdir()) == []
    monkeypatch.delenv("CC")
    compile_library(SOURCE)
    [kept] = (tmp_path / "klotski").iterdir()
    written = kept.stat().st_mtime_ns
    compile_library(SOURCE)
    assert kept.stat().st_mtime_ns == written, "it is compiled once"


def test_it_takes_what_is_worth_it() -> None:
    few, many = torch.zeros(15, 4, dtype=torch.bfloat16), torch.zeros(16, 4, dtype=torch.bfloat16)
    assert [OwnKernels(16, 4).takes(x) for x in (few, many, many.float())] == [False, True, False]
    assert not OwnKernels(0, 4).takes(many)
    assert [OwnKernels(1, 4, most_rows=15).takes(x) for x in (few, many)] == [True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_go_through_it_in_16_bits(family: str, tmp_path: Path) -> None:
    """But for those of a family that does something of its own between their matmuls."""
    skeleton = Skeleton(import_model(make_checkpoint(family, tmp_path)), torch.bfloat16, own_rows=(2, 0))
    experts = OwnExperts(skeleton.inner(1), skeleton.own_kernels)
    for dtype in (torch.bfloat16, torch.float32):
        x, parts = torch.zeros(4, 64, dtype=dtype), {"gate_up": torch.zeros(8, 64, dtype=dtype)}
        taken = [experts.takes(skeleton.experts(1), parts, x, torch.arange(count)) for count in (1, 2)]
        assert taken == [False, dtype == torch.bfloat16 and family != "gpt_oss"]
    assert not experts.takes(skeleton.experts(1), parts, x.bfloat16(), torch.arange(2)), "weights of another type"


@NARROW
def test_linear_modules_go_through_it(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen2_moe", tmp_path)
    skeleton = Skeleton(import_model(folder), dtype, own_rows=(4, 0))
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
    assert torch.equal(narrow, functional.linear(x[:1], module.weight, module.bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_goes_through_it_as_it_is(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm, router and shared experts of each family's last layer in bf16, beside the same in fp32."""
    folder = make_checkpoint(family, tmp_path)
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    seen: list[int] = []
    own = OwnKernels.mm

    def mm(self: OwnKernels, rows: torch.Tensor, *products: tuple[torch.Tensor, torch.Tensor], **how: Any) -> None:
        seen.append(len(rows))
        own(self, rows, *products, **how)

    monkeypatch.setattr(OwnKernels, "mm", mm)

    def block(dtype: torch.dtype, least: int) -> Routed:
        skeleton = Skeleton(import_model(folder), dtype, own_rows=(least, 0))
        last = skeleton.layers - 1
        prefix = f"model.layers.{last}."
        part = {name: tensor for name, tensor in state.items() if name.startswith(prefix) and ".experts." not in name}
        skeleton.bind(ModuleKey("router", last), part)
        with torch.inference_mode():
            return skeleton.moe_block(last, x.to(dtype))

    narrow, exact = block(torch.bfloat16, 1), block(torch.float32, 0)
    routers_in_fp32 = {"deepseek_v2", "deepseek_v3", "glm4_moe"}
    shared = 3 * (family in routers_in_fp32) + 4 * (family == "qwen2_moe")  # gate, up, down and its own gate
    assert len(seen) == (family not in routers_in_fp32) + shared
    torch.testing.assert_close(narrow.base.float(), exact.base, rtol=0.05, atol=0.05)
    same = narrow.indices.sort(dim=1).values == exact.indices.sort(dim=1).values
    assert same.float().mean() > 0.9
    torch.testing.assert_close(narrow.weights.float().sum(1), exact.weights.sum(1), rtol=0.05, atol=0.05)
