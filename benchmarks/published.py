"""What measured cases of published papers mean to the compiler: machine, model, policy, sizes and placement of each.

A case names a system as its source does. Systems named alike in different sources are different programs, hence the keys of
SYSTEMS. What a source leaves open (batch sizes, mostly) is settled by a rule per system, stated in ``System.why``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.errors import ConfigError, Infeasible
from klotski_compiler.hardware import Hardware, Processor, read_hardware
from klotski_compiler.model import Layer, ModelSpec, Module, read_model
from klotski_compiler.policies import policy
from klotski_compiler.routing import uniform
from klotski_compiler.search import Request, Search
from klotski_compiler.tensors import kv_bytes

GPU_USABLE = 0.95  # of the card: what driver and CUDA context leave
# Of host memory where a system states no more: MoE-Lightning's own cap; FlexGen's stated sizes come to 0.84.
HOST_USABLE = 0.8
HALF = 0.5  # of the GPU: weights that take no more stay there, with the KV cache
CARD_GB = 24  # the GPU memory that micro-batches are given for
LEAST_BATCHES = 10  # of a group of unstated size, so that shares of its batches mean something
LLAMA_TOKENS = 2048  # llama.cpp's default logical batch
# Per token and value of its hidden state, in an eager prefill: what DeepSpeed's rates imply of the batches that it took.
PREFILL_BYTES = 64
STATES_SHARE = 0.6  # of the GPU beside two layers, for hidden states: MoE-Lightning's largest stated group on the L4
PACKED = 4.5 / 16  # 4 bits and two 16-bit numbers per group of 64, of a 16-bit value
DEQUANTISE_BYTES = 20  # per value: PyTorch unpacks, casts, scales and shifts in five passes that read and write 16 bits
FOUR_MACHINES = "flexgen-4xt4"
STAGES = 4


class _Fact(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Machine(_Fact):
    """A machine as its source describes it."""

    name: str
    gpu_memory_gb: float
    host_memory_gb: float


class Asked(_Fact):
    """The workload, and the sizes that the source states. num_sequences: None for as many as fit."""

    prompt_len: int
    gen_len: int
    num_sequences: int | None = None
    batch_size: int | None = None
    num_batches: int | None = None


class Measured(_Fact):
    """Generated tokens over everything, over decode; prompt tokens over prefill. Each per second, None where not published."""

    tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None

    @property
    def found(self) -> dict[str, float]:
        """What was published, the most comprehensive first."""
        rates = ("tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s")
        return {rate: value for rate in rates if (value := getattr(self, rate))}


class Case(_Fact):
    """One measurement."""

    id: str
    source: str
    system: str
    hardware: Machine
    model: str
    workload: Asked
    policy_details: str = ""
    measured: Measured = Field(default_factory=Measured)


def read_cases(path: Path) -> list[Case]:
    """The cases of a file. Raises ConfigError."""
    try:
        return TypeAdapter(list[Case]).validate_json(path.read_bytes())
    except OSError as fault:
        raise ConfigError(path, "", f"cannot be read ({fault.strerror}); give a JSON list of cases") from fault
    except ValidationError as fault:
        first = fault.errors()[0]
        raise ConfigError(path, ".".join(map(str, first["loc"])), first["msg"]) from fault


# ------------------------------------------------------------------------------------------------------------- machines

# What Klotski's paper shows of the host's work for one batch and layer.
HOST_WORK: dict[str, tuple[Any, str]] = {
    "processors.gpu.attention_op_us": (
        2400.0,
        "2.6 ms at batch 16 (introduction), 3.8 at 64 (fig. 15), of which some 0.2 and 0.6 are weights and KV",
    ),
    "processors.gpu.router_op_us": (
        10500.0,
        "fig. 15: for each of ten batches 4.1 ms of gate and 6.9 of experts, which run batch by batch; the experts' price "
        "already has 0.5",
    ),
}
HIDDEN = "19 decode passes a second over OPT-6.7B's 13 GB leave no gap between kernels: launches run ahead; OPT has no router"
LAUNCHED: dict[str, tuple[Any, str]] = {
    f"processors.gpu.{op}_op_us": (10.0, HIDDEN) for op in ("attention", "router", "expert")
}
# name -> (shipped profile, {field: (value, reason)}). Memory is the case's.
MACHINES: dict[str, tuple[str, dict[str, tuple[Any, str]]]] = {
    "klotski-env1": (
        "rtx3090",
        {
            **HOST_WORK,
            "processors.cpu.matmul.bf16": (
                ((1, 4.1e10), (8, 3.28e11)),
                "Fiddler at batch 4, same paper: 1.6 s a pass, 0.4 of it launches, some 140 experts on the CPU: 8.5 ms each",
            ),
        },
    ),
    "klotski-env2": ("h800", HOST_WORK),  # the same programs on another Xeon
    "moe-lightning-s1": (
        "t4",
        {
            f"links.{link}.bandwidth_bytes_per_s": (9e9, "the records imply 7 to 9 GB/s of weights, gaps between copies included")
            for link in ("host>gpu", "gpu>host")
        },
    ),
    "moe-lightning-s2": ("l4", {}),
    "moe-gen-c1": ("a5000", {}),
    "moe-gen-c2": ("a5000", {}),
    "moe-gen-c3": (
        "a5000",
        {
            "processors.gpu.matmul.bf16": (
                ((1, 5.76e11), (8, 4.608e12), (32, 1.843e13), (128, 7.2e13), (512, 1e14)),
                "A6000: memory as the A5000, and 155 of its 111 TFLOPS by the datasheets",
            )
        },
    ),
    "flexgen-t4": ("t4", LAUNCHED),
    FOUR_MACHINES: ("t4", LAUNCHED),
}  # fmt: skip


@cache
def machine(name: str) -> Hardware:
    """The profile of a published machine. Raises ConfigError."""
    if name not in MACHINES:
        raise ConfigError("hardware", name, f"no such machine here; one of {', '.join(MACHINES)}")
    profile, changes = MACHINES[name]
    data = read_hardware(profile).model_dump()
    for field, (value, _) in changes.items():
        *path, last = field.split(".")
        part = data
        for key in path:
            part = part[key]
        part[last] = value
    return Hardware.model_validate(data)


def scaled(hardware: Hardware, compute: float = 1.0, transfer: float = 1.0) -> Hardware:
    """The same machine with all matmul and prefill attention rates, and all link bandwidths, times a factor."""

    def faster(processor: Processor) -> Processor:
        matmul = {dtype: tuple((m, rate * compute) for m, rate in points) for dtype, points in processor.matmul.items()}
        attention = processor.prefill_attention_flops_per_s * compute
        return processor.model_copy(update={"matmul": matmul, "prefill_attention_flops_per_s": attention})

    links = {
        name: link.model_copy(update={"bandwidth_bytes_per_s": link.bandwidth_bytes_per_s * transfer})
        for name, link in hardware.links.items()
    }
    processors = {name: faster(processor) for name, processor in hardware.processors.items()}
    return hardware.model_copy(update={"links": links, "processors": processors})


# --------------------------------------------------------------------------------------------------------------- models

# layers, hidden, ffn, heads, slices of the MLP (the smallest is on the GPU whole or not at all)
OPT = {
    "OPT-6.7B": (32, 4096, 16384, 32, 1),
    "OPT-30B": (48, 7168, 28672, 56, 4),
    "OPT-175B": (96, 12288, 49152, 96, 4),
}
OPT_VOCABULARY, OPT_POSITIONS = 50272, 2048


@cache
def model(name: str) -> ModelSpec:
    """A published model: a shipped profile, or an OPT, whose last layer computes what the others do, as it does in the published systems.
    Raises ConfigError."""
    if name in OPT:
        return _opt(name)
    spec = read_model(name.lower())
    return replace(spec, layers=tuple(replace(layer, last=False) for layer in spec.layers))


def _opt(name: str) -> ModelSpec:
    """A dense model whose MLP is cut into slices that every token visits, so that a part of them may be resident or on disk."""
    count, hidden, inner, heads, slices = OPT[name]
    mlp = _fp16(2 * hidden * inner // slices, 2)
    layer = Layer(
        attention=_fp16(4 * hidden * hidden, 4),
        heads=heads,
        kv_elements=2 * hidden,
        attention_flops=4 * hidden,
        sliding_window=None,
        expert=mlp,
        num_experts=slices,
        top_k=slices,
    )
    table = _fp16(OPT_VOCABULARY * hidden, 1)
    return ModelSpec(
        name=name,
        model_type="opt",
        hidden_size=hidden,
        vocab_size=OPT_VOCABULARY,
        max_positions=OPT_POSITIONS,
        layers=(layer,) * count,
        embedding=replace(table, flops_per_token=0),
        norm=Module(2 * hidden, 4 * hidden, 2, 0),
        head=table,
        tied=True,
        store_dtype="fp16",
        compute_dtype="fp16",
    )


def _fp16(params: int, segments: int) -> Module:
    return Module(params, 2 * params, segments, 2 * params)


def packed(spec: ModelSpec, weights: bool, cache: bool) -> ModelSpec:
    """The model with 4-bit layers, and with a 4-bit KV cache."""

    def smaller(module: Module) -> Module:
        return replace(module, nbytes=round(module.nbytes * PACKED)) if weights else module

    layers = tuple(
        replace(
            layer,
            attention=smaller(layer.attention),
            expert=layer.expert and smaller(layer.expert),
            kv_elements=round(layer.kv_elements * (PACKED if cache else 1)),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


@dataclass(frozen=True, eq=False)
class Priced(Cost):
    """What is peculiar to a program: 4-bit ``weights`` and a 4-bit KV ``cache``, which each use first writes out in 16 bits, and
    ``repeats``, CPU attention that copies keys and values for every query head of a group before it reads them."""

    weights: bool = False
    cache: bool = False
    repeats: bool = False

    def module_us(self, module: Module, tokens: float, processor: Processor | None = None) -> float:
        busy = super().module_us(module, tokens, processor)
        if not self.weights or not busy or module.nbytes >= module.params * self.compute_bytes:
            return busy
        return busy + 1e6 * module.params * DEQUANTISE_BYTES / (processor or self.processor).memory_bytes_per_s

    def attend_us(self, layer: Layer, sequences: float, context: float, processor: Processor) -> float:
        busy = super().attend_us(layer, sequences, context, processor)
        if self.repeats and processor.tier == "host":
            group = layer.attention_flops / (2 * layer.kv_elements)
            busy *= 1 + 2 * group if group > 1 else 1  # read once, write and read for all heads
        values = sequences * context * layer.kv_elements / PACKED
        return busy + self.cache * 1e6 * values * DEQUANTISE_BYTES / processor.memory_bytes_per_s


# -------------------------------------------------------------------------------------------------------------- systems


@dataclass(frozen=True)
class System:
    """A published program. why: of its policy and of the sizes that its source leaves open.

    calibration: cases that its two factors are fitted on. factors_of: the system whose factors it shares, because it is the same
    program. size: what bounds a group of unstated size: ``prefill`` (activations of whole prompts on the GPU), ``states`` (their
    hidden states there), ``cache`` (KV there), ``host`` (KV in host memory, of which it takes ``host_share``), ``one`` (sequence),
    ``tokens`` (of prompts, by model).
    micro_batch: sequences per batch of such a group, on a card of CARD_GB, and in proportion on another. cpu_share: of the batches
    whose attention the CPU computes. streams: whether it keeps no weights on the GPU. weights, repeats: see Priced.
    """

    policy: str
    why: str
    calibration: tuple[str, ...] = ()
    factors_of: str = ""
    size: str = "host"
    tokens: tuple[tuple[str, int], ...] = ()
    micro_batch: int = 1
    cpu_share: float = 0.0
    host_share: float = HOST_USABLE
    streams: bool = False
    weights: bool = False
    repeats: bool = False


KLOTSKI, LIGHTNING, MOE_GEN, FLEXGEN = "Klotski", "MoE-Lightning", "MoE-Gen", "FlexGen"
ENV1, S1, S2, C1, C2, T4 = (
    "klotski-8x7b-env1", "moe-lightning-s1-8x7b", "moe-lightning-s2-8x7b", "moe-gen-c1-8x7b", "moe-gen-c2-8x7b", "flexgen-t4",
)  # fmt: skip


def _ends(system: str) -> tuple[str, ...]:
    """First and last row of a system's bars in Klotski's figure 10."""
    return f"{ENV1}-{system}-bs4", f"{ENV1}-{system}-bs64"


SYSTEMS: dict[tuple[str, str], System] = {
    (KLOTSKI, "Klotski"): System(
        "klotski", "its own; corners of figure 14",
        (f"{ENV1}-fig14-bs4-n3", f"{ENV1}-fig14-bs4-n15", f"{ENV1}-fig14-bs64-n3", f"{ENV1}-fig14-bs64-n15"),
    ),
    (KLOTSKI, "Klotski (q)"): System(
        "klotski", "its own with 4-bit experts and attention", _ends("klotski-q"), weights=True
    ),
    (KLOTSKI, "Klotski without expert reordering"): System("klotski", "the same program", factors_of="Klotski"),
    (KLOTSKI, "FlexGen"): System("flexgen", "the authors' port to Mixtral, with Klotski's n", _ends("flexgen")),
    (KLOTSKI, "Accelerate"): System("accelerate", "its own", _ends("accelerate"), size="cache"),
    (KLOTSKI, "DeepSpeed-FastGen"): System(
        "zero_inference", "weights offloaded by ZeRO-Inference, which keeps none on the GPU",
        _ends("deepspeed-fastgen"), size="prefill", streams=True,
    ),
    (KLOTSKI, "MoE-Infinity"): System("moe_infinity", "its own", _ends("moe-infinity"), size="cache"),
    (KLOTSKI, "Fiddler"): System("fiddler", "its own", _ends("fiddler"), size="cache"),
    (LIGHTNING, "MoE-Lightning"): System(
        "moe_lightning", "its own; hidden states of all prompts wait on the GPU; micro-batch 68 where none is stated: it divides S2's",
        (f"{S1}-unpadded-gen32", f"{S1}-pad-gen32", f"{S2}-unpadded-gen256", f"{S2}-pad-gen256"),
        size="states", micro_batch=68, cpu_share=1.0,
    ),
    (LIGHTNING, "FlexGen"): System(
        "flexgen", "GPU attention; host memory filled; micro-batches in the middle of the stated ones (16 on 16 GB)",
        (f"{S1}-flexgen-gen32", f"{S1}-flexgen-gen256", f"{S2}-flexgen-gen32", f"{S2}-flexgen-gen256"), micro_batch=24,
    ),
    (LIGHTNING, "FlexGen(c)"): System(
        "flexgen", "CPU attention in PyTorch, not overlapped, which repeats keys and values for all heads; sizes as FlexGen",
        (f"{S1}-flexgen-c-gen32", f"{S1}-flexgen-c-gen256", f"{S2}-flexgen-c-gen32", f"{S2}-flexgen-c-gen256"),
        micro_batch=24, cpu_share=1.0, repeats=True,
    ),
    (LIGHTNING, "DeepSpeed ZeRO 0.14.3"): System(
        "zero_inference", "its own; the largest batch whose prefill fits",
        (f"{S1}-deepspeed-gen32", f"{S1}-deepspeed-gen256", f"{S2}-deepspeed-gen32", f"{S2}-deepspeed-gen256"),
        size="prefill", streams=True,
    ),
    (MOE_GEN, "llama.cpp"): System(
        "fiddler", "one sequence, all experts computed by the CPU in decode; prompts by the GPU, layer by layer, 2048 tokens at once",
        (f"{C2}-decode256-llamacpp", f"{C2}-prefill-llamacpp"), size="one", streams=True,
    ),
    (MOE_GEN, "vLLM"): System(
        "accelerate", "weights fetched when needed, nothing ahead; paged KV fills the GPU",
        (f"{C2}-decode256-vllm", f"{C2}-prefill-vllm"), size="cache", streams=True,
    ),
    (MOE_GEN, "DeepSpeed"): System(
        "zero_inference", "its own; the largest batch whose prefill fits",
        (f"{C2}-decode256-deepspeed", f"{C2}-prefill-deepspeed"), size="prefill", streams=True,
    ),
    (MOE_GEN, "FlexGen*"): System(
        "flexgen", "one batch for all modules, as the paper says of those it compares with: the largest whose prefill fits",
        (f"{C2}-decode256-flexgen", f"{C2}-prefill-flexgen"), size="prefill",
    ),
    (MOE_GEN, "MoE-Lightning*"): System(
        "moe_lightning", "its own; sizes as MoE-Lightning",
        (f"{C2}-decode256-moe-lightning", f"{C2}-prefill-moe-lightning"), size="states", micro_batch=68, cpu_share=1.0,
    ),
    (MOE_GEN, "MoE-Lightning(p)*"): System(
        "moe_lightning", "the same program", factors_of="MoE-Lightning*", size="states", micro_batch=68, cpu_share=1.0
    ),
    (MOE_GEN, "MoE-Gen(G)"): System(
        "moe_gen", "its own, GPU attention", factors_of="MoE-Gen(H)", host_share=0.95, micro_batch=400
    ),
    (MOE_GEN, "MoE-Gen(H)"): System(
        "moe_gen", "its own, 6:4 attention; as many sequences as host memory takes; micro-batches of 400 as in its code",
        (f"{C2}-decode256-moe-gen-h", f"{C2}-decode256-moe-gen-g", f"{C2}-prefill-moe-gen"),
        host_share=0.95, micro_batch=400, cpu_share=0.6,
    ),
    (MOE_GEN, "MoE-Gen"): System("moe_gen", "as (H)", factors_of="MoE-Gen(H)", host_share=0.95, micro_batch=400, cpu_share=0.6),
    (FLEXGEN, "FlexGen"): System(
        "flexgen", "its own; placement as stated", (f"{T4}-opt-6.7b-p512", f"{T4}-opt-30b-p512", f"{T4}-opt-175b-p256"),
        micro_batch=48,
    ),
    (FLEXGEN, "FlexGen compressed"): System(
        "flexgen", "its own, 4 bits as stated",
        (f"{T4}-opt-6.7b-p512-compressed", f"{T4}-opt-30b-p512-compressed", f"{T4}-opt-175b-p256-compressed"),
    ),
    (FLEXGEN, "Accelerate"): System(
        "accelerate", "its own; prompt tokens per batch as stated for prompts of 512",
        (f"{T4}-opt-6.7b-p512-accelerate", f"{T4}-opt-30b-p512-accelerate"), size="tokens",
        tokens=(("OPT-6.7B", 1024), ("OPT-30B", 4096), ("OPT-175B", 1024)),
    ),
    (FLEXGEN, "DeepSpeed"): System(
        "zero_inference", "its own; prompt tokens per batch as stated for prompts of 512",
        (f"{T4}-opt-6.7b-p512-deepspeed", f"{T4}-opt-30b-p512-deepspeed"), size="tokens", streams=True,
        tokens=(("OPT-6.7B", 8192), ("OPT-30B", 2048), ("OPT-175B", 512)),
    ),
}  # fmt: skip


def origin(case: Case) -> str:
    """The paper, by the first word of its source."""
    return re.split(r"[ ,]", case.source)[0]


def system(case: Case) -> System:
    """The system of a case. Raises ConfigError where nothing says which policy it runs."""
    key = origin(case), case.system
    if key not in SYSTEMS:
        known = ", ".join(name for source, name in SYSTEMS if source == key[0]) or "none of this source"
        raise ConfigError(case.id, "system", f"{case.system!r} is not known; known are {known}")
    return SYSTEMS[key]


# ---------------------------------------------------------------------------------------------------------------- setup


@dataclass(frozen=True, eq=False)
class Setup:
    """A case as the compiler sees it: what is lowered, and how often.

    fits: whether it does by our own memory model. weights, cache, repeats: see Priced. cache_on_disk: where the decision says host.
    """

    case: Case
    policy: str
    decision: Decision
    search: Search
    fits: bool
    weights: bool
    cache: bool
    repeats: bool
    cache_on_disk: bool

    @property
    def sequences(self) -> float:
        """Sequences per group: the workload's in equal groups."""
        total = self.search.request.workload.num_sequences
        return total / -(-total // self.decision.sequences)

    def cost(self, decided: Cost, hardware: Hardware) -> Cost:
        """The prices of that model on this machine."""
        peculiar = self.weights, self.cache, self.repeats
        return Priced(decided.spec, hardware, decided.routing, decided.dtype, *peculiar)


@cache
def setup(case: Case) -> Setup:
    """Sizes, placement and policy of a case. Raises ConfigError."""
    run, hardware, spec = system(case), machine(case.hardware.name), model(case.model)
    kv_only = "4-bit KV" in case.policy_details
    weights = run.weights or "4-bit weights" in case.policy_details
    packs_cache = kv_only or "4-bit weights and KV" in case.policy_details
    if weights or packs_cache:
        spec = packed(spec, weights, packs_cache)
    stages = STAGES if case.hardware.name == FOUR_MACHINES else 1
    spec = replace(spec, layers=spec.layers[: len(spec.layers) // stages])
    budgets = {
        "gpu": int(case.hardware.gpu_memory_gb / stages * GPU_USABLE * 2**30),
        "host": int(case.hardware.host_memory_gb / stages * 2**30),
        "disk": hardware.tiers["disk"].capacity_bytes,
    }
    batch_size, num_batches = sizes(case, run, spec, budgets)
    asked = case.workload
    workload = Workload(
        prompt_len=asked.prompt_len,
        gen_len=max(1, asked.gen_len),
        num_sequences=asked.num_sequences or batch_size * num_batches,
    )
    dtype = spec.compute_dtype if spec.compute_dtype in hardware.processors["gpu"].matmul else "bf16"
    request = Request(
        spec,
        hardware,
        uniform(spec),
        workload,
        budgets,
        dtype,
        run.policy,
        batch_size=batch_size,
        num_batches=num_batches,
    )
    search = Search(request)
    decision, fits = decide(case, run, search)
    disk = decision.layers[0].kv == "disk"
    if disk:  # what is lowered keeps it in host memory; the disk's time is counted apart
        layers = tuple(layer.model_copy(update={"kv": "host"}) for layer in decision.layers)
        decision = decision.model_copy(update={"layers": layers})
    return Setup(case, run.policy, decision, search, fits, weights, packs_cache, run.repeats, disk)


def sizes(case: Case, run: System, spec: ModelSpec, budgets: dict[str, int]) -> tuple[int, int]:
    """(batch size, number of batches): stated, or the largest that fit by the system's rule."""
    asked, alone = case.workload, policy(run.policy).one_batch
    if asked.batch_size:
        return asked.batch_size, 1 if alone else asked.num_batches or 1
    sequences = min(asked.num_sequences or 1 << 30, largest_group(case, run, spec, budgets))
    if alone or run.size == "prefill" or spec.nbytes <= HALF * budgets["gpu"]:
        return sequences, 1
    micro_batch = run.micro_batch * case.hardware.gpu_memory_gb / CARD_GB
    num_batches = max(min(sequences, LEAST_BATCHES), round(sequences / micro_batch))
    return -(-sequences // num_batches), num_batches


def largest_group(case: Case, run: System, spec: ModelSpec, budgets: dict[str, int]) -> int:
    """Sequences that fit by the system's rule."""
    asked = case.workload
    cache = sum(kv_bytes(spec, n, 1, asked.prompt_len + asked.gen_len, "fp16") for n in range(len(spec.layers)))
    value_bytes = asked.prompt_len * spec.hidden_size
    widest = max(layer.attention.nbytes + layer.num_experts * _expert_bytes(layer) for layer in spec.layers)
    on_gpu = budgets["gpu"] - 2 * widest  # one layer computes, the next one arrives
    if run.size == "host" and spec.nbytes <= HALF * budgets["gpu"]:
        return int(HOST_USABLE * budgets["gpu"] - spec.nbytes) // cache
    share = 1.0 if asked.num_sequences else run.host_share  # what was stated did fit
    room = {
        "tokens": dict(run.tokens).get(case.model, 0) // asked.prompt_len,
        "one": 1 if asked.gen_len else LLAMA_TOKENS // asked.prompt_len,
        "prefill": on_gpu // (PREFILL_BYTES * value_bytes),
        "states": int(STATES_SHARE * on_gpu) // (3 * 2 * value_bytes),
        "cache": on_gpu // cache,
        "host": int(share * budgets["host"] - spec.nbytes) // cache,
    }
    return max(1, room[run.size])


def _expert_bytes(layer: Layer) -> int:
    return layer.expert.nbytes if layer.expert else 0


def decide(case: Case, run: System, search: Search) -> tuple[Decision, bool]:
    """What is resident: as stated, else nothing where the system streams all, else what the policy's own fill finds."""
    stated = _shares(case.policy_details, "weights")
    first = None
    for base in _bases(case, run, search):
        first = first or base
        try:
            filled = search.fill(run.policy, base)
        except Infeasible:
            continue
        if stated is None and not run.streams:
            return filled, True
        return placed(filled, search, stated or (0.0, 1.0), _cache_tier(case, run, filled)), True
    if first is None:
        raise ConfigError(case.id, "workload", f"{run.policy} has no schedule of these sizes")
    return placed(first, search, stated or (0.0, 1.0), _cache_tier(case, run, first) if stated else "host"), False


def _bases(case: Case, run: System, search: Search) -> Iterator[Decision]:
    """Sizes and leads. CPU attention is ahead of the GPU by batches: with one batch there is none."""
    cpu_share = 1.0 if "CPU attention" in case.policy_details and run.policy == "flexgen" else run.cpu_share
    for base in search.bases(run.policy):
        cpu_batches = round(cpu_share * base.num_batches) if base.num_batches > 1 else 0
        yield base.model_copy(update={"cpu_batches": cpu_batches})


def _shares(details: str, what: str) -> tuple[float, float] | None:
    """The stated shares on GPU and in host memory, of weights or KV; the rest is on disk."""
    found = re.search(what + r" (?:GPU/CPU )?(\d+)/(\d+)", details)
    return (int(found[1]) / 100, int(found[2]) / 100) if found else None


def _cache_tier(case: Case, run: System, decision: Decision) -> str:
    stated = _shares(case.policy_details, "KV")
    if stated is None and run.size == "cache":
        return "gpu"
    if stated is None:
        return "host" if "KV and activations 100 % CPU" in case.policy_details else decision.layers[0].kv
    return "gpu" if stated[0] else "host" if stated[1] else "disk"


def placed(decision: Decision, search: Search, shares: tuple[float, float], cache_tier: str) -> Decision:
    """The decision with these shares of the layers' bytes on the GPU and in host memory, in experts, spread over the layers.

    Host memory takes no more than it can; the rest is on disk.
    """
    spec = search.request.spec
    whole = sum(layer.attention.nbytes + layer.num_experts * _expert_bytes(layer) for layer in spec.layers)
    each = max(map(_expert_bytes, spec.layers))
    on_gpu, in_host = shares
    in_host = min(in_host, HOST_USABLE * search.request.budgets["host"] / whole)
    resident = round(on_gpu * whole / each)
    far = round(max(0.0, 1 - on_gpu - in_host) * whole / each)
    count = len(spec.layers)
    layers = []
    for number, (layer, chosen) in enumerate(zip(spec.layers, decision.layers, strict=True)):
        late = bool(chosen.late)
        experts = tuple(range(layer.num_experts))
        here = min(len(experts), resident * (number + 1) // count - resident * number // count)
        disk = min(len(experts) - here, far * (number + 1) // count - far * number // count)
        layers.append(
            LayerDecision(
                resident=_modules(layer) if on_gpu == 1 else (),
                resident_experts=experts[:here],
                static=() if late else experts[here:],
                late=experts[here:] if late else (),
                cpu_picks=len(experts) - here if late and search.request.policy == "fiddler" else 0,
                on_disk=experts[len(experts) - disk :],
                kv=cache_tier,
            )
        )
    return decision.model_copy(update={"layers": tuple(layers)})


def _modules(layer: Layer) -> tuple[str, ...]:
    return tuple(kind for kind in ("attention", "router", "shared", "dense") if getattr(layer, kind))
