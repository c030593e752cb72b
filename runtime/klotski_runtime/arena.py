"""One tier's memory in host RAM: a single reservation whose byte ranges are slots."""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch

_MADV_POPULATE_WRITE = 23  # linux/mman.h; the mmap module has no name for it


class Arena:
    """``nbytes`` of anonymous private memory, page-aligned.

    A page costs no RSS before it is touched. The memory goes back to the system with the last view or tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(
                OSError
            ):  # a kernel built without huge pages: the arena works the same, with more page faults
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def populate(self) -> None:
        """Give every page its memory now, so that no pass pays for it; on a kernel before 5.14 pages get it when touched."""
        with suppress(OSError):
            self._map.madvise(_MADV_POPULATE_WRITE)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes ``offset:offset + nbytes``, writable: what a read fills."""
        self._check(offset, nbytes)
        return self._view[offset : offset + nbytes]

    def tensor(self, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The same bytes as a contiguous tensor, without a copy; ``offset`` is a multiple of the item size."""
        self._check(offset, nbytes)
        if nbytes != prod(shape) * dtype.itemsize or offset % dtype.itemsize:
            raise ValueError(f"{nbytes} bytes at {offset} cannot hold {dtype} {shape}")
        return self._bytes[offset : offset + nbytes].view(dtype).view(shape)

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}:{offset + nbytes} are outside an arena of {self.nbytes} bytes")
