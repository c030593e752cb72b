"""Measures how a model routes: streams its checkpoint once, layer by layer, and counts the experts that tokens pick.

Holds the prompts' hidden states and one module at a time, so it works on models larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from klotski_compiler.errors import ConfigError
from klotski_compiler.kernel_facts import GATHERED_ROWS
from klotski_compiler.model import read_model
from klotski_compiler.prompts import Limits, Tokenizer, read_tokens
from klotski_compiler.routing import Routing
from klotski_runtime.arena import Arena
from klotski_runtime.checkpoint import EMBEDDING, Checkpoint, ModuleKey, layout
from klotski_runtime.kernels import Chunks, Group
from klotski_runtime.kv import KvBlock
from klotski_runtime.locate import model_folder
from klotski_runtime.reader import DiskReader, RowGather
from klotski_runtime.skeleton import Routed, Skeleton, import_model

Report = Callable[[str, float], None]
"""Called with what is being done and the share (0 to 1) of the work that is done."""

MAX_TOKENS = 8192
MAX_PROMPT = 2048
KEPT_SUCCESSORS = 8
CHUNK_TOKENS = 512


def measure(model: str, prompts: str, report: Report) -> str:
    """The routing profile (JSON) of a checkpoint folder or cached Hugging Face id, over the first tokens of ``prompts``.

    Raises ConfigError where the model or the prompts cannot be used.
    """
    folder = model_folder(model)
    spec = read_model(folder)
    config = import_model(folder)
    longest = min(MAX_PROMPT, spec.max_positions)
    everything = Limits(prompt_len=1 << 60, gen_len=1 << 60, new_tokens=1, vocabulary=spec.vocab_size)
    taken = _first_tokens(read_tokens(prompts, Tokenizer(folder), everything), longest)
    if not taken:
        raise ConfigError(prompts, "", "holds no prompt that can be used; give text lines or JSON lines with a prompt")
    dtype = torch.float32 if spec.compute_dtype == "fp32" else torch.bfloat16
    pass_ = Prefill(folder, Listening(config, dtype), taken)
    try:
        picks = pass_.run(report)
    finally:
        pass_.close()
    routing = Routing(
        model=spec.name,
        source=f"measured with klotski-profile routing, prefill of {len(taken)} prompts of {Path(prompts).name}",
        tokens=sum(map(len, taken)),
        popularity=tuple(_popularity(p, la.num_experts) for p, la in zip(picks, spec.layers, strict=True)),
        successors=tuple(
            _successors(picks[n], picks[n + 1] if n + 1 < len(picks) else None, layer.num_experts)
            for n, layer in enumerate(spec.layers)
        ),
    )
    return routing.model_dump_json() + "\n"


def _first_tokens(prompts: list[list[int]], longest: int) -> list[list[int]]:
    """The prompts, cut to ``longest`` tokens each and MAX_TOKENS in all."""
    taken, room = [], MAX_TOKENS
    for prompt in prompts:
        if room == 0:
            break
        taken.append(prompt[: min(longest, room)])
        room -= len(taken[-1])
    return taken


class Listening(Skeleton):
    """A skeleton that notes the experts which tokens pick, in the order in which they come. ``heard``: [r, k] each."""

    def __init__(self, config: object, compute_dtype: torch.dtype) -> None:
        super().__init__(config, compute_dtype)
        self.heard: list[torch.Tensor] = []

    def moe_block(self, layer: int, hidden: torch.Tensor, shared: bool = True) -> Routed:
        routed = super().moe_block(layer, hidden, shared)
        self.heard.append(routed.indices)
        return routed


class Prefill:
    """One pass over the layers with one module in memory at a time. Each prompt is a batch, so there is no padding."""

    def __init__(self, folder: Path, skeleton: Listening, prompts: list[list[int]]) -> None:
        self._skeleton = skeleton
        self._modules = Checkpoint.open(folder, skeleton.model).modules
        self._reader = DiskReader()
        self._slots = {kind: Arena(size) for kind, size in self._sizes().items()}
        rows = RowGather(self._reader, self._modules[EMBEDDING][0], GATHERED_ROWS)
        chunks = Chunks(1, 1, CHUNK_TOKENS, CHUNK_TOKENS)
        self._group = Group(skeleton, [[prompt] for prompt in prompts], chunks, rows, every_token=True)
        tokens, hidden = self._group.tokens, skeleton.hidden
        self._group.begin(
            torch.empty(tokens, hidden, dtype=skeleton.wide_dtype),
            torch.empty(tokens, hidden, dtype=skeleton.compute_dtype),
        )

    def run(self, report: Report) -> list[torch.Tensor | None]:
        """Per layer the experts that each token picks [tokens, k], None for a dense layer."""
        skeleton, group = self._skeleton, self._group
        batches = range(len(group.batches))
        group.embed()
        picks: list[torch.Tensor | None] = []
        for layer in range(skeleton.layers):
            report(f"layer {layer + 1} of {skeleton.layers}", layer / skeleton.layers)
            blocks = self._kv_blocks(layer)
            with self._bound(ModuleKey("attention", layer)):
                for batch, block in enumerate(blocks):
                    group.attention(layer, batch, block)
            if skeleton.experts(layer) is None:
                picks.append(None)
                with self._bound(ModuleKey("dense", layer)):
                    for batch in batches:
                        group.dense(layer, batch)
                continue
            with self._bound(ModuleKey("router", layer), ModuleKey("shared", layer)):
                for batch in batches:
                    group.router(layer, batch)
            picks.append(torch.cat(skeleton.heard))
            skeleton.heard.clear()
            if layer + 1 < skeleton.layers:  # what the last layer's experts add, nobody routes
                self._experts(layer)
        report("done", 1.0)
        return picks

    def close(self) -> None:
        """Close files."""
        self._reader.close()

    def _experts(self, layer: int) -> None:
        for expert, tokens in enumerate(self._group.counts(layer)):
            if tokens:
                self._group.experts(layer, [(expert, self._read(ModuleKey("expert", layer, expert)))])

    def _sizes(self) -> dict[str, int]:
        """Bytes of the largest module of each kind that is read."""
        sizes: dict[str, int] = {}
        for key, segments in self._modules.items():
            if key.layer >= 0:
                sizes[key.kind] = max(sizes.get(key.kind, 0), layout(segments).slot_bytes)
        return sizes

    def _read(self, key: ModuleKey) -> dict[str, torch.Tensor]:
        """The module's weights, valid until the next of its kind is read."""
        segments, slot = self._modules[key], self._slots[key.kind]
        plan = layout(segments)
        self._reader.read(plan.extents, slot.view(0, plan.slot_bytes))
        return {
            segment.name: slot.tensor(offset, segment.nbytes, segment.dtype, segment.shape)
            for segment, offset in zip(segments, plan.offsets, strict=True)
        }

    @contextmanager
    def _bound(self, *keys: ModuleKey) -> Iterator[None]:
        present = [key for key in keys if key in self._modules]
        for key in present:
            self._skeleton.bind(key, self._read(key))
        yield
        for key in present:
            self._skeleton.unbind(key)

    def _kv_blocks(self, layer: int) -> list[KvBlock]:
        """Where each prompt's keys and values go: all to one place, as nothing reads them later."""
        shape, lengths = self._skeleton.kv_shape(layer), [batch.queries for batch in self._group.batches.values()]
        storage = torch.empty(max(lengths) * shape.elements, dtype=self._skeleton.compute_dtype)
        return [KvBlock(storage[: length * shape.elements], shape, 1, length) for length in lengths]


def _popularity(picks: torch.Tensor | None, experts: int) -> tuple[float, ...]:
    if picks is None:
        return ()
    return tuple((torch.bincount(picks.flatten(), minlength=experts) / picks.numel()).tolist())


def _successors(
    picks: torch.Tensor | None, following: torch.Tensor | None, experts: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For each expert the likeliest of the next layer, with the per mille of its tokens that pick them there."""
    if picks is None or following is None:
        return ()
    out = []
    for expert in range(experts):
        tokens = (picks == expert).any(dim=1)
        counts = torch.bincount(following[tokens].flatten())
        per_mille = (1000 * counts / max(1, int(tokens.sum()))).round().int().tolist()
        best = sorted((e for e, share in enumerate(per_mille) if share), key=lambda e: (-per_mille[e], e))
        out.append(tuple((e, per_mille[e]) for e in best[:KEPT_SUCCESSORS]))
    return tuple(out)
