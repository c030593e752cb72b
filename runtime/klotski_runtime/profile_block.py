"""A layer of a model on which the profile times the runtime's own ops, so that their small costs are in the numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from klotski_runtime.attention import OWN, grouped_attention
from klotski_runtime.checkpoint import ModuleKey
from klotski_runtime.kernels import Chunks, Group
from klotski_runtime.kv import KvBlock
from klotski_runtime.skeleton import Skeleton
from klotski_runtime.workers import Workers

SMALL = 128  # width of the matmuls that stand for "no work": what remains is the cost of the calls
CACHED = 16  # positions before the one token of a decode step


class Block:
    """One layer of transformers' Qwen3-MoE with random weights, through the runtime's ops: ``batch`` sequences of ``queries``
    new tokens each; a single one has CACHED positions before it.

    heads: query heads, key and value heads, width of a head.
    """

    def __init__(
        self,
        device: torch.device,
        hidden: int,
        heads: tuple[int, int, int],
        batch: int,
        queries: int,
        workers: Workers | None = None,
    ) -> None:
        """workers: who share work of our own kernel (None: it is PyTorch's)."""
        query_heads, kv_heads, width = heads
        settings: dict[str, Any] = {
            "hidden_size": hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": query_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width,
            "vocab_size": 8,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": SMALL,
        }
        skeleton = Skeleton(Qwen3MoeConfig(**settings), torch.bfloat16, device, (int(workers is not None), 0), workers)
        with device:
            shape = skeleton.kv_shape(0)
            for kind, part in (
                ("attention", "self_attn"),
                ("attention", "input_"),
                ("router", "mlp"),
                ("router", "post_"),
            ):
                shapes = {n: p.shape for n, p in skeleton.model.named_parameters() if f"layers.0.{part}" in n}
                weights = {n: torch.randn(shape) / 32 for n, shape in shapes.items() if "experts" not in n}
                skeleton.bind(ModuleKey(kind, 0), weights)
            tokens, past = batch * queries, CACHED if queries == 1 else 0
            prompts, chunks = [[[1] * max(queries, past)] * batch], Chunks(batch, batch, tokens, tokens)
            self._group = Group(skeleton, prompts, chunks, every_token=True)
            if past:
                self._group.batches[0].advance(torch.ones(batch, dtype=torch.long))
            self._group.begin(torch.randn(tokens, hidden), torch.randn(tokens, hidden, dtype=torch.bfloat16))
            capacity = past + queries
            storage = torch.zeros(batch * capacity * shape.elements, dtype=torch.bfloat16)
            self._kv = KvBlock(storage, shape, batch, capacity)
            # Small experts share a load; a GPU takes them together, and so does our own kernel, all that one token asks for.
            self.experts = 4 if device.type == "cuda" else 2 if workers else 1
            matrices = torch.randn(self.experts, 3, SMALL * hidden, dtype=torch.bfloat16) / 32
            forms = {"gate": (SMALL, hidden), "up": (SMALL, hidden), "down": (hidden, SMALL)}
            self._parts = [
                {name: matrix.view(forms[name]) for name, matrix in zip(forms, expert, strict=True)}
                for expert in matrices
            ]
            self._query = torch.randn(batch, query_heads, queries, width, dtype=torch.bfloat16)
            self._mask = torch.ones(batch, 1, queries, capacity, dtype=torch.bool).tril(past)
            self._state = torch.randn(tokens, hidden, dtype=torch.bfloat16)
            self._mixed = torch.randn(tokens, query_heads * width, dtype=torch.bfloat16)
            layer = skeleton.model.get_submodule("model.layers.0.self_attn")
            self._matmuls = (layer.q_proj, layer.k_proj, layer.v_proj), layer.o_proj
            self._heads = SimpleNamespace(num_key_value_groups=query_heads // kv_heads, is_causal=True)
            if workers:
                setattr(self._heads, OWN, skeleton.own_kernels)
            self._scaling = width**-0.5
            self.router()

    def attention(self) -> None:
        """The whole op."""
        self._group.attention(0, 0, self._kv)

    def router(self) -> None:
        """The whole op."""
        self._group.router(0, 0)

    def expert(self) -> None:
        """The op of the ``experts`` that most tokens chose."""
        counts = self._group.counts(0)
        chosen = sorted(range(len(counts)), key=lambda expert: -counts[expert])[: self.experts]
        self._group.experts(0, list(zip(chosen, self._parts, strict=True)))

    def projections(self) -> None:
        """The matmuls of attention."""
        first, last = self._matmuls
        for module in first:
            module(self._state)
        last(self._mixed)

    def core(self) -> None:
        """The keys and values of attention."""
        grouped_attention(self._heads, self._query, self._kv.keys, self._kv.values, self._mask, scaling=self._scaling)
