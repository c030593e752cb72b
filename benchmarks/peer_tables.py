"""What peers.py shows: rates of runs, ratios pair by pair, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.limit import Limit

OURS = "klotski"

Report = dict[str, Any]
Setting = dict[str, Any]

LEGEND = [
    "cap: what a process may take beyond an idle one, page cache included. batch: sequences in flight. prompts: that it ran.",
    "tokens/s: generated, end to end, of one loading and as many such runs as all prompts are. load s: before the first pass.",
    "prefill: prompt tokens/s. decode: generated tokens/s after each row's first; pass s: of one decode pass. In rolling order",
    "the two share passes. peak: beyond an idle process, page cache included;",
    "own: growth of the process's resident memory, pages of its libraries that it came to touch included. read: from the disk.",
    "same: share of prompts whose first token is ours; in bf16 a random model's two best logits are often closer than rounding.",
    "Ratios are of neighbours in time: median (least to most). no load: of the time after loading. equal batch: ours held to the",
    "peer's batch, one batch at a time, end to end. Beside the machine: the bytes that no decode pass avoids (limit.py) and what the",
    "best reader of the disk takes for them, what matmuls and cached keys and values take by the profile's rates and nothing beside",
    "them, the greater of which is the limit. In turn: the head after all layers, while which the disk can but fill the memory that is",
    "there, then the rest, either as before. The measured pass, and its share that each of them is. +-: how far forecasts of passes are",
    "above what was measured; the share of all passes in which neither the busiest stream works nor the plan waits (below 0: less).",
]


class Tried(NamedTuple):
    """A run of a sweep. factor: of the cap."""

    setting: Setting
    factor: int
    report: Report


class Best(NamedTuple):
    """What a sweep found. factor: of the cap. tried: in order. why_not: where nothing ran."""

    setting: Setting
    factor: int
    tried: list[Tried]
    why_not: str = ""

    @property
    def fastest(self) -> list[Setting]:
        """The best setting, then the others that ran in that cap, fastest first."""
        others = [one for one in self.tried if one.factor == self.factor and after_loading(one.report)]
        others.sort(key=lambda one: -after_loading(one.report))
        return [self.setting, *(one.setting for one in others if one.setting != self.setting)]


def end_to_end(report: Report) -> float:
    """Generated tokens per second from the first weight byte on; 0 for a run that failed. A run of a part of the prompts
    counts as often as there are such parts, and its loading once."""
    if "failed" in report:
        return 0.0
    parts = report["of_prompts"] / len(report["first_tokens"])
    return float(parts * report["generated_tokens"] / (report["wall_s"] + (parts - 1) * running_s(report)))


def running_s(report: Report) -> float:
    """Seconds of a run after loading."""
    return float(report["prefill_s"] + report["decode_s"])


def after_loading(report: Report) -> float:
    """The same from the first pass on."""
    if "failed" in report:
        return 0.0
    return float(report["generated_tokens"] / running_s(report))


def prefill(report: Report) -> float:
    """Prompt tokens per second of prefill."""
    return 0.0 if "failed" in report else float(report["prompt_tokens"] / report["prefill_s"])


def decode(report: Report) -> float:
    """Tokens per second of decode, which makes all but each row's first; 0 where there is none."""
    if "failed" in report or not report["decode_s"]:
        return 0.0
    return float((report["generated_tokens"] - len(report["first_tokens"])) / report["decode_s"])


def ratios(ours: list[Report], theirs: list[Report], rate: Callable[[Report], float]) -> list[float]:
    """Ours over theirs, pair by pair; a pair in which one failed is left out."""
    pairs = [(rate(our), rate(their)) for our, their in zip(ours, theirs, strict=True)]
    return [our / their for our, their in pairs if our and their]


