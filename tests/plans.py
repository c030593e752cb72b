"""Small plans of every policy, lowered by the real passes from a hand-made model and machine, and random programs that no policy
writes: what other tests read, run and break."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.hardware import Hardware, Link, Processor, Tier
from klotski_compiler.model import Layer, ModelSpec, Module
from klotski_compiler.ops import ALL, Bind, Compute, Load, Op, Step, Store, Tensor, Wait, op_text, parse_step, step_text
from klotski_compiler.pipeline import lower, phase_record
from klotski_compiler.plan import SCHEMA_VERSION, Candidate, Envelope, Forecast, Plan
from klotski_compiler.policies import policy
from klotski_compiler.program import Evict
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
        layers=(dense, *[moe] * (layers - 2), replace(moe, last=True)),
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
            hidden_bytes_per_s=1e12,
            attention_op_us=10.0,
            router_op_us=10.0,
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
    own = policy(policy_name)
    late = {"static": 0.0, "solved": 0.5, "picks": 1.0}[own.experts]
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
        num_batches=1 if own.one_batch else num_batches,
        batch_size=batch_size,
        lead=4,
        unit=1,
        head_pages=2,
        prefill_groups=1,
        attention_batch=1,
        decode_batch=batch_size,
        expert_rows=64,
        hot=2 if own.experts == "picks" else 0,
        embedding=True,
        layers=tuple(layers),
    )
    if kv == "host" and (own.solved or max(own.cpu_attention) > 0):
        decision = decision.model_copy(update={"cpu_batches": min(2, decision.num_batches)})
    if own.cpu_experts:
        chosen = [layer.model_copy(update={"cpu_picks": len(layer.late) // 2}) for layer in decision.layers]
        decision = decision.model_copy(update={"layers": tuple(chosen)})
    if own.rolling == (True,):
        decision = decision.model_copy(update={"rolling": True, "prefill_groups": decision.num_batches})
        changes.pop("prefill_groups", None)
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
    together = {"together": gpu and policy(policy_name).solved}
    decision = decision or tiny_decision(policy_name, spec, kv or hardware.compute_tier, **(together | changes))
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
        processors={name: processor.tier for name, processor in hardware.processors.items()},
        least_own_rows=hardware.processors["cpu"].least_own_rows,
        most_own_rows=hardware.processors["cpu"].most_own_rows,
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
                feasible=True,
                batches=decision.batches,
            ),
            Candidate(
                policy="other",
                tokens_per_s=0.0,
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
            s._replace(waits=tuple(Wait(w.op - (w.op > number), w.back) for w in s.waits if w.op != number))
            for s in steps
        ]
        lines = [step_text(s, plan.names) for s in moved]
    else:
        lines[number] = step_text(step, plan.names)
    phases = tuple(p.model_copy(update={"lines": tuple(lines)}) if p.name == phase else p for p in plan.phases)
    return edited(plan, phases=phases)


# ------------------------------------------------------------------------------------------------------ random programs


@dataclass
class RandomProgram:
    """A legal sequence of ops and evictions over a few tensors. fixed: (tier, tensor) -> permanent slot."""

    tier: str
    tensors: list[Tensor] = field(default_factory=list)
    fixed: dict[tuple[str, int], int] = field(default_factory=dict)
    entries: list[Op | Evict] = field(default_factory=list)
    batches: int = 2

    @property
    def processor(self) -> str:
        """The compute stream."""
        return "gpu" if self.tier == "gpu" else "cpu"

    def __repr__(self) -> str:
        names = [t.name for t in self.tensors]
        lines = (
            f"evict {e.tier} {' '.join(names[t] for t in e.tensors)}" if isinstance(e, Evict) else op_text(e, names)
            for e in self.entries
        )
        return "\n".join(lines)


def random_program(tape: Iterable[int], gpu: bool = False, wraps: bool = True) -> RandomProgram:
    """What ``tape`` says: each number is one choice among what is legal then. ``wraps``: with loads for the next pass.

    Two layers of three streamed experts and two picks, attention, KV of two batches, two pages of a head; resident are the
    routers and one expert. On a GPU some weights come from the disk through host memory.
    """
    return _Writer(tape, gpu, wraps).write()


class _Writer:
    """Keeps what is in the compute tier, so that every entry that it writes is legal."""

    def __init__(self, tape: Iterable[int], gpu: bool, wraps: bool) -> None:
        self.tape, self.left, self.gpu = iter(tape), True, gpu
        self.out = RandomProgram("gpu" if gpu else "host")
        self.resident: list[int] = []
        home = "host" if gpu else "disk"
        for layer in range(2):
            self._add("router", layer, 0, 1, home, resident=True)
            self._add("attention", layer, 0, 3, home)
            for expert in range(4):
                self._add("expert", layer, expert, 2, "disk" if expert == 3 else home, resident=expert == 0)
            for pick in range(2):
                self._add("pick", layer, pick, 2, home)
            for batch in range(2):
                self._add("kv", layer, batch, 1, home)
        for page in range(2):
            self._add("head", -1, page, 4, home)
        streamed = [t.id for t in self.out.tensors if t.id not in self.resident]
        weights = [t for t in streamed if self._kind(t) not in ("pick", "kv")]
        self.carried = [t for t in weights if self._below(3) == 0] if wraps else []
        self.here = set(self.carried)
        self.fresh = set(streamed) - self.here  # not loaded in this pass yet
        self.done: set[int] = set()  # loaded for the next pass
        self.bound: set[int] = set()
        self.staged: list[tuple[int, ...]] = []

    def _add(self, kind: str, layer: int, index: int, pages: int, home: str, resident: bool = False) -> None:
        out = self.out
        tensor = Tensor(len(out.tensors), kind, layer, index, 4096 * pages, 0 if kind == "kv" else 1, home)
        out.tensors.append(tensor)
        if resident:
            self.resident.append(tensor.id)
            out.fixed[out.tier, tensor.id] = len(out.fixed)
        if self.gpu and home == "host" and kind != "pick":
            out.fixed["host", tensor.id] = len(out.fixed)

    def _kind(self, tensor: int) -> str:
        return self.out.tensors[tensor].kind

    def _below(self, limit: int) -> int:
        """The next choice."""
        number = next(self.tape, None)
        self.left = self.left and number is not None
        return (number or 0) % limit

    def _some(self, tensors: Iterable[int], most: int) -> tuple[int, ...]:
        """One or more of them; none if there are none."""
        rest, chosen = sorted(tensors), list[int]()
        for _ in range(min(len(rest), 1 + self._below(most))):
            chosen.append(rest.pop(self._below(len(rest))))
        return tuple(chosen)

    def write(self) -> RandomProgram:
        """Random entries until the tape ends, then what makes the pass repeatable."""
        verbs: tuple[Callable[[], None], ...] = (
            self._load, self._compute, self._load, self._compute, self._evict, self._bind, self._store, self._wrap,
            self._unstage,
        )  # fmt: skip
        while self.left:
            verbs[self._below(len(verbs))]()
        for tensor in sorted(self.here):
            self._give_up((tensor,))
        while self.staged:
            self._unstage()
        for tensor in self.carried:
            if tensor not in self.done:
                self._transfer((tensor,), wraps=True)
        while self.staged:
            self._unstage()
        return self.out

    def _transfer(self, tensors: tuple[int, ...], wraps: bool = False, sync: bool = False) -> None:
        out, home = self.out, self.out.tensors[tensors[0]].home
        hops = ["disk>host", "host>gpu"] if self.gpu else ["disk>host"]
        hops = hops[1:] if home == "host" else hops
        for link in hops:
            out.entries.append(Load(out.processor if sync else link, link, tensors, wraps))
        if len(hops) > 1:
            self.staged.append(tensors)
            while len(self.staged) > 2:
                self._unstage()

    def _unstage(self) -> None:
        if self.staged:
            self.out.entries.append(Evict("host", self.staged.pop(0)))

    def _load(self) -> None:
        free = [
            t
            for t in set(self.carried) | self.fresh
            if t not in self.here | self.done and (self._kind(t) != "pick" or t in self.bound)
        ]
        if chosen := self._some(free, 2):
            first = self.out.tensors[chosen[0]]
            alike = tuple(
                t for t in chosen if (self.out.tensors[t].home, self._kind(t)) == (first.home, first.kind)
            )  # one op brings what is alike
            if any(set(alike) & set(s) for s in self.staged):
                return  # on its way already
            self._transfer(alike, sync=self._below(4) == 0)
            self.here.update(alike)
            self.fresh -= {t for t in alike if self._kind(t) == "kv"}  # a cache comes once in a pass

    def _compute(self) -> None:
        tensors = self._some(self.here | set(self.resident), 3)
        fn = ("attention", "router", "experts", "dense", "norm", "sample", "embed")[self._below(7)]
        self.out.entries.append(Compute(self.out.processor, fn, self._below(2), self._below(3) - 1, tensors))

    def _evict(self) -> None:
        self._give_up(self._some(self.here, 2))

    def _give_up(self, tensors: tuple[int, ...]) -> None:
        if tensors:
            self.out.entries.append(Evict(self.out.tier, tensors))
            self.here -= set(tensors)

    def _bind(self) -> None:
        layer = self._below(2)
        picks = [t.id for t in self.out.tensors if t.kind == "pick" and t.layer == layer]
        first = sum(t in self.bound for t in picks)
        if first < len(picks):
            count = 1 + self._below(len(picks) - first)
            rule, batch = ("rank", "arrival", "predicted")[self._below(3)], self._below(2)
            batch = ALL if rule == "rank" else batch
            self.out.entries.append(Bind(self.out.processor, layer, batch, rule, first, count))
            self.bound.update(picks[first : first + count])

    def _store(self) -> None:
        link = "gpu>host" if self.gpu else "host>disk"
        if caches := self._some((t for t in self.here if self._kind(t) == "kv"), 1):
            self.out.entries.append(Store(link, link, caches))

    def _wrap(self) -> None:
        staged = {t for tensors in self.staged for t in tensors}
        ready = [t for t in self.carried if t not in self.here | self.done | staged]
        if chosen := self._some(ready, 1):
            self._transfer(chosen, wraps=True)
            self.done.update(chosen)
