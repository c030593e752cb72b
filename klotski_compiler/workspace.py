"""What kernels allocate outside the arena: a formula per op, fitted to the measured high-water mark (design 5.5).

Ops run one at a time on the compute stream, so transient parts count once, by the largest; buffers that are kept add up.
"""

from __future__ import annotations

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, Workload
from klotski_compiler.kernel_facts import (
    FEW_ROWS,
    GATHERED_ROWS,
    ROW_READERS,
    ROW_SPAN_BYTES,
    ROW_STEP,
    WORKERS,
    inner_bytes,
    own_finds,
    own_kernels_bytes,
)
from klotski_compiler.model import Layer, ModelSpec, Module
from klotski_compiler.ops import PAGE_BYTES
from klotski_compiler.tensors import MODULES, query_bytes

RUNTIME_BYTES = 24 << 20  # what the first ops bring in of torch's own code, threads, allocator slack
LAYER_BYTES = 200_000  # transformers' modules of a layer, without weights
TENSOR_BYTES = 1_000  # where a tensor of the checkpoint lies
STEP_BYTES = 900  # a parsed step, its line and what is kept of its last runs
SHAPES, SHAPE_BYTES = 64, 600_000  # shapes of 16-bit matmuls for which oneDNN keeps code and scratch memory
FINE_BYTES = 1 << 20  # for tensors of more, torch takes memory in pieces of 20 MiB
GRAPHS_BYTES = 40 << 20  # two of them
MARGIN = 1.2
OTHER_SHAPES = 16  # of attention, router and head


