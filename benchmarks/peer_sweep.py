"""Peers, the settings of each that a sweep tries, and what a short run tells of a long one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from benchmarks.peer_tables import Report, Setting

FREE = "resident"
PEERS = (FREE, "disk_offload", "device_map", "llama_cpp")
FIRST_BATCH = 64
LLAMA_SEQUENCES = 256  # more are refused
BETTER = 1.03  # a setting must be faster by this to be taken: neighbours differ by less
CORES = os.cpu_count() or 1

# What a sweep tries beside the batch size; the first is where it starts.
OPTIONS: dict[str, dict[str, list[Any]]] = {
    FREE: {"experts": ["grouped_mm", "eager", "batched_mm"]},
    "disk_offload": {"experts": ["grouped_mm", "eager", "batched_mm"]},
    "device_map": {"experts": ["grouped_mm", "eager", "batched_mm"], "cpu_share": [0.25, 0.5, 0.0]},
    "llama_cpp": {
        "ubatch": [512, 2048, 4096],
        "threads": [CORES, *([CORES // 2] if CORES > 1 else [])],
        "unified": [False, True],
    },
}


def first(peer: str, prompts: int) -> Setting:
    """Where a sweep starts."""
    return {name: values[0] for name, values in OPTIONS[peer].items()} | {"batch": min(FIRST_BATCH, prompts)}


def halvings(batch: int) -> Iterator[int]:
    """Half of it, and half of that, down to one."""
    while batch := batch // 2:
        yield batch


def variants(peer: str, setting: Setting) -> Iterator[Setting]:
    """The same batch with one other option."""
    for name, values in OPTIONS[peer].items():
        yield from (setting | {name: value} for value in values if value != setting[name])


def moves(peer: str, setting: Setting, prompts: int) -> Iterator[Setting]:
    """Settings beside one: what a sweep tries next."""
    most = min(prompts, LLAMA_SEQUENCES) if peer == "llama_cpp" else prompts
    own = setting["batch"]
    for batch in (4 * own, 2 * own, own + own // 2, own // 2):
        if batch and (batch := min(batch, most)) != own:
            yield setting | {"batch": batch}
    yield from variants(peer, setting)


def prolonged(report: Report, gen_len: int, asked: int) -> Report:
    """A run with so many new tokens of each prompt as if there had been as many as asked: so much more decode."""
    if "failed" in report or gen_len == asked:
        return report
    more_s = report["decode_s"] * ((asked - 1) / (gen_len - 1) - 1)
    generated = report["generated_tokens"] * asked // gen_len
    longer = {
        "decode_s": report["decode_s"] + more_s,
        "wall_s": report["wall_s"] + more_s,
        "generated_tokens": generated,
    }
    return report | longer
