"""Whether every batch meets every module and every expert once, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from klotski_compiler.checks.common import Fault, by_layer, computing, is_sent, scope_of
from klotski_compiler.ops import ALL, MOST_BATCHES, Bind, Compute, Load, Step, batches_of
from klotski_compiler.plan import Phase, Plan

SOME = MOST_BATCHES  # no batch: stands for every one whose experts were not computed over all at once


def picks(plan: Plan) -> None:
    """Every expert is resident, static or late, picks range over the late ones, which memory holds if picks live there, and each pick is
    bound once in a pass, in order, after the routers that its rule reads and before its load."""
    found = by_layer(plan)
    held = {(tensor, plan.slots[slot].tier) for tensor, slot in plan.placed}
    for layer, chosen in enumerate(plan.decision.layers):
        experts, tensors = found["expert", layer], found["pick", layer]
        kinds = (*chosen.resident_experts, *chosen.static, *chosen.late, *chosen.cpu)
        if sorted(kinds) != sorted(t.index for t in experts):
            raise Fault(f"L{layer}: not every expert is exactly one of resident, static, late and the CPU's")
        if sorted(t.index for t in tensors) != list(range(len(chosen.late))):
            raise Fault(f"L{layer} has {len(tensors)} picks for {len(chosen.late)} late experts")
        if odd := [t.name for t in experts if t.index in chosen.late and t.home != tensors[0].home]:
            raise Fault(f"{odd[0]} may be picked, but does not live in {tensors[0].home} as picks do")
        for expert in experts:
            if expert.index in chosen.late and expert.home != "disk" and (expert.id, expert.home) not in held:
                raise Fault(f"{expert.name} may be picked, but has no slot in {expert.home}, where it lives")
    for phase, steps in computing(plan):
        bound = Counter[int]()  # picks of each layer, in order
        routed: dict[int, set[int]] = {}
        for number, step in enumerate(steps):
            op = step.op
            if isinstance(op, Compute):
                if op.fn == "router":
                    routed.setdefault(op.layer, set()).update(scope_of(op.batch, phase))
            elif isinstance(op, Bind):
                asked = range(phase.batches) if op.batch == ALL else range(op.batch + 1)
                if op.rule != "predicted" and not routed.get(op.layer, set()).issuperset(asked):
                    raise Fault("binds before the router has spoken", phase.name, number)
                if op.rule == "rank" and op.batch != ALL:
                    raise Fault("binds by rank before all batches have chosen", phase.name, number)
                if op.first != bound[op.layer]:
                    raise Fault(
                        f"binds picks from {op.first} on, where {bound[op.layer]} are bound", phase.name, number
                    )
                bound[op.layer] += op.count
            if isinstance(op, Load | Compute):
                for tensor in (plan.tensors[t] for t in op.tensors):
                    if tensor.kind == "pick" and tensor.index >= bound[tensor.layer]:
                        raise Fault(f"takes {tensor.name}, which is not bound yet", phase.name, number)
        for layer, chosen in enumerate(plan.decision.layers):
            if bound[layer] != len(chosen.late):
                raise Fault(f"phase {phase.name} binds {bound[layer]} picks of L{layer}, of {len(chosen.late)}")


def work(plan: Plan) -> None:
    """Every batch passes every module once and in order, and every expert of a layer once, with the tensors that it needs."""
    course, found = [("embed", -1)], by_layer(plan)
    for layer in range(len(plan.decision.layers)):
        routed = bool(found["expert", layer])
        course += [("attention", layer), *([("router", layer), ("experts", layer)] if routed else [("dense", layer)])]
    experts = {
        layer: frozenset(
            t.id
            for t in (*found["expert", layer], *found["pick", layer])
            if t.kind == "pick" or t.index not in chosen.late
        )
        | {t.id for t in found["shared", layer]}
        for layer, chosen in enumerate(plan.decision.layers)
    }
    for phase, steps in computing(plan):
        _Pass(plan, phase, course, experts).follow(steps)


class _Pass:
    """Where every batch stands in one pass, and which experts of each layer it has met."""

    def __init__(
        self, plan: Plan, phase: Phase, course: list[tuple[str, int]], experts: dict[int, frozenset[int]]
    ) -> None:
        self.plan, self.phase, self.course, self.experts = plan, phase, course, experts
        self.place = {stop: number for number, stop in enumerate(course)}
        self.needs = partial(_needs, plan, {(t.kind, t.layer, t.index): t.id for t in plan.tensors}, _in_place(plan))
        self.stands = [0] * phase.batches  # stops of the course that lie behind
        self.waiting = dict.fromkeys(
            range(len(plan.decision.layers)), 0
        )  # batches that the layer's router has sent to experts
        self.met: dict[tuple[int, int], set[int]] = {}  # (layer, batch, ALL or SOME) -> experts computed
        self.ending = ["norm", *["head"] * sum(t.kind == "head" for t in plan.tensors), "sample"]
        self.pages: set[int] = set()
        self.begun: dict[tuple[int, int], str] = {}  # (layer, batch) -> the last part of attention that is done
        self.owed: set[int] = set()  # layers whose sums are not added yet

    def follow(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps):
            if isinstance(step.op, Compute) and (why := self._compute(step.op)):
                raise Fault(why, self.phase.name, number)
        if self.ending:
            raise Fault(f"phase {self.phase.name} ends before its {self.ending[0]}")

    def _compute(self, op: Compute) -> str:
        if op.fn == "experts":
            return self._experts(op)
        if op.fn == "shared":
            return self._shared(op)
        if op.fn in ("norm", "head", "sample"):
            return self._end(op)
        shared = self._shared_in(op) if op.fn == "router" else set[int]()  # or an op of its own does that
        if set(op.tensors) - shared != (needs := self.needs(op)):
            return f"{op.fn} needs {', '.join(self.plan.names[t] for t in sorted(needs)) or 'no tensor'}"
        if op.fn == "add":
            if op.layer not in self.owed:
                return f"adds sums of L{op.layer} that nobody has computed"
            self.owed.remove(op.layer)
            return ""
        for batch in scope_of(op.batch, self.phase):
            if why := self._leave_experts(batch):
                return why
            fn = "attention" if op.fn in PARTS else op.fn
            if op.fn in PARTS:
                before = PARTS[PARTS.index(op.fn) - 1] if op.fn != PARTS[0] else ""
                if self.begun.get((op.layer, batch), "") != before:
                    return f"batch {batch} has {before or 'no part of attention'} of L{op.layer} before it"
                self.begun[op.layer, batch] = op.fn
            if self.place.get((fn, op.layer)) != self.stands[batch]:
                fn, layer = self.course[self.stands[batch]] if self.stands[batch] < len(self.course) else ("norm", -1)
                return f"batch {batch} has {fn} L{layer} before it"
            if op.fn in PARTS[:-1]:
                continue
            self.stands[batch] += 1
            if op.fn == "router":
                self.waiting[op.layer] += 1
        return self._meet(op, shared) if shared else ""

    def _experts(self, op: Compute) -> str:
        decision = self.plan.decision
        some = [] if op.batch == ALL else scope_of(op.batch, self.phase)
        if not self._routed(op.layer, some):
            return f"a batch is not yet routed in L{op.layer}, or has left it"
        if some and decision.last_batch and not decision.rolling:
            return "works on some batches, where batches of several sizes are there: the bound counts on ops over all of them"
        computed = {t for t in op.tensors if self.plan.tensors[t].kind in ("expert", "pick")}
        others = sorted(self.plan.tensors[t].kind for t in op.tensors if t not in computed)
        if others not in ([], ["rows", "sums"]):
            return f"experts need no {', '.join(others)}"
        if is_sent(self.plan, op):
            if op.batch != ALL or op.layer in self.owed:
                return f"is not the only op on what was sent of all batches of L{op.layer}"
            self.owed.add(op.layer)
        if unknown := computed - self.experts[op.layer]:
            return f"{self.plan.names[min(unknown)]} is no expert that L{op.layer} computes by that name"
        return self._meet(op, computed)

    def _shared(self, op: Compute) -> str:
        if not self._routed(op.layer, [] if op.batch == ALL else scope_of(op.batch, self.phase)):
            return f"a batch is not yet routed in L{op.layer}, or has left it"
        if not op.tensors or set(op.tensors) != self._shared_in(op):
            return f"does not name the shared expert of L{op.layer}, and nothing else"
        return self._meet(op, set(op.tensors))

    def _routed(self, layer: int, some: Sequence[int]) -> bool:
        """Whether some batches, or (none) all of them, stand before a layer's experts."""
        here = self.place.get(("experts", layer))
        routed = all(self.stands[batch] == here for batch in some)
        return here is not None and (routed if some else self.waiting.get(layer, 0) == self.phase.batches)

    def _shared_in(self, op: Compute) -> set[int]:
        return {t for t in op.tensors if self.plan.tensors[t].kind == "shared" and t in self.experts[op.layer]}

    def _meet(self, op: Compute, computed: set[int]) -> str:
        """Notes that the op's batches have met these experts, which they must not have before."""
        some = [] if op.batch == ALL else scope_of(op.batch, self.phase)
        # A set per batch, one of all batches' sets together, and one of what is for all at once, so that no such op asks every batch.
        for scope in (ALL, *some) if some else (ALL, SOME):
            if twice := computed & self.met.get((op.layer, scope), set()):
                return f"{self.plan.names[min(twice)]} is computed twice"
        for scope in (SOME, *some) if some else (ALL,):
            self.met.setdefault((op.layer, scope), set()).update(computed)
        return ""

    def _leave_experts(self, batch: int) -> str:
        """Steps over a layer's experts, which must all have been met."""
        stop = self.stands[batch]
        if stop == len(self.course) or self.course[stop][0] != "experts":
            return ""
        layer = self.course[stop][1]
        met = self.met.get((layer, ALL), set()) | self.met.get((layer, batch), set())
        if missing := self.experts[layer] - met:
            return f"batch {batch} goes on without {self.plan.names[min(missing)]}"
        if layer in self.owed:
            return f"batch {batch} goes on without the sums of L{layer}"
        self.stands[batch] += 1
        return ""

    def _end(self, op: Compute) -> str:
        for batch in range(self.phase.batches) if op.fn == "norm" else ():
            if why := self._leave_experts(batch):
                return why
            if self.stands[batch] < len(self.course):
                return f"batch {batch} has not passed every layer"
        if not self.ending or op.fn != self.ending[0]:
            return f"{self.ending[0] if self.ending else 'nothing'} was to come here"
        if op.fn == "head":
            if any(t in self.pages or self.plan.tensors[t].kind != "head" for t in op.tensors) or len(op.tensors) != 1:
                return "needs one page of the head that was not computed yet"
            self.pages.update(op.tensors)
        elif set(op.tensors) != self.needs(op):
            return f"{op.fn} does not name its weights"
        self.ending.pop(0)
        return ""


