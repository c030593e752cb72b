"""One tier's memory: a single reservation whose byte ranges are slots, in host RAM or on a GPU."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from math import prod
from typing import Any

import torch

_MADV_POPULATE_WRITE = 23  # linux/mman.h; the mmap module has no name for it


class Reservation:
    """Memory that somebody else holds, as bytes of which tensors are made. ``storage``: 1-D, uint8."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.nbytes, self._bytes = len(storage), storage

    def tensor(self, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Bytes ``offset:offset + nbytes`` as a contiguous tensor, without a copy; ``offset`` is a multiple of the item size."""
        self._check(offset, nbytes)
        if nbytes != prod(shape) * dtype.itemsize or offset % dtype.itemsize:
            raise ValueError(f"{nbytes} bytes at {offset} cannot hold {dtype} {shape}")
        return self._bytes[offset : offset + nbytes].view(dtype).view(shape)

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}:{offset + nbytes} are outside an arena of {self.nbytes} bytes")


class Arena(Reservation):
    """``nbytes`` of anonymous private memory, page-aligned.

    A page costs no RSS before it is touched. The memory goes back to the system with the last view or tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(
                OSError
            ):  # a kernel built without huge pages: the arena works the same, with more page faults
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self._pinned: list[int] = []
        super().__init__(torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes])

    def populate(self) -> None:
        """Give every page its memory now, so that no pass pays for it; on a kernel before 5.14 pages get it when touched."""
        with suppress(OSError):
            self._map.madvise(_MADV_POPULATE_WRITE)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes ``offset:offset + nbytes``, writable: what a read fills."""
        self._check(offset, nbytes)
        return self._view[offset : offset + nbytes]

    def pin(self, cuts: Sequence[int]) -> Reservation | None:
        """Lock the pages for a GPU's copy engines, piece by piece between ``cuts`` (ascending multiples of a page, from 0 to the
        end; a copy must lie within a piece). Returns the same bytes as kernels of the current GPU see them, or None where the
        system locks no more memory: then nothing is locked."""
        address, cudart = self._bytes.data_ptr(), torch.cuda.cudart()
        for begin, end in pairwise(cuts):
            if int(cudart.cudaHostRegister(address + begin, end - begin, 0)):
                self.unpin()
                with suppress(RuntimeError):  # the next kernel would be blamed for what the registration met
                    torch.zeros(1, device="cuda")
                return None
            self._pinned.append(address + begin)
        return Reservation(torch.as_tensor(_Seen(address, self.nbytes), device="cuda"))

    def unpin(self) -> None:
        """Undo ``pin``; no copy is on its way any more."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())


class _Seen:
    """Host memory that is locked for a GPU, by the protocol in which CUDA libraries hand each other arrays."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class GpuArena(Reservation):
    """``nbytes`` of a GPU's memory. Raises torch.OutOfMemoryError where it has not so much."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(torch.empty(nbytes, dtype=torch.uint8, device=device))


class Room:
    """Memory that one op uses at a time; grows to the most that was asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.held = torch.empty(0, dtype=dtype, device=device)

    def take(self, elements: int) -> torch.Tensor:
        """So many elements, flat, until the next call."""
        if self.held.numel() < elements:
            self.held = self.held.new_empty(elements)
        return self.held
