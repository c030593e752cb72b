"""Measures this machine, in the way the runtime uses it, and returns the Hardware that the compiler plans with.

Kernel times are lower quartiles of many short samples: what else runs on a machine only ever slows a sample down, by
two hundred times where two threads wait for each other and one of them has lost its core. Each is measured in two
rounds and the better kept, against disturbances that last. Disk rates are medians of few long samples. Buffers are
cycled so that no weight and no cached key is found in a processor's cache.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import count, cycle
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, Link, Processor, Tier

Report = Callable[[str, float], None]
"""Called with what is being measured and the share (0 to 1) of the work that is done."""

# A measured field: its value and how it was measured. Fields are dotted, relative to their part of the Hardware.
Found = dict[str, tuple[Any, str]]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PAGE = 4096
MIB = 1 << 20

# Width of the matmuls that stand for "no work": what remains is the cost of the calls.
SMALL = 128

# The attention of Qwen3-30B-A3B: 32 query heads share 4 key and value heads.
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128


@dataclass(frozen=True)
class Sizes:
    """How much to measure.

    hidden, inter, tokens: the expert and its token counts. cold_bytes: size of the buffers that are cycled.
    sample_s: time per number and round. rounds: how often each number is measured. scratch_bytes, disk_passes: the
    scratch file and how often each way of reading it is tried. decode: (batch, context) of decode attention.
    prompt: tokens of a prompt of prefill attention.
    """

    hidden: int
    inter: int
    tokens: tuple[int, ...]
    cold_bytes: int
    sample_s: float
    rounds: int
    scratch_bytes: int
    disk_passes: int
    decode: tuple[tuple[int, int], ...]
    prompt: int


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
    disk_passes=5,
    decode=((1, 256), (1, 1024), (4, 512), (8, 512), (8, 2048), (16, 1024), (32, 512), (32, 1024)),
    prompt=512,
)
# Small kernels on a GPU measure their launches: the expert is Mixtral's.
FULL_GPU = replace(FULL, hidden=4096, inter=14336, tokens=(*FULL.tokens, 4096), cold_bytes=1024 * MIB)
QUICK = Sizes(
    hidden=256,
    inter=128,
    tokens=(1, 8, 64),
    cold_bytes=4 * MIB,
    sample_s=0.02,
    rounds=1,
    scratch_bytes=32 * MIB,
    disk_passes=1,
    decode=((1, 64), (2, 128), (4, 256)),
    prompt=64,
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
    chosen, sizes = _device(device), QUICK if quick else FULL
    _check_scratch(scratch, sizes)
    with_gpu = chosen.type == "cuda"
    steps = 2 + 5 * sizes.rounds * (1 + with_gpu) + with_gpu
    taken = count()

    def step(what: str) -> None:
        report(what, next(taken) / steps)

    tiers: Found = {
        "host.capacity_bytes": (_available_memory(), "MemAvailable of /proc/meminfo when measured"),
        "disk.capacity_bytes": (shutil.disk_usage(scratch).free, "free space of the scratch folder when measured"),
    }
    step("disk")
    with _scratch_file(scratch) as file:
        links = _disk(file, sizes)
        step("processor and disk together")
        with torch.inference_mode():
            left = _together(file, sizes)
        links["disk>host.shared_speed"] = left["disk"]
    with torch.inference_mode():
        processors = {"cpu": _processor(torch.device("cpu"), sizes, step) | {"shared_speed": left["cpu"]}}
        if with_gpu:
            free, _ = torch.cuda.mem_get_info(chosen)
            tiers["gpu.capacity_bytes"] = free, "free memory by torch.cuda.mem_get_info when measured"
            gpu_sizes = QUICK if quick else FULL_GPU
            processors["gpu"] = _processor(chosen, gpu_sizes, step)
            step("copies to and from the GPU")
            links |= _copies(chosen, gpu_sizes)
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


def _rounded(value: float) -> float:
    """Four significant digits: more than any of these measurements is good for."""
    return float(f"{value:.4g}")


# Where to measure


def _device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError("--device", "", f"{device!r} is no device; give cpu or cuda:N") from None
    if chosen.type == "cpu":
        return chosen
    devices = torch.cuda.device_count()
    if chosen.type != "cuda" or (chosen.index or 0) >= devices:
        usable = ", ".join(["cpu", *(f"cuda:{index}" for index in range(devices))])
        why = (
            f"torch {torch.__version__} sees {devices} CUDA devices, so {device!r} cannot be measured; usable: {usable}"
        )
        raise ConfigError("--device", "", why)
    return torch.device("cuda", chosen.index or 0)


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


def processor_seconds() -> tuple[float, float]:
    """(seconds that the processors have worked for others than this process, seconds that they had), since the boot."""
    first, *_ = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in first.split()[1:9]]
    own, idle = sum(os.times()[:2]), sum(ticks[3:5])
    return sum(ticks) - idle - own, sum(ticks)


def _seconds(call: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
    """Seconds of one call: the median of samples that fill ``sample_s``.

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
    return statistics.median(samples)


