"""The passes on random programs, against oracles that know nothing of them: what may share a slot, what must wait for what."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klotski_compiler.errors import PlanError
from klotski_compiler.execute import execute
from klotski_compiler.ops import ALL, Bind, Compute, Load, Op, Step, Store, Tensor, Wait
from klotski_compiler.passes.depend import cells_of, depend
from klotski_compiler.passes.slots import Placed, Pool, slots
from klotski_compiler.passes.waits import waits
from klotski_compiler.program import Evict
from plans import RandomProgram, random_program


def tape_of(seed: int, length: int) -> list[int]:
    """Uniform choices: hypothesis' own lists repeat themselves, and shorter ones are what a failure shrinks to."""
    rng = random.Random(seed)
    return [rng.randrange(4096) for _ in range(length)]


TAPES = st.builds(tape_of, seed=st.integers(0, 1 << 32), length=st.integers(20, 350))
RANDOM = settings(max_examples=150, deadline=None, derandomize=True)
GPU = pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
Key = tuple[str, int]  # tier, tensor
Instance = tuple[int, int]  # pass (-1: the opening), op


PROCESSORS = {"cpu": "host", "gpu": "gpu"}


def place(program: RandomProgram) -> tuple[list[Placed], list[Pool]]:
    return slots(program.entries, program.tensors, program.fixed, PROCESSORS, len(program.fixed))


def lowered(program: RandomProgram, passes: int) -> list[Step]:
    """Through slots, depend and waits."""
    placed, _ = place(program)
    cells = [cells_of(p, program.tensors, program.batches) for p in placed]
    after = waits(placed, depend(placed, cells, passes))
    return [Step(p.op, p.slots, p.sources, w, 0, 0) for p, w in zip(placed, after, strict=True)]


# --------------------------------------------------------------------------------------------------------------- slots


class Memory:
    """What is alive in which slot, by the meaning of the entries alone."""

    def __init__(self, program: RandomProgram, placed: Sequence[Placed]) -> None:
        self.program, self.placed = program, placed
        self.live: dict[Key, int] = {}
        self.most: dict[tuple[str, str], int] = {}  # tensors alive at once in a tier, by kind

    def opening(self) -> None:
        """The loads for the next pass alone, with the staged copies that they leave."""
        self._walk(lambda entry: isinstance(entry, Load) and entry.wraps, must=False)

    def one_pass(self, last: bool = False) -> None:
        self._walk(lambda entry: not (last and isinstance(entry, Load) and entry.wraps), must=not last)

    def _walk(self, wanted: Callable[[Op], bool], must: bool) -> None:
        ops = iter(self.placed)
        for entry in self.program.entries:
            if isinstance(entry, Evict):
                for tensor in entry.tensors:
                    if must:
                        del self.live[entry.tier, tensor]
                    else:
                        self.live.pop((entry.tier, tensor), None)
                continue
            placed = next(ops)
            assert placed.op is entry
            if not wanted(entry):
                continue
            if isinstance(entry, Load):
                self._load(entry, placed)
            elif not isinstance(entry, Bind):
                tier = self.program.tier if isinstance(entry, Compute) else entry.link.split(">")[0]
                read = placed.slots if isinstance(entry, Compute) else placed.sources
                assert read == tuple(self._where(tier, t) for t in entry.tensors)

    def _load(self, entry: Load, placed: Placed) -> None:
        source, target = entry.link.split(">")
        if placed.sources:
            assert placed.sources == tuple(self._where(source, t) for t in entry.tensors)
        for tensor, slot in zip(entry.tensors, placed.slots, strict=True):
            assert slot not in self.program.fixed.values(), "a resident is overwritten"
            assert slot not in self.live.values(), "two live tensors share a slot"
            assert (target, tensor) not in self.live
            self.live[target, tensor] = slot
            kind = self.program.tensors[tensor].kind.replace("pick", "expert")
            alive = sum(
                t == target and self.program.tensors[n].kind.replace("pick", "expert") == kind for t, n in self.live
            )
            self.most[target, kind] = max(alive, self.most.get((target, kind), 0))

    def _where(self, tier: str, tensor: int) -> int:
        return self.live[tier, tensor] if (tier, tensor) in self.live else self.program.fixed[tier, tensor]


