"""Small plans of every policy, lowered by the real passes from a hand-made model and machine: what other tests read, run and break."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from klotski_compiler.cost import Cost
from klotski_compiler.hardware import Hardware, Link, Processor, Tier
from klotski_compiler.model import Layer, ModelSpec, Module
from klotski_compiler.pipeline import lower, phase_record
from klotski_compiler.plan import (
    SCHEMA_VERSION,
    Candidate,
    Decision,
    Envelope,
    Forecast,
    LayerDecision,
    Plan,
    Step,
    Wait,
    Workload,
    parse_step,
    step_text,
)
from klotski_compiler.policies import policy
from klotski_compiler.routing import uniform

WORKLOAD = Workload(prompt_len=16, gen_len=8, num_sequences=12)


def module(params: int, segments: int = 1, flops: bool = True) -> Module:
    """A bf16 module."""
    return Module(params, 2 * params, segments, 2 * params if flops else 0)


def tiny_spec(layers: int = 4, experts: int = 6) -> ModelSpec:
    """A dense layer, then MoE layers with a shared expert."""
    hidden, inner, vocab = 64, 96, 512
    attention = module(4 * hidden * hidden + hidden, 5)
    common = {
        "attention": attention,
        "heads": 1,
        "kv_elements": 2 * hidden,
        "attention_flops": 4 * hidden,
        "sliding_window": None,
    }
    dense = Layer(**common, dense=module(3 * hidden * 4 * inner, 4))  # type: ignore[arg-type]
    moe = Layer(
        **common,  # type: ignore[arg-type]
        router=module(hidden * experts, 2),
        shared=module(3 * hidden * inner, 3),
        expert=module(3 * hidden * inner, 3),
        num_experts=experts,
        top_k=2,
    )
    return ModelSpec(
        name="tiny",
        model_type="qwen2_moe",
        hidden_size=hidden,
        vocab_size=vocab,
        max_positions=1024,
        layers=(dense, *[moe] * (layers - 1)),
        embedding=module(vocab * hidden, flops=False),
        norm=module(hidden, flops=False),
        head=module(vocab * hidden),
        tied=False,
        store_dtype="bf16",
        compute_dtype="bf16",
    )


def tiny_hardware(gpu: bool = False) -> Hardware:
    """A slow machine, so that transfers and computes of a tiny model take comparable times."""

    def processor(tier: str, speed: float) -> Processor:
        return Processor(
            tier=tier,
            memory_bytes_per_s=speed,
            matmul={"bf16": ((1, speed), (64, 8 * speed))},
            kv_bytes_per_s=speed,
            prefill_attention_flops_per_s=8 * speed,
            op_us=5.0,
            attention_op_us=10.0,
            expert_op_us=5.0,
        )

    link = {
        "disk>host": Link(bandwidth_bytes_per_s=2e8, latency_us=20.0),
        "host>disk": Link(bandwidth_bytes_per_s=1e8, latency_us=20.0),
    }
    if gpu:
        fast = Link(bandwidth_bytes_per_s=5e8, latency_us=10.0)
        link |= {"host>gpu": fast, "gpu>host": fast}
    tiers = ("gpu", "host", "disk") if gpu else ("host", "disk")
    processors = {"cpu": processor("host", 2e9)} | ({"gpu": processor("gpu", 8e9)} if gpu else {})
    return Hardware(
        name="tiny-gpu" if gpu else "tiny-cpu",
        description="for tests",
        compute_tier=tiers[0],
        tiers={tier: Tier(capacity_bytes=1 << 30) for tier in tiers},
        links=link,
        processors=processors,
        sources={},
    )


def tiny_decision(
    policy_name: str, spec: ModelSpec, kv: str, num_batches: int = 3, batch_size: int = 2, **changes: Any
) -> Decision:
    """A decision as the policy's planner could take it: one expert resident, the others as the policy moves them."""
    module_ = policy(policy_name)
    late = {"static": 0.0, "solved": 0.5, "picks": 1.0}[module_.EXPERTS]
    layers = []
    for number, layer in enumerate(spec.layers):
        streamed = list(range(1, layer.num_experts))
        picks = round(late * len(streamed))
        layers.append(
            LayerDecision(
                resident=("router",) if layer.num_experts and number % 2 else (),
                resident_experts=(0,) if layer.num_experts else (),
                static=tuple(streamed[: len(streamed) - picks]),
                late=tuple(streamed[len(streamed) - picks :]),
                kv=kv,
            )
        )
    decision = Decision(
        num_batches=1 if module_.ONE_BATCH else num_batches,
        batch_size=batch_size,
        lead=4,
        unit=1,
        head_pages=2,
        prefill_groups=1,
        attention_batch=1,
        decode_batch=batch_size,
        expert_rows=64,
        hot=2 if module_.EXPERTS == "picks" else 0,
        embedding=True,
        layers=tuple(layers),
    )
    return decision.model_copy(update=changes)


