"""The simulated backend: a stream is a float clock, an event is a time, and a phase becomes pass times, busy times and bubbles.

Without shared bandwidth, FIFO streams and backward waits make the clock recurrence exact: no event queue is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from klotski_compiler.execute import execute
from klotski_compiler.ops import Bind, Compute, Step

SIMULATED_PASSES = 4  # the pipeline has settled well before
NEGLIGIBLE = 0.005  # growth of the op times over a phase, as a share of a pass, that need not be simulated
SAG = 0.005  # how far a phase's time may lie above its true one, as a share of it, in each span of positions
MOST_SPANS = 8

Times = list[tuple[float, float]]


class Clock:
    """A stream in virtual time."""

    def __init__(self, duration_us: Sequence[float], log: dict[tuple[int, int], tuple[float, float]]) -> None:
        self.now, self.duration_us, self.log = 0.0, duration_us, log

    def wait(self, event: float) -> None:
        self.now = max(self.now, event)

    def run(self, number: int, step: Step, at: int) -> None:
        start, self.now = self.now, self.now + self.duration_us[number]
        self.log[at, number] = (start, self.now)

    def record(self) -> float:
        return self.now


class Simulation:
    """A backend that only keeps time. ``log``: (pass, op) -> (start, end) in microseconds."""

    def __init__(self, duration_us: Sequence[float]) -> None:
        self.duration_us = duration_us
        self.streams: dict[str, Clock] = {}
        self.log: dict[tuple[int, int], tuple[float, float]] = {}

    def stream(self, name: str) -> Clock:
        if name not in self.streams:
            self.streams[name] = Clock(self.duration_us, self.log)
        return self.streams[name]

    def begin(self, at: int) -> bool:
        return True


@dataclass(slots=True)
class PhaseTimes:
    """What one phase takes. total_us: all passes. pass_us: a settled one, in the middle. steps: its ops' (start, end) from its first op,
    none where it was timed quickly. busy_us: per stream, over all passes. bubble_us: idle compute time over all passes, by cause.
    slowest_us: the longest settled pass of those that were simulated, the last one among them.
    """

    total_us: float
    pass_us: float
    steps: Times
    busy_us: dict[str, float] = field(default_factory=dict)
    bubble_us: dict[str, float] = field(default_factory=dict)
    slowest_us: float = 0.0

    def __post_init__(self) -> None:
        self.slowest_us = max(self.slowest_us, self.pass_us)


def simulate(
    steps: Sequence[Step], passes: int, compute: str, durations: Callable[[float], Sequence[float]], quick: bool = False
) -> PhaseTimes:
    """Time a phase of ``passes`` passes. ``durations(x)``: op times at the fraction x of the way from first to last pass.

    Op times are affine in the position and pass time is their maximum along paths, hence convex: the mean over a span of positions
    is at most the mean of its ends. Spans are halved until that is close enough, each point settled by replaying it. ``quick``:
    three points, no times of ops, no bubbles.
    """
    middle = _settled(steps, passes, compute, durations(0.5), quick)
    if passes == 1 or sum(durations(1.0)) - sum(durations(0.0)) < NEGLIGIBLE * middle.pass_us:
        return middle
    first, last = (_settled(steps, passes, compute, durations(x), quick) for x in (0.0, 1.0))
    runs = list[tuple[float, PhaseTimes]]()

    def cover(span: tuple[float, float], left: PhaseTimes, centre: PhaseTimes, right: PhaseTimes) -> None:
        """Weigh the runs of a span, or halve it."""
        low, high = span
        sag = (left.total_us + right.total_us) / 2 - centre.total_us
        if quick or sag * (high - low) < SAG * middle.total_us or high - low <= 1 / MOST_SPANS:
            runs.extend((weight * (high - low), run) for weight, run in ((0.25, left), (0.5, centre), (0.25, right)))
            return
        at = (low + high) / 2
        for (a, b), one, other in (((low, at), left, centre), ((at, high), centre, right)):
            cover((a, b), one, _settled(steps, passes, compute, durations((a + b) / 2), quick), other)

    cover((0.0, 1.0), first, middle, last)
    return PhaseTimes(
        total_us=sum(weight * run.total_us for weight, run in runs),
        pass_us=middle.pass_us,
        steps=middle.steps,
        busy_us=weighted_sum((weight, run.busy_us) for weight, run in runs),
        bubble_us=weighted_sum((weight, run.bubble_us) for weight, run in runs),
        slowest_us=max(first.pass_us, last.pass_us),
    )


def weighted_sum(parts: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Of tables of numbers by name."""
    total = defaultdict[str, float](float)
    for weight, table in parts:
        for name, value in table.items():
            total[name] += weight * value
    return dict(total)


