"""KV cache that lives on disk between passes: one preallocated, unlinked file under the scratch directory.

A region per (layer, batch) holds what its slot does, position by position: what a pass adds is one piece, and so is all that came
before. Slot and region are made of whole pages, so that the disk reads and writes the slot itself: no copy, no page cache.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from klotski_compiler.errors import ExecError
from klotski_compiler.ops import PAGE_BYTES, align_up
from klotski_runtime.checkpoint import Extent
from klotski_runtime.reader import DiskReader


class SpillFile:
    """``regions`` regions of ``region_bytes``, a multiple of a page. ``reader``: reads them."""

    def __init__(self, scratch: Path, regions: int, region_bytes: int, reader: DiskReader) -> None:
        """Raises ExecError where there is no room."""
        self._scratch, self._region_bytes, self._reader = scratch, region_bytes, reader
        try:
            self._file = tempfile.TemporaryFile(dir=scratch, prefix="klotski-kv-", buffering=0)  # noqa: SIM115 - closed by close
            os.posix_fallocate(self._file.fileno(), 0, max(1, regions * region_bytes))
        except OSError as error:
            need = regions * region_bytes
            raise ExecError(
                f"{scratch}: no room for {need:,} bytes of spilled KV ({error.strerror}); choose --scratch"
            ) from error
        self._path = Path(f"/proc/self/fd/{self._file.fileno()}")  # it has no other
        self._direct = self._open_direct()
        self.bytes_written = 0

    def _open_direct(self) -> int | None:
        """Past the page cache, if the file system can."""
        try:
            return os.open(self._path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None

    def store(self, region: int, slot: memoryview, begin: int, end: int) -> None:
        """Write bytes ``begin`` to ``end`` of a slot, and whatever else is in their pages. Raises ExecError."""
        self.bytes_written += end - begin
        begin, end = begin // PAGE_BYTES * PAGE_BYTES, align_up(end)
        offset, done = region * self._region_bytes, begin
        while done < end:
            try:
                done += os.pwrite(self._writing(), slot[done:end], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or self._direct is None:
                    raise ExecError(f"{self._scratch}: spilled KV: cannot be written: {error.strerror}") from error
                self._close_direct()  # some file systems take O_DIRECT when a file is opened and refuse it when it is written
        if self._direct is None:
            os.fdatasync(self._file.fileno())  # dirty pages cannot be dropped, and the memory budget counts them
            os.posix_fadvise(self._file.fileno(), offset + begin, end - begin, os.POSIX_FADV_DONTNEED)

    def load(self, region: int, slot: memoryview, end: int) -> None:
        """Read bytes 0 to ``end`` of a slot. Raises ExecError, by the name of the folder that the file is in, where that fails."""
        extent = Extent(self._path, region * self._region_bytes, align_up(end), slot_offset=0, needed=end)
        try:
            self._reader.read([extent], slot)
        except ExecError as error:
            why = error.why.removeprefix(str(self._path)).partition(", before its data")[0]
            raise ExecError(f"{self._scratch}: spilled KV{why}") from error

    def close(self) -> None:
        """Give the disk space back; the reader is closed by then."""
        self._close_direct()
        self._file.close()

    def _writing(self) -> int:
        return self._file.fileno() if self._direct is None else self._direct

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
