"""Order inside a layer: the list schedule of one layer in a steady pass, and CP-SAT to prove it or to better it
(design 7.4).

Loads, then computes, are a flow shop of two machines with a limited buffer: a job (transfer unit) holds its slots
from the start of its load to the end of its compute. The window is periodic: were every layer like this one, a layer
would begin every T microseconds, so that what belongs to the next layer is a copy of this one's ops, T later.

    link    | units as slots come free, of this layer, then of the next ..      | modules, units of the next
    compute | attention, router (the front)   | units, residents between them   | front of the next
            0                                                                   T

What the window leaves out (slots of modules and of KV, the link from disk to host memory) could only make T larger,
so that the solver's bound on T holds for any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

DETERMINISTIC_S = 0.1  # CP-SAT's own measure of work: up to half a second
CONFLICTS = 60  # that it may meet: the work of some, ten milliseconds each, is not in that measure
HINT_CONFLICTS = (1, 10)  # after which it leaves the list schedule: soon to find a better one, late to prove it best
MOST_JOBS = 40  # of a window that CP-SAT is given
LAYERS = 12  # in a row, after which the list schedule has settled
SEED = 1


class Job(NamedTuple):
    """Experts that compute as one. loads: (microseconds, slots) of each of their loads, none of residents. late:
    bound after the router, so that no load begins before the front ends."""

    loads: tuple[tuple[int, int], ...]
    compute_us: int
    late: bool = False

    @property
    def slots(self) -> int:
        """Slots that it holds in all."""
        return sum(slots for _, slots in self.loads)


class Window(NamedTuple):
    """One layer of a steady pass, in microseconds. jobs: in compute order, which is also that of their loads. slots:
    of experts. front_us: attention and router. least_us: the layer if experts took the processor of the compute tier
    no time. after_us: its work after all experts. modules_us, kv_us: loads that must have come when the front begins,
    and when it ends."""

    jobs: tuple[Job, ...]
    slots: int
    front_us: int
    least_us: int = 0
    after_us: int = 0
    modules_us: tuple[int, ...] = ()
    kv_us: tuple[int, ...] = ()

    @property
    def work_us(self) -> int:
        """What the busiest stream has to do, and the longest chain without experts."""
        compute = self.front_us + sum(job.compute_us for job in self.jobs) + self.after_us
        loads = sum(us for job in self.jobs for us, _ in job.loads) + sum(self.modules_us) + sum(self.kv_us)
        return max(compute, loads, self.least_us)


class Listed(NamedTuple):
    """The list schedule of a window, settled. Starts count from that of the layer; per job, those of its loads and of
    its compute, then of the loads of modules and of KV."""

    period_us: int
    loads: tuple[tuple[int, ...], ...]
    computes: tuple[int, ...]
    modules: tuple[int, ...]
    kv: tuple[int, ...]


class Solved(NamedTuple):
    """jobs: in the best order found. period_us: what it then takes. bound_us: less than which no order takes."""

    jobs: tuple[int, ...]
    period_us: int
    bound_us: int


def listed(window: Window) -> Listed:
    """What policy ``joint`` makes of the jobs' order: a load goes as soon as the one before it has and its slots are
    free, at most one layer ahead; modules of the next layer go when this one begins, its KV after attention."""
    free = deque([(0, window.slots)])  # (from when, slots)
    coming = deque((layer, n) for layer in range(LAYERS) for n, job in enumerate(window.jobs) if job.loads)
    link, now, unused = 0, 0, window.slots
    began, loads, computes = list[int](), dict[tuple[int, int], list[int]](), dict[tuple[int, int], int]()
    arrived: dict[tuple[int, int], int] = {}
    modules: list[list[int]] = [[0] * len(window.modules_us)]
    kv: list[list[int]] = [[0] * len(window.kv_us)]

    def take(slots: int) -> int:
        ready = 0
        while slots:
            ready, there = free.popleft()
            if there > slots:
                free.appendleft((ready, there - slots))
            slots -= min(slots, there)
        return ready

    def send(times_us: Sequence[int]) -> list[int]:
        nonlocal link
        starts = []
        for us in times_us:
            starts.append(link)
            link += us
        return starts

    def advance(layer: int, bound: int) -> None:
        nonlocal link, unused
        while coming and coming[0][0] <= layer + 1:
            job = window.jobs[coming[0][1]]
            if job.slots > unused or (job.late and coming[0][0] > bound):
                return
            unused -= job.slots
            starts = loads[coming[0]] = list[int]()
            for us, slots in job.loads:
                starts.append(max(link, take(slots), now if job.late else 0))
                link = starts[-1] + us
            arrived[coming.popleft()] = link

    advance(-1, -1)
    for layer in range(LAYERS):
        now = max(now, *(s + us for s, us in zip(modules[layer], window.modules_us, strict=True)), 0)
        began.append(now)
        modules.append(send(window.modules_us))
        advance(layer, layer - 1)
        here = max((s + us for s, us in zip(kv[layer], window.kv_us, strict=True)), default=0)
        now = max(now + window.front_us, here)
        kv.append(send(window.kv_us))
        advance(layer, layer)
        for n, job in enumerate(window.jobs):
            computes[layer, n] = max(now, arrived.get((layer, n), 0))
            now = computes[layer, n] + job.compute_us
            if job.loads:
                free.append((now, job.slots))
                unused += job.slots
                advance(layer, layer)
        now = max(now + window.after_us, began[layer] + window.least_us)
    last, numbers = LAYERS - 1, range(len(window.jobs))
    return Listed(
        period_us=max(one - other for other, one in pairwise(began[LAYERS // 2 :])),
        loads=tuple(tuple(s - began[last] for s in loads.get((last, n), ())) for n in numbers),
        computes=tuple(computes[last, n] - began[last] for n in numbers),
        modules=tuple(s - began[last] for s in modules[last]),
        kv=tuple(s - began[last] for s in kv[last]),
    )


def solve(window: Window, known: Listed) -> Solved:
    """The best order that CP-SAT finds, starting from the list schedule, and its bound. One worker, a fixed seed and
    a deterministic limit: equal windows give equal orders."""
    from ortools.sat.python import cp_model  # takes a third of a second, and few windows need it

    numbers = range(len(window.jobs))
    best = Solved(tuple(numbers), known.period_us, window.work_us)
    for hint_conflicts in HINT_CONFLICTS:
        model = Periodic(cp_model.CpModel(), window, known)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers, solver.parameters.random_seed = 1, SEED
        solver.parameters.max_deterministic_time, solver.parameters.max_number_of_conflicts = DETERMINISTIC_S, CONFLICTS
        solver.parameters.hint_conflict_limit = hint_conflicts
        status = solver.solve(model.model)
        best = best._replace(bound_us=max(best.bound_us, round(solver.best_objective_bound)))
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) and solver.value(model.period) < best.period_us:
            order = sorted(numbers, key=lambda n: solver.value(model.computes[n]))
            best = best._replace(jobs=tuple(order), period_us=solver.value(model.period))
        if status == cp_model.OPTIMAL:
            break
    return best._replace(bound_us=min(best.bound_us, best.period_us))


class Periodic:
    """The window as constraints: starts in (-T, T), and those of the copies T later. T is at most the list
    schedule's."""

    def __init__(self, model: cp_model.CpModel, window: Window, known: Listed) -> None:
        """All of it, with the list schedule as a complete hint."""
        self.model, self.window, self.most = model, window, max(known.period_us, window.work_us)
        self.period = self._variable(window.work_us, self.most, known.period_us)
        self.computes: list[cp_model.IntVar] = []
        self.loads: list[list[cp_model.IntVar]] = []
        on_link: list[cp_model.IntervalVar] = []
        on_processor: list[cp_model.IntervalVar] = []
        held: list[tuple[cp_model.IntervalVar, int]] = []
        for job, hint, hints in zip(window.jobs, known.computes, known.loads, strict=True):
            compute = self._variable(window.front_us, self.most - job.compute_us - window.after_us, hint)
            model.add(compute + job.compute_us + window.after_us <= self.period)
            on_processor.append(model.new_fixed_size_interval_var(compute, job.compute_us, ""))
            starts = []
            for (us, slots), start_hint in zip(job.loads, hints, strict=True):
                start, copy = self._load(us, self.most, start_hint, on_link)
                starts.append(start)
                model.add(start + us <= compute)
                if job.late:
                    model.add(start >= window.front_us)
                for begin, periods in ((start, 0), (copy, 1)):
                    until = hint + job.compute_us + periods * self.most
                    end = self._variable(0, 2 * self.most, until)
                    size = self._variable(us + job.compute_us, 2 * self.most, hint + job.compute_us - start_hint)
                    model.add(end == compute + job.compute_us + periods * self.period)
                    held.append((model.new_interval_var(begin, size, end, ""), slots))
            self.computes.append(compute)
            self.loads.append(starts)
        for us, hint in zip(window.modules_us, known.modules, strict=True):
            self._load(us, 0, hint, on_link)
        for us, hint in zip(window.kv_us, known.kv, strict=True):
            self._load(us, window.front_us, hint, on_link)
        model.add_no_overlap(on_link)
        model.add_no_overlap(on_processor)
        model.add_cumulative([interval for interval, _ in held], [slots for _, slots in held], window.slots)
        for n, job in enumerate(window.jobs):
            for other in (m for m in range(n) if self._alike(window.jobs[m], job)):
                self._same_order(other, n, equal=window.jobs[other] == job)
        model.minimize(self.period)

    def _variable(self, least: int, most: int, hint: int) -> cp_model.IntVar:
        variable = self.model.new_int_var(least, most, "")
        self.model.add_hint(variable, hint)
        return variable

    def _load(
        self, us: int, latest: int, hint: int, on_link: list[cp_model.IntervalVar]
    ) -> tuple[cp_model.IntVar, cp_model.IntVar]:
        """Start of a load, at most a layer ahead and done by ``latest``, and of the next layer's."""
        start = self._variable(-self.most, latest - us, hint)
        copy = self._variable(0, self.most + latest, hint + self.most)
        self.model.add(copy == start + self.period)
        on_link.extend(self.model.new_fixed_size_interval_var(begin, us, "") for begin in (start, copy))
        return start, copy

    @staticmethod
    def _alike(one: Job, other: Job) -> bool:
        return one.loads == other.loads and one.late == other.late

    def _same_order(self, one: int, other: int, equal: bool) -> None:
        """Jobs with equal loads are loaded in the order in which they compute, which costs nothing: if they are not,
        exchange the loads. Equal ones keep their order."""
        if not equal and not self.loads[one]:
            return
        first = self.model.new_bool_var("")
        self.model.add_hint(first, 1)
        if equal:
            self.model.add(first == 1)
        pairs = [(self.computes[one], self.computes[other]), *zip(self.loads[one], self.loads[other], strict=True)]
        for a, b in pairs:
            self.model.add(a <= b).only_enforce_if(first)
            self.model.add(a >= b).only_enforce_if(~first)
