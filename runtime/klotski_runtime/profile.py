"""Measures this machine, in the way the runtime uses it, and returns the Hardware that the compiler plans with.

Kernel times are means of many short samples; each number is measured in several rounds, spread over the whole time, and the
median of the rounds kept, against disturbances that last. Buffers are cycled so that no weight and no cached key is found in a
processor's cache. Whole blocks are measured through the runtime's own ops, so that their small costs are in the number.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, Link, Processor, Tier
from klotski_runtime.attention import grouped_attention
from klotski_runtime.checkpoint import PAGE
from klotski_runtime.device import context_bytes, cpu_threads, gpu_of, use
from klotski_runtime.native import can_compile
from klotski_runtime.profile_block import SMALL, Block
from klotski_runtime.profile_disk import MIB, Found, Turns, fill, rounded, scratch_file
from klotski_runtime.wide import Widener
from klotski_runtime.workers import Task, Workers, kernel_threads

Report = Callable[[str, float], None]
"""Called with what is being measured and the share (0 to 1) of the work that is done."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# The attention of Qwen3-30B-A3B: 32 query heads share 4 key and value heads.
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128


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


WORTH_WIDENING = 0.9  # of the time of a 16-bit matmul that one through fp32 may take
CACHE_BYTES = 64 * MIB  # more than caches hold
SHORT_PROMPT = 32  # tokens: of prompts whose attention is mostly elementwise work
SHARED_ROWS = 32  # tokens of the expert that computes while the disk is read

FULL = Sizes(
    hidden=2048,
    inter=768,
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    cold_bytes=320 * MIB,
    sample_s=0.25,
    rounds=3,
    scratch_bytes=1024 * MIB,
    turns=6,
    turn_s=0.4,
    decode=((1, 256), (1, 1024), (4, 512), (8, 512), (8, 2048), (16, 1024), (32, 512), (32, 1024)),
    prompt=512,
    short_prompts=16,
)
# Small kernels on a GPU measure their launches: the expert is Mixtral's, caches are a gigabyte, and prompts are many.
FULL_GPU = replace(
    FULL,
    hidden=4096,
    inter=14336,
    tokens=(*FULL.tokens, 4096),
    cold_bytes=1024 * MIB,
    sample_s=0.15,
    decode=((1, 1024), (16, 1024), (64, 1024), (128, 1024), (256, 1024), (512, 1024)),
    prompt=2048,
    short_prompts=1024,
)
# Machines with a GPU have processors with large caches, and cost more by the minute.
FULL_BESIDE_GPU = replace(
    FULL, cold_bytes=1024 * MIB, sample_s=0.15, rounds=2, turns=3, decode=(*FULL.decode, (128, 1024), (256, 1024))
)
QUICK = Sizes(
    hidden=256,
    inter=128,
    tokens=(1, 8, 64),
    cold_bytes=4 * MIB,
    sample_s=0.02,
    rounds=1,
    scratch_bytes=32 * MIB,
    turns=1,
    turn_s=0.02,
    decode=((1, 64), (2, 128), (4, 256)),
    prompt=64,
    short_prompts=2,
)


