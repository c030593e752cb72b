"""Reads extents of files straight into slots: no copy, no page cache, a few threads."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from klotski_compiler.errors import ExecError
from klotski_compiler.kernel_facts import ROW_GAP_BYTES, ROW_SPAN_BYTES
from klotski_compiler.ops import PAGE_BYTES
from klotski_runtime.arena import Arena
from klotski_runtime.checkpoint import Extent, Segment

READERS = 3
"""Requests in flight: so many keep the disk busy while one of them waits for a processor that computes."""


@dataclass(slots=True)
class _File:
    """An open file. direct: reads bypass the page cache; where the file system refuses that, they drop it after."""

    fd: int
    direct: bool


class DiskReader:
    """Reads extents with ``threads`` threads in pieces of ``chunk_bytes``.

    Every method but ``close`` may be called from any thread; reads are served in the order of the calls.
    """

    def __init__(self, threads: int = READERS, chunk_bytes: int = 8 << 20) -> None:
        if threads < 1 or chunk_bytes < PAGE_BYTES or chunk_bytes % PAGE_BYTES:
            raise ValueError(
                f"threads ({threads}) must be positive, chunk_bytes ({chunk_bytes}) a multiple of {PAGE_BYTES}"
            )
        self.threads, self._chunk_bytes = threads, chunk_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="disk")
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, alignment included."""
        return self._bytes_read

    def read(self, extents: Iterable[Extent], slot: memoryview) -> int:
        """Fill ``slot`` (page-aligned memory) with ``extents``; returns the bytes read once all have arrived.

        Raises ExecError where a file cannot be read or ends before the data does.
        """
        return self.read_all([(extents, slot)])

    def read_all(self, parts: Iterable[tuple[Iterable[Extent], memoryview]]) -> int:
        """The same for several slots at once, so that the disk has the next request while one is handed over."""
        return self.run(
            partial(self._read_chunk, extent, begin, slot)
            for extents, slot in parts
            for extent in extents
            for begin in range(0, extent.nbytes, self._chunk_bytes)
        )

    def run(self, tasks: Iterable[Callable[[], int]]) -> int:
        """Call all of them in the threads; returns the bytes that they say they have read. Raises what the first failure raised."""
        running = [self._pool.submit(task) for task in tasks]
        total, failure = 0, None
        for task in running:  # wait for all, even after a failure: nobody may write into a slot after this returns
            try:
                total += task.result()
            except ExecError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        with self._lock:
            self._bytes_read += total
        return total

    def close(self) -> None:
        """Close every file; the reader cannot be used afterwards."""
        self._pool.shutdown()
        with self._lock:
            for file in self._files.values():
                os.close(file.fd)
            self._files.clear()

    def read_extent(self, extent: Extent, slot: memoryview) -> int:
        """The whole of a small extent in the calling thread; returns how many bytes the file had. Raises ExecError as ``read`` does."""
        return self._read_chunk(extent, 0, slot)

    def _read_chunk(self, extent: Extent, begin: int, slot: memoryview) -> int:
        """Bytes ``begin`` to ``begin + chunk_bytes`` of one extent; returns how many the file had."""
        length = min(self._chunk_bytes, extent.nbytes - begin)
        target = slot[extent.slot_offset + begin :][:length]
        try:
            got = self._fill(self._open(extent.file), extent.offset + begin, target)
        except OSError as error:
            raise ExecError(f"{extent.file}: cannot be read: {error.strerror}") from error
        if got < min(length, extent.needed - begin):
            raise ExecError(
                f"{extent.file}: ends at byte {extent.offset + begin + got:,}, before its data; download it again"
            )
        return got

    def _fill(self, file: _File, offset: int, target: memoryview) -> int:
        got = 0
        while got < len(target):
            try:
                count = os.preadv(file.fd, [target[got:]], offset + got)
            except OSError as error:
                if error.errno != errno.EINVAL or not file.direct:
                    raise
                self._refuse_direct(file)
                continue
            got += count
            # A direct read that does not end on a page has met the end of the file, and another would be refused.
            if count == 0 or (file.direct and got % PAGE_BYTES):
                break
        if not file.direct:
            os.posix_fadvise(file.fd, offset, got, os.POSIX_FADV_DONTNEED)
        return got

    def _open(self, path: Path) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                try:
                    file = _File(os.open(path, os.O_RDONLY | os.O_DIRECT), direct=True)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    file = _File(os.open(path, os.O_RDONLY), direct=False)
                self._files[path] = file
            return file

    def _refuse_direct(self, file: _File) -> None:
        """Some file systems take O_DIRECT when a file is opened and refuse it when it is read."""
        with self._lock:
            file.direct = False
            fcntl.fcntl(file.fd, fcntl.F_SETFL, fcntl.fcntl(file.fd, fcntl.F_GETFL) & ~os.O_DIRECT)


class RowGather:
    """Reads rows of a matrix on disk, such as the embeddings of a pass's tokens, ``max_rows`` at a time: near ones in one request.

    One call at a time; a reader of its own keeps it from waiting behind the loads of another thread.
    """

    def __init__(self, reader: DiskReader, segment: Segment, max_rows: int) -> None:
        self._reader, self._segment, self.max_rows = reader, segment, max_rows
        self._width = segment.nbytes // segment.shape[0]
        # What rows of a request lie between, and the pages at both ends of it.
        self._staged = -(-max(ROW_SPAN_BYTES, self._width) // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES
        self._staging, self._rows = Arena(reader.threads * self._staged), Arena(max_rows * self._width)

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        """Rows ``ids``, in ascending order, as [len(ids), width] in the file's dtype; valid until the next call. Raises ExecError as the
        reader does."""
        share = -(-len(ids) // self._reader.threads) if ids else 1
        firsts = range(0, len(ids), share)
        self._reader.run(partial(self._read, ids[first : first + share], first, first // share) for first in firsts)
        shape = len(ids), *self._segment.shape[1:]
        return self._rows.tensor(0, len(ids) * self._width, self._segment.dtype, shape)

    def _read(self, ids: Sequence[int], place: int, thread: int) -> int:
        """Some of them: from ``place`` on, through the pages of one thread."""
        own, width, total = self._staging.view(thread * self._staged, self._staged), self._width, 0
        to = self._rows.view(place * width, len(ids) * width)
        for first, end in self._requests(ids):
            offset = self._segment.offset + ids[first] * width
            skipped = offset % PAGE_BYTES
            needed = skipped + (ids[end - 1] + 1 - ids[first]) * width
            pages = Extent(self._segment.file, offset - skipped, -(-needed // PAGE_BYTES) * PAGE_BYTES, 0, needed)
            total += self._reader.read_extent(pages, own)
            for number in range(first, end):
                at = skipped + (ids[number] - ids[first]) * width
                to[number * width : (number + 1) * width] = own[at : at + width]
        return total

    def _requests(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Which of ``ids`` are read together, from where to before where: what lies between two of them costs less than a request."""
        first, most, near = 0, ROW_SPAN_BYTES // self._width, ROW_GAP_BYTES // self._width
        for number in range(1, len(ids)):
            if ids[number] - ids[number - 1] > near or ids[number] - ids[first] >= most:
                yield first, number
                first = number
        if ids:
            yield first, len(ids)
