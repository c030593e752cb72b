"""Which device a plan runs on, and what a run takes of a GPU's memory."""

from __future__ import annotations

import os

import torch

from klotski_compiler.errors import ConfigError
from klotski_compiler.plan import Plan

ISSUING = 3  # threads that are busy beside the CPU's kernels: they compute on the GPU, load, and issue the next pass


def gpu_of(name: str) -> torch.device:
    """``cuda:N`` as a device with its index. Raises ConfigError where torch sees no such GPU."""
    devices = torch.cuda.device_count()
    usable = ", ".join(["cpu", *(f"cuda:{index}" for index in range(devices))])
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ConfigError("--device", "", f"{name!r} is no device; usable: {usable}") from None
    if chosen.type != "cuda" or (chosen.index or 0) >= devices:
        why = f"torch {torch.__version__} sees {devices} CUDA devices, so {name!r} cannot be used; usable: {usable}"
        raise ConfigError("--device", "", why)
    return torch.device("cuda", chosen.index or 0)


def device_of(plan: Plan, name: str, emulate: bool) -> torch.device:
    """Where a plan's kernels run. Raises ConfigError where that is a GPU and there is none of that name."""
    if plan.compute_tier != "gpu" or emulate:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "gpu, and torch sees no CUDA device; --emulate takes host memory for the GPU's, too"
        raise ConfigError("plan", "compute_tier", why)
    return gpu_of(name)


def use(device: torch.device) -> None:
    """Make a GPU this thread's, and choose kernels for it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention plans anew for every length of the cache, for 50 ms.
        torch.backends.cuda.enable_cudnn_sdp(False)


def cpu_threads(device: torch.device) -> int:
    """Threads of the CPU's own kernels: a core each but, beside a GPU, for the threads that issue to it. Where these take a core from
    one of a kernel's threads, all others wait for it."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores - ISSUING) if device.type == "cuda" else cores


class GpuMemory:
    """What this process takes of a GPU's memory from now on; of the CPU there is nothing to say."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        if self._device:
            use(self._device)
            for dtype in (
                torch.bfloat16,
                torch.float32,
            ):  # libraries come in with their first use; they are not a plan's memory
                torch.ones(8, 8, dtype=dtype, device=self._device).mm(
                    torch.ones(8, 8, dtype=dtype, device=self._device)
                )
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> dict[str, int]:
        """``peak_gpu_bytes``: what torch held at most; ``gpu_context_bytes``: what the driver keeps besides (``context_bytes``)."""
        if self._device is None:
            return {}
        held = torch.cuda.max_memory_reserved(self._device)
        return {"peak_gpu_bytes": held, "gpu_context_bytes": context_bytes(self._device)}


def context_bytes(device: torch.device) -> int:
    """What is in use of a GPU beside torch's tensors: the driver's own, loaded kernels, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
