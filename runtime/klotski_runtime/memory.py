"""What this process takes of the machine's memory, as the kernel counts it, and what keeps its libraries from taking more."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from pathlib import Path
from types import TracebackType

from klotski_compiler.workspace import SHAPES

SAMPLE_S = 0.05
_PROCESS = Path("/proc/self")

_SETTINGS = {
    # An OpenMP thread spins for so many turns before it sleeps: from one kernel of an op to the next, but no longer, for then it
    # would be in the way of a worker that has the core.
    "GOMP_SPINCOUNT": "10000",
    # oneDNN keeps code for every matmul shape that it meets, about 0.6 MB each and 1,024 of them unless told otherwise.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(SHAPES),
}

# glibc returns large blocks to the system when they are freed and faults them in again, page by page and ten times slower
# than the operation that fills them. The parameters of mallopt (malloc.h): one heap that never shrinks.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MALLOC = {_M_TRIM_THRESHOLD: (2 << 30) - 1, _M_MMAP_THRESHOLD: 32 << 20, _M_ARENA_MAX: 1}


def tune_libraries() -> None:
    """Set what the C library does with freed memory, and what torch's libraries read from the environment when torch is
    imported, so call it before; the user's own environment wins."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, number in _MALLOC.items():
            mallopt(parameter, number)


def rss_bytes() -> int:
    """Resident memory now."""
    return _status("VmRSS")


def storage_read_bytes() -> int:
    """Bytes that the kernel fetched from storage for this process since it began; 0 where it does not say."""
    try:
        fields = dict(line.split(": ") for line in (_PROCESS / "io").read_text().splitlines())
    except OSError:  # a container may hide it
        return 0
    return int(fields["read_bytes"])


def page_faults() -> int:
    """How often this process touched a page so far that was not there, whether or not a disk was read for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt + used.ru_majflt


class PeakRss:
    """The most resident memory between entry and exit, in ``nbytes``.

    The kernel keeps the high-water mark exactly; where it may not be reset, a thread samples instead.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._ended = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> PeakRss:
        try:
            (_PROCESS / "clear_refs").write_text("5")
        except OSError:
            self._sampler = threading.Thread(target=self._sample, name="rss", daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is None:
            self.nbytes = _status("VmHWM")
            return
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, rss_bytes())
            if self._ended.wait(SAMPLE_S):
                return


def _status(field: str) -> int:
    """A field of ``/proc/self/status``, which counts in KiB."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")
