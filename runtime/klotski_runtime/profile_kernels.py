"""Times of kernels, as the runtime calls them, on the CPU or a GPU: what ``profile`` repeats and keeps the medians of."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import inf
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from klotski_compiler.kernel_facts import FEW_ROWS, ROW_STEP
from klotski_compiler.ops import PAGE_BYTES
from klotski_runtime.attention import OWN, grouped_attention
from klotski_runtime.native import can_compile
from klotski_runtime.own_kernels import OwnKernels
from klotski_runtime.profile_block import SMALL, Block
from klotski_runtime.profile_disk import MIB, Found, rounded
from klotski_runtime.workers import Task, Workers, kernel_threads

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# The attention of Qwen3-30B-A3B: 32 query heads share 4 key and value heads.
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128

# Of PyTorch's time for a 16-bit matmul: what ours takes somewhere if it is to be used, and at most wherever it is, since experts
# gain by it beside their matmuls.
FASTER, CLOSE = 0.97, 1.05
CACHE_BYTES = 64 * MIB  # more than caches hold
SHORT_PROMPT = 32  # tokens: of prompts whose attention is mostly elementwise work
HEAD_WORDS = 8192  # of a page of a head
SHARED_ROWS = 32  # tokens of the expert that computes while the disk is read


@dataclass(frozen=True)
class Sizes:
    """How much to measure.

    hidden, inter, tokens: the expert and its token counts. cold_bytes: size of the buffers that are cycled.
    sample_s: time per number and round. rounds: how often each number is measured. scratch_bytes: the scratch file.
    turns, turn_s: of the disk and the processor in a round. decode: (batch, context) of decode attention.
    prompt: tokens of a prompt of prefill attention. short_prompts: how many prompts the elementwise work is measured on.
    """

    hidden: int
    inter: int
    tokens: tuple[int, ...]
    cold_bytes: int
    sample_s: float
    rounds: int
    scratch_bytes: int
    turns: int
    turn_s: float
    decode: tuple[tuple[int, int], ...]
    prompt: int
    short_prompts: int


def mean_seconds(call: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
    """Seconds of one call: the mean of samples that fill ``sample_s``, since a run too pays for what disturbs some of them.

    A sample holds as many calls as take about 5 ms and, on a GPU, ends with a synchronisation: kernels queue up as they
    do in a run, and launch cost shows only where it cannot hide behind the kernel before.
    """

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    sample(1)
    calls = max(1, round(0.005 / max(sample(2), 1e-7)))
    end = time.perf_counter() + sizes.sample_s
    samples = [sample(calls)]
    while time.perf_counter() < end:
        samples.append(sample(calls))
    return statistics.fmean(samples)


def shared_work(sizes: Sizes) -> Callable[[], object]:
    """The matmuls of experts over a few tokens each, side by side on the CPU, weights not in cache, in whichever way is faster."""
    host = torch.device("cpu")
    turn, workers = _experts(host, torch.bfloat16, sizes), Workers(torch.get_num_threads())
    rows = torch.randn(SHARED_ROWS, sizes.hidden, dtype=torch.bfloat16)
    ways: list[Task] = [lambda worker: _expert(rows, *next(turn))]
    if can_compile():
        ways.append(_ours(OwnKernels(1, max(sizes.hidden, sizes.inter), workers), workers, rows, turn, sizes))
    calls = [partial(workers.run, [way] * workers.count) for way in ways]
    return min(calls, key=lambda call: mean_seconds(call, host, sizes))


def _expert(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)


def _experts(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[tuple[Tensor, ...]]:
    """Weights (gate, up, down) of experts in turn, as many as no cache holds, without end."""
    shapes = (sizes.inter, sizes.hidden), (sizes.inter, sizes.hidden), (sizes.hidden, sizes.inter)
    nbytes = 3 * sizes.hidden * sizes.inter * dtype.itemsize
    number = max(2, -(-sizes.cold_bytes // nbytes))
    drawn = tuple(
        torch.randn(s, device=device, dtype=dtype) / 32 for s in shapes
    )  # takes a CPU longer than all else here
    return cycle([drawn, *(tuple(matrix.clone() for matrix in drawn) for _ in range(number - 1))])


def matmul_rates(
    device: torch.device, dtype: str, sizes: Sizes
) -> tuple[tuple[tuple[int, float], ...], float, tuple[int, int]]:
    """Points (tokens, flops per second) of experts, the fastest rate at which they read their weights, bytes/s, and from how many
    tokens on, and up to how many, 16-bit matmuls are faster by our kernel (see ``hardware.Processor``), which then gives the points.
    On a CPU as many run side by side as there are workers.

    On a CPU the fixed cost of the calls is taken off, because expert_op_us holds it; on a GPU it hides behind the
    kernel before.
    """
    torch_dtype = DTYPES[dtype]
    params = 3 * sizes.hidden * sizes.inter
    nbytes = params * torch_dtype.itemsize
    turn = _experts(device, torch_dtype, sizes)
    small = [torch.randn(n, SMALL, device=device, dtype=torch_dtype) for n in (1, SMALL, SMALL, SMALL)]
    on_cpu = device.type == "cpu"
    workers = Workers(torch.get_num_threads() if on_cpu else 1)

    def each(task: Task) -> float:
        """Seconds per task where every worker has one."""
        return mean_seconds(lambda: workers.run([task] * workers.count), device, sizes) / workers.count

    fixed = each(lambda worker: _expert(*small)) if on_cpu else 0.0
    may_own = on_cpu and torch_dtype.itemsize == 2 and can_compile()
    own = OwnKernels(int(may_own), max(sizes.hidden, sizes.inter), workers)
    plain, ours, fastest = list[float](), list[float](), 0.0
    for tokens in sizes.tokens:
        rows = torch.randn(tokens, sizes.hidden, device=device, dtype=torch_dtype)
        seconds = each(lambda worker, rows=rows: _expert(rows, *next(turn)))  # type: ignore[misc]
        plain.append(seconds)
        ours.append(each(_ours(own, workers, rows, turn, sizes)) if may_own else inf)
    workers.close()
    won = worth(sizes.tokens, plain, ours)
    points = []
    for place, tokens in enumerate(sizes.tokens):
        seconds = (ours if place in won else plain)[place]
        alone = max(seconds - fixed, seconds / 2)
        points.append((tokens, rounded(2 * params * tokens / alone)))
        fastest = max(fastest, nbytes / alone)
    least, most = (sizes.tokens[won[0]], sizes.tokens[won[-1]]) if won else (0, 0)
    return tuple(points), fastest, (least, 0 if most == sizes.tokens[-1] else most)


def head_rates(sizes: Sizes, least_rows: int) -> tuple[tuple[tuple[int, float], ...], str]:
    """Points (rows, flops per second) of a bf16 head on the CPU of whose products each row's greatest is kept, by our kernel from
    ``least_rows`` on: one page after the other of a head that no cache holds."""
    workers = Workers(torch.get_num_threads())
    own = OwnKernels(least_rows, sizes.hidden, workers)
    drawn = torch.randn(min(HEAD_WORDS, sizes.cold_bytes // (4 * sizes.hidden)), sizes.hidden, dtype=torch.bfloat16)
    pages = [drawn.roll(number, 1) for number in range(max(2, sizes.cold_bytes // drawn.nbytes))]  # of other products
    points = []
    for count in sizes.tokens[::2]:
        rows = torch.randn(count, sizes.hidden, dtype=torch.bfloat16)

        def head(rows: Tensor = rows) -> None:
            best, where = torch.full((len(rows),), -inf), torch.zeros(len(rows), dtype=torch.long)
            for page in pages:
                if own.finds(rows):
                    best, where = own.greatest(rows, page, None, best, where)
                else:
                    F.linear(rows, page).max(dim=1)

        seconds = mean_seconds(head, torch.device("cpu"), sizes)
        points.append((count, rounded(2 * count * sum(page.numel() for page in pages) / seconds)))
    workers.close()
    how = f"the greatest of each row's products, {len(pages)} pages of {len(drawn)} words, hidden {sizes.hidden}"
    return tuple(points), how


def worth(tokens: Sequence[int], plain: Sequence[float], ours: Sequence[float]) -> range:
    """For which of so many tokens, in a row, our kernel had better be taken, given the seconds of either: the longest stretch in which it
    is nowhere slower than CLOSE says, and faster somewhere. PyTorch's compute more rows than there are."""
    shares = [
        own / (theirs * (1 + ROW_STEP / 2 / count if count > FEW_ROWS else 1))
        for count, theirs, own in zip(tokens, plain, ours, strict=True)
    ]
    stretches = (range(i, j) for i in range(len(shares)) for j in range(i + 1, len(shares) + 1))
    close = (s for s in stretches if max(shares[s.start : s.stop]) <= CLOSE and min(shares[s.start : s.stop]) < FASTER)
    return max(close, key=len, default=range(0))


