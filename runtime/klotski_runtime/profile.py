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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from klotski_compiler.errors import ConfigError
from klotski_compiler.hardware import Hardware, Link, Processor, Tier
from klotski_runtime.device import context_bytes, cpu_threads, gpu_of, use
from klotski_runtime.native import can_compile
from klotski_runtime.profile_block import SMALL
from klotski_runtime.profile_disk import MIB, Found, Turns, fill, rounded, scratch_file, weight_pieces
from klotski_runtime.profile_kernels import (
    DTYPES,
    Sizes,
    beside_cpu,
    copies,
    decode_attention,
    fixed_costs,
    head_rates,
    matmul_rates,
    prefill_attention,
    shared_work,
)

Report = Callable[[str, float], None]
"""Called with what is being measured and the share (0 to 1) of the work that is done."""

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
    weights: Path | None = None,
    *,
    name: str = "this-machine",
    quick: bool = False,
    report: Report = lambda what, done: None,
) -> Hardware:
    """Measures memories, links and processors of this machine.

    device: ``cpu`` or ``cuda:N``; with a GPU, the host's processor is measured too. scratch: a folder on the disk that
    weights and spilled KV would live on; it needs 1 GiB for a moment. weights: a checkpoint's folder, whose files are then what is read.
    quick: sizes for a test, not for planning. Raises ConfigError if the device or a folder cannot be used.
    """
    chosen = torch.device("cpu") if device == "cpu" else gpu_of(device)
    with_gpu = chosen.type == "cuda"
    sizes = QUICK if quick else FULL_BESIDE_GPU if with_gpu else FULL
    _check_scratch(scratch, sizes)
    cold = weight_pieces(weights) if weights else []
    units = {"cpu": (torch.device("cpu"), sizes)}
    if with_gpu:
        use(chosen)
        torch.set_num_threads(cpu_threads(chosen))
        units["gpu"] = chosen, QUICK if quick else FULL_GPU
    steps = 1 + sizes.rounds * (2 + 5 * len(units) - with_gpu) + with_gpu
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
        read = (cold, f"the files of {weights.name}") if weights else (file.pieces, file.how)
        turns = Turns(*read, shared_work(sizes), sizes.turn_s)
        for _ in range(sizes.rounds):
            step("disk: reading, with and without the processor at work")
            turns.take(sizes.turns)
            for unit, (where, its_sizes) in units.items():
                with _surroundings(unit, chosen):
                    rounds[unit].append(_processor_round(where, its_sizes, step, not with_gpu))
        links |= turns.found()
    processors = {unit: _typical(found) for unit, found in rounds.items()}
    processors["cpu"]["shared_speed"] = turns.processor_speed()
    if with_gpu:
        gpu, gpu_sizes = units["gpu"]
        step("copies to and from the GPU")
        links |= copies(gpu, gpu_sizes)
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


# Processors


def _typical(rounds: list[Found]) -> Found:
    """The median over rounds, of matmul tables at each point."""

    def median(field: str) -> tuple[Any, str]:
        found = [of[field] for of in rounds]
        if not isinstance(found[0][0], tuple):
            return statistics.median_low(found)
        return tuple(statistics.median_low(points) for points in zip(*(t for t, _ in found), strict=True)), found[0][1]

    return {field: median(field) for field in rounds[0]}


def _processor_round(device: torch.device, sizes: Sizes, step: Callable[[str], None], heads: bool) -> Found:
    """heads: whether it may find the next tokens by our own kernel."""
    unit = "CPU" if device.type == "cpu" else "GPU"
    found: Found = {}
    fastest_read = 0.0
    for dtype in DTYPES:
        step(f"{unit}: expert matmuls in {dtype}")
        points, read, (least, most) = matmul_rates(device, dtype, sizes)
        fastest_read = max(fastest_read, read)
        if device.type == "cpu" and dtype == "bf16":
            why = "nowhere" if can_compile() else "without a C compiler, which it takes"
            found["least_own_rows"] = (
                least,
                f"from where on those matmuls, faster by the package's own kernel, are in the table so; 0: {why}",
            )
            found["most_own_rows"] = most, "up to where; 0: any number"
            found["threads"] = torch.get_num_threads(), "PyTorch's"
        how = f"experts side by side (each three F.linear, hidden {sizes.hidden}, intermediate {sizes.inter}), weights not in cache"
        found[f"matmul.{dtype}"] = points, how
    found["memory_bytes_per_s"] = rounded(fastest_read), "fastest read of an expert's weights in those matmuls"
    least_own_rows, _ = found.get("least_own_rows", (0, ""))
    own = least_own_rows > 0
    if heads:
        step(f"{unit}: the head")
    if heads and own:
        found["head"] = head_rates(sizes, least_own_rows)
    step(f"{unit}: decode attention")
    found["kv_bytes_per_s"] = decode_attention(device, sizes, own)
    step(f"{unit}: prefill attention")
    found["prefill_attention_flops_per_s"] = prefill_attention(device, sizes, own)
    step(f"{unit}: fixed costs")
    return found | fixed_costs(device, sizes, own)