def measure(
    device: str = "cpu",
    scratch: Path = Path("."),
    *,
    name: str = "this-machine",
    quick: bool = False,
    report: Report = lambda what, done: None,
) -> Hardware:
    """Measures memories, links and processors of this machine.

    device: ``cpu`` or ``cuda:N``; with a GPU, the host's processor is measured too. scratch: a folder on the disk that
    weights and spilled KV would live on; it needs 1 GiB for a moment. quick: sizes for a test, not for planning.
    Raises ConfigError if the device or the folder cannot be used.
    """
    chosen = torch.device("cpu") if device == "cpu" else gpu_of(device)
    with_gpu = chosen.type == "cuda"
    sizes = QUICK if quick else FULL_BESIDE_GPU if with_gpu else FULL
    _check_scratch(scratch, sizes)
    units = {"cpu": (torch.device("cpu"), sizes)}
    if with_gpu:
        use(chosen)
        torch.set_num_threads(cpu_threads(chosen))
        units["gpu"] = chosen, QUICK if quick else FULL_GPU
    steps = 1 + sizes.rounds * (1 + 5 * len(units)) + with_gpu
    taken = count()

    def step(what: str) -> None:
        report(what, next(taken) / steps)

    tiers: Found = {
        "host.capacity_bytes": (_available_memory(), "MemAvailable of /proc/meminfo when measured"),
        "disk.capacity_bytes": (shutil.disk_usage(scratch).free, "free space of the scratch folder when measured"),
    }
    rounds: dict[str, list[Found]] = {unit: [] for unit in units}
    with scratch_file(scratch, sizes.scratch_bytes) as file, torch.inference_mode():
        step("disk: writing")
        links = fill(file)
        turns = Turns(file, _shared_work(sizes), sizes.turn_s)
        for _ in range(sizes.rounds):
            step("disk: reading, with and without the processor at work")
            turns.take(sizes.turns)
            for unit, (where, its_sizes) in units.items():
                with _surroundings(unit, chosen):
                    rounds[unit].append(_processor_round(where, its_sizes, step))
        links |= turns.found()
    processors = {unit: _typical(found) for unit, found in rounds.items()}
    processors["cpu"]["shared_speed"] = turns.processor_speed()
    if with_gpu:
        gpu, gpu_sizes = units["gpu"]
        step("copies to and from the GPU")
        links |= _copies(gpu, gpu_sizes)
        with torch.inference_mode():
            processors["gpu"]["beside_cpu"] = beside_cpu(gpu, gpu_sizes, sizes)
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info(gpu)
        left = total - context_bytes(gpu)
        tiers["gpu.capacity_bytes"] = left, "what the driver, its context and other processes leave"
    report("done", 1.0)

    stamp = f"measured with klotski-profile, {date.today().isoformat()}"
    parts: dict[str, Found] = {"tiers": tiers, "links": links}
    parts |= {f"processors.{unit}": found for unit, found in processors.items()}
    sources = {f"{part}.{field}": how for part, found in parts.items() for field, (_, how) in found.items()}
    return Hardware(
        name=name,
        description=_describe(chosen),
        compute_tier="gpu" if with_gpu else "host",
        tiers={tier: Tier(**fields) for tier, fields in _grouped(tiers).items()},
        links={link: Link(**fields) for link, fields in _grouped(links).items()},
        processors={
            unit: Processor(tier="host" if unit == "cpu" else "gpu", **_processor_fields(found))
            for unit, found in processors.items()
        },
        sources={field: f"{stamp}: {how}" for field, how in sources.items()},
    )


def _grouped(found: Found) -> dict[str, dict[str, Any]]:
    """``{"host.capacity_bytes": ...}`` as ``{"host": {"capacity_bytes": ...}}``."""
    groups: dict[str, dict[str, Any]] = {}
    for field, (value, _) in found.items():
        group, _, leaf = field.partition(".")
        groups.setdefault(group, {})[leaf] = value
    return groups


def _processor_fields(found: Found) -> dict[str, Any]:
    plain = {field: value for field, (value, _) in found.items() if "." not in field}
    return plain | _grouped({field: pair for field, pair in found.items() if "." in field})


# Where to measure


def _check_scratch(scratch: Path, sizes: Sizes) -> None:
    if not scratch.is_dir():
        raise ConfigError("--scratch", "", f"{scratch} is not a folder; give one on the disk that is to be measured")
    free = shutil.disk_usage(scratch).free
    if free < 2 * sizes.scratch_bytes:
        need = f"{free:,} bytes are free and {2 * sizes.scratch_bytes:,} are needed"
        why = f"{scratch}: {need}; free some or name another folder"
        raise ConfigError("--scratch", "", why)


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024