@GPU
@RANDOM
@given(tape=TAPES)
def test_live_tensors_have_slots_of_their_own_and_every_pass_ends_as_it_began(gpu: bool, tape: list[int]) -> None:
    program = random_program(tape, gpu)
    memory = Memory(program, place(program)[0])
    memory.opening()
    start = dict(memory.live)
    for _ in range(3):
        memory.one_pass()
        assert memory.live == start
    memory.one_pass(last=True)
    assert not memory.live


@GPU
@RANDOM
@given(tape=TAPES)
def test_pools_are_no_larger_than_what_is_alive_at_once(gpu: bool, tape: list[int]) -> None:
    """Without loads for the next pass, where the lifetimes are intervals and first fit is optimal."""
    program = random_program(tape, gpu, wraps=False)
    placed, pools = place(program)
    memory = Memory(program, placed)
    memory.one_pass()
    assert {(pool.tier, pool.kind): len(pool.members) for pool in pools} == memory.most


@GPU
@RANDOM
@given(tape=TAPES)
def test_pools_hold_equal_slots_of_one_kind_that_are_numbered_on(gpu: bool, tape: list[int]) -> None:
    program = random_program(tape, gpu)
    placed, pools = place(program)
    members = sorted(slot for pool in pools for slot in pool.members)
    assert members == list(range(len(program.fixed), len(program.fixed) + len(members)))
    at = {slot: pool for pool in pools for slot in pool.members}
    for op in placed:
        if isinstance(op.op, Load):
            for number, slot in zip(op.op.tensors, op.slots, strict=True):
                tensor = program.tensors[number]
                assert at[slot].tier == op.op.link.split(">")[1]
                assert at[slot].kind == tensor.kind.replace("pick", "expert")
                assert at[slot].nbytes >= tensor.slot_bytes


def test_the_slot_that_has_been_free_for_longest_is_reused() -> None:
    """So that a load waits for the oldest reader."""
    loads = [loading(t) for t in range(3)]
    entries = [*loads, evicting(1), evicting(0), evicting(2), loading(3), evicting(3)]
    placed, _ = slots(entries, experts(4), {}, PROCESSORS, 0)
    assert [p.slots for p in placed] == [(0,), (1,), (2,), (1,)]


# ---------------------------------------------------------------------------------------------------- depend and waits


def touched(step: Step, tensors: Sequence[Tensor], batches: int) -> tuple[set[object], set[object]]:
    """What an op reads and writes, from what it means. In-place updates count as both."""
    op = step.op
    reads, writes = set[object](), set[object]()
    if isinstance(op, Bind):
        writes |= {("assignment", op.layer, pick) for pick in range(op.first, op.first + op.count)}
        if op.rule != "predicted":
            reads |= {("routing", op.layer, b) for b in range(batches) if op.batch in (ALL, b) or b < op.batch}
        return reads, writes
    picks: set[object] = {
        ("assignment", t.layer, t.index) for t in (tensors[n] for n in op.tensors) if t.kind == "pick"
    }
    caches: set[object] = {("file", n) for n in op.tensors if tensors[n].kind == "kv"}
    if isinstance(op, Load):
        return picks | (set(step.sources) or caches), set(step.slots)
    if isinstance(op, Store):
        return set(step.sources), set(step.slots) or caches
    placed = list(zip(op.tensors, step.slots, strict=True))
    both: set[object] = {slot for n, slot in placed if tensors[n].kind == "kv"}
    reads |= picks | {slot for n, slot in placed if tensors[n].kind != "kv"}
    scope = range(batches) if op.batch == ALL else (op.batch,)
    if op.fn in ("embed", "attention", "dense", "router", "experts"):
        both |= {("hidden", b) for b in scope}
    if op.fn == "router":
        writes |= {("routing", op.layer, b) for b in scope}
    if op.fn == "experts":
        reads |= {("routing", op.layer, b) for b in scope}
    if op.fn == "norm":
        reads |= {("hidden", b) for b in scope}
    if op.fn in ("norm", "head", "sample"):
        both.add("last")
    if op.fn in ("embed", "sample"):
        both.add("tokens")
    return reads | both, writes | both