def tiny_plan(
    policy_name: str = "joint",
    gpu: bool = False,
    kv: str = "",
    spec: ModelSpec | None = None,
    workload: Workload = WORKLOAD,
    decision: Decision | None = None,
    **changes: Any,
) -> Plan:
    """A sealed plan. ``kv``: the tier of the KV cache (default: the compute tier). ``changes`` replace fields of the decision."""
    spec, hardware = spec or tiny_spec(), tiny_hardware(gpu)
    decision = decision or tiny_decision(policy_name, spec, kv or hardware.compute_tier, **changes)
    return make_plan(spec, hardware, policy_name, decision, workload)


def make_plan(spec: ModelSpec, hardware: Hardware, policy_name: str, decision: Decision, workload: Workload) -> Plan:
    """Lower one decision and write it down, with a forecast that is complete though not searched for."""
    cost = Cost(spec, hardware, uniform(spec), spec.compute_dtype)
    lowered = lower(cost, policy_name, decision, workload)
    names = [t.name for t in lowered.tensors]
    busy, bubble, moved = Counter[str](), Counter[str](), Counter[str]()
    for name, phase in lowered.phases.items():
        moved.update(phase.link_bytes)
        if name != "load":
            busy.update({stream: round(us) for stream, us in phase.times.busy_us.items()})
            bubble.update({cause: round(us) for cause, us in phase.times.bubble_us.items()})
    makespan, critical = round(lowered.group_us), round(sum(p.critical_us for p in lowered.phases.values()))
    tokens = decision.sequences * workload.gen_len
    rate = tokens / (lowered.load_us + makespan) * 1e6
    forecast = Forecast(
        makespan_us=makespan,
        load_us=round(lowered.load_us),
        pass_us={name: round(p.times.pass_us) for name, p in lowered.phases.items() if name != "load"},
        phase_us={name: round(p.times.total_us) for name, p in lowered.phases.items() if name != "load"},
        bound_us=max(critical, *busy.values()),
        tokens_per_s=rate,
        bound_tokens_per_s=1.25 * rate,
        gap=0.25,
        bubble_fraction=sum(bubble.values()) / makespan,
        bubble_us=dict(bubble),
        busy_us=dict(busy),
        peak_bytes=dict(lowered.peak_bytes),
        link_bytes=dict(moved),
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=spec.name,
        model_digest="0" * 64,
        dtype=spec.compute_dtype,
        hardware=hardware.name,
        compute_tier=hardware.compute_tier,
        budgets={tier: t.capacity_bytes for tier, t in hardware.tiers.items()},
        workload=workload,
        envelope=Envelope(sequences=decision.sequences, prompt_len=workload.prompt_len, gen_len=workload.gen_len),
        policy=policy_name,
        decision=decision,
        tensors=tuple(lowered.tensors),
        slots=tuple(lowered.slots),
        placed=tuple(lowered.placed),
        streams=tuple(sorted({s.op.stream for p in lowered.phases.values() for s in p.steps})),
        phases=tuple(phase_record(p, names) for p in lowered.phases.values()),
        workspace=lowered.workspace,
        predictor=(),
        forecast=forecast,
        candidates=(
            Candidate(
                policy=policy_name,
                tokens_per_s=rate,
                num_batches=decision.num_batches,
                batch_size=decision.batch_size,
                feasible=True,
            ),
            Candidate(
                policy="other",
                tokens_per_s=0.0,
                num_batches=0,
                batch_size=0,
                feasible=False,
                why_not="host is short by 1,000 bytes",
            ),
        ),
        notes=("expert popularity is uniform, assumed",),
        truncated=False,
        digest="",
    ).sealed()


def edited(plan: Plan, **changes: Any) -> Plan:
    """The plan with other fields. Unlike ``model_copy`` it keeps nothing that was derived from the old ones."""
    return Plan(**{name: getattr(plan, name) for name in Plan.model_fields} | changes)


def with_step(plan: Plan, phase: str, number: int, step: Step | None) -> Plan:
    """The plan with one step of a phase replaced, or taken out (waits then name the ops that they named before)."""
    lines = list(plan.phase(phase).lines)
    if step is None:
        del lines[number]
        steps = [parse_step(line, {n: i for i, n in enumerate(plan.names)}) for line in lines]
        moved = [
            replace(s, waits=tuple(Wait(w.op - (w.op > number), w.back) for w in s.waits if w.op != number))
            for s in steps
        ]
        lines = [step_text(s, plan.names) for s in moved]
    else:
        lines[number] = step_text(step, plan.names)
    phases = tuple(p.model_copy(update={"lines": tuple(lines)}) if p.name == phase else p for p in plan.phases)
    return edited(plan, phases=phases)
