"""What this process takes of the machine's memory, as the kernel counts it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

SAMPLE_S = 0.05
_PROCESS = Path("/proc/self")


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

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
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
