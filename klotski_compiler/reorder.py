"""The winner's order of experts, layer by layer: shown to be near the best there is, or bettered, by CP-SAT (design
7.4).

Layers of a phase that look the same share one window. What is found becomes the order of experts in the decision; the
schedule is then lowered again, and the faster of the two is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeGuard

from klotski_compiler.cost import Cost
from klotski_compiler.decision import Decision
from klotski_compiler.milp.window import MOST_JOBS, Job, Window, listed, solve
from klotski_compiler.ops import Compute, Load, Op, Step, Tensor
from klotski_compiler.pipeline import LoweredPhase, lower
from klotski_compiler.policies import OURS
from klotski_compiler.search import Best, Search
from klotski_compiler.tensors import MODULES

WORTH = (
    0.0005  # of the workload's time, which another order of alike layers might save: else theirs is as good as proved
)
MOST_WINDOWS = 3  # that are solved
ROUNDING_US = 2  # what starts and ends that were rounded can add to the time between them


class Seen(NamedTuple):
    """A layer's window, and the experts of each of its jobs (of late ones the ranks)."""

    window: Window
    experts: tuple[tuple[int, ...], ...]


class Alike(NamedTuple):
    """Layers of a phase that look the same. window: of the first of them. passes: of the phase."""

    phase: str
    layers: dict[int, Seen]
    window: Window
    passes: int

    def saving_us(self, bound_us: int) -> int:
        """What they could save in the whole phase if each took ``bound_us``."""
        return max(0, listed(self.window).period_us - bound_us) * len(self.layers) * self.passes


def reordered(search: Search, best: Best) -> Best:
    """The schedule with its experts in a better order, where one is found, and with what any order could still save;
    itself where no order can save much."""
    if best.policy != OURS or best.decision.by_batch:  # which has no order of its own
        return best
    doubtful = sorted(_doubtful(search, best), key=lambda alike: -alike.saving_us(alike.window.work_us))[:MOST_WINDOWS]
    bounds: dict[tuple[str, int], int] = {}
    for alike in doubtful:
        solved = solve(alike.window, listed(alike.window))
        bounds |= {(alike.phase, layer): solved.bound_us for layer in alike.layers}
        tried = with_order(best.decision, alike, solved.jobs)
        if tried != best.decision:
            lowered = lower(search.cost, OURS, tried, search.request.workload)
            if not search.over(lowered) and (rate := search.rate(lowered)) > best.tokens_per_s:
                best = replace(best, decision=tried, lowered=lowered, tokens_per_s=rate)
    if not bounds:
        return best
    left = Counter[str]()
    for alike in _alike(search, best):
        left[alike.phase] += alike.saving_us(bounds.get((alike.phase, next(iter(alike.layers))), alike.window.work_us))
    total_us = {name: phase.times.total_us for name, phase in best.lowered.phases.items()}
    shares = [f"{phase} more than {left[phase] / total_us[phase]:.1%}" for phase in sorted({p for p, _ in bounds})]
    line = f"no other would make {', or '.join(shares)} shorter"
    return replace(best, order=f"order of experts: were each layer followed by its like, {line}")


def _doubtful(search: Search, best: Best) -> Iterator[Alike]:
    """Layers that might be shorter in another order."""
    for alike in _alike(search, best):
        if (
            len(alike.window.jobs) <= MOST_JOBS
            and alike.saving_us(alike.window.work_us) > WORTH * best.lowered.group_us
        ):
            yield alike


def _alike(search: Search, best: Best) -> Iterator[Alike]:
    """The MoE layers of each phase by what they load and compute in which order, whatever time it takes."""
    for name, phase in best.lowered.phases.items():
        kinds: dict[object, dict[int, Seen]] = {}
        for number, layer in seen(search.cost, phase, best.lowered.tensors, best.decision).items():
            jobs = tuple((len(job.loads), job.slots, job.late) for job in layer.window.jobs)
            kind = jobs, len(layer.window.modules_us), len(layer.window.kv_us)
            kinds.setdefault(kind, {})[number] = layer
        for layers in kinds.values():
            yield Alike(name, layers, next(iter(layers.values())).window, phase.shape.passes)


def with_order(decision: Decision, alike: Alike, order: Sequence[int]) -> Decision:
    """The decision with the experts of these layers in the order of the window's jobs, as far as a decision can say
    it: among those streamed by name, among those of the CPU, which prefill streams before them, and among
    residents."""
    layers = list(decision.layers)
    for number, layer in alike.layers.items():
        named = [layer.experts[job] for job in order if not layer.window.jobs[job].late]
        place = {expert: at for at, expert in enumerate(expert for experts in named for expert in experts)}
        old = layers[number]
        layers[number] = old.model_copy(
            update={
                "static": _in_place(old.static, place),
                "cpu": _in_place(old.cpu[::-1], place)[::-1],
                "resident_experts": _in_place(old.resident_experts, place),
            }
        )
    return decision.model_copy(update={"layers": tuple(layers)})