_READ_BY = {
    "embed": ("embedding",), "attention": ("attention", "kv"), "router": ("router",), "dense": ("dense",), "norm": ("norm",),
    "project": ("attention", "query"), "attend": ("kv", "query"), "output": ("attention", "query"), "add": ("sums",),
    "shared": ("shared",),
}  # fmt: skip
PARTS = ("project", "attend", "output")


def _needs(plan: Plan, ids: dict[tuple[str, int, int], int], in_place: set[int], op: Compute) -> set[int]:
    """The tensors that an op must name: its weights, an embedding that lives in the compute tier, and a KV cache that does not."""
    keys = [
        (kind, -1 if kind in ("query", "sums") else op.layer, index)
        for kind in _READ_BY.get(op.fn, ())
        for index in (batches_of(op.batch, plan.decision.num_batches) if kind in ("kv", "query") else (0,))
    ]
    found = {ids[key] for key in keys if key in ids}
    named = {"embedding": True, "kv": False}
    return {t for t in found if (t in in_place) == named.get(plan.tensors[t].kind, t in in_place)}


def _in_place(plan: Plan) -> set[int]:
    """What has a permanent slot in the compute tier."""
    return {tensor for tensor, slot in plan.placed if plan.slots[slot].tier == plan.compute_tier}
