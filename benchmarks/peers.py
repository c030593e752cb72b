"""Klotski and its peers side by side: one model, the same prompts, precision and memory cap, each at its best setting.

Peers: ``resident`` (transformers, all in memory, no cap: what enough memory would give), ``disk_offload`` (accelerate),
``device_map`` (transformers, modules that fit in memory and the others on disk), ``llama_cpp`` (a GGUF file of the same weights,
mapped; optional: ``pip install gguf llama-cpp-python``).

The cap is what a process may take beyond an idle one that has imported its libraries and does nothing: the cgroup of a run gets the
cap and what such a process was seen to take, page cache counted for both. So no one pays for Python, and everyone for cached pages.
Every run is a process of its own and starts with the model's files out of the page cache.A peer that cannot take 64 prompts at once
in the cap gets the least cap, in doubling steps, in which it can, and the sweep says what it does in the cap itself; one that is
killed may try again: at the edge of a cap that is chance. What a peer writes once beside the model (an offload folder, a GGUF file) is
made before and not timed; nor are Klotski's profile, measured anew for every run of ours, and its compilation. Routing is profiled on
other prompts than those of the runs.

Every run of ours stands in time between two peers, or beside one; and every peer beside one of ours at its own batch size, too.

Speeds end to end count from the first weight byte to the last token, imports apart. ``device_map`` rewrites fused experts whenever it
loads; so the ratio without loading is printed beside it. A peer takes a file batch by batch, each as long as the one before; with
``--peer-prompts`` it runs fewer of them, and its speed end to end is that of one loading and as many batches as the file has.

Not tried so far: cgroups of version 2.

    python benchmarks/peers.py                                        a small model

    python benchmarks/checkpoint.py big-model --shape qwen3-30b-a3b --layers 6
    python benchmarks/peers.py --model big-model --prompts 1024 --prompt-len 64 --gen-len 32 --cap 2GiB --sweep-gen-len 6 \\
        --peer-prompts 256 --json peers.json --output benchmarks/results/peers.txt

The last one takes hours; what is done is kept in peers.json and not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

from benchmarks import cage  # noqa: E402
from benchmarks.demo import command, weight_bytes  # noqa: E402
from benchmarks.limit import fastest, limit, readings  # noqa: E402
from benchmarks.peer_sweep import BETTER, CORES, FREE, PEERS, first, halvings, moves, prolonged, variants  # noqa: E402
from benchmarks.peer_tables import (  # noqa: E402
    LEGEND,
    OURS,
    Best,
    Report,
    Setting,
    Tried,
    after_loading,
    described,
    end_to_end,
    held_to,
    sweeps,
    tables,
)
from klotski_compiler.cli.compile import parse_size  # noqa: E402
from klotski_compiler.cost import Cost  # noqa: E402
from klotski_compiler.errors import ConfigError, ExecError, Infeasible  # noqa: E402
from klotski_compiler.hardware import read_hardware  # noqa: E402
from klotski_compiler.model import read_model  # noqa: E402
from klotski_compiler.outcome import outcome  # noqa: E402
from klotski_compiler.output import check_file, write_whole  # noqa: E402
from klotski_compiler.plan import load  # noqa: E402
from klotski_compiler.routing import read_routing  # noqa: E402

CAP_SHARE = 4
ROUTING_PROMPTS = 64
TRIES, SWEEP_TRIES = 4, 2  # of a run that is killed, at the edge of its cap
SMALL = ("--layers", 16, "--hidden", 1024)  # of the model that is made where none is named: 0.68 GB
PACKAGES = {"disk_offload": "accelerate", "device_map": "accelerate", "llama_cpp": "gguf llama-cpp-python"}


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint folder (default: a small one is made)")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where files go (default: demo)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument("--cap", type=parse_size, metavar="SIZE", help="of memory (default: a quarter of the weights)")
    parser.add_argument(
        "--peers", default=",".join(PEERS), metavar="LIST", help="some of %(default)s, or '': ours alone"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--sweep-prompts",
        type=int,
        default=0,
        metavar="N",
        help="at least so many prompts in a sweep's run (default: a batch)",
    )
    parser.add_argument(
        "--sweep-gen-len",
        type=int,
        metavar="N",
        help="new tokens of each prompt in a sweep's run; the time of all follows, since decode passes are alike (default: --gen-len)",
    )
    parser.add_argument(
        "--peer-prompts",
        type=int,
        default=0,
        metavar="N",
        help="whole batches of at least so many prompts in a peer's run (default: all prompts)",
    )
    parser.add_argument(
        "--disk-rate", type=parse_size, metavar="SIZE", help="slow the disk to so many bytes per second"
    )
    parser.add_argument(
        "--limit", type=float, default=1800, metavar="SECONDS", help="of one run (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep every run here; runs that are in it are not done again"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the tables here, with command, date and machine"
    )
    arguments = parser.parse_args(argv)
    typed = shlex.join(["python", "benchmarks/peers.py", *(sys.argv[1:] if argv is None else argv)])
    return outcome("peers", lambda: compare(arguments, typed))


def compare(asked: argparse.Namespace, typed: str) -> str:
    """Sweep, then run all in turn; the tables."""
    peers = [name for name in asked.peers.split(",") if name]
    if odd := [name for name in peers if name not in PEERS]:
        raise ConfigError("--peers", "", f"{odd[0]} is not one of {', '.join(PEERS)}")
    for option in ("prompts", "prompt_len", "gen_len", "repeats"):
        if getattr(asked, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", "", f"{getattr(asked, option)} is not a positive number")
    asked.sweep_gen_len = min(asked.gen_len, max(2, asked.sweep_gen_len or asked.gen_len))
    for option in ("json", "output"):
        if path := getattr(asked, option):
            check_file(f"--{option}", path)
    bench = Bench(asked)
    found = {name: bench.sweep(name) for name in peers}
    runs: dict[str, list[Report]] = {}
    for repeat in range(asked.repeats):
        for name, report in bench.repeat(repeat, found):
            runs.setdefault(name, []).append(report)
        text = "\n".join([*bench.head(typed), *tables(found, runs), *sweeps(found), *LEGEND]) + "\n"
        if asked.output:  # what is measured is shown, whatever happens next
            write_whole(asked.output, text)
    return text


class Bench:
    """A model, its prompts and a cap; runs one thing at a time and remembers it."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        asked.folder.mkdir(parents=True, exist_ok=True)
        self.source: Path = asked.model or asked.folder / "small-model"
        if asked.model is None:  # writes nothing where it is there
            self._do([sys.executable, ROOT / "benchmarks" / "checkpoint.py", self.source, *SMALL])
        if not (self.source / "config.json").exists():
            raise ConfigError("--model", "", f"{self.source} holds no config.json; name a checkpoint folder")
        self.weights = weight_bytes(self.source)
        self.cap: int = asked.cap or self.weights // CAP_SHARE
        self.work: Path = asked.folder / "peers"
        self.work.mkdir(exist_ok=True)
        self.model = bare(self.source, self.work / "model")
        self.prompts = self._prompts("prompts", asked.prompts, 0)
        self.disk = cage.Disk(self.work, asked.disk_rate) if asked.disk_rate else None
        self.no_cage = cage.unavailable(self.disk)
        if self.no_cage and asked.disk_rate:
            raise ConfigError("--disk-rate", "", f"needs cgroups, which cannot be had here ({self.no_cage})")
        sizes = ("prompts", "prompt_len", "gen_len", "sweep_gen_len", "disk_rate")
        about = {name: getattr(asked, name) for name in sizes} | {"cap": self.cap, "weights": self.weights}
        about |= {"model": self.source.name, "processor": processor(), "packages": packages()}
        self.record = Record(asked.json, about)
        self.idle: dict[str, int] = {}

    # -------------------------------------------------------------------------------------------------- what is run

    def sweep(self, peer: str) -> Best:
        """The fastest setting of a peer, and the least cap that it can run in."""
        if why := self._missing(peer):
            return Best({}, 1, [], why)
        tried: dict[str, Tried] = {}
        base = first(peer, self.asked.prompts)

        def speed(setting: Setting, factor: int) -> float:
            key = json.dumps([factor, setting], sort_keys=True)
            if key not in tried:
                count = self._whole_batches(self.asked.sweep_prompts or 1, setting["batch"])
                tried[key] = Tried(setting, factor, self.tries(peer, setting, factor, count, None, SWEEP_TRIES))
            return after_loading(tried[key].report)

        factor = 1
        while not (best := next((s for s in (base, *variants(peer, base)) if speed(s, factor)), None)):
            killed = any(one.report.get("killed") for one in tried.values() if one.factor == factor)
            if not killed or factor * self.cap > CAP_SHARE * self.weights or peer == FREE:
                return Best({}, factor, list(tried.values()), next(iter(tried.values())).report["failed"])
            factor *= 2
        for batch in halvings(base["batch"]) if factor > 1 else ():  # what it does in the cap itself
            if speed(base | {"batch": batch}, 1):
                break
        while better := next(
            (s for s in moves(peer, best, self.asked.prompts) if speed(s, factor) > BETTER * speed(best, factor)), None
        ):
            best = better
        return Best(best, factor, list(tried.values()))

    def repeat(self, number: int, found: dict[str, Best]) -> Iterator[tuple[str, Report]]:
        """(name, report) of each peer and of ours; a peer's report has that of ours next to it in time as ``beside``."""
        running = [(peer, best) for peer, best in found.items() if not best.why_not]
        for at in range(0, max(1, len(running)), 2):
            yield from self._turn(f"{number}.{at // 2}", number, running[at : at + 1], running[at + 1 : at + 2])

    def _turn(
        self, turn: str, number: int, before: list[tuple[str, Best]], after: list[tuple[str, Best]]
    ) -> Iterator[tuple[str, Report]]:
        """Ours after the disk, between two peers."""
        first = [pair for peer, best in before for pair in self._pair(turn, number, peer, best)]
        disk = self.record.once(f"repeat {turn}: independent reader", self._reader)
        ours = self.ours(turn, None, self.asked.prompts) | {"disk": disk}
        yield OURS, ours
        for name, report in [*first, *(pair for peer, best in after for pair in self._pair(turn, number, peer, best))]:
            yield name, report | {"beside": ours}

    def _pair(self, turn: str, number: int, peer: str, best: Best) -> Iterator[tuple[str, Report]]:
        """A peer at the fastest setting that is not killed too often, then ours at its batch size."""
        for setting in best.fastest:
            count = self._whole_batches(self.asked.peer_prompts or self.asked.prompts, setting["batch"])
            report = self.tries(peer, setting, best.factor, count, number, TRIES)
            if not report.get("killed"):
                break
        yield peer, report | {"shown": described(setting)}
        yield held_to(peer), self.ours(turn, setting["batch"], count)

    def _whole_batches(self, prompts: int, batch: int) -> int:
        """Prompts of as few batches as hold so many; there are no more than all."""
        most: int = self.asked.prompts
        return min(-(-prompts // batch) * batch, most)

    def tries(self, peer: str, setting: Setting, factor: int, count: int, repeat: int | None, most: int) -> Report:
        """A run of a peer that may be killed, and try again, so many times."""
        for again in range(most):
            report = self.run(peer, setting, factor, count, repeat, again)
            if not report.get("killed"):
                return report | ({"again": again} if again else {})
        return report

    def run(
        self, peer: str, setting: Setting, factor: int, count: int, repeat: int | None = None, again: int = 0
    ) -> Report:
        """One run of a peer, of a sweep where it belongs to no repeat, after so many that were killed; a failure is a report, too."""
        gen_len = self.asked.sweep_gen_len if repeat is None else self.asked.gen_len
        sizes = ["--prompts", count, "--gen-len", gen_len]
        options = [*sizes, "--setting", json.dumps(self._full(setting, factor))]
        words = [sys.executable, ROOT / "benchmarks" / "peer.py", peer, self.model, self.prompts, *options]
        limit = None if peer == FREE else self.cap * factor
        what = f"{peer}, {described(setting, factor)}, {count} prompts"
        name = "sweep" if repeat is None else f"repeat {repeat}" + ", again" * again

        def work() -> Report:
            report = self._measured(words, peer, limit)
            say_speed(prolonged(report, gen_len, self.asked.gen_len))
            return report

        return prolonged(self.record.once(f"{name}: {what}", work), gen_len, self.asked.gen_len)

    def ours(self, turn: str, batch: int | None, count: int) -> Report:
        """Compile and run Klotski, in the least cap in which it can; the machine is profiled once in a turn."""
        factor = 1
        while True:
            size = f", batch {batch}" if batch else ""
            what = f"repeat {turn}: {OURS}{size}, {count} prompts" + (f", cap x {factor}" if factor > 1 else "")
            report = self.record.once(what, partial(self._ours, turn, batch, count, factor))
            if not report.get("killed") or factor * self.cap > CAP_SHARE * self.weights:
                return report
            factor *= 2

    def _ours(self, turn: str, batch: int | None, count: int, factor: int) -> Report:
        report = self._compiled_and_run(turn, batch, count, factor)
        say_speed(report)
        return report

    def _compiled_and_run(self, turn: str, batch: int | None, count: int, factor: int) -> Report:
        asked, path, out = self.asked, self.work / "plan.json", self.work / "out.jsonl"
        sizes = ("--prompt-len", asked.prompt_len, "--gen-len", asked.gen_len, "--num-sequences", count)
        known = ("--routing", self._routing, "--memory", f"host={self.cap * factor}")
        held = ("--batch-size", batch, "--num-batches", 1) if batch else ()
        words = (*command("klotski_compiler.cli.compile"), self.model, self._profiled(turn), "-o", path)
        compiled = cage.run([*words, *sizes, *known, *held])
        if compiled.code:
            why = compiled.stderr.strip().replace("\n", "; ")
            return {"failed": why, "killed": compiled.code == Infeasible.exit_code}
        out.unlink(missing_ok=True)
        prompts = self._prompts(f"prompts-{count}", count, 0)
        files = ("--model", self.model, "--scratch", self._scratch, "--input", prompts, "--output", out)
        report = self._measured([*command("klotski_runtime.cli.run"), path, *files, "--json"], OURS, self.cap * factor)
        if "failed" in report:
            return report
        plan, spec = load(path), read_model(str(self.model))
        hardware, routing = read_hardware(str(self._profiled(turn))), read_routing(self._routing, spec)
        least, decision = limit(plan, Cost(spec, hardware, routing, plan.dtype)), plan.decision
        order = ", rolling" if decision.rolling else ""
        rows = [json.loads(line)["response"]["body"] for line in out.read_text().splitlines()]
        return report | {
            "first_tokens": [row["choices"][0]["token_ids"][0] for row in rows],
            "prompt_tokens": sum(row["usage"]["prompt_tokens"] for row in rows),
            "of_prompts": asked.prompts,
            "decode_pass_s": report["pass_us"].get("decode", {}).get("measured", 0) / 1e6,
            "shown": f"{decision.num_batches} x {decision.batch_size}{order}",
            "limit": least and least._asdict(),
            "factor": factor,
        }

    def _reader(self) -> Report:
        """The fastest of many ways to read the model's files."""
        found = fastest(readings(sorted(file.resolve() for file in self.model.glob("*.safetensors"))))
        say(f"  {found}")
        return {"bytes_per_s": found.bytes_per_s, "shown": str(found)}

    def _measured(self, words: list[Any], peer: str, limit: int | None) -> Report:
        """Run caged and cold; the JSON that it printed, and what the cage saw."""
        idle = self._idle(peer)
        files = [self.model, self.source, self._offload, self._gguf]
        cage.drop_page_cache(path for path in files if path.exists())
        self._scratch.mkdir(exist_ok=True)
        began = time.time()
        total = (limit + idle) if limit else machine_bytes()
        done = cage.run(words, None if self.no_cage else total, self.disk, self.asked.limit)
        shutil.rmtree(self._scratch)  # who is killed leaves files behind
        if done.code:
            return {"failed": done.why, "killed": done.killed, "wall_s": done.wall_s, "began": began}
        report: Report = json.loads(done.stdout.splitlines()[-1])
        if rows := report.pop("tokens", None):
            report |= {"first_tokens": [row[0] for row in rows], "of_prompts": self.asked.prompts}
        if report.get("decode_passes"):
            report["decode_pass_s"] = report["decode_s"] / report["decode_passes"]
        own = report["peak_rss_bytes"] - report["idle_rss_bytes"]
        peak = max(0, done.peak_bytes - idle) if done.peak_bytes else None
        return report | {"own_bytes": own, "peak_bytes": peak, "cap_bytes": limit, "began": began}

    # -------------------------------------------------------------------------------------------- what runs need

    def _idle(self, peer: str) -> int:
        """What a process takes that has imported a peer's libraries; the second of two, when they are in the page cache."""

        def measured() -> Report:
            words = [sys.executable, ROOT / "benchmarks" / "peer.py", peer, self.model, self.prompts, "--idle"]
            for _ in range(2):
                done = cage.run(words, None if self.no_cage else machine_bytes(), None, self.asked.limit)
                if done.code:
                    raise ExecError(f"{peer}: {done.why}")
            return {"idle_bytes": done.peak_bytes or json.loads(done.stdout)["idle_rss_bytes"]}

        self.idle[peer] = self.record.once(f"idle: {peer}", measured)["idle_bytes"]
        return self.idle[peer]

    def _missing(self, peer: str) -> str:
        """Why a peer cannot run at all; empty where it can and has its files."""
        setting = self._full({}, 1)
        needed = {"disk_offload": self._offload / "index.json", "llama_cpp": self._gguf}.get(peer)
        words = [sys.executable, ROOT / "benchmarks" / "peer.py", peer, self.model, self.prompts]
        ready = needed is None or needed.exists()
        if not ready:
            say(f"{peer}: preparing its files")
        done = cage.run([*words, "--setting", json.dumps(setting), "--idle" if ready else "--prepare"])
        if not done.code:
            return ""
        if "ModuleNotFoundError" in done.stderr and peer in PACKAGES:
            return f"not installed here; pip install {PACKAGES[peer]}"
        return done.why

    def _full(self, setting: Setting, factor: int) -> Setting:
        """A setting with what follows from it."""
        files = {"offload": str(self._offload), "gguf": str(self._gguf), "scratch": str(self._scratch)}
        share = {"cpu_bytes": int(setting["cpu_share"] * self.cap * factor)} if "cpu_share" in setting else {}
        return setting | files | share

    @cached_property
    def _digest(self) -> str:
        files = sorted(self.source.glob("*.safetensors"))
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:8]

    @property
    def _offload(self) -> Path:
        return self.work / f"{self.source.name}-{self._digest}.offload"

    @property
    def _scratch(self) -> Path:
        return self.work / "scratch"

    @property
    def _gguf(self) -> Path:
        return self.work / f"{self.source.name}-{self._digest}.gguf"

    @cached_property
    def _routing(self) -> Path:
        """Which experts prompts of this kind ask for: not those of the runs."""
        others = self._prompts("other-prompts", min(ROUTING_PROMPTS, self.asked.prompts), 1)
        path = self.work / "routing.json"
        say("profiling the routing of other prompts")
        self._do([*command("klotski_runtime.cli.profile"), "routing", self.model, "--input", others, "-o", path])
        return path

    def _profiled(self, turn: str) -> Path:
        """The machine, measured once in a turn, with the disk as slow as in the runs."""
        path = self.work / f"hw-{os.getpid()}-{turn}.json"
        if not path.exists():
            for old in self.work.glob("hw-*.json"):
                old.unlink()
            say("profiling the machine")
            self._do(
                [*command("klotski_runtime.cli.profile"), "-o", path, "--scratch", self.work, "--model", self.model]
            )
        return path

    def _prompts(self, name: str, count: int, seed: int) -> Path:
        """Random token ids: equal lengths, no padding."""
        vocabulary, ids = json.loads((self.model / "config.json").read_text())["vocab_size"], random.Random(seed)
        rows = ({"prompt": [ids.randrange(vocabulary) for _ in range(self.asked.prompt_len)]} for _ in range(count))
        path = self.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _do(self, words: list[Any]) -> None:
        """Run what is not measured. Raises ExecError."""
        done = cage.run(words, None, getattr(self, "disk", None))
        if done.code:
            raise ExecError(done.why)

    def head(self, typed: str) -> list[str]:
        """Command, date, machine, workload."""
        asked = self.asked
        for name in [key.removeprefix("idle: ") for key in self.record.done if key.startswith("idle: ")]:
            self._idle(name)
        rate = f"disk slowed to {asked.disk_rate / 1e6:.0f} MB/s" if asked.disk_rate else "disk as it is"
        cgroups = f"no cap on peers: no cgroup can be had here ({self.no_cage})" if self.no_cage else "in a cgroup each"
        idle = ", ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in self.idle.items())
        return [
            f"{date.today()}: {typed}",
            f"{CORES} cores of {processor()}, {machine_bytes() / 1e9:.0f} GB; {rate}; {packages()}",
            f"{self.source.name}: {self.weights / 1e9:.2f} GB of weights; {asked.prompts} prompts of {asked.prompt_len} tokens, "
            f"{asked.gen_len} new tokens each",
            f"cap {self.cap / 1e6:.0f} MB beyond an idle process (MB: {idle}); {cgroups}",
            "",
        ]


class Record:
    """Runs that are done, in a file if there is one. about: what they were done with."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about, self.done = path, about, dict[str, Report]()
        if path and path.exists():
            try:
                kept = json.loads(path.read_text())
                before, self.done = kept["about"], kept["runs"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    "--json", "", f"{path} does not hold runs of this command; name another file"
                ) from None
            if before != about:
                changed = ", ".join(name for name in about if before.get(name) != about[name])
                raise ConfigError("--json", "", f"{path} holds runs with another {changed}; name another file")

    def once(self, name: str, work: Callable[[], Report]) -> Report:
        """What a run gave; it is done now if it was not yet."""
        if name not in self.done:
            say(name)
            self.done[name] = work()
            if self.path:
                write_whole(self.path, json.dumps({"about": self.about, "runs": self.done}, indent=1) + "\n")
        return self.done[name]


def say_speed(report: Report) -> None:
    """Progress: how a run went."""
    speeds = (
        "" if "failed" in report else f"{end_to_end(report):.2f} tokens/s, {after_loading(report):.2f} after loading"
    )
    say(f"  {report.get('failed', speeds)}")


def bare(model: Path, folder: Path) -> Path:
    """The same weights without a tokenizer and without an end token: rows are token ids and run to their limit for everyone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in [*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    config.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def packages() -> str:
    """Versions of what runs, as far as it is installed."""
    found = list[str]()
    for name in ("torch", "transformers", "accelerate", "llama-cpp-python"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return " ".join(found)


def processor() -> str:
    """The processor's name, and which instructions it has for what everyone here computes in."""
    told = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    name = next((value.strip() for key, _, value in told if key.strip() == "model name"), platform.machine())
    features = next((value.split() for key, _, value in told if key.strip() in ("flags", "Features")), [])
    return f"{name} ({', '.join(sorted(f for f in features if 'bf16' in f)) or 'no bf16 instructions'})"


def machine_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what runs is ended, too
    raise SystemExit(main())
