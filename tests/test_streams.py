"""Plans on real threads: the order that is promised is the order that happens, and every thread comes to its end."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest

from klotski_compiler.decision import Workload
from klotski_compiler.execute import execute
from klotski_compiler.ops import NOWHERE, Bind, Compute, Load, Step, Store
from klotski_compiler.plan import Plan
from klotski_compiler.policies import POLICIES
from klotski_runtime.streams import Perform, Ran, ThreadBackend
from plans import tiny_plan, tiny_spec

PASSES = 4
PLACES = ((False, "host"), (False, "disk"), (True, "host"))
SOON_S = 30.0  # a phase that takes longer than this hangs


def plan_of(policy: str, gpu: bool, kv: str) -> Plan:
    workload = Workload(prompt_len=16, gen_len=PASSES + 1, num_sequences=6)
    return tiny_plan(policy, gpu, kv, spec=tiny_spec(3, 4), workload=workload)


def compute_stream(steps: Sequence[Step]) -> str:
    return next(s.op.stream for s in steps if isinstance(s.op, Compute))


def jitter(seed: int) -> Callable[[], None]:
    """Pauses of up to a third of a millisecond, so that threads overtake each other wherever they may."""
    rng = random.Random(seed)
    return lambda: time.sleep(rng.random() * 3e-4 if rng.random() < 0.5 else 0.0)


@contextmanager
def no_thread_remains() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def run(steps: Sequence[Step], passes: int, backend: ThreadBackend) -> None:
    """Execute in a thread of its own, so that a hang fails instead of hanging the tests."""

    def whole() -> None:
        with backend:
            execute(steps, passes, backend)

    with no_thread_remains():
        runner = threading.Thread(target=whole, daemon=True)
        runner.start()
        runner.join(SOON_S)
        assert not runner.is_alive(), "the phase hangs"


class Logging(ThreadBackend):
    """Keeps what it is told."""

    def __init__(self, steps: Sequence[Step], perform: Perform) -> None:
        self._ran: list[Ran] = []
        super().__init__(compute_stream(steps), perform, note=self._ran.append)

    @property
    def log(self) -> list[Ran]:
        """All finished ops, by start."""
        return sorted(self._ran, key=lambda ran: ran.start)


def logged(steps: Sequence[Step], passes: int, perform: Perform) -> list[Ran]:
    backend = Logging(steps, perform)
    run(steps, passes, backend)
    assert backend.failure is None, backend.failure
    return backend.log


# --------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_threads_keep_every_wait_and_every_stream_in_order(policy: str, gpu: bool, kv: str) -> None:
    steps, pause = plan_of(policy, gpu, kv).steps["decode"], jitter(1)
    log = logged(steps, PASSES, lambda number, step, at: pause())
    spans = {(ran.at, ran.number): ran for ran in log}
    assert len(spans) == len(log), "an op ran twice in a pass"
    for (at, number), ran in spans.items():
        for wait in steps[number].waits:
            awaited = spans.get((at - wait.back, wait.op))
            assert awaited is None or awaited.end <= ran.start, f"{number} of pass {at} did not wait for {wait}"
    for stream in {step.op.stream for step in steps}:
        lane = [ran for ran in log if ran.stream == stream]
        assert [(ran.at, ran.number) for ran in lane] == sorted((ran.at, ran.number) for ran in lane)
        assert all(one.end <= two.start for one, two in pairwise(lane))
        assert all(steps[ran.number].op.stream == stream for ran in lane)


@pytest.mark.parametrize("passes", [1, 2, PASSES])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_op_runs_once_in_every_pass_and_the_last_pass_opens_no_other(policy: str, passes: int) -> None:
    steps = plan_of(policy, False, "disk").steps["decode"]
    log = logged(steps, passes, lambda number, step, at: None)
    wraps = {n for n, step in enumerate(steps) if isinstance(step.op, Load) and step.op.wraps}
    ran = Counter((ran.at, ran.number) for ran in log)
    assert ran == Counter(
        [(at, n) for at in range(passes) for n in range(len(steps)) if n not in wraps]
        + [(at, n) for at in range(-1, passes - 1) for n in wraps]
    )


class Slots:
    """What threads see in memory: an op takes its time over it, and finds out if another one writes meanwhile."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.pause = plan, jitter(seed)
        placed = [*plan.placed, *(pair for phase in plan.phases for pair in phase.placed)]
        self.held: dict[int, int | str] = {slot: tensor for tensor, slot in placed}
        self.faults: list[str] = []

    def perform(self, number: int, step: Step, at: int) -> None:
        match step.op:
            case Bind():
                return
            case Load(tensors=tensors):
                for slot in step.slots:
                    self.held[slot] = f"op {number} of pass {at} on its way"
                self._read(number, tensors, step.sources)
                self.held.update(zip(step.slots, tensors, strict=True))
            case Store(tensors=tensors):
                self._read(number, tensors, step.sources)
            case Compute(tensors=tensors):
                self._read(number, tensors, step.slots)

    def _read(self, number: int, tensors: Sequence[int], slots: Sequence[int]) -> None:
        for moment in range(2):
            if moment:
                self.pause()
            for tensor, slot in zip(tensors, slots, strict=False):
                if slot != NOWHERE and self.held.get(slot) != tensor:
                    self.faults.append(f"op {number} finds {self.held.get(slot)} in slot {slot}, not {tensor}")


