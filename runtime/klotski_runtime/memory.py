"""What this process takes of the machine's memory, as the kernel counts it, and what keeps its libraries from taking more."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

SAMPLE_S = 0.05
_PROCESS = Path("/proc/self")

_SETTINGS = {
    # OpenMP threads spin for milliseconds at a barrier, on the very core that the thread they wait for, or a disk reader,
    # needs: with a busy neighbour on two cores, passes took up to 15 times as long. Not to spin at all costs as much where
    # ops are small. This many turns are some microseconds: near the better of both.
    "GOMP_SPINCOUNT": "1000",
    # oneDNN keeps code for every matmul shape that it meets, about 0.6 MB each and 1,024 of them unless told otherwise.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def restrain_libraries() -> None:
    """Set what torch's libraries read from the environment when torch is imported, so call it before; the user's own win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


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