def _describe(device: torch.device) -> str:
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    parts = [f"{os.cpu_count()} cores {cpu}", f"torch {torch.__version__} with {torch.get_num_threads()} threads"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(parts)


# Time


def _surroundings(unit: str, device: torch.device) -> AbstractContextManager[object]:
    """As it is when plans run: beside a GPU, the CPU is not alone; on a GPU, kernels are issued to a stream of their own."""
    if device.type == "cpu":
        return nullcontext()
    return _at_work(device) if unit == "cpu" else torch.cuda.stream(torch.cuda.Stream(device))


@contextmanager
def _at_work(gpu: torch.device) -> Iterator[None]:
    """With a thread that copies to the GPU and one that issues kernels, as there are whenever the CPU helps a GPU."""
    stopped = threading.Event()
    host = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)
    there, small = host.to(gpu), torch.randn(SMALL, SMALL, device=gpu)

    def repeat(call: Callable[[], object]) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(gpu)):
            while not stopped.is_set():
                for _ in range(8):
                    call()
                torch.cuda.current_stream(gpu).synchronize()

    calls: tuple[Callable[[], object], ...] = (
        lambda: there.copy_(host, non_blocking=True),
        lambda: F.linear(small, small),
    )
    threads = [threading.Thread(target=repeat, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def processor_seconds() -> tuple[float, float]:
    """(seconds that the processors have worked for others than this process, seconds that they had), since the boot."""
    first, *_ = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in first.split()[1:9]]
    own, idle = sum(os.times()[:2]), sum(ticks[3:5])
    return sum(ticks) - idle - own, sum(ticks)


def _seconds(call: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
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


# Processors


def _typical(rounds: list[Found]) -> Found:
    """The median over rounds, of matmul tables at each point."""

    def median(field: str) -> tuple[Any, str]:
        found = [of[field] for of in rounds]
        if not field.startswith("matmul."):
            return statistics.median_low(found)
        return tuple(statistics.median_low(points) for points in zip(*(t for t, _ in found), strict=True)), found[0][1]

    return {field: median(field) for field in rounds[0]}


def _shared_work(sizes: Sizes) -> Callable[[], object]:
    """The matmuls of experts over a few tokens each, side by side on the CPU, weights not in cache, in whichever way is faster."""
    host = torch.device("cpu")
    turn, workers = _experts(host, torch.bfloat16, sizes), Workers(torch.get_num_threads())
    rows = torch.randn(SHARED_ROWS, sizes.hidden, dtype=torch.bfloat16)
    ways: list[Task] = [lambda worker: _expert(rows, *next(turn))]
    if can_compile():
        ways.append(_widened(Widener(1, max(sizes.hidden, sizes.inter), workers), workers, rows, turn, sizes))
    calls = [partial(workers.run, [way] * workers.count) for way in ways]
    return min(calls, key=lambda call: _seconds(call, host, sizes))


def _processor_round(device: torch.device, sizes: Sizes, step: Callable[[str], None]) -> Found:
    unit = "CPU" if device.type == "cpu" else "GPU"
    found: Found = {}
    fastest_read = 0.0
    for dtype in DTYPES:
        step(f"{unit}: expert matmuls in {dtype}")
        points, read, widen_rows = _matmul(device, dtype, sizes)
        fastest_read = max(fastest_read, read)
        if device.type == "cpu" and dtype == "bf16":
            why = "nowhere" if can_compile() else "without a C compiler, which it takes"
            found["widen_rows"] = (
                widen_rows,
                f"from where on those matmuls, faster through fp32, are in the table so; 0: {why}",
            )
            found["threads"] = torch.get_num_threads(), "PyTorch's"
        how = f"experts side by side (each three F.linear, hidden {sizes.hidden}, intermediate {sizes.inter}), weights not in cache"
        found[f"matmul.{dtype}"] = points, how
    found["memory_bytes_per_s"] = rounded(fastest_read), "fastest read of an expert's weights in those matmuls"
    step(f"{unit}: decode attention")
    found["kv_bytes_per_s"] = _decode_attention(device, sizes)
    step(f"{unit}: prefill attention")
    found["prefill_attention_flops_per_s"] = _prefill_attention(device, sizes)
    step(f"{unit}: fixed costs")
    return found | _fixed_costs(device, sizes)


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


def _matmul(device: torch.device, dtype: str, sizes: Sizes) -> tuple[tuple[tuple[int, float], ...], float, int]:
    """Points (tokens, flops per second) of experts, the fastest rate at which they read their weights, bytes/s, and from how many
    tokens on 16-bit matmuls are faster through fp32 (0: never), which then give the points. On a CPU as many run side by side as there
    are workers.

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
        return _seconds(lambda: workers.run([task] * workers.count), device, sizes) / workers.count

    fixed = each(lambda worker: _expert(*small)) if on_cpu else 0.0
    may_widen = on_cpu and torch_dtype.itemsize == 2 and can_compile()
    widener = Widener(int(may_widen), max(sizes.hidden, sizes.inter), workers)
    points, fastest, widen_rows = [], 0.0, 0
    for tokens in sizes.tokens:
        rows = torch.randn(tokens, sizes.hidden, device=device, dtype=torch_dtype)
        seconds = each(lambda worker, rows=rows: _expert(rows, *next(turn)))  # type: ignore[misc]
        if may_widen:
            wide = each(_widened(widener, workers, rows, turn, sizes))
            widen_rows = (widen_rows or tokens) if wide < WORTH_WIDENING * seconds else 0
            seconds = wide if widen_rows else seconds
        seconds = max(seconds - fixed, seconds / 2)
        points.append((tokens, rounded(2 * params * tokens / seconds)))
        fastest = max(fastest, nbytes / seconds)
    workers.close()
    return tuple(points), fastest, widen_rows


def _widened(
    widener: Widener, workers: Workers, rows: Tensor, turn: Iterator[tuple[Tensor, ...]], sizes: Sizes
) -> Task:
    """An expert through fp32, the next one in every call."""
    outs = [
        [rows.new_empty(len(rows), n) for n in (sizes.inter, sizes.inter, sizes.hidden)] for _ in range(workers.count)
    ]

    def task(worker: int) -> None:
        (gate, up, down), (inner, other, out) = next(turn), outs[worker]
        widener.mm(rows, (gate, inner), (up, other), worker=worker)
        widener.mm(F.silu(inner, inplace=True).mul_(other), (down, out), worker=worker)

    return task


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Grouped-query attention as the runtime calls it."""
    heads = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, is_causal=True)
    output: Tensor
    output, _ = grouped_attention(heads, query, key, value, None, scaling=HEAD_DIM**-0.5)
    return output


def _decode_attention(device: torch.device, sizes: Sizes) -> tuple[float, str]:
    """Bytes of keys and values per second: the slope of time over bytes, the intercept being part of attention_op_us.

    Least squares in relative error, because times span two orders of magnitude.
    """
    pool = torch.randn(sizes.cold_bytes // 64, device=device, dtype=torch.bfloat16).repeat(32)
    rows = []
    for batch, context in sizes.decode:
        elements = batch * KV_HEADS * context * HEAD_DIM
        caches = pool[: len(pool) // (2 * elements) * 2 * elements].view(-1, 2, batch, KV_HEADS, context, HEAD_DIM)
        turn = cycle(caches.unbind())
        query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)

        def attend(query: Tensor = query, turn: Iterator[Tensor] = turn) -> Tensor:
            key, value = next(turn)
            return _attend(query, key, value)

        rows.append((2 * elements * 2, _seconds(attend, device, sizes)))
    design = torch.tensor([[1 / seconds, nbytes / seconds] for nbytes, seconds in rows], dtype=torch.float64)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    fixed, per_byte = torch.linalg.lstsq(design, ones).solution.flatten().tolist()
    if per_byte <= 0:  # too noisy for a slope: take the largest cache as it is
        nbytes, seconds = max(rows)
        fixed, per_byte = 0.0, seconds / nbytes
    how = f"slope over {len(rows)} sizes of grouped attention, {QUERY_HEADS} query and {KV_HEADS} KV heads, bf16"
    return rounded(1 / per_byte), f"{how}; fixed part {1e6 * fixed:.0f} us"


def _prefill_attention(device: torch.device, sizes: Sizes) -> tuple[float, str]:
    """Flops per second of attention over whole prompts: 4 x heads x head_dim for every pair of positions."""
    batch, prompt = 2, sizes.prompt
    query = torch.randn(batch, QUERY_HEADS, prompt, HEAD_DIM, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, KV_HEADS, prompt, HEAD_DIM, device=device, dtype=torch.bfloat16)
    seconds = _seconds(lambda: _attend(query, key, value), device, sizes)
    flops = 4 * QUERY_HEADS * HEAD_DIM * batch * prompt**2
    how = f"transformers' SDPA, {batch} whole prompts of {prompt} tokens, bf16, all pairs of positions counted"
    return rounded(flops / seconds), how


def _fixed_costs(device: torch.device, sizes: Sizes) -> Found:
    """What an op costs however little it computes: everything here is so small that only calls and launches remain."""
    weight = torch.randn(SMALL, SMALL, device=device, dtype=torch.bfloat16)
    rows = torch.randn(8, SMALL, device=device, dtype=torch.bfloat16)
    small = _seconds(lambda: F.linear(rows, weight), device, sizes)
    block = Block(device, SMALL, (4, 2, 32), batch=1, queries=1)
    attention = _seconds(block.attention, device, sizes) - _seconds(block.projections, device, sizes)
    what = f"transformers' Qwen3-MoE by the runtime's ops, {SMALL} wide, 1 token"
    return {
        "op_us": (rounded(1e6 * small), f"F.linear of 8 rows, {SMALL} x {SMALL}"),
        "hidden_bytes_per_s": _hidden_rate(device, sizes),
        "router_op_us": (
            rounded(1e6 * _seconds(block.router, device, sizes)),
            f"router (norm, gate, choice) of {what}",
        ),
        "attention_op_us": (
            rounded(1e6 * max(attention, small)),
            f"attention (norms, rotary, mask, cache, SDPA, residual) of {what}, less matmuls",
        ),
        "expert_op_us": (
            rounded(1e6 * _seconds(block.expert, device, sizes) / block.experts),
            f"expert (gather, three matmuls, activation, weighting, index_add), {block.experts} at once, of {what}",
        ),
    }


def beside_cpu(device: torch.device, sizes: Sizes, on_cpu: Sizes) -> tuple[float, str]:
    """What is left of the speed of a GPU's small ops while the CPU attends, as it does in a plan that lets it."""
    block = Block(device, SMALL, (4, 2, 32), batch=1, queries=1)
    alone, threads, stop = _seconds(block.expert, device, sizes), torch.get_num_threads(), threading.Event()
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
        beside = _seconds(block.expert, device, sizes)
    finally:
        stop.set()
        other.join()
    how = (
        f"an op of {block.experts} small experts, alone over beside decode attention on the CPU with {threads} threads"
    )
    return rounded(min(1.0, alone / beside)), how


def _hidden_rate(device: torch.device, sizes: Sizes) -> tuple[float, str]:
    """Bytes of hidden states per second through the elementwise work of a block: attention's, where most of it is.

    What the block takes for many short prompts, less its matmuls, the attention of keys and values, and its fixed cost.
    """
    batch, heads, width = sizes.short_prompts, 8, 64
    block = Block(device, sizes.hidden, (heads, 2, width), batch, SHORT_PROMPT)
    least = Block(device, SMALL, (4, 2, 32), batch=1, queries=1)
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
    fixed = [_seconds(call, device, sizes) for call in (least.attention, least.projections, least.core)]
    left = whole - matmuls - core - max(0.0, fixed[0] - fixed[1] - fixed[2])
    nbytes = batch * SHORT_PROMPT * (sizes.hidden + heads * width) * torch.bfloat16.itemsize
    how = f"attention of transformers' Qwen3-MoE by the runtime's ops, {batch} prompts of {SHORT_PROMPT} tokens"
    return rounded(nbytes / max(left, 0.05 * whole)), f"{how}, less matmuls, SDPA and calls"


# Copies between host and GPU


def _copies(device: torch.device, sizes: Sizes) -> Found:
    """Both directions between pinned host memory and the GPU."""
    host = torch.empty(sizes.cold_bytes, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(sizes.cold_bytes, dtype=torch.uint8, device=device)
    found: Found = {}
    for link, target, source in (("host>gpu", gpu, host), ("gpu>host", host, gpu)):
        latency = _seconds(lambda t=target, s=source: t[:PAGE].copy_(s[:PAGE], non_blocking=True), device, sizes)  # type: ignore[misc]
        seconds = _seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True), device, sizes)  # type: ignore[misc]
        found[f"{link}.bandwidth_bytes_per_s"] = (
            rounded(sizes.cold_bytes / seconds),
            f"pinned buffer of {sizes.cold_bytes // MIB} MiB",
        )
        found[f"{link}.latency_us"] = rounded(1e6 * latency), f"pinned buffer of {PAGE} bytes, copies queued"
    return found
