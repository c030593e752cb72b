"""What is known of a model's routing before it runs: expert popularity per layer and layer-to-layer correlation.

Design section 7.1: p(l, e) sums to 1 over e; a token picks e with probability q = min(1, k p(l, e)); with B tokens expert e gets
B q tokens on average and is touched with probability 1 - (1 - q)^B.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from klotski_compiler.errors import ConfigError
from klotski_compiler.model import ModelSpec


class Routing(BaseModel):
    """popularity[layer][expert]: share of the layer's picks (empty for a dense layer). source: how it was obtained.

    successors[layer][expert]: (expert of the next layer, share in per mille) of the tokens that picked ``expert``, most frequent
    first; empty where nothing follows or nothing was measured (Klotski, section 6.2 of the paper: path length 1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    source: str
    tokens: int
    popularity: tuple[tuple[float, ...], ...]
    successors: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] = ()


def uniform(spec: ModelSpec) -> Routing:
    """Every expert equally popular: what is assumed where nothing was measured."""
    popularity = tuple(
        (1.0 / layer.num_experts,) * layer.num_experts if layer.num_experts else () for layer in spec.layers
    )
    return Routing(model=spec.name, source="uniform popularity, assumed", tokens=0, popularity=popularity)


def read_routing(source: str | Path, spec: ModelSpec) -> Routing:
    """A routing profile, checked against the model. Raises ConfigError."""
    try:
        routing = Routing.model_validate(json.loads(Path(source).read_text()))
    except OSError as fault:
        raise ConfigError(
            source, "", f"cannot be read ({fault.strerror}); write one with klotski-profile routing"
        ) from fault
    except ValidationError as fault:
        first = fault.errors()[0]
        raise ConfigError(source, ".".join(map(str, first["loc"])), first["msg"]) from fault
    except ValueError as fault:
        raise ConfigError(source, "", f"is not JSON: {fault}") from fault
    shape = [layer.num_experts for layer in spec.layers]
    if [len(layer) for layer in routing.popularity] != shape:
        raise ConfigError(
            source, "popularity", f"was measured on another model than {spec.name} (layers and experts differ)"
        )
    for number, layer in enumerate(routing.popularity):
        if layer and (min(layer) < 0 or abs(sum(layer) - 1) > 1e-3):
            raise ConfigError(
                source, f"popularity[{number}]", f"must be shares that sum to 1, sums to {sum(layer):.4f}"
            )
    return routing
