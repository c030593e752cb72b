"""How long compiling takes and how much memory, how near to its bounds the plan is, how large it is, how long it takes to load and to
verify. Beside them what a million additions in Python take meanwhile, since machines, and the hours of a shared one, differ by a
factor of three.

Whole commands, as a user waits for them from the second one on (modules are compiled), each repeated. Neither the models nor the
machines are needed. Memory is that of the command and all its processes together, what they share counted once (the kernel's
proportional set size, sampled).

    python benchmarks/compile.py [--repeats 3] [--output FILE]        three to twelve minutes
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from klotski_compiler.output import write_whole  # noqa: E402
from klotski_compiler.plan import load  # noqa: E402
from klotski_compiler.verify import verify  # noqa: E402

SAMPLE_S = 0.05
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
PAIRS = (
    ("mixtral-8x7b", "rtx3090"),
    ("mixtral-8x22b", "rtx3090"),
    ("qwen3-30b-a3b", "t4"),
    ("qwen3-235b-a22b", "h800"),
    ("deepseek-v3", "h800"),
    ("gpt-oss-120b", "rtx3090"),
)


def main(argv: list[str] | None = None) -> int:
    """Prints a line per model and machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the table here, with command, date and machine")
    arguments = parser.parse_args(argv)
    head = ("compile s", "memory MB", "schedule +%", "class +%", "plan MB", "load s", "verify s", "adds ms")
    lines = [
        f"{date.today()}: python benchmarks/compile.py {shlex.join(argv if argv is not None else sys.argv[1:])}",
        f"{platform.machine()}, {os.cpu_count()} cores; medians of {arguments.repeats}",
        "",
        f"{'model':<18}{'machine':<10}" + "".join(f"{word:>13}" for word in head),
    ]
    print("\n".join(lines), flush=True)
    for model, machine in PAIRS:
        lines.append(line(model, machine, arguments.repeats))
        print(lines[-1], flush=True)
    lines += [
        "",
        "schedule: how much longer than this decision's bound; class: how much slower than the bound of every decision;",
        "load: read and check the digest; verify: parse every op and prove the plan, as klotski-run does before it runs one;",
        "adds: a million additions in Python, which says how fast the machine is at that time.",
    ]
    print("\n".join(lines[-4:]))
    if arguments.output:
        write_whole(arguments.output, "\n".join(lines) + "\n")
    return 0


def line(model: str, machine: str, repeats: int) -> str:
    """Compile, load, measure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "klotski_compiler.cli.compile", model, machine, "-o", str(path)]
        memory = peak_bytes(command)
        compiling, loading, verifying, adding = [], [], [], []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=COMPILED)
            compiling.append(time.perf_counter() - began)
            began = time.perf_counter()
            plan = load(path)
            loading.append(time.perf_counter() - began)
            began = time.perf_counter()
            verify(plan)
            verifying.append(time.perf_counter() - began)
            adding.append(timeit.timeit("total += 1", "total = 0", number=1_000_000))
        forecast, size = plan.forecast, path.stat().st_size
    numbers = (
        statistics.median(compiling),
        memory / 1e6,
        100 * (forecast.makespan_us / forecast.bound_us - 1),
        100 * forecast.gap,
        size / 1e6,
        statistics.median(loading),
        statistics.median(verifying),
        1e3 * statistics.median(adding),
    )
    return f"{model:<18}{machine:<10}" + "".join(f"{number:>13.2f}" for number in numbers)


def peak_bytes(command: list[str]) -> int:
    """The most memory that a command and its children take at once; in a run of its own, since looking costs time."""
    process, most = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=COMPILED), 0
    while process.poll() is None:
        most = max(most, sum(map(share_bytes, (process.pid, *children(process.pid)))))
        time.sleep(SAMPLE_S)
    return most


def children(pid: int) -> list[int]:
    """All processes that a process has started, and theirs."""
    try:
        own = [
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended meanwhile
        return []
    return [*own, *(other for child in own for other in children(child))]


def share_bytes(pid: int) -> int:
    """A process's memory, of what it shares its part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    raise SystemExit(main())
