"""Measures the disk as the runtime uses it: its own readers, pieces as large as experts, while the processor computes or rests.

A disk that others share swings by half within a second and drifts over minutes. Therefore it is read in short turns, with and
without the processor at work, spread over the whole measurement; a rate is all bytes over all time.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

from klotski_compiler.errors import ConfigError
from klotski_compiler.ops import PAGE_BYTES
from klotski_runtime.arena import Arena
from klotski_runtime.checkpoint import Extent
from klotski_runtime.reader import DiskReader

MIB = 1 << 20
PIECE_BYTES, PIECES = 4 * MIB, 8  # an expert, and how many of them a load has
SLOTS = (
    64  # what was read a while ago has left the caches, also those of a virtual machine's host, when it is overwritten
)
WRITERS, WRITTEN_BYTES = 4, 8 * MIB
LATENCY_SAMPLES = 64

Found = dict[str, tuple[Any, str]]
"""A measured field: its value and how it was measured. Fields are dotted, relative to their part of the Hardware."""


@dataclass(frozen=True)
class ScratchFile:
    """A nameless file of ``nbytes``: it is unlinked at once, so that not even a killed process leaves it behind.

    direct: reads and writes bypass the page cache.
    """

    descriptor: int
    nbytes: int
    direct: bool

    @property
    def how(self) -> str:
        """How bytes move."""
        return "O_DIRECT" if self.direct else "buffered, page cache dropped"

    @property
    def pieces(self) -> list[tuple[Path, int]]:
        """What ``Turns`` reads of it, by the only name that it has."""
        return _pieces(Path(f"/proc/self/fd/{self.descriptor}"), self.nbytes)


def weight_pieces(folder: Path) -> list[tuple[Path, int]]:
    """What ``Turns`` reads of a checkpoint: a disk may give files that are old, or many, at another rate than one just written. Raises
    ConfigError where that is too little to tell."""
    found = [piece for path in sorted(folder.glob("*.safetensors")) for piece in _pieces(path, path.stat().st_size)]
    if len(found) < PIECES:
        why = (
            f"{folder} has no weights in safetensors of {PIECES * PIECE_BYTES >> 20} MiB or more; leave the option out"
        )
        raise ConfigError("--model", "", why)
    return found


def _pieces(path: Path, nbytes: int) -> list[tuple[Path, int]]:
    return [(path, offset) for offset in range(0, nbytes - PIECE_BYTES + 1, PIECE_BYTES)]


@contextmanager
def scratch_file(folder: Path, nbytes: int) -> Iterator[ScratchFile]:
    """An empty scratch file in ``folder``. Raises ConfigError where none can be made."""
    path = os.path.join(folder, f".klotski-profile-{os.getpid()}-{random.getrandbits(32):08x}")
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
        why = f"no file can be made in {folder} ({error.strerror}); name another folder"
        raise ConfigError("--scratch", "", why) from None
    try:
        yield ScratchFile(descriptor, nbytes, direct)
    finally:
        os.close(descriptor)


def fill(file: ScratchFile) -> Found:
    """Writes the whole file; what that tells about the link to the disk, and what one page takes either way."""
    noise, rates = random.Random(0).randbytes(WRITTEN_BYTES), []
    part = file.nbytes // 4
    for start in range(0, file.nbytes, part):
        begin = time.perf_counter()
        _write(file, range(start, start + part, WRITTEN_BYTES), noise)
        os.fsync(file.descriptor)
        rates.append(part / (time.perf_counter() - begin))
    pages = random.Random(1)
    offsets = [pages.randrange(0, file.nbytes, PAGE_BYTES) for _ in range(LATENCY_SAMPLES)]
    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    reads = [_one_page(file, offset) for offset in offsets]
    writes = [_one_page(file, offset, noise[:PAGE_BYTES]) for offset in offsets]
    wrote = f"{file.how}, {WRITERS} threads of {WRITTEN_BYTES // MIB} MiB, then fsync, median of {len(rates)} parts"
    return {
        "disk>host.latency_us": (rounded(1e6 * statistics.median(reads)), f"read of {PAGE_BYTES} bytes, {file.how}"),
        "host>disk.bandwidth_bytes_per_s": (rounded(statistics.median(rates)), wrote),
        "host>disk.latency_us": (rounded(1e6 * statistics.median(writes)), f"write of {PAGE_BYTES} bytes, {file.how}"),
    }


@dataclass
class Tally:
    """Work over time."""

    done: float = 0.0
    seconds: float = 0.0

    def add(self, done: float, seconds: float) -> None:
        """More of both."""
        self.done += done
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.done / self.seconds


@dataclass
class Turns:
    """The disk and the processor in turns: each alone, then both together. pieces: (file, offset) that are read in turn, and of what they
    are in words. compute: one call of work for the processor."""

    pieces: Sequence[tuple[Path, int]]
    of: str
    compute: Callable[[], object]
    turn_s: float
    read_alone: Tally = field(default_factory=Tally)
    read_shared: Tally = field(default_factory=Tally)
    compute_alone: Tally = field(default_factory=Tally)
    compute_shared: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._slots = Arena(SLOTS * PIECE_BYTES)
        self._read_pieces = 0

    def take(self, turns: int) -> None:
        """So many turns more."""
        reader = DiskReader()
        try:
            for _ in range(turns):
                self._work(self.compute_alone, time.perf_counter() + self.turn_s / 2)
                self._read(self.read_alone, reader, time.perf_counter() + self.turn_s)
                end = time.perf_counter() + self.turn_s
                with ThreadPoolExecutor(1) as pool:
                    reading = pool.submit(self._read, self.read_shared, reader, end)
                    self._work(self.compute_shared, end)
                    reading.result()
        finally:
            reader.close()

    def found(self) -> Found:
        """What the turns so far say."""
        how = f"{self.of}, loads of {PIECES} x {PIECE_BYTES // MIB} MiB by the runtime's readers"
        amount = f"{self.read_alone.done / 1e9:.1f} GB in turns of {self.turn_s:g} s"
        left = min(1.0, self.read_shared.rate / self.read_alone.rate)
        return {
            "disk>host.bandwidth_bytes_per_s": (rounded(self.read_alone.rate), f"{how}, {amount}"),
            "disk>host.shared_speed": (rounded(left), "the same while the processor computes, over the former"),
        }

    def processor_speed(self) -> tuple[float, str]:
        """The share of its speed that the processor keeps while the disk is read."""
        left = min(1.0, self.compute_shared.rate / self.compute_alone.rate)
        return rounded(left), "expert matmuls while the disk is read, over those while it rests, in turns"

    def _work(self, tally: Tally, end: float) -> None:
        begin, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() < end:
            self.compute()
            calls += 1
        tally.add(calls, time.perf_counter() - begin)

    def _read(self, tally: Tally, reader: DiskReader, end: float) -> None:
        begin, nbytes = time.perf_counter(), 0
        while nbytes == 0 or time.perf_counter() < end:
            parts = []
            for number in range(self._read_pieces, self._read_pieces + PIECES):
                source, offset = self.pieces[number % len(self.pieces)]
                slot = self._slots.view(number % SLOTS * PIECE_BYTES, PIECE_BYTES)
                parts.append(([Extent(source, offset, PIECE_BYTES, 0, PIECE_BYTES)], slot))
            self._read_pieces += PIECES
            nbytes += reader.read_all(parts)
        tally.add(nbytes, time.perf_counter() - begin)


def rounded(value: float) -> float:
    """Four significant digits: more than any of these measurements is good for."""
    return float(f"{value:.4g}")


def _write(file: ScratchFile, offsets: range, data: bytes) -> None:
    """Writes ``data`` at each of ``offsets``; threads take turns."""

    def lane(mine: range) -> None:
        with mmap(-1, len(data)) as buffer:  # aligned to a page, as O_DIRECT wants it
            buffer[:] = data
            for offset in mine:
                if os.pwritev(file.descriptor, [buffer], offset) != len(data):
                    raise OSError("the disk took less than was given; is it full?")

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lane, (offsets[first::WRITERS] for first in range(WRITERS))))


def _one_page(file: ScratchFile, offset: int, data: bytes | None = None) -> float:
    with mmap(-1, PAGE_BYTES) as buffer:
        buffer[:] = data if data is not None else bytes(PAGE_BYTES)
        move = os.pwritev if data is not None else os.preadv
        begin = time.perf_counter()
        move(file.descriptor, [buffer], offset)
        return time.perf_counter() - begin
