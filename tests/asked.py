"""Requests, decisions and plans of tiny models: what the token tests compile and run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.hardware import Hardware
from klotski_compiler.model import Layer, ModelSpec
from klotski_compiler.ops import Load, Tensor
from klotski_compiler.pipeline import lower
from klotski_compiler.plan import Plan
from klotski_compiler.planner import Request
from klotski_compiler.policies import OURS, policy
from klotski_compiler.routing import Routing, uniform
from klotski_compiler.search import Search
from plans import edited, make_plan, tiny_decision, tiny_hardware
from same import PROMPTS, STEPS, Resident


def machine(gpu: bool = False, attends: float = 1.0) -> Hardware:
    """A slow machine, as fast in fp32 as in bf16. attends: how many times as fast its CPU reads keys and values as it usually does."""
    hardware = tiny_hardware(gpu)
    processors = {
        name: processor.model_copy(update={"matmul": dict.fromkeys(("bf16", "fp32"), processor.matmul["bf16"])})
        for name, processor in hardware.processors.items()
    }
    cpu = processors["cpu"]
    processors["cpu"] = cpu.model_copy(update={"kv_bytes_per_s": attends * cpu.kv_bytes_per_s})
    return hardware.model_copy(update={"processors": processors})


def skewed(spec: ModelSpec) -> Routing:
    """A quarter of the experts and one more, others in each layer, are eight times as popular as the rest."""

    def shares(number: int, layer: Layer) -> tuple[float, ...]:
        popular = layer.num_experts // 4 + 1
        weights = [8.0 if (e + 3 * number) % layer.num_experts < popular else 1.0 for e in range(layer.num_experts)]
        return tuple(w / sum(weights) for w in weights)

    popularity = tuple(shares(number, layer) for number, layer in enumerate(spec.layers))
    return uniform(spec).model_copy(update={"popularity": popularity})


def asked(
    model: Resident,
    policy_name: str,
    prompts: Sequence[list[int]],
    num_batches: int = 3,
    batch_size: int = 2,
    gen_len: int = STEPS,
    share: float = 0.25,
) -> Request:
    """A compilation with memory for all modules but the routed experts, and for ``share`` of those, beyond what streaming takes; for
    joint, which would stream other modules rather, for none of those."""
    if policy(policy_name).one_batch:
        num_batches, batch_size = 1, num_batches * batch_size
    spec, budgets = model.spec, {"host": 1 << 40, "disk": 1 << 40}
    work = workload(prompts, gen_len)
    request = Request(spec, machine(), skewed(spec), work, budgets, "fp32", policy_name, batch_size, num_batches)
    bare, weights = streaming_all(request)
    share = 0.0 if policy_name == OURS else share
    room = sum(t.slot_bytes * (share if t.kind == "expert" else 1) for t in weights)
    return replace(request, budgets=budgets | {"host": bare + round(room)})


def streaming_all(request: Request, kv: str = "host") -> tuple[int, list[Tensor]]:
    """What a schedule takes that keeps no weight of a layer in memory; and these weights. kv: where all of it lives."""
    search = Search(request)
    base = next(search.bases(request.policy))
    layers = tuple(layer.model_copy(update={"kv": kv}) for layer in base.layers)
    lowered = lower(search.cost, request.policy, base.model_copy(update={"layers": layers}), request.workload)
    weights = [t for t in lowered.tensors if t.layer >= 0 and t.kind not in ("kv", "pick")]
    return lowered.peak_bytes["host"], weights


def workload(prompts: Sequence[list[int]], gen_len: int) -> Workload:
    return Workload(prompt_len=max(map(len, prompts)), gen_len=gen_len, num_sequences=len(prompts))


def decided(
    model: Resident, policy_name: str, kv: str = "host", gen_len: int = STEPS, gpu: bool = False, **changes: Any
) -> Plan:
    """A plan in which every layer streams all of its weights; joint loads half of the experts by name and half by rank. On a GPU
    the CPU has as much of the work as the policy gives it, and joint a named expert and half of the picks of every layer."""
    spec = replace(model.spec, compute_dtype="fp32")
    batch_size = 6 if policy(policy_name).one_batch else 2
    decision = tiny_decision(policy_name, spec, kv, batch_size=batch_size, **changes)
    group = "late" if policy(policy_name).experts == "picks" else "static"
    layers = tuple(
        layer.model_copy(
            update={"resident": (), "resident_experts": (), group: (*layer.resident_experts, *getattr(layer, group))}
        )
        for layer in decision.layers
    )
    if any(layer.expand_flops for layer in spec.layers):  # such a cache is for GPUs
        decision = decision.model_copy(update={"cpu_batches": 0})
    elif gpu and policy_name == "joint":
        decision = decision.model_copy(update={"together": changes.get("together", True)})
    if gpu and policy_name == "joint":
        layers = tuple(x.model_copy(update={"static": x.static[1:], "cpu": x.static[:1]}) for x in layers)
    if policy_name == "joint" and gpu and kv == "host":  # some KV in either place
        layers = tuple(x.model_copy(update={"kv_batches": n % 2}) for n, x in enumerate(layers))
    decision = decision.model_copy(update={"layers": layers})
    return plan_of(spec, policy_name, decision, workload(PROMPTS, gen_len), gpu)


def drawn(spec: ModelSpec, policy_name: str, rng: random.Random) -> tuple[Decision, Workload]:
    """A random decision that the policy can take, for a random workload."""
    own, layers = policy(policy_name), list[LayerDecision]()
    for layer in spec.layers:
        order = rng.sample(range(layer.num_experts), layer.num_experts)
        kept = rng.randint(0, len(order) - 1) if order else 0
        picks = {"static": 0, "solved": rng.randint(0, len(order) - kept), "picks": len(order) - kept}[own.experts]
        named = len(order) - picks
        modules = [k for k in ("attention", "router", "shared", "dense") if getattr(layer, k) and rng.random() < 0.4]
        layers.append(
            LayerDecision(
                resident=tuple(modules),
                resident_experts=tuple(order[:kept]),
                static=tuple(order[kept:named]),
                late=tuple(order[named:]),
                kv=rng.choice(["host", "disk"]),
                kv_batches=rng.randint(0, 1) if own.solved else 0,
            )
        )
    most, top_k = max(layer.num_experts for layer in spec.layers), max(layer.top_k for layer in spec.layers)
    num_batches = 1 if own.one_batch else rng.randint(1, 4)
    batch_size, unit, parts = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, num_batches)
    decision = Decision(
        num_batches=num_batches,
        batch_size=batch_size,
        lead={"static": most, "solved": unit * rng.randint(2, 5), "picks": rng.randint(min(most, top_k + unit), most)}[
            own.experts
        ],
        unit=unit,
        head_pages=rng.choice([0, 1, 2, 5]),
        prefill_groups=parts,
        rolling=num_batches % parts == 0 and parts > 1 and rng.random() < 0.7,
        attention_batch=rng.randint(1, batch_size),
        decode_batch=rng.randint(1, batch_size),
        expert_rows=rng.choice([1, 7, 64]),
        hot=rng.randint(0, top_k) if own.experts == "picks" else 0,
        embedding=rng.random() < 0.5,
        layers=tuple(layers),
        prefill_lead=unit * rng.randint(2, 5) if own.solved else 0,
    )
    prompts = PROMPTS[: decision.sequences + rng.randint(0, decision.sequences)]
    return decision, workload(prompts, rng.choice([2, 3, 9] if decision.rolling else [1, 2, 3, 9]))


def plan_of(
    spec: ModelSpec, policy_name: str, decision: Decision, work: Workload, gpu: bool = False, attends: float = 1.0
) -> Plan:
    """The plan of a decision for such a ``machine``."""
    return edited(make_plan(spec, machine(gpu, attends), policy_name, decision, work), model_digest="").sealed()


def loaded(plan: Plan, phase: str = "decode") -> set[str]:
    """Kinds of tensors that a pass of the phase loads."""
    return {plan.tensors[t].kind for step in plan.steps[phase] if isinstance(step.op, Load) for t in step.op.tensors}
