"""transformers' own model as a skeleton without weights: parameters are bound to slots while an op needs them.

The model lives on the meta device. Every op calls the model's own modules: each family's arithmetic is transformers'.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from klotski_compiler.errors import ConfigError
from klotski_runtime.attention import GROUPED, OWN, SINKS
from klotski_runtime.checkpoint import EMBEDDING, SHARED, ModuleKey, read_config
from klotski_runtime.kv import KvShape
from klotski_runtime.own_kernels import NARROW, OwnKernels
from klotski_runtime.usual import Usual, replaced
from klotski_runtime.workers import Workers

HOST = torch.device("cpu")
WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
"""Compute dtype -> the type in which expert outputs are summed."""

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls the argument: the first since 5.24."""

MODEL_PARTS = {"model", "lm_head"}
BASE_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class Routed(NamedTuple):
    """What a MoE block says of r tokens.

    x: the routed experts' input [r, hidden]. base: what their outputs add into, shared experts included [r, hidden].
    indices, weights: each token's experts and their weights [r, k].
    """

    x: torch.Tensor
    base: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


def _capture(experts: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts function of the skeleton: notes what the experts are asked for and answers zero."""
    experts.captured = (hidden, indices, weights)
    return torch.zeros_like(hidden)


ALL_EXPERTS_FUNCTIONS.register("klotski", _capture)


def import_model(folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """The transformers configuration of ``folder``, with its modeling code imported and no model built.

    Raises ConfigError where transformers has no such model.
    """
    kind = read_config(folder)["model_type"]
    path = Path(folder) / "config.json"
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        importlib.import_module(AutoModelForCausalLM._model_mapping[type(config)].__module__)
    except (KeyError, ValueError, OSError, StrictDataclassError) as error:
        raise ConfigError(
            path, "model_type", f"{kind} is not one that this version of transformers can generate with: {error}"
        ) from error
    return config


class _KvProbe(Cache):
    """A cache that only notes the shapes which attention stores."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shape: KvShape | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shape = KvShape(key_states.shape[1], key_states.shape[3], value_states.shape[1], value_states.shape[3])
        return key_states, value_states


class _Remembered(Exception):
    """Keys and values are in the cache."""


class _Remembering(Cache):
    """A cache that ends attention as soon as it has the new keys and values."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=cache.layers)
        self._cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._cache.update(key_states, value_states, layer_idx)
        raise _Remembered


def _nothing(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Zeros in the shape of the module's product; the memory of one row stands for all."""
    return x.new_zeros(module.out_features).expand(*x.shape[:-1], -1)


def _adds_nothing(x: torch.Tensor) -> torch.Tensor:
    """A zero in place of what a module makes of x."""
    return x.new_zeros(1)


class _LinearCalls(TorchFunctionMode):
    """Where it is entered, ``instead`` is called for ``functional.linear``."""

    def __init__(self, instead: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (self._instead if function is functional.linear else function)(*args, **(kwargs or {}))


class Skeleton:
    """The model that ``config`` describes, for kernels on ``device`` in ``compute_dtype``; holds no weights but those that are bound.

    ``bind`` and ``unbind`` may run on any thread while no op of that module runs. The rest belongs to one thread.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        compute_dtype: torch.dtype,
        device: torch.device = HOST,
        own_rows: tuple[int, int] = (0, 0),
        workers: Workers | None = None,
    ) -> None:
        """own_rows: least and most, of 16-bit matmuls on the CPU, see ``plan.Plan``. workers: of the CPU (None: only who calls).

        Raises ConfigError where the model or the type is unknown, or where ``own_rows`` ask for a C compiler that is not there."""
        if compute_dtype not in WIDE:
            raise ConfigError(
                "", "dtype", f"{compute_dtype} is not a compute dtype; use one of {', '.join(map(str, WIDE))}"
            )
        self.config, self.compute_dtype, self.wide_dtype = config, compute_dtype, WIDE[compute_dtype]
        self.device = device
        try:
            with torch.device("meta"):
                self.model: Any = AutoModelForCausalLM.from_config(
                    config, dtype=compute_dtype, experts_implementation="klotski"
                ).eval()
        except ValueError as error:
            raise _unsupported(config, str(error)) from error
        if config._attn_implementation == "sdpa":
            config._attn_implementation = GROUPED
        elif any(name.endswith(".sinks") for name, _ in self.model.named_parameters()):
            config._attn_implementation = SINKS
        base = self.model.get_submodule(self.model.base_model_prefix)
        _check_supported(config, self.model, base)
        self._embedding, self._layers, self._norm = base.embed_tokens, base.layers, base.norm
        # Buffers that no file holds (rotary frequencies) are lost on the meta device: build their module again, off it.
        self._rotary = type(base.rotary_emb)(config=config).to(device)
        base.rotary_emb = self._rotary
        # Gathered rows of the embedding are bound too; the padding row, which only gradients ask for, may not be there.
        self._embedding.padding_idx = None
        self._full_precision = tuple(self.model._keep_in_fp32_modules_strict or ())
        self._bound: dict[ModuleKey, dict[str, torch.Tensor]] = {}
        self._addresses: dict[ModuleKey, tuple[int, ...]] = {}
        self.layers = len(self._layers)
        self.hidden = int(config.hidden_size)
        self._own_rows, self.workers = own_rows, workers or Workers(1)
        linear = [module for module in self.model.modules() if type(module).forward is nn.Linear.forward]
        self._widest = max(
            self.hidden, *(module.in_features for module in linear), *map(self.inner, range(self.layers))
        )
        self.own_kernels = self.make_own_kernels()
        if own_rows[0]:
            for layer in self._layers:
                layer.self_attn.__dict__[OWN] = self.own_kernels
        self._usual: Usual | None = None
        if own_rows[0] and device == HOST:
            for module in linear:
                module.__dict__["forward"] = partial(self._linear_module, module)
            for layer in range(self.layers):
                self._wrap_router(layer)
            if compute_dtype in NARROW:
                self._usual = Usual(self.model, self._layers[0].self_attn, self.own_kernels, compute_dtype)

    # ------------------------------------------------------------------------------------------ weights

    def bind(self, key: ModuleKey, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set parameters by their names in the whole model; a tensor of another dtype than ops use is converted."""
        self._bound.setdefault(key, {})
        for name, tensor in tensors.items():
            full = any(part in name for part in self._full_precision)
            converted = tensor.to(torch.float32 if full else self.compute_dtype)
            self._bound[key].setdefault(name, self._place(name, converted))
            self._addresses[key] = *self._addresses.get(key, ()), converted.data_ptr()

    def unbind(self, key: ModuleKey) -> None:
        """Put back the parameters without memory that ``bind`` replaced."""
        self._addresses.pop(key, None)
        for name, empty in self._bound.pop(key, {}).items():
            self._place(name, empty)

    def addresses(self, kind: str, layer: int) -> tuple[int, ...]:
        """Where the weights of a layer's module are."""
        return self._addresses.get(ModuleKey(kind, layer), ())

    def is_bound(self, key: ModuleKey) -> bool:
        """Whether the module's weights are in memory."""
        return key in self._bound

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Swap one parameter or buffer; returns the old one."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._parameters:
            held = module._parameters
            tensor = nn.Parameter(tensor, requires_grad=False)
        else:
            held = module._buffers
        old: torch.Tensor = held[leaf]
        held[leaf] = tensor
        return old

    def make_own_kernels(self) -> OwnKernels:
        """What multiplies by this model's weights with our own kernel, where it may."""
        return OwnKernels(self._own_rows[0], self._widest, self.workers, self._own_rows[1])

    def _linear_module(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, module.weight, module.bias)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``functional.linear``, by our own kernel where that is faster."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.own_kernels.takes(rows):
            return functional.linear(x, weight, bias)
        out = x.new_empty(*x.shape[:-1], len(weight))
        self.own_kernels.mm(rows.contiguous(), (weight, out.view(len(rows), -1)), bias=bias)
        return out

    def _wrap_router(self, layer: int) -> None:
        """Let a layer's router, a module of each family's own, call ``_linear``."""
        mlp = self._layers[layer].mlp
        router: Any = getattr(mlp, "gate", None) or getattr(mlp, "router", None)
        if self.experts(layer) is None or type(router).forward is nn.Linear.forward:
            return
        forward, calls = router.forward, _LinearCalls(self._linear)

        def within(*args: Any, **kwargs: Any) -> Any:
            with calls:
                return forward(*args, **kwargs)

        router.__dict__["forward"] = within

    # ------------------------------------------------------------------------------------------ structure

    def experts(self, layer: int) -> Any:
        """The experts module of a MoE layer (its parameters stay empty), or None in a dense layer."""
        return getattr(self._layers[layer].mlp, "experts", None)

    def inner(self, layer: int) -> int:
        """Inner width of a layer's routed experts, 0 in a dense layer."""
        module = self.experts(layer)
        return 0 if module is None else int(module.down_proj.shape[1 if module.is_transposed else 2])

    def num_experts(self, layer: int) -> int:
        """Routed experts of a MoE layer."""
        return int(self.experts(layer).down_proj.shape[0])

    def sliding(self, layer: int) -> bool:
        """Whether the layer's attention looks back only ``config.sliding_window`` positions."""
        types = getattr(self.config, "layer_types", None)
        if types:
            return bool(types[layer] == "sliding_attention")
        return getattr(self.config, "sliding_window", None) is not None

    def kv_shape(self, layer: int) -> KvShape:
        """What the layer's attention caches per position, found by running it, unbound, on the meta device."""
        probe = _KvProbe()
        hidden = torch.empty(1, 1, self.hidden, dtype=self.compute_dtype, device="meta")
        positions = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        angles = self.rotary(positions)
        on_meta = tuple(angle.to("meta") for angle in angles) if isinstance(angles, tuple) else angles.to("meta")
        self.attention(layer, hidden, None, positions.to("meta"), on_meta, probe)
        assert probe.shape is not None
        return probe.shape

    @property
    def own_attention(self) -> bool:
        """Whether all rows are multiplied, and attended for, by our own kernel."""
        narrow = self.device == HOST and self.compute_dtype in NARROW
        return narrow and self._own_rows == (1, 0) and self.config._attn_implementation == GROUPED

    def latent(self, layer: int) -> bool:
        """Whether attention caches its keys and values in another form than it uses them in."""
        return getattr(self._layers[layer].self_attn, "kv_lora_rank", None) is not None

    # ------------------------------------------------------------------------------------------ ops

    def embed(self, ids: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings of ``ids`` [r] as [r, hidden]; ids count the rows of ``rows`` [u, hidden] where that is given."""
        if rows is not None:
            self.bind(EMBEDDING, {f"{self.model.base_model_prefix}.embed_tokens.weight": rows.to(self.device)})
        try:
            embedded: torch.Tensor = self._embedding(ids.to(self._embedding.weight.device))
            return embedded.to(ids.device)
        finally:
            if rows is not None:
                self.unbind(EMBEDDING)

    def rotary(self, positions: torch.Tensor) -> Any:
        """Position embeddings of ``positions`` [B, q], in the form that the model's attention takes."""
        return self._rotary(torch.empty(0, dtype=self.compute_dtype, device=self.device), position_ids=positions)

    def mask(self, layer: int, present: torch.Tensor, padded: bool, queries: int, cache: Cache) -> torch.Tensor | None:
        """The attention mask of a layer's kind (causal or sliding), None where plain causal attention is right.

        present: [B, past + queries], False where a sequence has padding, as ``padded`` says that some have: to look would halt a
        GPU. cache: not yet updated. The mask is where ``present`` is.
        """
        if padded and queries == 1 and self.config._attn_implementation == GROUPED and not self.sliding(layer):
            return present[:, None, None]  # as transformers has it, who would first look whether all is there
        make: Any = create_sliding_window_causal_mask if self.sliding(layer) else create_causal_mask
        # Only its shape and dtype are read.
        embeds = torch.empty(1, dtype=self.compute_dtype, device=present.device)
        embeds = embeds.expand(present.shape[0], queries, self.hidden)
        mask: torch.Tensor | None = make(
            config=self.config, inputs_embeds=embeds, attention_mask=present if padded else None, **{CACHE: cache}
        )
        return mask

    def attention(
        self,
        layer: int,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
        angles: Any,
        cache: Cache,
    ) -> torch.Tensor:
        """Norm and attention of ``hidden`` [B, q, hidden], without the residual; writes into ``cache``."""
        part = self._layers[layer]
        with self._usual.rotating() if self._usual else nullcontext():
            out: torch.Tensor = part.self_attn(
                hidden_states=part.input_layernorm(hidden),
                position_embeddings=angles,
                attention_mask=mask,
                position_ids=positions,
                **{CACHE: cache},
            )[0]
        return out

    def remember(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor, angles: Any, cache: Cache) -> None:
        """Write keys and values of ``hidden`` [B, q, hidden] into ``cache``, as ``attention`` does; without a matmul for queries, nor what
        comes after them."""
        children = self._layers[layer].self_attn.named_children()
        queries = [part for name, part in children if name.startswith("q_") and isinstance(part, nn.Linear)]
        with ExitStack() as stack, suppress(_Remembered):
            for part in queries:
                stack.enter_context(replaced(part.__dict__, "forward", partial(_nothing, part)))
            self.attention(layer, hidden, None, positions, angles, _Remembering(cache))

    def moe_block(self, layer: int, hidden: torch.Tensor, shared: bool = True) -> Routed:
        """Norm, router and shared experts (or without those) of ``hidden`` [r, hidden], without the residual and the routed experts."""
        part = self._layers[layer]
        with ExitStack() as stack:
            for name, module in () if shared else part.mlp.named_children():
                if name.startswith(SHARED):
                    stack.enter_context(replaced(module.__dict__, "forward", _adds_nothing))
            out = part.mlp(part.post_attention_layernorm(hidden)[None])
        base = out[0] if isinstance(out, tuple) else out
        experts = part.mlp.experts
        x, indices, weights = experts.captured
        experts.captured = None
        return Routed(x, base[0], indices, weights)

    def shared_block(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What the shared experts of a layer add for the experts' input ``x`` [r, hidden]."""
        parts = {name: module for name, module in self._layers[layer].mlp.named_children() if name.startswith(SHARED)}
        gate = parts.pop(f"{SHARED}_gate", None)
        (expert,) = parts.values()
        out: torch.Tensor = expert(x[None])[0]
        return out if gate is None else functional.sigmoid(gate(x)) * out

    def dense_block(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Norm and MLP of ``hidden`` [r, hidden] in a dense layer, without the residual."""
        part = self._layers[layer]
        out: torch.Tensor = part.mlp(part.post_attention_layernorm(hidden)[None])[0]
        return out

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm of [r, hidden]."""
        out: torch.Tensor = self._norm(hidden)
        return out


def _check_supported(config: PreTrainedConfig, model: Any, base: nn.Module) -> None:
    """Raise ConfigError unless the model has just the parts that the ops of a plan compute, in the usual order."""
    if {name for name, _ in model.named_children()} != MODEL_PARTS or {
        name for name, _ in base.named_children()
    } != BASE_PARTS:
        raise _unsupported(config, "it has other parts than an embedding, decoder layers, a norm and a head")
    for number, layer in enumerate(base.get_submodule("layers").children()):
        experts = getattr(getattr(layer, "mlp", None), "experts", None)
        plain = experts is None or (getattr(experts, "has_gate", False) and not experts.has_post_expert_norm)
        if {name for name, _ in layer.named_children()} != LAYER_PARTS or not plain:
            raise _unsupported(
                config, f"layer {number} is not attention and a gated MLP or mixture of experts, each after its norm"
            )


def _unsupported(config: PreTrainedConfig, why: str) -> ConfigError:
    return ConfigError(
        Path(config.name_or_path or ".") / "config.json", "model_type", f"{config.model_type} is not supported: {why}"
    )