def conflicts(order: Sequence[Instance], cells: Sequence[tuple[set[object], set[object]]]) -> Iterator[tuple[int, int]]:
    """Every pair of places in a sequence of which one writes what the other reads or writes: all pairs, one by one."""
    numbers: dict[object, int] = {}
    masks = [
        tuple(sum(1 << numbers.setdefault(cell, len(numbers)) for cell in side) for side in sides) for sides in cells
    ]
    for later, (_, op) in enumerate(order):
        reads, writes = masks[op]
        for earlier in range(later):
            r, w = masks[order[earlier][1]]
            if writes & (r | w) or reads & w:
                yield earlier, later


class Knowledge:
    """A backend that performs nothing: a stream knows, as a bit set, which ops have surely ended before its next one."""

    def __init__(self) -> None:
        self.lanes: dict[str, Lane] = {}
        self.order: list[Instance] = []
        self.before: list[int] = []  # what has surely ended when the op at this place of the order starts

    def stream(self, name: str) -> Lane:
        return self.lanes.setdefault(name, Lane(self))

    def begin(self, at: int) -> bool:
        return True


class Lane:
    """A stream of ``Knowledge``."""

    def __init__(self, backend: Knowledge) -> None:
        self.backend, self.known = backend, 0

    def wait(self, event: int) -> None:
        self.known |= event

    def run(self, number: int, step: Step, at: int) -> None:
        self.backend.before.append(self.known)
        self.known |= 1 << len(self.backend.order)
        self.backend.order.append((at, number))

    def record(self) -> int:
        return self.known


def unordered(program: RandomProgram, passes: int) -> list[tuple[Instance, Instance]]:
    """Pairs of ops that touch the same cell, one of them writing, which FIFO streams and waits leave without an order."""
    steps = lowered(program, passes)
    backend = Knowledge()
    execute(steps, passes, backend)
    order, cells = backend.order, [touched(step, program.tensors, program.batches) for step in steps]
    return [(order[a], order[b]) for a, b in conflicts(order, cells) if not backend.before[b] >> a & 1]


@GPU
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
@settings(RANDOM, max_examples=100)
@given(tape=TAPES)
def test_everything_that_conflicts_is_ordered_in_every_pass(gpu: bool, passes: int, tape: list[int]) -> None:
    """RAW, WAR and WAW over all pairs of the unrolled phase: from what opens it to its last pass. On a GPU, what opens it may
    race with itself: see below."""
    found = unordered(random_program(tape, gpu), passes)
    assert not [(earlier, later) for earlier, later in found]


def test_the_loads_that_open_a_phase_are_ordered_though_another_is_staged_between_them_in_a_pass() -> None:
    """Experts 0 and 2 are loaded for the next pass; between the two, expert 1 passes through the same staging slot."""
    program = RandomProgram("gpu", experts(3))
    program.entries = [Evict("gpu", (0,)), Evict("gpu", (2,))]
    for expert in range(3):
        hops = [Load(link, link, (expert,), expert != 1) for link in ("disk>host", "host>gpu")]
        program.entries += [*hops, Evict("host", (expert,))]
    program.entries.append(Evict("gpu", (1,)))
    assert not unordered(program, 2)


def test_a_cache_is_read_back_from_host_memory_after_it_was_written() -> None:
    """Into another slot than before, so that nothing else orders the two."""
    tensors = [Tensor(n, "kv", 0, n, 4096, 0, "host") for n in range(2)]
    program = RandomProgram("gpu", tensors, {("host", 0): 0, ("host", 1): 1})
    first, second = (Load("host>gpu", "host>gpu", (n,)) for n in range(2))
    stored = Store("gpu>host", "gpu>host", (0,))
    program.entries = [first, second, Evict("gpu", (1,)), stored, Evict("gpu", (0,)), first, Evict("gpu", (0,))]
    assert Wait(2, 0) in lowered(program, 1)[3].waits


