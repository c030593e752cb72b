"""What a run took: passes, busy streams, bubbles, and the log of every op where a trace is wanted."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from klotski_compiler.ops import Bind, Compute, Step
from klotski_compiler.simulate import cause_of
from klotski_runtime.memory import page_faults
from klotski_runtime.streams import Ran


@dataclass(slots=True)
class Measured:
    """What a run took. passes_us, passes_faults: per phase, of each pass, its time and its page faults. link_bytes: per phase and link.
    busy_s: per stream, loading apart. bubble_s: idle compute time by cause, as the forecast splits it (``simulate.bubbles``). log: per
    phase run (group, phase, finished ops), where kept."""

    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    passes_us: dict[str, list[float]] = field(default_factory=dict)
    passes_faults: dict[str, list[int]] = field(default_factory=dict)
    link_bytes: dict[str, Counter[str]] = field(default_factory=dict)
    busy_s: dict[str, float] = field(default_factory=dict)
    bubble_s: dict[str, float] = field(default_factory=dict)
    log: list[tuple[int, str, list[Ran]]] = field(default_factory=list)

    def pass_us(self, phase: str) -> float:
        """Median time of a pass, 0 where there was none."""
        return statistics.median(self.passes_us[phase]) if self.passes_us.get(phase) else 0.0

    def pass_faults(self, phase: str) -> float:
        """Median number of page faults of a pass: none once all memory has been touched."""
        return statistics.median(self.passes_faults[phase]) if self.passes_faults.get(phase) else 0.0

    def pass_bytes(self, phase: str) -> dict[str, float]:
        """Bytes that a pass moved over each link, on average."""
        passes = len(self.passes_us.get(phase, ()))
        return {link: nbytes / passes for link, nbytes in self.link_bytes[phase].items()} if passes else {}

    def add(self, phase: str, watch: Watch, moved: Mapping[str, int]) -> None:
        """Take in what was watched of one run of a phase, and the bytes that it moved over each link."""
        self.link_bytes.setdefault(phase, Counter()).update(moved)
        starts = [watch.began, *watch.samples[:-1]]
        spans = [1e6 * (end - start) for start, end in zip(starts, watch.samples, strict=False)]
        self.passes_us.setdefault(phase, []).extend(spans)
        self.passes_faults.setdefault(phase, []).extend(after - before for before, after in pairwise(watch.faults))
        for stream, busy in watch.busy_s.items():
            self.busy_s[stream] = self.busy_s.get(stream, 0.0) + busy
        for cause, idle in watch.bubble_s.items():
            self.bubble_s[cause] = self.bubble_s.get(cause, 0.0) + idle


class Watch:
    """The times of one run of a phase, added up as ops end; ``note`` is called from every stream's thread.

    busy_s: per stream. bubble_s: idle time of the compute stream, copies that block it included, by what it waited for. samples: when
    each pass ended. faults: of the process, before the first pass and when each ended.
    """

    def __init__(self, steps: Sequence[Step], compute: str, keep_log: bool) -> None:
        self._steps, self._compute, self._keep_log = steps, compute, keep_log
        self.began = time.perf_counter()
        self.busy_s: dict[str, float] = {}
        self.bubble_s: dict[str, float] = {}
        self._computed = self.began
        self.samples: list[float] = []
        self.faults = [page_faults()]
        self.log: list[Ran] = []

    def note(self, ran: Ran) -> None:
        """An op has ended."""
        step, took = self._steps[ran.number], ran.end - ran.start
        op = step.op
        self.busy_s[ran.stream] = self.busy_s.get(ran.stream, 0.0) + took
        if ran.stream == self._compute and isinstance(op, Compute | Bind):
            cause = cause_of(step)
            self.bubble_s[cause] = self.bubble_s.get(cause, 0.0) + max(0.0, ran.start - self._computed)
            self._computed = ran.end
            if isinstance(op, Compute) and op.fn == "sample":
                self.samples.append(ran.end)
                self.faults.append(page_faults())
        if self._keep_log:
            self.log.append(ran)
