"""The tensors of a model under a decision: ids, bytes, homes, and which of them are resident in the compute tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from klotski_compiler.decision import Decision, Workload
from klotski_compiler.kernel_facts import DTYPE_BYTES
from klotski_compiler.model import ModelSpec, Module
from klotski_compiler.ops import Pages, Tensor, align_up

MODULES = ("attention", "router", "shared", "dense")
BEHIND = {"gpu": "host", "host": "disk"}  # where what a compute tier has no room for lives
QUERY_ELEMENTS = 8  # what a sequence's part of an exchange is a multiple of


def kv_bytes(spec: ModelSpec, layer: int, batch_size: int, positions: int, dtype: str) -> int:
    """KV cache of one layer and batch, reserved for ``positions`` (prompt and generated)."""
    return batch_size * positions * spec.layers[layer].kv_elements * DTYPE_BYTES[dtype]


def state_bytes(spec: ModelSpec, tokens: int, dtype: str) -> int:
    """Hidden states of ``tokens`` tokens between ops: the sum in twice the compute width, and the experts' input."""
    return tokens * spec.hidden_size * 3 * DTYPE_BYTES[dtype]


def query_bytes(spec: ModelSpec, batch_size: int, dtype: str) -> int:
    """Queries, keys and values of one new token of every sequence of a batch; the mixed values that come back take less."""
    widest = max(layer.attention_flops // 4 + layer.kv_elements for layer in spec.layers)
    return batch_size * align_up(widest, QUERY_ELEMENTS) * DTYPE_BYTES[dtype]


def rows_bytes(spec: ModelSpec, tokens: int, dtype: str) -> int:
    """The experts' input of ``tokens`` tokens, with the number (4) and weight (twice the width) of each chosen expert."""
    top_k = max(layer.top_k for layer in spec.layers)
    return tokens * (spec.hidden_size * DTYPE_BYTES[dtype] + top_k * (4 + 2 * DTYPE_BYTES[dtype]))


def sums_bytes(spec: ModelSpec, tokens: int, dtype: str) -> int:
    """What experts add to ``tokens`` tokens, in twice the compute width."""
    return tokens * spec.hidden_size * 2 * DTYPE_BYTES[dtype]


@dataclass
class TensorTable:
    """Every tensor that the plan may name, in a fixed order, found by kind, layer and index."""

    spec: ModelSpec
    decision: Decision
    workload: Workload
    dtype: str
    compute_tier: str
    all: list[Tensor] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    exchanged: list[tuple[str, int]] = field(default_factory=list)  # (tier, tensor)
    ids: dict[tuple[str, int, int], int] = field(default_factory=dict)  # of (kind, layer, index)

    def __post_init__(self) -> None:
        spec, decision = self.spec, self.decision
        positions = self.workload.prompt_len + self.workload.gen_len
        if self.compute_tier == "gpu":  # which reads its rows from host memory
            self._module("embedding", -1, 0, spec.embedding, False)
        elif decision.embedding:  # else they are read from disk
            self._module("embedding", -1, 0, spec.embedding, True)
        self._module("norm", -1, 0, spec.norm, True)
        pages = decision.head_parts
        for page in range(pages):
            rows = page_rows(spec.vocab_size, pages, page)
            nbytes = spec.head.nbytes * (rows[1] - rows[0]) // spec.vocab_size
            self._add("head", -1, page, nbytes, spec.head.segments, decision.head_pages == 0)
        for number, (layer, chosen) in enumerate(zip(spec.layers, decision.layers, strict=True)):
            for kind in MODULES:
                if module := getattr(layer, kind):
                    self._module(kind, number, 0, module, kind in chosen.resident)
            if layer.expert:
                far, here = frozenset(chosen.on_disk), frozenset(chosen.resident_experts)
                for expert in range(layer.num_experts):
                    home = "disk" if expert in far else ""
                    self._module("expert", number, expert, layer.expert, expert in here, home)
                for pick in range(len(chosen.late)):
                    self._module("pick", number, pick, layer.expert, False)
            away = set(decision.away(number))
            for batch in range(decision.num_batches):
                nbytes = kv_bytes(spec, number, decision.size_of(batch), positions, self.dtype)
                home = chosen.kv if batch in away else self.compute_tier
                self._add("kv", number, batch, nbytes, 0, home == self.compute_tier, home)
        self._exchanges()

    def _exchanges(self) -> None:
        """What a GPU and the CPU, or ops of one processor, exchange in decode; their places are kept for the whole phase. The hidden states
        themselves are what is sent as rows."""
        spec, decision, here = self.spec, self.decision, self.compute_tier
        beside = here == "gpu"  # else the CPU computes everything
        away = {batch for layer in range(len(spec.layers)) for batch in decision.attended(layer) if beside}
        together = decision.together and decision.num_batches > 1
        for batch in range(decision.num_batches) if together else sorted(away):
            nbytes = query_bytes(spec, decision.size_of(batch), self.dtype)
            self._exchange("query", batch, nbytes, (here, "host") if batch in away else (here,))
        if beside and any(layer.cpu or layer.cpu_picks for layer in decision.layers):
            self._exchange("rows", 0, rows_bytes(spec, decision.sequences, self.dtype), ("host",))
            self._exchange("sums", 0, sums_bytes(spec, decision.sequences, self.dtype), ("gpu", "host"))

    def _exchange(self, kind: str, index: int, nbytes: int, tiers: Sequence[str]) -> None:
        self.exchanged += [(tier, len(self.all)) for tier in tiers]
        self._add(kind, -1, index, nbytes, 0, False, "none")

    def _module(self, kind: str, layer: int, index: int, module: Module, resident: bool, home: str = "") -> None:
        self._add(kind, layer, index, module.nbytes, module.segments, resident, home)

    def _add(
        self, kind: str, layer: int, index: int, nbytes: int, segments: int, resident: bool, home: str = ""
    ) -> None:
        weights_home = home or BEHIND[self.compute_tier]
        tensor = Tensor(len(self.all), kind, layer, index, nbytes, segments, weights_home)
        self.ids[kind, layer, index] = tensor.id
        self.all.append(tensor)
        if resident:
            self.resident.append(tensor.id)

    def near(self, tensor: Tensor) -> Pages | None:
        """Of a tensor that lives on disk, what host memory before a GPU keeps nonetheless; None: all that lives there, or nothing."""
        far = self.compute_tier == "gpu" and tensor.kind == "expert" and tensor.home == "disk"
        return self.decision.near if far else None

    @cached_property
    def passing_bytes(self) -> int:
        """Room of what passes at once through host memory on its way to a GPU: a page of an expert where those are cut, else a transfer
        unit of them."""
        far, unit = self.decision.far, 1 if self.decision.far else self.decision.unit
        return unit * max(tensor.room(far) for tensor in self.all if tensor.kind == "expert")

    def add_state(self, phase: str, tokens: int) -> Tensor:
        """Adds the hidden states of a phase: ``tokens`` tokens at once."""
        nbytes = state_bytes(self.spec, tokens, self.dtype)
        tensor = Tensor(len(self.all), "state", -1, 0 if phase == "prefill" else 1, nbytes, 0, "none")
        self.all.append(tensor)
        return tensor


def page_rows(vocab_size: int, pages: int, page: int) -> tuple[int, int]:
    """Rows [first, end) of the head that page ``page`` of ``pages`` holds."""
    return vocab_size * page // pages, vocab_size * (page + 1) // pages
