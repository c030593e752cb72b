"""KV cache that lives on disk between passes: one preallocated, unlinked file under the scratch directory.

A region per (layer, batch), position by position, so that a pass writes one contiguous piece and reads another. The page cache is
dropped after each transfer: the memory budget counts it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from klotski_compiler.errors import ExecError
from klotski_runtime.kv import KvBlock


class SpillFile:
    """``regions`` regions of ``capacity`` positions of at most ``row_bytes`` bytes."""

    def __init__(self, scratch: Path, regions: int, capacity: int, row_bytes: int) -> None:
        self._region_bytes = capacity * row_bytes
        try:
            self._file = tempfile.TemporaryFile(dir=scratch, prefix="klotski-kv-", buffering=0)  # noqa: SIM115 - closed by close
            os.posix_fallocate(self._file.fileno(), 0, max(1, regions * self._region_bytes))
        except OSError as error:
            need = regions * self._region_bytes
            raise ExecError(
                f"{scratch}: no room for {need:,} bytes of spilled KV ({error.strerror}); choose --scratch"
            ) from error
        # One for each direction: a load and a store may run at the same time.
        self._stored, self._loaded = (torch.empty(self._region_bytes, dtype=torch.uint8) for _ in range(2))
        self.bytes_read = self.bytes_written = 0

    def store(self, region: int, block: KvBlock, first: int, last: int) -> None:
        """Write positions ``first:last`` of a block."""
        packed = _packed(self._stored, block, last - first)
        block.pack(first, last, packed)
        row = packed.nbytes // (last - first)
        data = _bytes(packed)
        done, offset = 0, region * self._region_bytes + first * row
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)
        os.fdatasync(self._file.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(self._file.fileno(), offset, len(data), os.POSIX_FADV_DONTNEED)
        self.bytes_written += len(data)

    def load(self, region: int, block: KvBlock, last: int) -> None:
        """Read the first ``last`` positions of a block."""
        packed = _packed(self._loaded, block, last)
        data = _bytes(packed)
        done, offset = 0, region * self._region_bytes
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], offset + done)
        os.posix_fadvise(self._file.fileno(), offset, len(data), os.POSIX_FADV_DONTNEED)
        block.unpack(0, last, packed)
        self.bytes_read += len(data)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


def _packed(buffer: torch.Tensor, block: KvBlock, positions: int) -> torch.Tensor:
    """As much of a buffer as so many positions of a block take."""
    row = sum(part[:, :, 0].numel() for part in (block.keys, block.values))
    return buffer[: positions * row * block.keys.dtype.itemsize].view(block.keys.dtype)


def _bytes(packed: torch.Tensor) -> memoryview:
    """The tensor's own bytes."""
    return memoryview(packed.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stub knows no buffer before 3.12