def _ours(own: OwnKernels, workers: Workers, rows: Tensor, turn: Iterator[tuple[Tensor, ...]], sizes: Sizes) -> Task:
    """An expert by our own kernel, the next one in every call."""
    outs = [
        [rows.new_empty(len(rows), n) for n in (sizes.inter, sizes.inter, sizes.hidden)] for _ in range(workers.count)
    ]

    def task(worker: int) -> None:
        (gate, up, down), (inner, other, out) = next(turn), outs[worker]
        own.mm(rows, (gate, inner), (up, other), worker=worker)
        own.mm(F.silu(inner, inplace=True).mul_(other), (down, out), worker=worker)

    return task


def _attend(query: Tensor, key: Tensor, value: Tensor, own: OwnKernels | None = None) -> Tensor:
    """Grouped-query attention as the runtime calls it. own: with our kernel."""
    heads = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, is_causal=True, **{OWN: own})
    output: Tensor
    output, _ = grouped_attention(heads, query, key, value, None, scaling=HEAD_DIM**-0.5)
    return output


def decode_attention(device: torch.device, sizes: Sizes, own: bool = False) -> tuple[float, str]:
    """Bytes of keys and values per second: the slope of time over bytes, the intercept being part of attention_op_us.

    Least squares in relative error, because times span two orders of magnitude.
    """
    pool = torch.randn(sizes.cold_bytes // 64, device=device, dtype=torch.bfloat16).repeat(32)
    workers = Workers(torch.get_num_threads())
    rows, kernel = [], OwnKernels(1, HEAD_DIM, workers) if own else None
    for batch, context in sizes.decode:
        elements = batch * KV_HEADS * context * HEAD_DIM
        caches = pool[: len(pool) // (2 * elements) * 2 * elements].view(-1, 2, batch, KV_HEADS, context, HEAD_DIM)
        turn = cycle(caches.unbind())
        query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)

        def attend(query: Tensor = query, turn: Iterator[Tensor] = turn) -> Tensor:
            key, value = next(turn)
            return _attend(query, key, value, kernel)

        rows.append((2 * elements * 2, mean_seconds(attend, device, sizes)))
    workers.close()
    design = torch.tensor([[1 / seconds, nbytes / seconds] for nbytes, seconds in rows], dtype=torch.float64)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    fixed, per_byte = torch.linalg.lstsq(design, ones).solution.flatten().tolist()
    if per_byte <= 0:  # too noisy for a slope: take the largest cache as it is
        nbytes, seconds = max(rows)
        fixed, per_byte = 0.0, seconds / nbytes
    how = f"slope over {len(rows)} sizes of grouped attention, {QUERY_HEADS} query and {KV_HEADS} KV heads, bf16"
    how += ", by the package's own kernel" if own else ""
    return rounded(1 / per_byte), f"{how}; fixed part {1e6 * fixed:.0f} us"


def prefill_attention(device: torch.device, sizes: Sizes, own: bool = False) -> tuple[float, str]:
    """Flops per second of attention over whole prompts: 4 x heads x head_dim for every pair of positions."""
    workers = Workers(torch.get_num_threads())
    kernel = OwnKernels(1, HEAD_DIM, workers) if own else None
    batch, prompt = 2, sizes.prompt
    query = torch.randn(batch, QUERY_HEADS, prompt, HEAD_DIM, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, KV_HEADS, prompt, HEAD_DIM, device=device, dtype=torch.bfloat16)
    seconds = mean_seconds(lambda: _attend(query, key, value, kernel), device, sizes)
    workers.close()
    flops = 4 * QUERY_HEADS * HEAD_DIM * batch * prompt**2
    what = "the package's own kernel" if own else "transformers' SDPA"
    how = f"{what}, {batch} whole prompts of {prompt} tokens, bf16, all pairs of positions counted"
    return rounded(flops / seconds), how


def fixed_costs(device: torch.device, sizes: Sizes, own: bool = False) -> Found:
    """What an op costs however little it computes: everything here is so small that only calls and launches remain. own: by our own
    kernel."""
    weight = torch.randn(SMALL, SMALL, device=device, dtype=torch.bfloat16)
    rows = torch.randn(8, SMALL, device=device, dtype=torch.bfloat16)
    small = mean_seconds(lambda: F.linear(rows, weight), device, sizes)
    workers = Workers(torch.get_num_threads()) if own else None
    block = Block(device, SMALL, (4, 2, 32), 1, 1, workers)
    attention = mean_seconds(block.attention, device, sizes) - mean_seconds(block.projections, device, sizes)
    what = f"transformers' Qwen3-MoE by the runtime's ops, {SMALL} wide, 1 token"
    found: Found = {
        "op_us": (rounded(1e6 * small), f"F.linear of 8 rows, {SMALL} x {SMALL}"),
        "hidden_bytes_per_s": _hidden_rate(device, sizes, workers),
        "router_op_us": (
            rounded(1e6 * mean_seconds(block.router, device, sizes)),
            f"router (norm, gate, choice) of {what}",
        ),
        "attention_op_us": (
            rounded(1e6 * max(attention, small)),
            f"attention (norms, rotary, mask, cache, SDPA, residual) of {what}, less matmuls",
        ),
        "expert_op_us": (
            rounded(1e6 * mean_seconds(block.expert, device, sizes) / block.experts),
            f"expert (gather, three matmuls, activation, weighting, index_add), {block.experts} at once, of {what}",
        ),
    }
    if workers:
        workers.close()
    return found


def beside_cpu(device: torch.device, sizes: Sizes, on_cpu: Sizes) -> tuple[float, str]:
    """What is left of the speed of a GPU's small ops while the CPU attends, as it does in a plan that lets it."""
    block = Block(device, SMALL, (4, 2, 32), batch=1, queries=1)
    alone, threads, stop = mean_seconds(block.expert, device, sizes), torch.get_num_threads(), threading.Event()
    batch, context = on_cpu.decode[-1]

    def attend() -> None:
        kernel_threads(threads)
        with torch.inference_mode():
            query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
            key, value = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, dtype=torch.bfloat16)
            while not stop.is_set():
                _attend(query, key, value)

    other = threading.Thread(target=attend, name="attend")
    other.start()
    try:
        beside = mean_seconds(block.expert, device, sizes)
    finally:
        stop.set()
        other.join()
    how = (
        f"an op of {block.experts} small experts, alone over beside decode attention on the CPU with {threads} threads"
    )
    return rounded(min(1.0, alone / beside)), how


