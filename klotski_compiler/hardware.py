"""A machine as measured or published: tiers, links, processors, and where each number comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from klotski_compiler.errors import ConfigError
from klotski_compiler.kernel_facts import DTYPE_BYTES
from klotski_compiler.shipped import shipped, shipped_names

# Strict, so that "12" and true are not silently numbers; a JSON integer is still a valid Rate.
Size = Annotated[int, Field(strict=True, gt=0)]
Rate = Annotated[float, Field(strict=True, gt=0)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Microseconds = Annotated[float, Field(strict=True, ge=0)]
Points = tuple[tuple[int, float], ...]
Table = tuple[tuple[Size, Rate], ...]


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tier(_Fact):
    """A memory. ``capacity_bytes``: what a user may have of it."""

    capacity_bytes: Size


class Link(_Fact):
    """A directed copy engine between two tiers: time = latency + bytes / bandwidth.

    shared_speed: what is left of the bandwidth while the processor of the target tier computes (memory and cores are shared).
    """

    bandwidth_bytes_per_s: Rate
    latency_us: Microseconds
    shared_speed: Share = 1.0


class Processor(_Fact):
    """A processor and the memory it computes in.

    matmul: for each compute dtype, points (tokens m, flops per second) of one expert-sized matmul, increasing in m.
    kv_bytes_per_s: rate at which decode attention reads the KV cache. prefill_attention_flops_per_s: rate of attention
    over whole prompts, counting all pairs of positions although a causal kernel skips half of them. op_us: fixed cost
    of one small op (launch, framework). Several expert matmuls make one op. attention_op_us: fixed cost of one
    attention op (a whole attention block of a layer). router_op_us: of one router op. expert_op_us: of one expert.
    hidden_bytes_per_s: rate at which hidden states pass the elementwise work of such a block (norm, residual, copies),
    each element counted once. shared_speed: what is left of the speed while a link into the processor's tier is busy.
    least_own_rows, most_own_rows: from how many rows on, and up to how many (0: any number), a 16-bit matmul is faster by the package's
    kernel (0: never); ``matmul`` has the faster one's rates, and where they are not 0 experts and decode attention are that kernel's, too.
    head: points, as of a matmul, of a 16-bit head of whose products only the greatest are kept (none: ``matmul`` has them).
    threads: of a CPU's kernels. beside_cpu: what is left of the speed of a GPU's ops while the CPU computes, whose threads take cores and
    the interpreter from those that issue them.
    """

    tier: str
    memory_bytes_per_s: Rate
    matmul: Annotated[dict[str, Annotated[Table, Field(min_length=1)]], Field(min_length=1)]
    kv_bytes_per_s: Rate
    prefill_attention_flops_per_s: Rate
    op_us: Microseconds
    hidden_bytes_per_s: Rate
    attention_op_us: Microseconds
    router_op_us: Microseconds
    expert_op_us: Microseconds
    shared_speed: Share = 1.0
    least_own_rows: Annotated[int, Field(strict=True, ge=0)] = 0
    most_own_rows: Annotated[int, Field(strict=True, ge=0)] = 0
    head: Table = ()
    threads: Annotated[int, Field(strict=True, ge=1)] = 1
    beside_cpu: Share = 1.0


class Hardware(_Fact):
    """A machine. ``compute_tier``: where kernels read weights. ``sources``: dotted field -> where the number is from.

    A matmul table is one entry of ``sources`` (``processors.gpu.matmul.bf16``).
    """

    name: Annotated[str, Field(min_length=1)]
    description: str
    compute_tier: str
    tiers: dict[str, Tier]
    links: dict[str, Link]
    processors: dict[str, Processor]
    sources: dict[str, str]

    @model_validator(mode="after")
    def _parts_fit(self) -> Hardware:
        """Names refer to what exists; every fault is reported, each under its own field."""
        faults = [
            InitErrorDetails(type=PydanticCustomError("reference", "{why}", {"why": why}), loc=field, input=value)
            for field, value, why in _reference_faults(self)
        ]
        if faults:
            raise ValidationError.from_exception_data("Hardware", faults)
        return self


def _reference_faults(hardware: Hardware) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """(field, value, why) of each name that refers to nothing and of each matmul table out of order."""
    tiers = ", ".join(hardware.tiers)
    if hardware.compute_tier not in hardware.tiers:
        yield ("compute_tier",), hardware.compute_tier, f"not a tier; choose one of {tiers}"
    elif all(processor.tier != hardware.compute_tier for processor in hardware.processors.values()):
        yield ("compute_tier",), hardware.compute_tier, "no processor computes in this tier; add one"
    for name in hardware.links:
        source, _, target = name.partition(">")
        if source == target or source not in hardware.tiers or target not in hardware.tiers:
            yield ("links", name), name, f"name a link '<tier>><tier>' between two different tiers of {tiers}"
    for name, processor in hardware.processors.items():
        if processor.tier not in hardware.tiers:
            yield ("processors", name, "tier"), processor.tier, f"not a tier; choose one of {tiers}"
        for field, points in [
            *((("matmul", dtype), table) for dtype, table in processor.matmul.items()),
            (("head",), processor.head),
        ]:
            tokens = [m for m, _ in points]
            if any(later <= earlier for earlier, later in pairwise(tokens)):
                yield ("processors", name, *field), tokens, "token counts must increase; sort the points by m"


def read_hardware(source: str | Path) -> Hardware:
    """The hardware profile at a JSON path or, failing that, the shipped profile of that name.

    Raises ConfigError, one line per fault, if the file cannot be read or does not describe a machine.
    """
    path = Path(source)
    if not path.exists():
        found = shipped("hardware", str(source))
        if found is None:
            names = ", ".join(shipped_names("hardware"))
            mend = f"give a JSON path or one of {names}; `klotski-profile -o hw.json` measures this machine"
            raise ConfigError(source, "", f"no such file, and no shipped hardware profile of that name: {mend}")
        path = found
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, "", f"cannot be read ({error}); give a hardware profile in JSON") from None
    try:
        return Hardware.model_validate_json(text)
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors(include_url=False)]
        (field, why), *others = faults
        lines = [f"{path}: {other}: {reason}" for other, reason in others]
        raise ConfigError(path, field, "\n".join([why, *lines])) from None


# What to do about each of pydantic's findings; the finding itself is its own message.
_MENDS = {
    "missing": "add it; every field is required",
    "extra_forbidden": "remove it or correct its name",
    "finite_number": "measure it again or remove the profile; NaN and infinity are no measurements",
    "greater_than": "give a positive number",
    "greater_than_equal": "give zero or a positive number",
    "json_invalid": "correct the file at that place, or write it anew with `klotski-profile -o FILE`",
}


def _explain(fault: Any) -> tuple[str, str]:
    """(dotted field, message with the value and the mend) of one pydantic error."""
    field = ".".join(map(str, fault["loc"]))
    message, kind = fault["msg"], fault["type"]
    if kind == "json_invalid":
        return field, f"{message}; {_MENDS[kind]}"
    if kind == "missing":
        return field, f"missing; {_MENDS[kind]}"
    value = json.dumps(fault["input"], default=str)
    shown = value if len(value) <= 60 else value[:57] + "..."
    mend = _MENDS.get(kind)
    return field, f"{shown}: {message[:1].lower()}{message[1:]}" + (f"; {mend}" if mend else "")


def to_json(hardware: Hardware) -> str:
    """The profile as the text of a file: indented, one matmul point per line."""
    text = json.dumps(hardware.model_dump(mode="json", exclude_unset=True), indent=2)
    return re.sub(r"\[\s+(\d+),\s+([^\s\[\]]+)\s+\]", r"[\1, \2]", text) + "\n"


def numbers(hardware: Hardware) -> dict[str, object]:
    """Every number that was given, by its dotted field, as ``sources`` names them; a matmul table counts as one."""

    def leaves(value: object, field: str) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from leaves(inner, f"{field}.{name}")
        elif not isinstance(value, str):
            yield field, value

    parts = hardware.model_dump(include={"tiers", "links", "processors"}, exclude_unset=True)
    return {field: value for part, inner in parts.items() for field, value in leaves(inner, part)}


def matmul_us(processor: Processor, dtype: str, tokens: float, params: int, weight_bytes: int) -> float:
    """Microseconds of a matmul of ``tokens`` rows with ``params`` weights of ``weight_bytes``: a roofline.

        max(2 params tokens / rate(tokens), weight_bytes / memory_bytes_per_s)

    rate is the measured table, interpolated in log-log, constant above its last point and proportional to tokens below
    its first (there a kernel's time is constant). ``tokens`` may be an expected, fractional count; none take no time.

    Guarantee that bounds rely on: the time does not decrease as tokens grow, and the time per token does not increase.
    So merging two batches never costs more than running both, and splitting one never helps. See ``monotone``.
    Raises ConfigError for a dtype that the profile has no rates for.
    """
    try:
        points = processor.matmul[dtype]
    except KeyError:
        why = f"no matmul rates for this dtype; the profile has {', '.join(processor.matmul)}; add it or use --dtype"
        raise ConfigError("hardware profile", f"matmul.{dtype}", why) from None
    return _roofline_us(processor, points, tokens, params, weight_bytes)


def head_us(processor: Processor, dtype: str, tokens: float, params: int, weight_bytes: int) -> float:
    """The same of a head of whose products only the greatest of every row is kept, with the same guarantee."""
    if not processor.head or DTYPE_BYTES[dtype] != 2:
        return matmul_us(processor, dtype, tokens, params, weight_bytes)
    return _roofline_us(processor, processor.head, tokens, params, weight_bytes)


def _roofline_us(processor: Processor, points: Points, tokens: float, params: int, weight_bytes: int) -> float:
    if tokens <= 0:
        return 0.0
    work_s = 2 * params * tokens / _rate(monotone(points), tokens)
    return 1e6 * max(work_s, weight_bytes / processor.memory_bytes_per_s)


@lru_cache(maxsize=256)
def monotone(points: Points) -> Points:
    """The least table above ``points`` whose rate never falls with m and never grows faster than m.

    A falling rate is noise, or a kernel that a caller avoids by splitting the tokens; a rate that grows faster than m
    means that fewer tokens took longer than more, which padding avoids. Both repairs only raise rates, so a bound
    computed from the table stays a bound. Straight lines in log-log between such points keep both properties.
    """
    best = 0.0
    rising = [(m, best := max(best, rate)) for m, rate in points]
    per_token = 0.0
    repaired = []
    for m, rate in reversed(rising):
        per_token = max(per_token, rate / m)
        repaired.append((m, max(rate, per_token * m)))
    return tuple(reversed(repaired))


def _rate(points: Points, tokens: float) -> float:
    """Flops per second at ``tokens``, from a monotone table."""
    (first, lowest), (last, highest) = points[0], points[-1]
    if tokens <= first:
        return lowest * tokens / first
    if tokens >= last:
        return highest
    for (m0, rate0), (m1, rate1) in pairwise(points):
        if tokens <= m1:
            slope = log(rate1 / rate0) / log(m1 / m0)
            return float(rate0 * (tokens / m0) ** slope)
    raise AssertionError("unreachable: tokens lies between the first and the last point")