def rolled(
    steps: Sequence[Step],
    rounds: Rounds,
    passes: int,
    compute: str,
    durations: Callable[[int], Sequence[float]],
    quick: bool,
) -> PhaseTimes:
    """Time a phase that comes once in every round of a workload, with as many batches as are there (rolling order). ``durations(k)``:
    op times in round k. Between the rounds that are simulated, times are interpolated. ``passes`` 0: the phase is all that a round has,
    so that one pass per round follows the other without a drain."""
    runs = {k: _settled(steps, passes or rounds.count, compute, durations(k), quick) for k in rounds.samples(quick)}
    weights, steady = rounds.weights(runs), runs[rounds.full]
    total = sum(weight * (runs[k].total_us if passes else runs[k].pass_us) for k, weight in weights.items())
    if not passes:  # what comes before the first pass and after the last
        total += max(0.0, steady.total_us - rounds.count * steady.pass_us)
    shares = {k: weight if passes else weight / rounds.count for k, weight in weights.items()}
    return PhaseTimes(
        total_us=total,
        pass_us=steady.pass_us,
        steps=steady.steps,
        busy_us=weighted_sum((share, runs[k].busy_us) for k, share in shares.items()),
        bubble_us=weighted_sum((share, runs[k].bubble_us) for k, share in shares.items()),
        slowest_us=max(run.pass_us for run in runs.values()),
    )


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rounds of a workload in rolling order: in round k the k-th cohort joins; ``ages`` of them are there at most.

    cohorts: of the whole workload.
    """

    cohorts: int
    ages: int

    @property
    def count(self) -> int:
        """Until the last cohort is done."""
        return self.cohorts + self.ages - 1

    @property
    def full(self) -> int:
        """A round in which a cohort joins and as many are there as ever do while one joins."""
        return self.cohorts - 1

    def there(self, k: int) -> range:
        """Ages, youngest first, that are there in round k."""
        return range(max(0, k - self.cohorts + 1), min(self.ages, k + 1))

    def samples(self, quick: bool = False) -> list[int]:
        """Rounds between which times are about linear: cohorts come one by one, then go one by one; the first without a newcomer
        is a step. Marks are closest where few are there, since one more then touches most experts that no other does."""
        rising, last = min(self.cohorts, self.ages) - 1, self.count - 1
        marks = {0, rising, self.full, min(self.cohorts, last), last}
        falling = max(0, last - self.cohorts)
        few = set() if quick else {n for part in (8, 4, 2) for n in (rising // part, last - falling // part)}
        return sorted(marks | few)

    def weights(self, sampled: Collection[int]) -> dict[int, float]:
        """How many rounds each sampled one stands for: every round is interpolated between the two beside it."""
        marks = sorted(sampled)
        found = dict.fromkeys(marks, 0.0)
        for low, high in pairwise(marks):
            inner = high - low - 1
            found[low] += inner / 2
            found[high] += inner / 2
        return {k: weight + 1 for k, weight in found.items()}


def _settled(
    steps: Sequence[Step], passes: int, compute: str, duration_us: Sequence[float], quick: bool = False
) -> PhaseTimes:
    shown = min(passes, SIMULATED_PASSES)
    clock = Simulation(duration_us)
    execute(steps, shown, clock)
    # A pass ends with its last compute op: loads for the next one go on beside it.
    last = max((n for n, s in enumerate(steps) if s.op.stream == compute), default=len(steps) - 1)
    ends = [clock.log[at, last][1] for at in range(shown)]
    middle = max(0, shown - 2)  # the last pass opens no other, so the one before it is a settled one
    settled = ends[middle] - ends[middle - 1] if middle else ends[0]
    work = defaultdict[str, float](float)
    for step, us in zip(steps, duration_us, strict=True):
        work[step.op.stream] += us
    if passes > shown:  # no stream can do a pass's work in less, however long the lead that it began with
        settled = max(settled, *work.values())
    total = max([end for _, end in clock.log.values()]) + (passes - shown) * settled
    busy = {stream: us * passes for stream, us in work.items()}
    if quick:
        return PhaseTimes(total, settled, [], busy)
    begin = min(clock.log[middle, n][0] for n in range(len(steps)) if (middle, n) in clock.log)
    spans = [clock.log.get((middle, n), (begin, begin)) for n in range(len(steps))]
    times = [(start - begin, end - begin) for start, end in spans]
    idle = bubbles(steps, clock.log, shown, compute)
    bubble = {cause: us * passes / shown for cause, us in idle.items()}
    return PhaseTimes(total, settled, times, busy, bubble)


def bubbles(
    steps: Sequence[Step], log: dict[tuple[int, int], tuple[float, float]], passes: int, compute: str
) -> dict[str, float]:
    """Idle time of the compute stream by what it waits for: ``inter_layer`` (attention, router, dense weights),
    ``intra_layer`` (experts), ``kv``, ``end_of_pass`` (head, embedding). A synchronous copy is idle time of its own kind."""
    idle = defaultdict[str, float](float)
    now = 0.0
    copying = 0.0
    for at in range(passes):
        for number, step in enumerate(steps):
            if step.op.stream != compute or (at, number) not in log:
                continue
            start, end = log[at, number]
            copying += start - now
            if isinstance(step.op, Compute | Bind):
                idle[cause_of(step)] += copying
                copying = 0.0
            else:
                copying += end - start
            now = end
    return dict(idle)


def cause_of(step: Step) -> str:
    """The kind of bubble that ends when this op starts."""
    op = step.op
    if isinstance(op, Compute):
        if op.fn in ("experts", "add"):
            return "intra_layer"
        spilled = op.fn == "attention" and len(op.tensors) > 1  # KV
        if spilled or op.fn in ("attend", "output"):
            return "kv"
        if op.layer < 0:
            return "end_of_pass"
    return "inter_layer"