def workspace(cost: Cost, decision: Decision, workload: Workload) -> dict[str, dict[str, int]]:
    """Bytes by tier and purpose."""
    spec, width, rows = cost.spec, cost.compute_bytes, decision.expert_rows
    tokens = decision.sequences * workload.prompt_len // decision.prefill_groups
    if decision.rolling:  # the others decode in the same pass
        tokens += decision.sequences - decision.sequences // decision.prefill_groups
    hidden = spec.hidden_size
    top_k = max(layer.top_k for layer in cost.layers)
    inner, shared, dense = (_widest(cost, kind) for kind in ("expert", "shared", "dense"))
    rows = min(rows, tokens)
    transient = {
        "attention": max(
            prefill_attention_bytes(cost, decision.attention_batch, workload.prompt_len),
            decode_attention_bytes(cost, decision.decode_batch, workload.prompt_len + workload.gen_len),
        ),
        "router": router_bytes(cost, rows),
        "dense": (20 * rows * hidden + 4 * rows * dense * width) if dense else 0,
        "activation": 56 * rows * inner if spec.model_type == "gpt_oss" else 1 << 20,
        "embedding": 2 * rows * hidden * width,
    }
    if converted := _converts(cost):
        pages = decision.head_parts
        expert = max(layer.expert.params for layer in cost.layers if layer.expert)
        transient["conversion"] = 2 * width * max(expert, -(-spec.head.params // pages))
    gathered = cost.hardware.compute_tier == "host" and not decision.embedding
    halves, own = width == 2 and cost.hardware.compute_tier == "host", cost.processor
    greatest = halves and own_finds(decision.sequences, own.least_own_rows)
    words = 0 if greatest else -(-spec.vocab_size // decision.head_parts)  # that kernel keeps only the greatest logits
    kept = {
        "experts": rows * width * (3 * hidden + 2 * inner),
        "logits": decision.sequences * (2 * hidden + words) * width,
        "routing": tokens * top_k * (44 + 2 * width),
        "embedding rows": gathered * gather_bytes(spec, width),
    }
    if cost.hardware.compute_tier == "gpu":  # what decode ops take in graphs, no other op can have
        few = min(rows, decision.sequences)
        projected = max(decision.decode_batch, few if decision.together else 0)
        graphs = max(router_bytes(cost, few), 16 * projected * hidden * width)
        if decision.together:  # projections of all stay until the last part of attention, those of ``few`` are counted
            graphs += (decision.sequences - few) * (hidden * width + query_bytes(spec, 1, cost.dtype))
        kept["CUDA graphs"] = graphs + (GRAPHS_BYTES if graphs > FINE_BYTES else 0)
    narrow = rows  # of 16-bit matmuls
    if halves and own.least_own_rows:
        narrow = rows if own.most_own_rows else min(rows, own.least_own_rows)
        widest = max(hidden, inner, shared, dense, *(layer.attention_flops // 4 for layer in cost.layers))
        kept["matmuls"] = max(WORKERS, cost.processor.threads) * own_kernels_bytes(widest) + inner_bytes(inner)
    if converted:
        kept["converted weights"] = width * _bound_params(spec, decision)
    experts = sum(count * layer.num_experts for layer, count in cost.layers.items())
    kept["plan"] = STEP_BYTES * 4 * (experts // decision.unit + len(spec.layers) * (2 * decision.num_batches + 4))
    largest = max(transient, key=lambda op: transient[op])
    parts = {purpose: _reserved(nbytes) for purpose, nbytes in kept.items() if nbytes}
    parts[f"op ({largest})"] = _reserved(transient[largest])
    parts["model"] = LAYER_BYTES * len(spec.layers) + TENSOR_BYTES * _tensors(cost)
    parts["matmul code"] = SHAPE_BYTES * min(SHAPES, _shapes(narrow)) if width == 2 else 0
    parts["runtime"] = RUNTIME_BYTES
    return {cost.hardware.compute_tier: parts}


def _converts(cost: Cost) -> bool:
    """Whether weights are computed with in another type than they are stored in, so that what is in use exists twice."""
    return cost.hardware.compute_tier == "host" and cost.spec.store_dtype != cost.dtype


def _bound_params(spec: ModelSpec, decision: Decision) -> int:
    """Parameters outside the experts that are in use at once: the resident ones, and those of two layers that stream."""
    if not decision.layers:
        return 0  # a bound asks for the least of all decisions
    resident = spec.norm.params + decision.embedding * spec.embedding.params
    streamed = [0]
    for layer, chosen in zip(spec.layers, decision.layers, strict=True):
        sizes: dict[str, int] = {part: module.params for part in MODULES if (module := getattr(layer, part))}
        resident += sum(params for part, params in sizes.items() if part in chosen.resident)
        streamed.append(sum(params for part, params in sizes.items() if part not in chosen.resident))
    return resident + 2 * max(streamed)


def _tensors(cost: Cost) -> int:
    """Tensors of the checkpoint's layers."""
    total = 0
    for layer, count in cost.layers.items():
        modules: list[Module] = [m for part in MODULES if (m := getattr(layer, part))]
        experts = layer.num_experts * layer.expert.segments if layer.expert else 0
        total += count * (sum(module.segments for module in modules) + experts)
    return total


def _shapes(rows: int) -> int:
    """Shapes of matmuls: every number of tokens that an expert may get at once (few one by one, more in steps) has two."""
    return 2 * (min(rows, FEW_ROWS) + -(-rows // ROW_STEP)) + OTHER_SHAPES


def _reserved(nbytes: int) -> int:
    return int(MARGIN * nbytes) + (2 << 20)


def gather_bytes(spec: ModelSpec, width: int) -> int:
    """What rows of the embedding pass through on their way from disk, and two copies of those that are read at a time."""
    rows, span = min(GATHERED_ROWS, spec.vocab_size), min(ROW_SPAN_BYTES, spec.embedding.nbytes)
    return 2 * rows * spec.hidden_size * width + ROW_READERS * (span + 2 * PAGE_BYTES)


def router_bytes(cost: Cost, rows: int) -> int:
    """Peak of a router's op over so many tokens, with the shared expert that it computes, too."""
    return 32 * rows * cost.spec.hidden_size + 4 * rows * _widest(cost, "shared") * cost.compute_bytes


def prefill_attention_bytes(cost: Cost, sequences: int, prompt_len: int) -> int:
    """Peak of one prefill attention call over ``sequences`` whole prompts: projections, mask and (in latent attention, which is not
    fused) scores."""
    tokens, width = sequences * prompt_len, cost.compute_bytes

    def layer_bytes(layer: Layer) -> int:
        widest = max(cost.spec.hidden_size, layer.attention_flops // 4)
        if layer.expand_elements:
            return 12 * layer.heads * tokens * prompt_len + 13 * tokens * widest * width
        copies = 14 if _pads(cost) else 10  # of query, key, value
        return 7 * width // 2 * tokens * prompt_len + copies * tokens * widest * width

    return max(layer_bytes(layer) for layer in cost.layers)


def decode_attention_bytes(cost: Cost, sequences: int, context: int) -> int:
    """Peak of one decode attention call: keys and values expanded to all heads where the kernel needs that."""

    def layer_bytes(layer: Layer) -> int:
        if layer.expand_elements:
            return 2 * sequences * context * layer.expand_elements * cost.compute_bytes
        if _pads(cost):
            return 9 * sequences * context * layer.kv_elements // 8 * cost.compute_bytes + (1 << 20)
        return 8 * sequences * cost.spec.hidden_size * cost.compute_bytes + (1 << 20)

    return max(layer_bytes(layer) for layer in cost.layers)


def _pads(cost: Cost) -> bool:
    """Whether attention makes room for a sink in copies of keys and values: on a GPU."""
    return cost.spec.model_type == "gpt_oss" and cost.hardware.compute_tier == "gpu"


def _widest(cost: Cost, kind: str) -> int:
    """Greatest inner width of the modules of a kind, 0 where there are none."""
    modules = (getattr(layer, kind) for layer in cost.layers)
    return max((module.params // (3 * cost.spec.hidden_size) for module in modules if module), default=0)