def _hidden_rate(device: torch.device, sizes: Sizes, workers: Workers | None) -> tuple[float, str]:
    """Bytes of hidden states per second through the elementwise work of a block: attention's, where most of it is.

    What the block takes for many short prompts, less its matmuls, the attention of keys and values, and its fixed cost.
    """
    batch, heads, width = sizes.short_prompts, 8, 64
    block = Block(device, sizes.hidden, (heads, 2, width), batch, SHORT_PROMPT, workers)
    least = Block(device, SMALL, (4, 2, 32), 1, 1, workers)
    sweep = torch.zeros(min(sizes.cold_bytes, CACHE_BYTES), device=device, dtype=torch.uint8)

    def cold(call: Callable[[], object]) -> float:
        """Mean time of single calls, each after other memory has passed through the caches, as a layer's weights do."""
        taken, end = list[float](), time.perf_counter() + sizes.sample_s
        while len(taken) < 3 or time.perf_counter() < end:
            sweep.add_(1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begin)
        return statistics.fmean(taken)

    whole, matmuls, core = (cold(call) for call in (block.attention, block.projections, block.core))
    fixed = [mean_seconds(call, device, sizes) for call in (least.attention, least.projections, least.core)]
    left = whole - matmuls - core - max(0.0, fixed[0] - fixed[1] - fixed[2])
    nbytes = batch * SHORT_PROMPT * (sizes.hidden + heads * width) * torch.bfloat16.itemsize
    how = f"attention of transformers' Qwen3-MoE by the runtime's ops, {batch} prompts of {SHORT_PROMPT} tokens"
    return rounded(nbytes / max(left, 0.05 * whole)), f"{how}, less matmuls, SDPA and calls"


def copies(device: torch.device, sizes: Sizes) -> Found:
    """Both directions between pinned host memory and the GPU."""
    host = torch.empty(sizes.cold_bytes, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(sizes.cold_bytes, dtype=torch.uint8, device=device)
    found: Found = {}
    for link, target, source in (("host>gpu", gpu, host), ("gpu>host", host, gpu)):
        page = target[:PAGE_BYTES], source[:PAGE_BYTES]
        latency = mean_seconds(lambda page=page: page[0].copy_(page[1], non_blocking=True), device, sizes)  # type: ignore[misc]
        seconds = mean_seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True), device, sizes)  # type: ignore[misc]
        found[f"{link}.bandwidth_bytes_per_s"] = (
            rounded(sizes.cold_bytes / seconds),
            f"pinned buffer of {sizes.cold_bytes // MIB} MiB",
        )
        found[f"{link}.latency_us"] = rounded(1e6 * latency), f"pinned buffer of {PAGE_BYTES} bytes, copies queued"
    return found