def same_first(ours: list[Report], theirs: list[Report]) -> float | None:
    """Share of prompts with the same first token in the first pair that has both; the peer may have run fewer prompts."""
    for our, their in zip(ours, theirs, strict=True):
        if "failed" not in our and "failed" not in their:
            pairs = list(zip(our["first_tokens"], their["first_tokens"], strict=False))
            return float(sum(one == other for one, other in pairs) / len(pairs))
    return None


# ------------------------------------------------------------------------------------------------------------- tables

Value = Callable[[Report], float | None]
COLUMNS: dict[str, tuple[Value, int]] = {  # of a run, and decimal places
    "cap MB": (lambda run: run["cap_bytes"] and run["cap_bytes"] / 1e6, 0),
    "prompts": (lambda run: len(run["first_tokens"]), 0),
    "tokens/s": (end_to_end, 2),
    "load s": (lambda run: run["load_s"], 2),
    "prefill": (prefill, 1),
    "decode": (decode, 2),
    "pass s": (lambda run: run.get("decode_pass_s"), 2),
    "peak MB": (lambda run: run["peak_bytes"] and run["peak_bytes"] / 1e6, 0),
    "own MB": (lambda run: run["own_bytes"] / 1e6, 0),
    "read GB": (lambda run: run["storage_read_bytes"] / 1e9, 2),
}


def tables(found: dict[str, Best], runs: dict[str, list[Report]]) -> Iterator[str]:
    """Speeds, ratios, what did not run, and ours beside what the machine can do."""
    ours = runs[OURS]
    yield f"runs, {when(report for reports in runs.values() for report in reports)}:"
    yield f"{'medians':<26}{'runs':>6}" + "".join(f"{word:>9}" for word in [*COLUMNS, "same"]) + "  setting"
    for name, reports in runs.items():
        if good := [report for report in reports if "failed" not in report]:
            shown = good[-1]["shown"]
            beside = [report.get("beside", report) for report in reports]
            cells = [*numbers(good), cell(same_first(beside, reports), 2) if name != OURS else cell(None)]
            yield f"{name:<26}{len(good):>6}" + "".join(cells) + f"  {shown}"
    yield ""
    yield from over_theirs(found, runs)
    factors = {name: best.factor for name, best in found.items() if not best.why_not}
    factors |= {
        name: max(report.get("factor", 1) for report in reports) for name, reports in runs.items() if name not in found
    }
    for name, factor in factors.items():
        if factor > 1:
            few = [one for one in found[name].tried if one.factor == 1] if name in found else []
            here = max((after_loading(one.report) for one in few), default=0.0)
            alone = f"; in the cap it reaches {here:.2f} tokens/s after loading" if here else ""
            yield f"{name}: {factor} times the cap is the least, in doubling steps, in which it takes what others take{alone}"
    for name, best in found.items():
        if best.why_not:
            yield f"{name}: {best.why_not}"
    for name, reports in runs.items():
        for report in reports:
            if "failed" in report:
                yield f"{name}: a run failed: {report['failed']}"
            elif report.get("again"):
                yield f"{name}: was killed, and ran when tried again ({report['again'] + 1} tries)"
            if name in found and report.get("shown") not in (None, described(found[name].setting)):
                yield f"{name}: was killed at its best setting whenever it was tried; ran with {report['shown']}"
    yield from at_the_limit([report for report in ours if "failed" not in report])


def over_theirs(found: dict[str, Best], runs: dict[str, list[Report]]) -> Iterator[str]:
    """Ratios, pair by pair."""
    if not found:
        return
    yield f"{'ours over theirs':<16}" + "".join(
        f"{word:>24}" for word in ("end to end", "no load", "prefill", "decode", "equal batch")
    )
    for name, reports in runs.items():
        if name in found:
            beside = [report["beside"] for report in reports]
            all_pairs = [ratios(beside, reports, rate) for rate in (end_to_end, after_loading, prefill, decode)]
            held = runs[held_to(name)]
            yield f"{name:<16}" + "".join(
                f"{spread(pairs):>24}" for pairs in [*all_pairs, ratios(held, reports, end_to_end)]
            )
    yield ""


