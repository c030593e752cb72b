"""What a run took: passes, busy streams, bubbles, and the log of every op where a trace is wanted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from klotski_compiler.plan import Bind, Compute, Step
from klotski_runtime.streams import Ran


@dataclass(slots=True)
class Measured:
    """What a run took. busy_s: per stream, loading apart. log: per phase run (group, phase, finished ops), where kept."""

    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes_us: dict[str, list[float]] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    bubble_s: float = 0.0
    log: list[tuple[int, str, list[Ran]]] = field(default_factory=list)

    def pass_us(self, phase: str) -> float:
        """Median time of a pass, 0 where there was none."""
        return statistics.median(self.passes_us[phase]) if self.passes_us.get(phase) else 0.0

    def add(self, phase: str, watch: Watch) -> None:
        """Take in what was watched of one run of a phase."""
        starts = [watch.began, *watch.samples[:-1]]
        spans = [1e6 * (end - start) for start, end in zip(starts, watch.samples, strict=False)]
        self.passes_us.setdefault(phase, []).extend(spans)
        for stream, busy in watch.busy_s.items():
            self.busy_s[stream] = self.busy_s.get(stream, 0.0) + busy
        self.bubble_s += watch.ended - watch.began - watch.computed_s


class Watch:
    """The times of one run of a phase, added up as ops end; ``note`` is called from every stream's thread.

    busy_s: per stream. computed_s: of it, what the compute stream did not spend on transfers. samples: when each pass ended.
    """

    def __init__(self, steps: Sequence[Step], compute: str, keep_log: bool) -> None:
        self._steps, self._compute, self._keep_log = steps, compute, keep_log
        self.began = self.ended = time.perf_counter()
        self.busy_s: dict[str, float] = {}
        self.computed_s = 0.0
        self.samples: list[float] = []
        self.log: list[Ran] = []

    def note(self, ran: Ran) -> None:
        """An op has ended."""
        op, took = self._steps[ran.number].op, ran.end - ran.start
        self.busy_s[ran.stream] = self.busy_s.get(ran.stream, 0.0) + took
        self.ended = max(self.ended, ran.end)
        if ran.stream == self._compute and isinstance(op, Compute | Bind):
            self.computed_s += took
            if isinstance(op, Compute) and op.fn == "sample":
                self.samples.append(ran.end)
        if self._keep_log:
            self.log.append(ran)
