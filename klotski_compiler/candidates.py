"""What may be decided before residency: group sizes, batches, slots, micro-batches; with nothing resident yet.

All policies see the same grid of sizes, so that none is handicapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision, LayerDecision, Workload
from klotski_compiler.hardware import Hardware
from klotski_compiler.layout import LOAD_BYTES, most_pages
from klotski_compiler.model import ModelSpec
from klotski_compiler.policies import Policy, policy
from klotski_compiler.routing import Routing
from klotski_compiler.tensors import state_bytes
from klotski_compiler.workspace import decode_attention_bytes, prefill_attention_bytes, router_bytes

FINER = 2 ** (1 / 3)  # sizes of a group that are tried, one over the next
SMALL_SHARE = 0.03  # head and embedding stay resident where they take less than this of the budget
ATTENTION_SHARE = 0.08  # of the budget for what one attention call allocates
# What one may allocate on a CPU: caches hold less, and for tensors over 32 MiB the C library takes each page anew.
CACHED_BYTES = 96 << 20
LOAD_SHARE = 0.05  # of the budget for what one load brings, at most
LEAST_PAGE_BYTES = 1 << 20  # of the head
ROWS_SHARE = 0.05  # of the budget for what a router allocates, above which fewer tokens per matmul are looked at
EXPERT_ROWS = {"host": 512, "gpu": 8192}  # tokens per matmul: where its rate has long stopped growing
LEAST_ROWS = 512  # tokens per matmul that joint may go down to: its rate has stopped growing
FEWEST_ROWS = 128  # where memory is that small, or the link so slow
HIDDEN = 8  # times as long as such a matmul that the expert takes the link: then it does not matter how many there are
LAUNCH_SHARE = 0.25  # of such a matmul's time that launching the next, which goes on beside it, may take
LEAST_BATCH, BATCH_TOKENS = 8, 4096  # sequences of a batch, or prompt tokens: fewer leave a processor little to do
UNEVEN = 1.1  # passes from a sequence's first to the last that its cohort is given, over those that it needs, at most
MOST_AGES = 32  # batches of different age
FEWEST_AHEAD = 2  # batches whose KV is on its way or waits: attention brings that of the next one by itself
MANY_EXPERTS = 8000  # a model of more: loads bring twice as much, for the sake of the plan's length


@dataclass(frozen=True)
class Request:
    """What to compile. ``batch_size``, ``num_batches``: fixed, or None to be solved. ``max_latency_s``: of one decode pass."""

    spec: ModelSpec
    hardware: Hardware
    routing: Routing
    workload: Workload
    budgets: dict[str, int]
    dtype: str
    policy: str = "auto"
    batch_size: int | None = None
    num_batches: int | None = None
    max_latency_s: float | None = None
    time_limit_s: float = 60.0
    model_digest: str = ""


class Candidates:
    """The sizes of one request that are worth a try."""

    def __init__(self, request: Request) -> None:
        """Prices of the request's model on its machine."""
        self.request = request
        self.cost = Cost(request.spec, request.hardware, request.routing, request.dtype)
        self.tier = request.hardware.compute_tier
        self.num_experts = sum(layer.num_experts for layer in request.spec.layers)
        self.most_sequences = request.workload.num_sequences

    @property
    def is_large(self) -> bool:
        """Whether the model has so many experts that compiling it takes long."""
        return self.num_experts > MANY_EXPERTS

    @property
    def sizes_are_free(self) -> bool:
        """Whether neither the number of batches nor their size is asked for."""
        return not self.request.num_batches and not self.request.batch_size

    @property
    def finest(self) -> int:
        """Experts of a layer."""
        return max(layer.num_experts for layer in self.request.spec.layers)

    def group_sizes(self, rolling: bool = False) -> list[int]:
        """Sequences per group: the workload in 1, 2, 3, ... equal groups, thinned out geometrically; in rolling order, where a group's
        size need not divide the workload, all in the same steps."""
        request, total = self.request, self.request.workload.num_sequences
        if request.batch_size and request.num_batches:
            return [request.batch_size * request.num_batches]
        sizes, groups = list[int](), 1.0
        while groups <= total:
            size = ceil(total / groups)
            if not sizes or size < sizes[-1]:
                sizes.append(size)
            groups = groups * FINER if rolling else max(groups + 1, int(groups * FINER))
        return [size for size in ([*sizes, 1] if sizes[-1] > 1 else sizes) if size <= self.most_sequences]

    def bases(self, name: str) -> Iterator[Decision]:
        """Sizes and leads to try, largest groups first; nothing resident yet."""
        orders = self.orders(name)
        return (base for rolling in orders for base in self.bases_of(name, self.group_sizes(rolling), rolling))

    def orders(self, name: str) -> tuple[bool, ...]:
        """Whether a policy's sub-groups join in rolling order: as it has them, where sequences live for more than one pass."""
        return policy(name).rolling if self.request.workload.gen_len > 1 else (False,)

    def bases_of(self, name: str, sizes: Sequence[int], rolling: bool = False) -> Iterator[Decision]:
        """The same for given sizes of the group."""
        chosen, request = policy(name), self.request
        for sequences in sizes:
            for num_batches in (1,) if chosen.one_batch else self.batch_counts(sequences, rolling):
                batch_size = request.batch_size or -(-sequences // num_batches)
                if chosen.one_batch and request.batch_size is None and num_batches * batch_size > sequences:
                    continue
                ages = self.ages(num_batches) if rolling else []
                if rolling and not ages and False in self.orders(name):
                    continue  # too few batches for that: the other order has them
                leads = self.leads(chosen.experts)
                for lead, unit in leads[1:2] if ages and chosen.solved else leads:  # others: ``neighbours``
                    for parts in ages or self.prefill_parts(num_batches, batch_size):
                        base = self.base(chosen.experts, num_batches, batch_size, lead, unit, parts)
                        base = base.model_copy(update={"rolling": bool(ages)})
                        if ages and base.cohorts(request.workload.num_sequences) < parts:
                            continue  # they would never all be there
                        for cpu_batches in self.cpu_batches(chosen, num_batches):
                            yield base.model_copy(update={"cpu_batches": cpu_batches})

    def batch_counts(self, sequences: int, rolling: bool = False) -> list[int]:
        """Batches of a group: few large ones cost least, more of them overlap KV and bound workspace; in rolling order one of each age
        at least."""
        request = self.request
        if request.num_batches:
            return [request.num_batches]
        if request.batch_size:
            return sorted({max(1, sequences // request.batch_size), -(-sequences // request.batch_size)})
        least = max(1, min(LEAST_BATCH, BATCH_TOKENS // request.workload.prompt_len))
        if rolling and sequences > 1:
            return [n for n in (2, 4, 8, 16, MOST_AGES) if n == 2 or sequences // n >= least]
        return [n for n in (1, 2, 4, 8, 16) if n == 1 or sequences // n >= least]

    def ages(self, num_batches: int) -> list[int]:
        """Sub-groups of different age: as many as divide batches, and the life of a sequence about evenly."""
        gen_len = self.request.workload.gen_len
        fitting = [a for a in range(2, min(num_batches, gen_len) + 1) if num_batches % a == 0]
        return [a for a in fitting if a * -(-gen_len // a) <= UNEVEN * gen_len][-1:]

    def cpu_batches(self, chosen: Policy, num_batches: int) -> list[int]:
        """Batches whose decode attention the CPU computes: the shares that the policy may choose from."""
        shares = chosen.cpu_attention if self.cost.cpu_attends else (0.0,)
        return sorted({round(share * num_batches) for share in shares})

    @property
    def load_bytes(self) -> float:
        """What a load of experts aims at."""
        return min(LOAD_BYTES * (2 if self.is_large else 1), LOAD_SHARE * self.request.budgets[self.tier])

    def leads(self, experts: str, unit: int = 0) -> list[tuple[int, int]]:
        """(expert slots, experts per load). unit: the latter, 0 for as many as a load aims at."""
        layer = next(layer for layer in self.request.spec.layers if layer.expert)
        assert layer.expert is not None
        unit = unit or max(1, min(layer.num_experts, round(self.load_bytes / layer.expert.nbytes)))
        if experts == "static":
            return [(layer.num_experts, unit)]
        if experts == "picks":
            return [(layer.num_experts, unit), (max(layer.top_k + unit, layer.num_experts // 4), unit)]
        return [(ahead * unit, unit) for ahead in (2, 4, 8, 16) if ahead * unit <= 2 * layer.num_experts]

    def prefill_parts(self, num_batches: int, batch_size: int) -> list[int]:
        """Sub-groups of prefill: whole, and split until the hidden states take a sixth of the budget."""
        workload, parts = self.request.workload, [1]
        tokens = num_batches * batch_size * workload.prompt_len
        budget = self.request.budgets[self.tier]
        while (
            parts[-1] < num_batches
            and state_bytes(self.request.spec, tokens // parts[-1], self.request.dtype) > budget / 6
        ):
            batches = -(-num_batches // min(num_batches, parts[-1] * 2))
            parts.append(-(-num_batches // batches))  # none of which is empty
        return parts

    def base(self, experts: str, num_batches: int, batch_size: int, lead: int, unit: int, parts: int) -> Decision:
        """A decision in which nothing is resident and KV lives in the compute tier."""
        spec, budget = self.request.spec, self.request.budgets[self.tier]
        small, solved = SMALL_SHARE * budget, experts == "solved"
        layers = []
        for number, layer in enumerate(spec.layers):
            order = tuple(self.cost.popular(number)) if layer.expert else ()
            static = order if experts != "picks" else ()
            layers.append(LayerDecision(static=static, late=() if static else order, kv=self.tier))
        top_k = max(layer.top_k for layer in spec.layers)
        workload = self.request.workload
        context = workload.prompt_len + workload.gen_len
        room = ATTENTION_SHARE * budget
        rows = EXPERT_ROWS[self.tier]
        return Decision(
            num_batches=num_batches,
            batch_size=batch_size,
            lead=lead,
            unit=unit,
            head_pages=0
            if spec.head.nbytes <= small and not solved
            else self.head_pages(min(2 * LOAD_BYTES, LOAD_SHARE * budget)),
            prefill_groups=parts,
            attention_batch=largest(
                min(batch_size, self.most_attention),
                lambda a: prefill_attention_bytes(self.cost, a, workload.prompt_len) <= room,
            ),
            decode_batch=largest(batch_size, lambda a: decode_attention_bytes(self.cost, a, context) <= room),
            expert_rows=min(rows, num_batches * batch_size * workload.prompt_len),
            together=solved and self.cost.cpu_attends,
            hot=top_k if experts == "picks" else 0,
            embedding=self.tier == "host" and spec.embedding.nbytes <= small and not solved,
            layers=tuple(layers),
        )

    def head_pages(self, nbytes: float = 0) -> int:
        """Pages of so many bytes in which the head is streamed, or of the least that is worth a load."""
        return ceil(self.request.spec.head.nbytes / max(LEAST_PAGE_BYTES, nbytes))

    def smallest_pieces(self, name: str, base: Decision) -> Decision:
        """The same with the smallest pieces to stream in, whatever the budget."""
        lead, unit = min(self.leads(policy(name).experts, unit=1))
        return base.model_copy(update={"lead": lead, "unit": unit, "head_pages": self.head_pages(), "embedding": False})

    @cached_property
    def most_attention(self) -> int:
        """Prompts that an attention call should take at most."""
        most, prompt_len = self.request.workload.num_sequences, self.request.workload.prompt_len
        if self.tier == "gpu":
            return most
        power = 1 << (most - 1).bit_length()
        return largest(power, lambda a: prefill_attention_bytes(self.cost, a, prompt_len) <= CACHED_BYTES)

    @cached_property
    def least_rows(self) -> int:
        """Tokens per expert matmul that joint may go down to."""
        rows, cost = LEAST_ROWS, self.cost
        room = ROWS_SHARE * self.request.budgets[self.tier]
        while rows > FEWEST_ROWS and router_bytes(cost, rows) > room:
            rows //= 2
        layer = next(layer for layer in self.request.spec.layers if layer.expert)
        assert layer.expert is not None
        while rows < EXPERT_ROWS["gpu"] and cost.processor.expert_op_us > LAUNCH_SHARE * cost.module_us(
            layer.expert, rows
        ):
            rows *= 2
        load_us = cost.transfer_us(cost.links[0], layer.expert.nbytes)
        while rows > FEWEST_ROWS and self.tier == "gpu" and HIDDEN * cost.module_us(layer.expert, rows) < load_us:
            rows //= 2
        return rows

    def bare(self, name: str, d: Decision, num_batches: int) -> Decision:
        """The sizes of a decision, in so many batches, with nothing resident."""
        base = self.base(policy(name).experts, num_batches, d.batch_size, d.lead, d.unit, d.prefill_groups)
        kept = {size: getattr(d, size) for size in KEPT} | (
            {"last_batch": d.last_batch} if num_batches == d.num_batches else {}
        )
        shared = 0 if policy(name).solved else min(d.cpu_batches, num_batches)
        return base.model_copy(update={**kept, "cpu_batches": shared})

    def neighbours(self, name: str, d: Decision) -> Iterator[Decision]:
        """The same sizes with twice or half as many slots, with twice or half as many batches, in units of twice or half the size; with KV
        of a batch more or less on its way, where it is sent."""
        base = self.bare(name, d, d.num_batches)
        most = 2 * self.finest
        for lead in (2 * d.lead, d.lead // 2):
            if d.unit <= lead <= most:
                yield base.model_copy(update={"lead": lead})
        for num_batches in (2 * d.num_batches, d.num_batches // 2):
            if num_batches and self.sizes_are_free and not d.last_batch:
                size, parts = -(-d.sequences // num_batches), min(base.prefill_groups, num_batches)
                if base.rolling and (parts < 2 or num_batches % parts):
                    continue
                if num_batches * size <= self.most_sequences:
                    yield in_batches(base, num_batches, size).model_copy(update={"prefill_groups": parts})
        for unit in (d.unit // 2, 2 * d.unit):
            if 1 <= unit <= d.lead // 2:
                yield base.model_copy(update={"unit": unit, "pages": base.pages if unit == 1 else 1})
        for ahead in (d.kv_ahead + 1, d.kv_ahead - 1) if d.sends_kv(self.tier) else ():
            if FEWEST_AHEAD <= ahead <= d.num_batches:
                yield base.model_copy(update={"kv_ahead": ahead})

    @cached_property
    def most_pages(self) -> int:
        """Pages that joint may cut an expert into, where experts may have to live on disk before a GPU."""
        spec = self.request.spec
        if self.tier != "gpu" or spec.expert_bytes <= self.request.budgets["host"]:
            return 1
        return min(most_pages(layer.expert.nbytes) for layer in spec.layers if layer.expert)


KEPT = ("attention_batch", "decode_batch", "expert_rows", "prefill_lead", "rolling", "pages", "kv_ahead", "together")
"""Sizes that a decision keeps when others are changed."""
FITTED = ("expert_rows", "lead", "prefill_lead", "attention_batch", "decode_batch", "prefill_groups", "pages")
"""What is fitted to memory, in the order in which it is tried."""


def resized(d: Decision, size: str, least_rows: int = LEAST_ROWS, most_pages: int = 1) -> Iterator[Decision]:
    """A decision with one of its micro-batches, its slots in prefill, the number of prefill's parts, or of an expert's pages, half or
    twice as large; or with one transfer unit in flight in place of two, and back."""
    now: int = getattr(d, size) or d.lead  # 0 slots in prefill: as many
    most_pages = most_pages if d.unit == 1 else 1
    least, most = {
        "expert_rows": (min(least_rows, now), now),
        "lead": (d.unit, 2 * d.unit) if d.lead <= 2 * d.unit else (now, now),
        "prefill_lead": (min(2 * d.unit, d.lead), d.lead),
        "attention_batch": (1, d.batch_size),
        "decode_batch": (1, d.batch_size),
        # in rolling order its sub-groups are a matter of order, not of memory
        "prefill_groups": (now, now) if d.rolling else (1, d.num_batches),
        "pages": (1, most_pages),
    }[size]
    others = sorted({max(least, -(-now // 2)), min(most, 2 * now)} - {now})
    if size == "pages" and now == 1:  # two of half an expert take as much as a whole one: what pays is to have many
        others = sorted({most >> halvings for halvings in range(most.bit_length() - 1)} - {now}, reverse=True)
    for other in others:
        yield d.model_copy(update={size: other})


def lean(d: Decision, least_rows: int, most_pages: int = 1) -> Decision:
    """A decision with the smallest buffers."""
    smallest = {"lead": d.unit, "attention_batch": 1, "expert_rows": min(least_rows, d.expert_rows)}
    return d.model_copy(update={**smallest, "pages": most_pages if d.unit == 1 else 1})


def in_batches(d: Decision, num_batches: int, size: int, last: int = 0) -> Decision:
    """A decision in other batches, of which a call of attention takes no more than there is. last: sequences of every part's last one."""
    small = {key: min(getattr(d, key), size) for key in ("attention_batch", "decode_batch")}
    return d.model_copy(update={"num_batches": num_batches, "batch_size": size, "last_batch": last, **small})


def with_last_batches(d: Decision, parts: int, count: int, last: int) -> Decision:
    """About the same sequences with prefill in so many parts, each with ``last`` of them in a batch of the CPU's own and the others in
    ``count`` batches."""
    size = -(-(d.sequences // parts - last) // count)
    return in_batches(d, (count + 1) * parts, size, last).model_copy(update={"prefill_groups": parts})


def fitted_sizes(d: Decision) -> tuple[int, ...]:
    """What ``resized`` changes."""
    return tuple(getattr(d, size) for size in FITTED)


def shape_of(d: Decision) -> tuple[int, ...]:
    """What two decisions must share to be the same candidate."""
    return (
        d.num_batches,
        d.batch_size,
        d.last_batch,
        d.lead,
        d.unit,
        d.prefill_groups,
        d.rolling,
        d.together,
        d.kv_ahead,
    )


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest of limit, limit/2, limit/4, ... that fits, at least 1."""
    while limit > 1 and not fits(limit):
        limit = -(-limit // 2)
    return limit
