"""What a decode pass takes at least on this machine, whatever the schedule: the bytes that no schedule of a plan's sizes can avoid at the
disk's best rate, or its matmuls and cached keys and values at the measured rates, as if each weight met all tokens at once and nothing
cost anything beside them: no op, no load that shares the memory.

The disk's best rate is what an independent reader gets from the model's own files, out of the page cache: plain threads that read
blocks in order, of every size and number that is tried, past the page cache and through it.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

from benchmarks.cage import drop_page_cache
from klotski_compiler.bounds.apart import Relaxation
from klotski_compiler.bounds.least import DECODE
from klotski_compiler.cost import Cost
from klotski_compiler.plan import Plan

THREADS = (1, 2, 4, 8)
BLOCKS = (1 << 20, 4 << 20, 16 << 20)
SAMPLE_BYTES = 1 << 30  # read in one try


class Reading(NamedTuple):
    """How fast a way to read was."""

    threads: int
    block_bytes: int
    direct: bool
    bytes_per_s: float

    def __str__(self) -> str:
        way = "past the page cache" if self.direct else "through the page cache"
        return (
            f"{self.bytes_per_s / 1e9:.2f} GB/s ({self.threads} threads, blocks of {self.block_bytes >> 20} MiB, {way})"
        )


class Limit(NamedTuple):
    """Of a decode pass: read_bytes that every schedule of its sizes reads at least; compute_s of its matmuls by the measured rate(m), and
    of what attention reads of the cache. head_s: the part of compute_s that begins when all layers are done, while which the disk can
    fill no more than the room for weights: layer_bytes it reads before or after."""

    read_bytes: float
    compute_s: float
    head_s: float
    layer_bytes: float

    def one_after_the_other_s(self, bytes_per_s: float) -> float:
        """What a pass takes at least if the head of all sequences follows the last layer of all, as it does in every plan."""
        return self.head_s + max(self.layer_bytes / bytes_per_s, self.compute_s - self.head_s)


def readings(files: Sequence[Path]) -> Iterator[Reading]:
    """Every way to read, on one stretch of the files after the other, so that no reader finds what another one has warmed."""
    blocks = _stretches(files)
    for threads, block_bytes, direct in product(THREADS, BLOCKS, (True, False)):
        drop_page_cache(files)
        yield Reading(threads, block_bytes, direct, _rate(next(blocks), threads, block_bytes, direct))


def _stretches(files: Sequence[Path]) -> Iterator[tuple[Path, int, int]]:
    """(file, first byte, bytes): SAMPLE_BYTES at a time of all files, around and around."""
    while True:
        for file in files:
            size = file.stat().st_size
            for first in range(0, size, SAMPLE_BYTES):
                if (nbytes := min(SAMPLE_BYTES, size - first)) == SAMPLE_BYTES or size < SAMPLE_BYTES:
                    yield file, first, nbytes


def _rate(stretch: tuple[Path, int, int], threads: int, block_bytes: int, direct: bool) -> float:
    """Bytes per second of threads that each take the next block."""
    file, first, nbytes = stretch
    blocks, read = count(), [0] * threads
    try:
        descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError:  # a file system without direct reads
        return 0.0

    def work(number: int) -> None:
        with mmap.mmap(-1, block_bytes) as buffer:  # on a page's border, as direct reads want it
            while (at := next(blocks) * block_bytes) < nbytes:
                read[number] += os.preadv(descriptor, [buffer], first + at)

    try:
        began = time.perf_counter()
        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(read) / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def fastest(found: Iterable[Reading]) -> Reading:
    """The fastest way to read."""
    return max(found, key=lambda reading: reading.bytes_per_s)


def limit(plan: Plan, cost: Cost) -> Limit | None:
    """Of a decode pass of a plan: every weight that its sequences touch in the mean, less those that save most per byte in all the room
    that the bound leaves for weights (design 7.2) beside the prompts' KV cache. None where no pass only decodes all sequences."""
    sequences, passes = plan.decision.sequences, plan.envelope.gen_len - 1
    if plan.decision.rolling or not passes:
        return None
    relaxed = Relaxation(cost, plan.workload, plan.budgets)
    room = relaxed.room(sequences) - sequences * plan.envelope.prompt_len * relaxed.kv_position
    modules, *experts = [(w.nbytes, w.moved_bytes[DECODE] / passes) for w in relaxed.weights(1, sequences, sequences)]
    head_bytes = cost.spec.head.nbytes
    beside_head = modules[0] - head_bytes, modules[1] - head_bytes
    return Limit(
        _read_bytes([modules, *experts], room),
        work_us(cost, sequences, plan.envelope.prompt_len + passes / 2) / 1e6,
        cost.head_us(sequences) / 1e6,
        _read_bytes([beside_head, *experts], room),
    )


def _read_bytes(weights: Sequence[tuple[float, float]], room: float) -> float:
    """Of weights (bytes, bytes that a pass reads of them if they are not kept), what is read where those are kept that save most."""
    read = 0.0
    for nbytes, moved in sorted(weights, key=lambda weight: weight[1] / weight[0], reverse=True):
        read += (1 - min(1.0, max(0.0, room) / nbytes)) * moved
        room -= nbytes
    return read


def work_us(cost: Cost, sequences: int, context: float) -> float:
    """What the compute tier's processor takes for one token of each sequence by its measured rates alone."""
    total = cost.head_us(sequences)
    for number, layer in enumerate(cost.spec.layers):
        total += cost.attend_us(layer, sequences, context, cost.processor)
        modules = (layer.attention, layer.router, layer.shared, layer.dense)
        total += sum(cost.module_us(module, sequences) for module in modules if module)
        if layer.expert:
            asked = [(tokens, touched) for tokens, touched in cost.experts(number, sequences) if touched]
            total += sum(touched * cost.module_us(layer.expert, tokens / touched) for tokens, touched in asked)
    return total