@GPU
@settings(RANDOM, max_examples=100)
@given(tape=TAPES)
def test_the_waits_are_what_transitive_reduction_leaves(gpu: bool, tape: list[int]) -> None:
    """Of all conflicts and FIFO order, in the first pass and in a later one; an op keeps the union of the two, and so may wait
    in one of them for what it knows there. What opens the phase may wait for what is left of its own."""
    program = random_program(tape, gpu)
    steps = lowered(program, 3)
    opening = [(-1, n) for n, s in enumerate(steps) if isinstance(s.op, Load) and s.op.wraps]
    order = opening + [(at, n) for at in (0, 1) for n in range(len(steps))]
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(order)))
    graph.add_edges_from(conflicts(order, [touched(s, program.tensors, program.batches) for s in steps]))
    last: dict[str, int] = {}
    for position, (_, number) in enumerate(order):
        stream = steps[number].op.stream
        if stream in last:
            graph.add_edge(last[stream], position)
        last[stream] = position
    must, may = set[tuple[int, Wait]](), set[tuple[int, Wait]]()
    for a, b in networkx.transitive_reduction(graph).edges:
        (earlier_pass, earlier), (later_pass, later) = order[a], order[b]
        if steps[earlier].op.stream != steps[later].op.stream:
            (must if later_pass >= 0 else may).add((later, Wait(earlier, later_pass - earlier_pass)))
    kept = {(number, wait) for number, step in enumerate(steps) for wait in step.waits}
    assert must <= kept <= must | may


@GPU
@RANDOM
@given(tape=TAPES)
def test_waits_point_backwards_and_to_other_streams(gpu: bool, tape: list[int]) -> None:
    steps = lowered(random_program(tape, gpu), 3)
    for number, step in enumerate(steps):
        assert len(set(step.waits)) == len(step.waits)
        for wait in step.waits:
            assert wait.back in (0, 1) and (wait.back == 1 or wait.op < number)
            assert steps[wait.op].op.stream != step.op.stream


# -------------------------------------------------------------------------------------------------------------- errors


def experts(count: int) -> list[Tensor]:
    return [Tensor(n, "expert", 0, n, 4096, 1, "disk") for n in range(count)]


def loading(*tensors: int, wraps: bool = False) -> Op:
    return Load("disk>host", "disk>host", tensors, wraps)


def computing(*tensors: int) -> Op:
    return Compute("cpu", "experts", 0, ALL, tensors)


def evicting(*tensors: int) -> Evict:
    return Evict("host", tensors)


WRONG: dict[str, tuple[list[Op | Evict], str]] = {
    "a load is never evicted": ([loading(0), computing(0)], "L0.E0 is loaded and never evicted from host"),
    "a tensor is loaded twice": ([loading(0), loading(0), evicting(0)], "L0.E0 is loaded and never evicted from host"),
    "a read of what was not loaded": ([loading(0), computing(0, 1), evicting(0)], "cpu op reads L0.E1, which is not in host"),
    "a read of what was evicted": ([loading(0), evicting(0), computing(0)], "cpu op reads L0.E0, which is not in host"),
    "a store of what was not loaded": ([Store("host>disk", "host>disk", (1,))], "host>disk op reads L0.E1, which is not in host"),
    "a load for the next pass without an eviction": (
        [loading(0, wraps=True)],
        "L0.E0 is loaded for the next pass before this one has evicted it",
    ),
    "a load for the next pass before the eviction": (
        [computing(0), loading(0, wraps=True), evicting(0)],
        "cpu op reads L0.E0, which is not in host",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_program_that_is_not_sound_is_refused_by_name(what: str) -> None:
    entries, why = WRONG[what]
    with pytest.raises(PlanError) as refusal:
        slots(entries, experts(2), {}, PROCESSORS, 0)
    assert (refusal.value.check, refusal.value.why) == ("slots", why)
