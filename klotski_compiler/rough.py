"""A quick estimate of a decision: the busiest resource of every layer; no order, no slots. It chooses what is worth simulating."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.layout import LOAD_BYTES
from klotski_compiler.ops import ALL, CPU
from klotski_compiler.policies import Policy
from klotski_compiler.shape import Shape, shapes
from klotski_compiler.tensors import MODULES


def rough_us(cost: Cost, policy: Policy, decision: Decision, workload: Workload) -> float:
    """The whole workload, from the first weight byte on."""
    rounds, kinds = decision.rounds(workload.num_sequences), _kinds(cost, decision)
    phases = (shape for shape in shapes(decision, workload) if shape.passes)
    total = sum(shape.passes * _pass_us(cost, policy, decision, shape, kinds) for shape in phases)
    return load_us(cost, decision) + rounds * total


def busiest_us(cost: Cost, decision: Decision, workload: Workload) -> float:
    """The whole workload as the work of each phase's busiest stream in all layers together: about what no schedule takes less than."""
    groups = decision.cohorts(workload.num_sequences) if decision.rolling else decision.rounds(workload.num_sequences)
    total, kinds = load_us(cost, decision), _kinds(cost, decision)
    for shape in shapes(decision, workload):
        work = Counter[str]()
        known = {first: layer_work(cost, decision, first, decision.layers[first], shape, True) for first in set(kinds)}
        for first in kinds:
            work.update(known[first])
        total += groups * shape.passes * max(work.values())
    return total


def _kinds(cost: Cost, decision: Decision) -> list[int]:
    """For each layer the first one that is like it, and decided alike."""
    firsts = dict[tuple[int, LayerDecision], int]()
    layers = enumerate(zip(cost.kinds, decision.layers, strict=True))
    return [firsts.setdefault(pair, number) for number, pair in layers]


def load_us(cost: Cost, decision: Decision) -> float:
    """Reading what is resident; before a GPU, what host memory keeps as well."""
    on_gpu, nbytes, loads = cost.hardware.compute_tier == "gpu", 0, 0.0
    for layer, chosen in zip(cost.spec.layers, decision.layers, strict=True):
        modules = {kind: module.nbytes for kind in MODULES if (module := getattr(layer, kind))}
        nbytes += sum(size for kind, size in modules.items() if on_gpu or kind in chosen.resident)
        if layer.expert:
            near = layer.num_experts - len(chosen.on_disk) / decision.pages if on_gpu else len(chosen.resident_experts)
            nbytes += near * layer.expert.nbytes
            loads += near / max(1, LOAD_BYTES // layer.expert.nbytes)
        loads += len(modules)
    nbytes += cost.spec.head.nbytes if on_gpu or not decision.head_pages else 0
    disk = cost.hardware.links["disk>host"]
    return 1e6 * nbytes / disk.bandwidth_bytes_per_s + loads * cost.load_op_us("disk>host")


def _pass_us(cost: Cost, policy: Policy, decision: Decision, shape: Shape, kinds: Sequence[int]) -> float:
    busy = max if policy.overlaps else sum
    works = {first: layer_work(cost, decision, first, decision.layers[first], shape) for first in set(kinds)}
    known = {first: busy(work.values()) for first, work in works.items()}
    total = sum(known[first] for first in kinds)
    link, _ = cost.links
    head = cost.head_us(shape.sequences)
    streamed = cost.transfer_us(link, cost.spec.head.nbytes) if decision.head_pages else 0.0
    return total + max(head, streamed)


def layer_work(
    cost: Cost, decision: Decision, number: int, chosen: LayerDecision, shape: Shape, at_once: bool = False
) -> dict[str, float]:
    """Microseconds of every stream in one layer and pass. at_once: all batches go through the router together, which takes least."""
    hardware, layer = cost.hardware, cost.spec.layers[number]
    on_gpu, (link, back) = hardware.compute_tier == "gpu", cost.links
    helped = cost.cpu_helps and shape.decoding
    tokens, tier = shape.fed_tokens(ALL, layer), hardware.compute_tier
    position = layer.kv_elements * cost.compute_bytes  # of one sequence
    context = shape.middle_context
    work = defaultdict[str, float](float)
    for kind in MODULES:
        if kind not in chosen.resident and (module := getattr(layer, kind)):
            work[link] += cost.transfer_us(link, module.nbytes)
    routed = cost.mlp_us(layer, tokens) if at_once else cost.routers_us(layer, shape)
    work[cost.processor_name] += cost.attentions_us(layer, shape, context) + routed
    attended = frozenset(decision.attended(number)) if cost.cpu_helps else frozenset[int]()
    for batch in decision.away(number) if chosen.kv != tier else ():
        if not shape.has(batch):
            continue
        seen, sequences = shape.context_of(batch, context), shape.size_of(batch)
        work[back] += cost.kv_us(back, sequences * position * shape.tokens_of(batch))
        if shape.decodes(batch) and batch in attended:
            work[CPU] += cost.attend_us(layer, sequences, seen, hardware.processors[CPU])
            work[cost.processor_name] -= cost.attend_us(layer, sequences, seen, cost.processor)
        elif shape.decodes(batch):
            work[link] += cost.kv_us(link, sequences * position * seen)
    if layer.expert is None:
        return work
    touched = cost.experts(number, tokens)
    whole = cost.transfer_us(link, layer.expert.nbytes * decision.unit) / decision.unit
    loaded = len(chosen.late) - (chosen.cpu_picks if helped else 0)
    named = chosen.static if helped else (*chosen.static, *chosen.cpu)
    work[link] += whole * (len(named) + sum(touched[e][1] for e in chosen.late[:loaded]))
    work["disk>host"] += (
        len(chosen.on_disk)
        * cost.transfer_us("disk>host", layer.expert.nbytes * decision.unit / decision.pages)
        / decision.unit
        if on_gpu
        else 0.0
    )
    here = (*chosen.resident_experts, *named, *chosen.late[:loaded])
    here_us = cost.experts_us(number, tokens)
    work[cost.processor_name] += sum([here_us[e] for e in here])
    if apart := (*(chosen.cpu if helped else ()), *chosen.late[loaded:]):
        there_us = cost.experts_us(number, tokens, CPU)
        work[CPU] += sum([there_us[e] for e in apart])
    return work