# Disk


@dataclass(frozen=True)
class _File:
    """An open scratch file. ``direct``: reads and writes bypass the page cache."""

    descriptor: int
    direct: bool

    @property
    def how(self) -> str:
        return "O_DIRECT" if self.direct else "buffered, page cache dropped"


@contextmanager
def _scratch_file(scratch: Path) -> Iterator[_File]:
    """A nameless file: it is unlinked at once, so that not even a killed process leaves it behind."""
    path = os.path.join(scratch, f".klotski-profile-{os.getpid()}-{random.getrandbits(32):08x}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    direct = True
    try:
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError:
            # A file system without O_DIRECT refuses it with EINVAL, some after they made the file.
            Path(path).unlink(missing_ok=True)
            descriptor, direct = os.open(path, flags, 0o600), False
        os.unlink(path)
    except OSError as error:
        why = f"no file can be made in {scratch} ({error.strerror}); name another folder"
        raise ConfigError("--scratch", "", why) from None
    try:
        yield _File(descriptor, direct)
    finally:
        os.close(descriptor)


def _disk(file: _File, sizes: Sizes) -> Found:
    """Both directions of the disk link. Several requests are in flight, as the runtime's readers have them."""
    chunk, threads = 8 * MIB, 4
    noise = random.Random(0).randbytes(chunk)
    written = []
    part = sizes.scratch_bytes // 4
    for start in range(0, sizes.scratch_bytes, part):
        begin = time.perf_counter()
        _transfer(file, range(start, start + part, chunk), chunk, threads, noise)
        os.fsync(file.descriptor)
        written.append(part / (time.perf_counter() - begin))

    best, best_how = 0.0, ""
    for threads in (2, 4):
        for chunk in (4 * MIB, 8 * MIB):
            rates = []
            for _ in range(sizes.disk_passes):
                os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                begin = time.perf_counter()
                _transfer(file, range(0, sizes.scratch_bytes, chunk), chunk, threads)
                rates.append(sizes.scratch_bytes / (time.perf_counter() - begin))
            rate = statistics.median(rates)
            if rate > best:
                spread = f"{min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s"
                best, best_how = rate, f"{file.how}, {threads} threads of {chunk // MIB} MiB, median of {spread}"

    pages = random.Random(1)
    offsets = [pages.randrange(0, sizes.scratch_bytes, PAGE) for _ in range(64)]
    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    reads = [_one_page(file, offset) for offset in offsets]
    writes = [_one_page(file, offset, noise[:PAGE]) for offset in offsets]
    return {
        "disk>host.bandwidth_bytes_per_s": (_rounded(best), best_how),
        "disk>host.latency_us": (_rounded(1e6 * statistics.median(reads)), f"read of {PAGE} bytes, {file.how}"),
        "host>disk.bandwidth_bytes_per_s": (
            _rounded(statistics.median(written)),
            f"{file.how}, 4 threads of 8 MiB, then fsync, median of 4 parts",
        ),
        "host>disk.latency_us": (_rounded(1e6 * statistics.median(writes)), f"write of {PAGE} bytes, {file.how}"),
    }


def _transfer(file: _File, offsets: range, chunk: int, threads: int, data: bytes | None = None) -> None:
    """Reads the chunks at ``offsets`` or, given ``data``, writes it to each; threads take turns."""

    def lane(mine: range) -> None:
        with mmap(-1, chunk) as buffer:  # aligned to a page, as O_DIRECT wants it
            buffer[:] = data if data is not None else bytes(chunk)
            move = os.pwritev if data is not None else os.preadv
            for offset in mine:
                if move(file.descriptor, [buffer], offset) != chunk:
                    raise OSError("the disk moved less than was asked; is it full?")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lane, (offsets[first::threads] for first in range(threads))))


