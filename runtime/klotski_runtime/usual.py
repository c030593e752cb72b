"""Modules that compute what most families' do, in several of PyTorch's ops, for which our own kernel has one.

What a module is called says little of what it computes: it is found by trying. Both are given the same numbers, drawn at random.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from klotski_runtime.own_kernels import OwnKernels

ROTATION = "apply_rotary_pos_emb"
"""What modeling files of transformers call the function that turns queries and keys by rotary angles."""

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]

WIDTH = 48
"""Of heads that are tried."""

ROUNDED_OTHERWISE = 0.02
"""In a norm, the order in which squares are added may decide how an element is rounded, of at most such a share of them; the product with
its weight is then up to two numbers away."""


@contextmanager
def replaced(values: dict[str, Any], name: str, value: object) -> Iterator[None]:
    """One entry, for as long as the context lasts."""
    there, kept = name in values, values.get(name)
    values[name] = value
    try:
        yield
    finally:
        if there:
            values[name] = kept
        else:
            del values[name]


class Usual:
    """Our own kernel in the place of a model's norms, and of its rotary embeddings within ``rotating``, where they are what it
    computes."""

    def __init__(self, model: nn.Module, attention: nn.Module, own: OwnKernels, dtype: torch.dtype) -> None:
        """attention: a module of it. dtype: that it computes in."""
        self._own = own
        self._family = vars(sys.modules[type(attention).__module__])
        self.rotate = usual_rotation(attention, own, dtype)
        self.norms = list[nn.Module]()
        kinds = dict[tuple[Any, ...], bool]()
        for module in model.modules():
            added = epsilon(module)
            if added is None:
                continue
            kind = type(module), added, *(parameter.shape for parameter in module.parameters())
            if kind not in kinds:
                kinds[kind] = is_usual_norm(module, own, dtype)
            if kinds[kind]:
                module.__dict__["forward"] = partial(self._normed, module, module.forward, added)
                self.norms.append(module)

    def rotating(self) -> AbstractContextManager[None]:
        """While attention modules are called; whoever else calls them finds them as they were."""
        return replaced(self._family, ROTATION, self._rotated) if self.rotate else nullcontext()

    def _normed(
        self, module: Any, theirs: Callable[[torch.Tensor], torch.Tensor], added: float, x: torch.Tensor
    ) -> torch.Tensor:
        if not self._own.knows(x) or module.weight.dtype != x.dtype:
            return theirs(x)
        return self._own.norm(x, module.weight, added)

    def _rotated(
        self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *how: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of whole heads; theirs where only a part of each is turned, or it is asked for otherwise."""
        known = all(map(self._own.knows, (query, key, cosine, sine)))
        if how or named or not known or not query.shape[3] == key.shape[3] == cosine.shape[2]:
            assert self.rotate is not None
            return self.rotate(query, key, cosine, sine, *how, **named)
        return self._own.rotate(query, cosine, sine), self._own.rotate(key, cosine, sine)


def epsilon(norm: nn.Module) -> float | None:
    """What a norm adds to mean squares, where it says so."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


@torch.inference_mode()
def is_usual_norm(norm: nn.Module, own: OwnKernels, dtype: torch.dtype) -> bool:
    """Whether a module computes ``OwnKernels.norm``."""
    parameters, added = dict(norm.named_parameters()), epsilon(norm)
    if set(parameters) != {"weight"} or any(True for _ in norm.children()) or added is None:
        return False
    draw = torch.Generator().manual_seed(0)
    shape = parameters["weight"].shape
    weight = (1 + torch.randn(shape, generator=draw) / 4).to(dtype)
    sizes = added**0.5 * torch.tensor([0.1, 1, 10, 1e3])  # by which epsilon shows, and by which it does not
    x = (sizes[:, None, None] * torch.randn(4, 8, *shape, generator=draw)).to(dtype)
    with suppress(Exception):  # of whatever else it is
        theirs = torch.func.functional_call(norm, {"weight": weight}, (x,))
        ours = own.norm(x, weight, added)
        apart = (theirs.view(torch.int16).int() - ours.view(torch.int16).int()).abs()
        return theirs.dtype == dtype and int(apart.max()) <= 2 and float(apart.float().mean()) <= ROUNDED_OTHERWISE
    return False


@torch.inference_mode()
def usual_rotation(attention: nn.Module, own: OwnKernels, dtype: torch.dtype) -> Rotate | None:
    """The function by which an attention module turns queries and keys, if it computes ``OwnKernels.rotate``."""
    theirs: Rotate | None = vars(sys.modules[type(attention).__module__]).get(ROTATION)
    if theirs is None:
        return None
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, heads, WIDTH, generator=draw).to(dtype).transpose(1, 2) for heads in (4, 2))
    cosine, sine = torch.randn(2, 2, 3, WIDTH, generator=draw).to(dtype)
    with suppress(Exception):
        turned = theirs(query, key, cosine, sine)
        ours = own.rotate(query, cosine, sine), own.rotate(key, cosine, sine)
        return theirs if all(map(torch.equal, turned, ours)) else None
    return None