@pytest.mark.parametrize(("gpu", "kv"), PLACES)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_an_op_reads_stays_in_its_slot_while_it_runs(policy: str, gpu: bool, kv: str) -> None:
    plan = plan_of(policy, gpu, kv)
    for name in ("prefill", "decode"):
        memory = Slots(plan, 2)
        logged(plan.steps[name], plan.phase(name).passes, memory.perform)
        assert not memory.faults


def test_a_missing_wait_shows_in_what_is_read() -> None:
    """The test above sees what it is there to see."""
    plan = plan_of("joint", False, "host")
    memory = Slots(plan, 2)
    steps = [Step(s.op, s.slots, s.sources, (), 0, 0) for s in plan.steps["decode"]]
    logged(steps, PASSES, memory.perform)
    assert memory.faults


def test_no_more_than_two_passes_are_issued_ahead() -> None:
    steps = plan_of("joint", False, "host").steps["decode"]
    last = max(n for n, s in enumerate(steps) if s.op.stream == compute_stream(steps))
    done: list[int] = []
    begun: list[tuple[int, list[int]]] = []

    class Counting(ThreadBackend):
        def begin(self, at: int) -> bool:
            going = super().begin(at)
            begun.append((at, list(done)))
            return going

    def perform(number: int, step: Step, at: int) -> None:
        if number == last:
            done.append(at)

    run(steps, 8, Counting(compute_stream(steps), perform))
    assert done == list(range(8))
    assert all(at < 2 or at - 2 in ended for at, ended in begun)


# ----------------------------------------------------------------------------------------------------------------- end


def failing(steps: Sequence[Step], number: int, at: int) -> Logging:
    """A backend that has run with one op failing."""
    pause = jitter(number)

    def perform(n: int, step: Step, now: int) -> None:
        pause()
        if (now, n) == (at, number):
            raise OSError("the disk is gone")

    backend = Logging(steps, perform)
    run(steps, PASSES, backend)
    return backend


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failing_op_stops_all_and_is_named(policy: str) -> None:
    """Wherever it is: each other stream finishes what it is at, and begins at most what it has already looked up."""
    steps = plan_of(policy, True, "host").steps["decode"]
    rng = random.Random(policy)
    for number in rng.sample(range(len(steps)), 6):
        wraps = isinstance(op := steps[number].op, Load) and op.wraps
        at = rng.randrange(PASSES) - wraps
        backend = failing(steps, number, at)
        assert backend.failure is not None and backend.failure[0] == number
        assert isinstance(backend.failure[1], OSError)
        failed = next(ran for ran in backend.log if (ran.at, ran.number) == (at, number))
        later = Counter(ran.stream for ran in backend.log if ran.start > failed.end)
        assert op.stream not in later and max(later.values(), default=0) <= 1


def test_a_stream_that_fails_between_ops_holds_nobody_up() -> None:
    """As a GPU does in which something went wrong before: every further call fails."""
    steps = plan_of("joint", True, "host").steps["decode"]

    def note(ran: Ran) -> None:
        raise OSError("the device is lost")

    backend = ThreadBackend(compute_stream(steps), lambda number, step, at: None, note=note)
    run(steps, PASSES, backend)
    assert backend.failure is not None and str(backend.failure[1]) == "the device is lost"


def test_the_first_of_several_failures_is_kept() -> None:
    steps = plan_of("joint", False, "host").steps["decode"]
    first = next(n for n, s in enumerate(steps) if isinstance(s.op, Compute))

    def perform(number: int, step: Step, at: int) -> None:
        if isinstance(step.op, Compute):
            raise ValueError(number)

    backend = Logging(steps, perform)
    run(steps, PASSES, backend)
    assert backend.failure is not None and backend.failure[0] == first
    assert [ran.number for ran in backend.log if isinstance(steps[ran.number].op, Compute)] == [first]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_early_stop_ends_the_phase(policy: str) -> None:
    """As when every sequence has met its end token: what is issued does no further work, and nothing more is issued."""
    steps = plan_of(policy, True, "host").steps["decode"]
    sample = next(n for n, s in enumerate(steps) if isinstance(s.op, Compute) and s.op.fn == "sample")
    backend = Logging(steps, lambda number, step, at: (at, number) == (2, sample))
    run(steps, 1000, backend)
    assert backend.failure is None
    computed = [(r.at, r.number) for r in backend.log if r.stream == compute_stream(steps)]
    assert computed[-1] == (2, sample)
    assert sum(number == sample for _, number in computed) == 3


def test_a_phase_that_is_stopped_before_it_begins_does_nothing() -> None:
    steps = plan_of("flexgen", False, "host").steps["decode"]
    performed: list[int] = []
    backend = Logging(steps, lambda number, step, at: performed.append(number))
    backend.stop()
    run(steps, PASSES, backend)
    assert performed == [] and backend.log == []


def test_an_interrupt_of_the_issuing_thread_ends_the_others() -> None:
    steps = plan_of("joint", False, "host").steps["decode"]

    class Interrupted(Logging):
        def begin(self, at: int) -> bool:
            if at == 2:
                raise KeyboardInterrupt
            return super().begin(at)

    backend = Interrupted(steps, lambda number, step, at: time.sleep(1e-4))
    with no_thread_remains(), pytest.raises(KeyboardInterrupt), backend:
        execute(steps, PASSES, backend)
    assert all(ran.at <= 1 for ran in backend.log)