def at_the_limit(ours: list[Report]) -> Iterator[str]:
    """Of each run: the decode pass beside the least that it can take, forecasts, overhead."""
    yield ""
    words = ["least GB", "disk s", "computes s", "in turn s", "decode s", "of limit", "of in turn"]
    words += ["prefill +-", "decode +-", "overhead"]
    yield f"{'ours beside the machine':<26}" + "".join(f"{word:>11}" for word in words) + "  disk"
    for number, our in enumerate(ours, 1):
        cells = ["-"] * 7
        if our["limit"]:
            least, bytes_per_s, pass_s = Limit(**our["limit"]), our["disk"]["bytes_per_s"], our["decode_pass_s"]
            read_s, in_turn_s = least.read_bytes / bytes_per_s, least.one_after_the_other_s(bytes_per_s)
            seconds = [f"{value:.2f}" for value in (read_s, least.compute_s, in_turn_s, pass_s)]
            shares = [f"{value / pass_s:.1%}" for value in (max(read_s, least.compute_s), in_turn_s)]
            cells = [f"{least.read_bytes / 1e9:.2f}", *seconds, *shares]
        for phase in ("prefill", "decode"):
            us = our["pass_us"].get(phase, {"measured": 0})
            cells.append(f"{us['predicted'] / us['measured'] - 1:+.1%}" if us["measured"] else "-")
        cells.append(f"{overhead(our):.1%}")
        yield f"{f'run {number}':<26}" + "".join(f"{text:>11}" for text in cells) + f"  {our['disk']['shown']}"


def overhead(report: Report) -> float:
    """Share of the passes in which neither the busiest stream works nor the plan waits."""
    planned_idle_s = sum(report["predicted_bubble_s"].values())
    return float(1 - (max(report["busy_s"].values()) + planned_idle_s) / running_s(report))


def numbers(reports: list[Report]) -> Iterator[str]:
    """Median cells of a row."""

    def median(value: Value) -> float | None:
        values = [found for report in reports if (found := value(report)) is not None]
        return float(statistics.median(values)) if values else None

    for value, places in COLUMNS.values():
        yield cell(median(value), places)


def sweeps(found: dict[str, Best]) -> Iterator[str]:
    """Every setting that was tried."""
    yield ""
    if not found:
        return
    tried = [one.report for best in found.values() for one in best.tried]
    yield f"sweep, {when(tried)}: generated tokens/s after loading (one batch, or as many as hold --sweep-prompts; with"
    yield "--sweep-gen-len, as it follows from so many passes)"
    for name, best in found.items():
        for setting, factor, report in best.tried:
            mark = "*" if (setting, factor) == (best.setting, best.factor) else ""
            shown = report.get("failed") or f"{after_loading(report):.2f}{mark}"
            yield f"{name:<16}{described(setting, factor):<60}{shown}"
    yield ""


def described(setting: Setting, factor: int = 1) -> str:
    """A setting as text. factor: of the cap."""
    more = [f"cap x {factor}"] if factor > 1 else []
    return ", ".join([*(f"{name} {value}" for name, value in sorted(setting.items())), *more])


def held_to(peer: str) -> str:
    """Name of ours at a peer's batch size."""
    return f"{OURS}, as {peer}"


def when(reports: Iterable[Report]) -> str:
    """From when to when runs began, by this machine's clock."""
    began = [report["began"] for report in reports if "began" in report]
    ends = [time.strftime("%Y-%m-%d %H:%M", time.localtime(end(began))) for end in (min, max) if began]
    return " to ".join(dict.fromkeys(ends))


def cell(number: float | None, places: int = 0) -> str:
    """A number of a table, or a dash."""
    return f"{'-':>9}" if number is None else f"{number:>9.{places}f}"


def spread(values: list[float]) -> str:
    """Median and range."""
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