def _in_place(experts: tuple[int, ...], place: dict[int, int]) -> tuple[int, ...]:
    return tuple(sorted(experts, key=lambda expert: place.get(expert, 0)))


def seen(cost: Cost, phase: LoweredPhase, tensors: Sequence[Tensor], decision: Decision) -> dict[int, Seen]:
    """The window of every MoE layer, from the ops of a settled pass."""
    into, processor = cost.links[0], cost.processor_name
    brought: dict[int, tuple[Step, ...]] = {}  # by tensor: its load, or those of its pages
    others: dict[int, list[tuple[str, int]]] = {}  # modules and KV of a layer: (kind, microseconds)
    begins: dict[int, int] = {}
    for number, step in enumerate(phase.steps):
        if isinstance(step.op, Load) and step.op.link == into == step.op.stream:
            for tensor in step.op.tensors:
                before = brought.get(tensor, ()) if step.op.pages and step.op.pages.first else ()
                brought[tensor] = (*before, step)
            first = tensors[step.op.tensors[0]]
            if us := step.end_us - step.start_us:
                others.setdefault(first.layer, []).append((first.kind, us))
        elif isinstance(step.op, Compute) and step.op.stream == processor:
            begins.setdefault(step.op.layer, number)
    ends = sorted([*begins.values(), len(phase.steps)])
    found = {}
    for layer, begin in begins.items():
        numbers = range(begin, next(number for number in ends if number > begin))
        jobs, experts = list[Job](), list[tuple[int, ...]]()
        for step in (phase.steps[n] for n in numbers):
            if _is_experts(step.op, processor):
                own = step.op.tensors
                mine = dict.fromkeys(brought[t] for t in own if t in brought)
                loads = tuple(
                    (sum(load.end_us - load.start_us for load in parts), len(parts[0].slots)) for parts in mine
                )
                jobs.append(Job(loads, step.end_us - step.start_us, late=tensors[own[0]].kind == "pick"))
                experts.append(tuple(tensors[t].index for t in own))
        if not jobs:
            continue
        computes = _evened(job.compute_us for job in jobs)
        arrivals = _evened(us for job in jobs for us, _ in job.loads)
        jobs = [
            Job(tuple((arrivals[us], slots) for us, slots in job.loads), computes[job.compute_us], job.late)
            for job in jobs
        ]
        front, after, least = _without_experts(phase.steps, numbers, processor)
        window = Window(
            jobs=tuple(jobs),
            slots=decision.lead_of(phase.shape.decoding),
            front_us=front,
            least_us=least,
            after_us=after,
            modules_us=tuple(us for kind, us in others.get(layer, []) if kind in MODULES),
            kv_us=tuple(us for kind, us in others.get(layer, []) if kind == "kv"),
        )
        found[layer] = Seen(window, tuple(experts))
    return found


def _evened(times_us: Iterable[int]) -> dict[int, int]:
    """What each time is without rounding, so that equal ops are seen to be equal: the least of those that differ by
    no more."""
    evened: dict[int, int] = {}
    for us in sorted(set(times_us)):
        least = next(reversed(evened.values()), us)
        evened[us] = least if us - least <= ROUNDING_US else us
    return evened


def _is_experts(op: Op, processor: str) -> TypeGuard[Compute]:
    return isinstance(op, Compute) and op.fn == "experts" and op.stream == processor


def _without_experts(steps: Sequence[Step], numbers: range, processor: str) -> tuple[int, int, int]:
    """A layer replayed without its loads and as if its experts took no time on ``processor``: when the first of them
    could begin, what the processor does after the last, and when that would end."""
    ends: dict[int, int] = {}
    now: dict[str, int] = {}
    front, after = -1, 0
    for number in numbers:
        step = steps[number]
        op, us = step.op, step.end_us - step.start_us
        if isinstance(op, Load) and op.link == op.stream:
            continue
        if _is_experts(op, processor):
            front, after, us = (now[processor] if front < 0 else front), 0, 0
        elif op.stream == processor:
            after += us
        known = (ends[wait.op] for wait in step.waits if not wait.back and wait.op in ends)
        now[op.stream] = ends[number] = max(now.get(op.stream, 0), *known, 0) + us
    return front, after, now[processor]