def _together(file: _File, sizes: Sizes) -> dict[str, tuple[float, str]]:
    """What is left of the speed of the processor and of the disk while both work: (share, how it was measured)."""
    chunk, threads, cpu = 8 * MIB, 2, torch.device("cpu")
    shapes = (sizes.inter, sizes.hidden), (sizes.inter, sizes.hidden), (sizes.hidden, sizes.inter)
    count = max(2, sizes.cold_bytes // (2 * 3 * sizes.hidden * sizes.inter))
    turn = cycle([tuple(torch.randn(shape, dtype=torch.bfloat16) / 32 for shape in shapes) for _ in range(count)])
    rows = torch.randn(SHARED_ROWS, sizes.hidden, dtype=torch.bfloat16)

    def compute() -> Tensor:
        return _expert(rows, *next(turn))

    def read() -> None:
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        _transfer(file, range(0, sizes.scratch_bytes // 2, chunk), chunk, threads)

    found: dict[str, list[float]] = {"cpu": [], "disk": []}
    for _ in range(sizes.disk_passes):
        alone = _seconds(compute, cpu, replace(sizes, sample_s=sizes.sample_s / 2))
        read_alone = _elapsed(read)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(_elapsed, read)
            taken = []
            while not reading.done():
                taken.append(_elapsed(compute))
        found["cpu"].append(min(1.0, alone / statistics.median(taken)))
        found["disk"].append(min(1.0, read_alone / reading.result()))
    how = f"an expert of {SHARED_ROWS} tokens computing, {threads} threads reading {chunk // MIB} MiB each; median of {sizes.disk_passes}"
    return {part: (_rounded(statistics.median(shares)), how) for part, shares in found.items()}


def _elapsed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _one_page(file: _File, offset: int, data: bytes | None = None) -> float:
    with mmap(-1, PAGE) as buffer:
        buffer[:] = data if data is not None else bytes(PAGE)
        move = os.pwritev if data is not None else os.preadv
        begin = time.perf_counter()
        move(file.descriptor, [buffer], offset)
        return time.perf_counter() - begin


# Processors


def _processor(device: torch.device, sizes: Sizes, step: Callable[[str], None]) -> Found:
    rounds = [_processor_round(device, sizes, step) for _ in range(sizes.rounds)]
    return {field: _typical(field, [found[field] for found in rounds]) for field in rounds[0]}


def _typical(field: str, found: list[tuple[Any, str]]) -> tuple[Any, str]:
    """What is typical: the median, of matmul tables at each point."""
    if field.startswith("matmul."):
        return tuple(
            statistics.median_low(points) for points in zip(*(table for table, _ in found), strict=True)
        ), found[0][1]
    return statistics.median_low(found)


def _processor_round(device: torch.device, sizes: Sizes, step: Callable[[str], None]) -> Found:
    unit = "CPU" if device.type == "cpu" else "GPU"
    found: Found = {}
    fastest_read = 0.0
    for dtype in DTYPES:
        step(f"{unit}: expert matmuls in {dtype}")
        points, read = _matmul(device, dtype, sizes)
        fastest_read = max(fastest_read, read)
        how = f"one expert (three F.linear, hidden {sizes.hidden}, intermediate {sizes.inter}), weights not in cache"
        found[f"matmul.{dtype}"] = points, how
    found["memory_bytes_per_s"] = _rounded(fastest_read), "fastest read of an expert's weights in those matmuls"
    step(f"{unit}: decode attention")
    found["kv_bytes_per_s"] = _decode_attention(device, sizes)
    step(f"{unit}: prefill attention")
    found["prefill_attention_flops_per_s"] = _prefill_attention(device, sizes)
    step(f"{unit}: fixed costs")
    return found | _fixed_costs(device, sizes)


def _expert(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)


def _matmul(device: torch.device, dtype: str, sizes: Sizes) -> tuple[tuple[tuple[int, float], ...], float]:
    """Points (tokens, flops per second) of one expert, and the fastest rate at which one read its weights, bytes/s.

    On a CPU the fixed cost of the calls is taken off, because expert_op_us holds it; on a GPU it hides behind the
    kernel before.
    """
    torch_dtype = DTYPES[dtype]
    params = 3 * sizes.hidden * sizes.inter
    nbytes = params * torch_dtype.itemsize
    shapes = (sizes.inter, sizes.hidden), (sizes.inter, sizes.hidden), (sizes.hidden, sizes.inter)
    experts = [
        tuple(torch.randn(shape, device=device, dtype=torch_dtype) / 32 for shape in shapes)
        for _ in range(max(2, -(-sizes.cold_bytes // nbytes)))
    ]
    turn = cycle(experts)
    small = [torch.randn(SMALL, SMALL, device=device, dtype=torch_dtype) for _ in range(4)]
    fixed = _seconds(lambda: _expert(*small), device, sizes) if device.type == "cpu" else 0.0
    points, fastest = [], 0.0
    for tokens in sizes.tokens:
        rows = torch.randn(tokens, sizes.hidden, device=device, dtype=torch_dtype)
        seconds = _seconds(lambda rows=rows: _expert(rows, *next(turn)), device, sizes)  # type: ignore[misc]
        seconds = max(seconds - fixed, seconds / 2)
        points.append((tokens, _rounded(2 * params * tokens / seconds)))
        fastest = max(fastest, nbytes / seconds)
    return tuple(points), fastest


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention exactly as the installed transformers calls it."""
    heads = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, is_causal=True)
    output: Tensor
    output, _ = sdpa_attention_forward(heads, query, key, value, mask, scaling=HEAD_DIM**-0.5)  # type: ignore[arg-type]
    return output


def _decode_attention(device: torch.device, sizes: Sizes) -> tuple[float, str]:
    """Bytes of keys and values per second: the slope of time over bytes, the intercept being part of attention_op_us.

    Least squares in relative error, because times span two orders of magnitude.
    """
    pool = torch.randn(sizes.cold_bytes // 2, device=device, dtype=torch.bfloat16)
    rows = []
    for batch, context in sizes.decode:
        elements = batch * KV_HEADS * context * HEAD_DIM
        caches = pool[: len(pool) // (2 * elements) * 2 * elements].view(-1, 2, batch, KV_HEADS, context, HEAD_DIM)
        turn = cycle(caches.unbind())
        query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
        # Prompts of one batch differ in length, so a decode step carries a mask.
        mask = torch.ones(batch, 1, 1, context, device=device, dtype=torch.bool)

        def attend(query: Tensor = query, mask: Tensor = mask, turn: Iterator[Tensor] = turn) -> Tensor:
            key, value = next(turn)
            return _attend(query, key, value, mask)

        rows.append((2 * elements * 2, _seconds(attend, device, sizes)))
    design = torch.tensor([[1 / seconds, nbytes / seconds] for nbytes, seconds in rows], dtype=torch.float64)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    fixed, per_byte = torch.linalg.lstsq(design, ones).solution.flatten().tolist()
    if per_byte <= 0:  # too noisy for a slope: take the largest cache as it is
        nbytes, seconds = max(rows)
        fixed, per_byte = 0.0, seconds / nbytes
    how = f"slope over {len(rows)} sizes of transformers' SDPA, {QUERY_HEADS} query and {KV_HEADS} KV heads, bf16"
    return _rounded(1 / per_byte), f"{how}, masked; fixed part {1e6 * fixed:.0f} us"


def _prefill_attention(device: torch.device, sizes: Sizes) -> tuple[float, str]:
    """Flops per second of attention over whole prompts: 4 x heads x head_dim for every pair of positions."""
    batch, prompt = 2, sizes.prompt
    query = torch.randn(batch, QUERY_HEADS, prompt, HEAD_DIM, device=device, dtype=torch.bfloat16)
    key, value = torch.randn(2, batch, KV_HEADS, prompt, HEAD_DIM, device=device, dtype=torch.bfloat16)
    seconds = _seconds(lambda: _attend(query, key, value, None), device, sizes)
    flops = 4 * QUERY_HEADS * HEAD_DIM * batch * prompt**2
    how = f"transformers' SDPA, {batch} whole prompts of {prompt} tokens, bf16, all pairs of positions counted"
    return _rounded(flops / seconds), how


def _fixed_costs(device: torch.device, sizes: Sizes) -> Found:
    """What an op costs however little it computes: everything here is so small that only calls and launches remain."""
    hidden = SMALL
    kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    weight = torch.randn(hidden, hidden, **kind)
    rows = torch.randn(8, hidden, **kind)
    index = torch.arange(8, device=device)
    shares = torch.rand(8, 1, **kind)
    total = torch.zeros(8, hidden, **kind)

    def expert() -> None:
        total.index_add_(0, index, _expert(rows[index], weight, weight, weight) * shares)

    attention, projections, _ = _attention_block(hidden, kind, 1, 1, (4, 2, 32))
    whole, matmuls = _seconds(attention, device, sizes), _seconds(projections, device, sizes)
    small = _seconds(lambda: F.linear(rows, weight), device, sizes)
    return {
        "op_us": (_rounded(1e6 * small), f"F.linear of 8 rows, {hidden} x {hidden}"),
        "hidden_bytes_per_s": _hidden_rate(device, sizes),
        "router_op_us": (
            _rounded(1e6 * _seconds(_moe_block(hidden, kind), device, sizes)),
            "mixture-of-experts block of transformers' Qwen3-MoE without its experts (norm, router, copies), 1 token",
        ),
        "attention_op_us": (
            _rounded(1e6 * max(whole - matmuls, small)),
            "attention block of transformers' Qwen3-MoE (norms, rotary, cache, SDPA, residual), 1 token, less matmuls",
        ),
        "expert_op_us": (
            _rounded(1e6 * _seconds(expert, device, sizes)),
            f"gather of 8 rows, three F.linear of {hidden} x {hidden}, activation, weighting, index_add",
        ),
    }


def _hidden_rate(device: torch.device, sizes: Sizes) -> tuple[float, str]:
    """Bytes of hidden states per second through the elementwise work of a block: attention's, where most of it is.

    What the block takes for many short prompts, less its matmuls, the attention of keys and values, and its fixed cost.
    """
    kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    batch, queries, heads, width = max(1, sizes.prompt // SHORT_PROMPT), SHORT_PROMPT, 8, 64
    whole, matmuls, core = _attention_block(sizes.hidden, kind, batch, queries, (heads, 2, width))
    fixed, fixed_matmuls, fixed_core = _attention_block(SMALL, kind, 1, 1, (4, 2, 32))
    sweep = torch.zeros(min(sizes.cold_bytes, CACHE_BYTES), device=device, dtype=torch.uint8)

    def cold(call: Callable[[], object]) -> float:
        """Median time of single calls, each after other memory has passed through the caches, as a layer's weights do."""
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
        return statistics.median(taken)

    seconds = [cold(call) for call in (whole, matmuls, core)]
    seconds += [_seconds(call, device, sizes) for call in (fixed, fixed_matmuls, fixed_core)]
    left = seconds[0] - seconds[1] - seconds[2] - max(0.0, seconds[3] - seconds[4] - seconds[5])
    nbytes = batch * queries * (sizes.hidden + heads * width) * torch.bfloat16.itemsize
    how = (
        f"attention block of transformers' Qwen3-MoE, {batch} prompts of {queries} tokens, less matmuls, SDPA and calls"
    )
    return _rounded(nbytes / max(left, 0.05 * seconds[0])), how


def _moe_block(hidden: int, kind: dict[str, Any]) -> Callable[[], Tensor]:
    """What the runtime's router op does for one token: norm, router, and the hidden state's way between two types."""
    config = Qwen3MoeConfig(hidden_size=hidden, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=8)
    layer = Qwen3MoeDecoderLayer(config, 0).to(**kind)
    layer.mlp.experts.forward = lambda states, *_: torch.zeros_like(states)  # type: ignore[method-assign]
    state, wide = torch.randn(1, hidden, **kind), torch.ones(1, hidden, device=kind["device"], dtype=torch.float32)

    def block() -> Tensor:
        normed = layer.post_attention_layernorm(state)
        out = layer.mlp(normed[None])
        wide.copy_(state).add_((out[0] if isinstance(out, tuple) else out)[0])
        return state.copy_(normed)

    return block


def _attention_block(
    hidden: int, kind: dict[str, Any], batch: int, queries: int, shape: tuple[int, int, int]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """A decoder layer's attention as the runtime runs it, the matmuls in it alone, and its keys and values alone.

    shape: query heads, key and value heads, width of a head. One query has 16 cached positions before it.
    """
    (heads, kv_heads, width), device = shape, kind["device"]
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "num_experts": 2,
        "moe_intermediate_size": 8,
        "attn_implementation": "sdpa",
    }
    config = Qwen3MoeConfig(**settings)
    layer = Qwen3MoeDecoderLayer(config, 0).to(**kind)
    seen = queries if queries > 1 else 17
    wide = torch.randn(batch, queries, hidden, device=device)
    state = torch.empty(batch, queries, hidden, **kind)
    positions = torch.arange(seen - queries, seen, device=device).expand(batch, queries)
    rotation = Qwen3MoeRotaryEmbedding(config=config).to(device)(state, positions)
    cache = _Slot(torch.zeros(2, batch, kv_heads, seen, width, **kind), queries)
    mask = torch.ones(batch, 1, queries, seen, device=device, dtype=torch.bool).tril(seen - queries)
    weights = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj]
    mixed = torch.randn(batch, queries, heads * width, **kind)
    query = torch.randn(batch, heads, queries, width, **kind)

    def attention() -> Tensor:
        state.copy_(wide)
        output: Tensor = layer.self_attn(
            hidden_states=layer.input_layernorm(state),
            position_embeddings=rotation,
            attention_mask=mask,
            past_key_values=cache,
        )[0]
        return state.add_(output)

    def projections() -> Tensor:
        for part in weights:
            output = F.linear(mixed if part.in_features == heads * width else state, part.weight)
        return output

    def core() -> Tensor:
        groups = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
        output: Tensor
        output, _ = sdpa_attention_forward(groups, query, cache.keys, cache.values, mask, scaling=width**-0.5)  # type: ignore[arg-type]
        return output

    return attention, projections, core


class _Slot:
    """The part of a transformers cache that attention uses, writing in place as the runtime's cache does."""

    def __init__(self, slot: Tensor, queries: int) -> None:
        (self.keys, self.values), self._queries = slot, queries

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -self._queries :], self.values[:, :, -self._queries :] = keys, values
        return self.keys, self.values


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
            _rounded(sizes.cold_bytes / seconds),
            f"pinned buffer of {sizes.cold_bytes // MIB} MiB",
        )
        found[f"{link}.latency_us"] = _rounded(1e6 * latency), f"pinned buffer of {PAGE} bytes, copies queued"
    return found
