"""What a machine with a GPU shows; ``gpu.sh`` says how to call it.

``run`` begins with the link's rate beside the profile's. Then tiny models of every family write their tokens with the GPU and with the
CPU in its place. Then models of published layer shapes run under every policy, with a GPU budget far below their weights: decode
passes beside what the link, at the rate measured in this run, takes for the bytes that they moved, and the whole beside the plan's bound.
Between them accelerate's own offloading and, where it is installed, DeepSpeed ZeRO-Inference, in the same memory.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.checkpoint import SHAPES, Shape, make_checkpoint, make_config
from klotski_compiler.errors import KlotskiError
from klotski_compiler.hardware import read_hardware
from klotski_compiler.output import write_whole
from klotski_compiler.plan import Plan, load
from klotski_compiler.policies import POLICIES

GIB = 1 << 30
MEMORY = Path("/dev/shm")  # the "disk" of these plans: what is measured here are the links of the GPU
GPU_SHARE = 0.32  # of the weights: the GPU's budget
NAMES = 29  # columns of a row's name


class Model(NamedTuple):
    """A random model of a published layer shape and its workload."""

    name: str
    shape: Shape
    prompts: int
    prompt_len: int
    gen_len: int
    policies: tuple[str, ...]
    until: float  # share of the time by which it is through


FIRST = ("joint", "klotski", "moe_gen", "flexgen", "moe_lightning", "accelerate", "zero_inference")
ORDER = (*FIRST, *sorted(set(POLICIES) - set(FIRST)))  # of runs: the last ones may find no time left
MODELS = (
    Model("mixtral-8x7b", replace(SHAPES["mixtral-8x7b"], layers=10), 512, 128, 16, ORDER, 0.65),
    Model("qwen3-30b-a3b", replace(SHAPES["qwen3-30b-a3b"], layers=10), 1024, 128, 16, ORDER, 1.0),
)
FAMILY_POLICIES = ("joint", "klotski")
PEERS = {"accelerate": "gpu_offload", "deepspeed": "zero_inference"}  # by the program, what peer.py calls it
PEER_BATCHES = (16, 64, 128)
PEER_GEN_LEN = 3
CALIBRATED = MODELS[-1]  # its ops are the smallest: what they cost beside their work shows most
CALIBRATION_TOKENS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the steps."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models",
        type=Path,
        default=MEMORY / "klotski-models",
        help="folder for 43 GB of random weights (default: in memory)",
    )
    parser.add_argument(
        "--model",
        choices=[model.name for model in MODELS],
        action="append",
        help="plans and runs of this one alone; may be given again",
    )
    steps = parser.add_subparsers(dest="step", required=True)
    profile = steps.add_parser("profile", help="measure this machine, its GPU included")
    profile.add_argument("-o", "--output", type=Path, default=Path("hw.json"))
    profile.add_argument(
        "--scratch", type=Path, default=MEMORY, help="folder of the disk to measure (default: in memory)"
    )
    calibrate = steps.add_parser("calibrate", help="correct a profile by what a run measured; needs the solvers, too")
    calibrate.add_argument("hardware", type=Path)
    calibrate.add_argument("-o", "--output", type=Path, default=Path("hw2.json"))
    plans = steps.add_parser("plans", help="compile what `run` runs; needs the solvers and no GPU")
    plans.add_argument("hardware", type=Path)
    plans.add_argument("-o", "--output", type=Path, default=Path("plans"))
    run = steps.add_parser("run", help="run the plans and compare")
    run.add_argument("plans", type=Path)
    run.add_argument("-o", "--output", type=Path, help="write the report here, too")
    run.add_argument("--seconds", type=float, default=420.0, help="begin nothing after so long (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.asked = [model for model in MODELS if not arguments.model or model.name in arguments.model]
    try:
        return {"profile": _profile, "calibrate": _calibrate, "plans": _plans, "run": _run}[arguments.step](arguments)
    except KlotskiError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return error.exit_code


def _profile(arguments: argparse.Namespace) -> int:
    from klotski_runtime.cli.profile import main as klotski_profile

    return klotski_profile(["--device", "cuda:0", "--scratch", str(arguments.scratch), "-o", str(arguments.output)])


def _calibrate(arguments: argparse.Namespace) -> int:
    """A few tokens of one model under joint, whose trace corrects the profile."""
    from klotski_runtime.cli.profile import main as klotski_profile

    model = CALIBRATED
    folder = make_checkpoint(arguments.models / model.name, model.shape)
    plan, trace = folder / "plan.json", folder / "trace.json"
    if not _compile(folder, arguments.hardware, plan, "joint", model, int(GPU_SHARE * weight_bytes(model.shape))):
        return 4
    options = ["--json", "--max-new-tokens", str(CALIBRATION_TOKENS), "--trace", str(trace)]
    found = attempt(klotski_run, [str(plan), "--model", str(folder), *options])
    if "failed" in found:
        print(found["failed"], file=sys.stderr)
        return 5
    for line in attempt(compared, plan, trace).get("lines", []):
        print(line)
    return klotski_profile(
        ["--from-trace", str(trace), str(plan), str(arguments.hardware), "-o", str(arguments.output)]
    )


# --------------------------------------------------------------------------------------------------------------- plans


def _plans(arguments: argparse.Namespace) -> int:
    hardware, out = read_hardware(arguments.hardware), arguments.output
    (out / "families").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.hardware, out / "hw.json")
    _family_plans(out / "families")
    jobs = [
        (model, policy, make_config(out / model.name, model.shape))
        for model in arguments.asked
        for policy in model.policies
    ]
    with ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1), mp_context=multiprocessing.get_context("fork")
    ) as pool:
        for line in pool.map(partial(_plan, hardware=arguments.hardware, out=out), *zip(*jobs, strict=True)):
            print(line, flush=True)
    print(f"for {hardware.description}: written to {out}")
    return 0


def _plan(model: Model, policy: str, config: Path, hardware: Path, out: Path) -> str:
    """Compiles one; returns what to say of it."""
    path, budget = out / model.name / f"{policy}.json", int(GPU_SHARE * weight_bytes(model.shape))
    began = time.perf_counter()
    done = _compile(config, hardware, path, policy, model, budget)
    # What takes the prompts in many small groups shows its speed in one.
    if done and (one := load(path).envelope.sequences) < model.prompts:
        done = _compile(config, hardware, path, policy, model._replace(prompts=one), budget)
    return f"{model.name}, {policy}: {time.perf_counter() - began:.1f} s{'' if done else ', FAILED'}"


def _compile(config: Path, hardware: Path, path: Path, policy: str, model: Model, budget: int) -> bool:
    from klotski_compiler.cli.compile import main as klotski_compile

    sizes = {"prompt-len": model.prompt_len, "gen-len": model.gen_len, "num-sequences": model.prompts}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    options += ["--policy", policy, "--memory", f"gpu={budget}", "-o", str(path)]
    with redirect_stdout(io.StringIO()):
        return klotski_compile([str(config), str(hardware), *options]) == 0


def _family_plans(out: Path) -> None:
    """Every weight in host memory, in pieces on its way, as the tests have it."""
    from transformers.utils.logging import disable_progress_bar

    from asked import decided
    from same import Resident
    from tiny import FAMILIES, make_checkpoint

    disable_progress_bar()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model = Resident(make_checkpoint(family, Path(folder)))
            for policy in FAMILY_POLICIES:
                decided(model, policy, gen_len=8, gpu=True, unit=2, head_pages=3).save(out / f"{family}.{policy}.json")


def weight_bytes(shape: Shape) -> int:
    """Bytes of a model's weights in bf16, norms left out."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + shape.experts * shape.hidden * (1 + 3 * shape.moe_intermediate)
    return 2 * (shape.layers * layer + 2 * shape.vocab * shape.hidden)


# ----------------------------------------------------------------------------------------------------------------- run


class Report:
    """Lines that are shown, and written to a file, as they come: what has been measured is not lost with what fails later."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._lines = path, list[str]()

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self._lines.append(line)
        if self._path:
            write_whole(self._path, "\n".join(self._lines) + "\n")


def _run(arguments: argparse.Namespace) -> int:
    began, say = time.perf_counter(), Report(arguments.output)
    hardware = read_hardware(arguments.plans / "hw.json")
    rates = attempt(link_rates)
    if "failed" in rates:
        print(f"gpu.sh: the link's rates could not be measured: {rates['failed']}", file=sys.stderr)
        return 4
    say(f"{date.today().isoformat()}, {rates['gpu']}, {platform.python_version()}, torch {rates['torch']}")
    say(f"command: benchmarks/gpu.sh run {arguments.plans.name}; plans for {hardware.description}")
    for link in ("host>gpu", "gpu>host"):
        planned = hardware.links[link].bandwidth_bytes_per_s
        say(
            f"{link}: {rates[link] / 1e9:.1f} GB/s now, {planned / 1e9:.1f} in the profile ({rates[link] / planned:.2f})"
        )
    say()
    say("Tokens with the GPU beside those with the CPU in its place, fp32, tiny models")
    for family in sorted({path.name.partition(".")[0] for path in (arguments.plans / "families").glob("*.json")}):
        found = attempt(rows_of_family, family, arguments.plans / "families")
        say(f"  {family:14}{found['failed'] if 'failed' in found else ', '.join(found['parts'])}")
    for model in arguments.asked:
        folder = make_checkpoint(arguments.models / model.name, model.shape)
        end = began + model.until * arguments.seconds
        try:
            _compare(model, folder, arguments.plans, rates["host>gpu"], end, say)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    say()
    say(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def _compare(model: Model, folder: Path, plans: Path, link_rate: float, end: float, say: Report) -> None:
    """The policies side by side on one model, and accelerate; nothing begins after ``end``."""
    total, budget = weight_bytes(model.shape), int(GPU_SHARE * weight_bytes(model.shape))
    say()
    work = f"{model.prompts} prompts x ({model.prompt_len} + {model.gen_len} tokens)"
    say(
        f"{model.name}, {model.shape.layers} layers: {total / 1e9:.1f} GB of weights, GPU {budget / 1e9:.1f} GB, {work}"
    )
    columns = f"{'tokens/s':>17}{'prefill pass s':>18}{'decode pass s':>18}{'link s':>9}{'of link':>9}{'of bound':>10}"
    say(f"{'':{NAMES}}{'size':>11}{columns}{'GPU':>14}{'host':>16}")
    columns = f"{'now / forecast':>17}{'now / forecast':>18}{'now / forecast':>18}{'':28}"
    say(f"{'':{NAMES}}{'':11}{columns}{'peak / cap GB':>14}{'peak / cap GB':>16}")
    speeds: dict[str, float] = {}
    here = partial(_policy, model=model, folder=folder, plans=plans, link_rate=link_rate, say=say)
    runs: list[tuple[str, Callable[[], float]]] = [(policy, partial(here, policy)) for policy in model.policies]
    peers = [
        (name := f"{program}'s own, batch {batch}", partial(_peer, name, program, batch, model, folder, say))
        for program in PEERS
        for batch in PEER_BATCHES
    ]
    runs[2:2] = peers  # whatever there is no time for is none of those that matter most
    for name, run in runs:
        if time.perf_counter() > end:
            say(f"{name:{NAMES}}no time left")
        elif speed := run():
            speeds[name] = speed
    if "joint" in speeds and len(speeds) > 1:
        ratios = [f"{name} {speeds['joint'] / speed:.2f}" for name, speed in speeds.items() if name != "joint"]
        say(f"joint x: {', '.join(ratios)}")


def _policy(policy: str, model: Model, folder: Path, plans: Path, link_rate: float, say: Report) -> float:
    """Tokens per second of a plan, 0 where it did not run."""
    path = plans / model.name / f"{policy}.json"
    if not path.exists():
        say(f"{policy:{NAMES}}no plan")
        return 0.0
    traced = policy in model.policies[:2]
    trace = ["--trace", str(folder / "trace.json")] if traced else []
    found = attempt(klotski_run, [str(path), "--model", str(folder), "--json", *trace])
    if "failed" in found:
        say(f"{policy:{NAMES}}failed: {found['failed']}")
        return 0.0
    say(_row(policy, load(path), found, link_rate, int(GPU_SHARE * weight_bytes(model.shape))))
    if traced:
        shown = attempt(compared, path, folder / "trace.json")
        for line in shown.get("lines", list(shown.values())):
            say(f"    {line}")
    return after_loading(found)


def _peer(name: str, program: str, batch: int, model: Model, folder: Path, say: Report) -> float:
    """Tokens per second of a program's own offloading, 0 where it did not run; where memory is short, with no module kept on the GPU."""
    budget = int(GPU_SHARE * weight_bytes(model.shape))
    keeps = sorted({_room(model, batch, budget), 0}, reverse=True) if program == "accelerate" else [0]
    for kept_bytes in keeps:
        found = attempt(peer, program, folder, model, batch, budget, kept_bytes)
        if "OutOfMemory" not in found.get("failed", ""):
            break
    if "failed" in found:
        missing = "ModuleNotFoundError" in found["failed"]
        say(f"{name:{NAMES}}{f'{program} is not installed here' if missing else found['failed']}")
        return 0.0
    passes = f"prefill {found['prefill_s']:.2f} s, decode pass {found['pass_s']:.3f} s"
    peak = f"GPU {found['peak_gpu_bytes'] / 1e9:.2f} GB"
    kept = f", {kept_bytes / 1e9:.1f} GB of modules kept" if kept_bytes else ""
    say(f"{name:{NAMES}}{found['tokens_per_s']:,.1f} tokens/s, {passes}, {peak}{kept}")
    return float(found["tokens_per_s"])


def _row(policy: str, plan: Plan, found: dict[str, Any], link_rate: float, budget: int) -> str:
    """What a policy's run took. of link: what the link takes for the bytes that the plan moves in a decode pass, over that pass. of bound:
    tokens/s from the first weight byte on, over what no schedule of the plan's class exceeds, whatever it moves."""
    size = f"{plan.decision.num_batches} x {plan.decision.batch_size}"
    passes = {phase: us["measured"] / 1e6 for phase, us in found["pass_us"].items()}
    planned = {phase: us["predicted"] / 1e6 for phase, us in found["pass_us"].items()}
    phase = "decode" if passes.get("decode") else "prefill"
    link_s = found["pass_bytes"][phase].get("host>gpu", 0) / link_rate
    spans = [f"{passes.get(p, 0):.3f} / {planned.get(p, 0):.3f}" for p in ("prefill", "decode")]
    forecast = 1e6 * plan.workload.num_sequences * plan.workload.gen_len / plan.forecast.makespan_us
    speed = f"{after_loading(found):,.0f} / {forecast:,.0f}"
    gpu = f"{found['peak_gpu_bytes'] / 1e9:.2f} / {budget / 1e9:.2f}"
    host = f"{(found['peak_rss_bytes'] - found['idle_rss_bytes']) / 1e9:.1f} / {plan.budgets['host'] / 1e9:.1f}"
    share = link_s / passes[phase] if passes[phase] else 0.0
    whole = found["generated_tokens"] / (found["load_s"] + found["prefill_s"] + found["decode_s"])
    bound = whole / plan.forecast.bound_tokens_per_s
    row = f"{spans[0]:>18}{spans[1]:>18}{link_s:>9.3f}{share:>9.1%}{bound:>10.1%}"
    return f"{policy:{NAMES}}{size:>11}{speed:>17}{row}{gpu:>14}{host:>16}"


def after_loading(found: dict[str, Any]) -> float:
    """Generated tokens per second, the first load of resident weights left out."""
    return float(found["generated_tokens"] / (found["prefill_s"] + found["decode_s"]))


# ---------------------------------------------------------------------------------------- each in a process of its own


def attempt(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``work`` returns in a fork of this process, which has imported torch once and holds no GPU memory; ``failed`` says why, where
    it does not."""
    import klotski_runtime.engine  # noqa: F401

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except Exception as error:  # of any kind: the others are still worth running
            return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def klotski_run(arguments: list[str]) -> dict[str, Any]:
    """The command's report."""
    from klotski_runtime.cli.run import main as command

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command(arguments)
    return {"failed": err.getvalue().strip()} if code else dict(json.loads(out.getvalue()))


def compared(plan: Path, trace: Path) -> dict[str, Any]:
    """``lines``: where the time went beyond the plan."""
    from klotski_compiler.cli.inspect import main as command

    out = io.StringIO()
    with redirect_stdout(out):
        command([str(plan), "--compare", str(trace)])
    return {"lines": out.getvalue().splitlines()}


def link_rates() -> dict[str, Any]:
    """Bytes per second of large copies between locked host memory and the GPU, each way: the median of nine."""
    import torch

    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    rates: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for link, target, source in (("host>gpu", gpu, host), ("gpu>host", host, gpu)):
        taken = []
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        rates[link] = GIB / statistics.median(taken[1:])
    return rates


def rows_of_family(family: str, folder: Path) -> dict[str, Any]:
    """``parts``: of each plan for a tiny model of that family, how many rows are equal."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from klotski_runtime.skeleton import HOST
    from same import PROMPTS, Resident, run
    from tiny import make_checkpoint

    disable_progress_bar()
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Resident(make_checkpoint(family, Path(scratch) / "model"))
        for path in sorted(folder.glob(f"{family}.*.json")):
            plan, devices = load(path), (torch.device("cuda:0"), HOST)
            there, here = (run(plan, model, Path(scratch), device=device).rows for device in devices)
            equal = sum(one.tokens == other.tokens for one, other in zip(there, here, strict=True))
            parts.append(f"{path.stem.partition('.')[2]} {equal} of {len(PROMPTS)}")
    return {"parts": parts}


def peer(program: str, folder: Path, model: Model, batch: int, budget: int, kept_bytes: int) -> dict[str, Any]:
    """transformers with a device map of accelerate's, or DeepSpeed ZeRO-Inference, in the same GPU memory, of which modules of
    ``kept_bytes`` stay there; the rate of a whole workload from one prefill and a few passes."""
    import torch

    from benchmarks.peer import PEERS as programs
    from benchmarks.peer import generate

    imports, load_weights, _ = programs[PEERS[program]]
    choose = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.shape.vocab, (batch, model.prompt_len), generator=choose).tolist()
    setting = {"batch": batch, "cap_bytes": budget, "gpu_bytes": kept_bytes}
    asked = argparse.Namespace(setting=setting, gen_len=PEER_GEN_LEN)
    imports(folder)
    found = generate(lambda: load_weights(folder, setting, PEER_GEN_LEN), prompts, asked)
    pass_s = found["decode_s"] / found["decode_passes"]
    return {
        "tokens_per_s": batch * model.gen_len / (found["prefill_s"] + (model.gen_len - 1) * pass_s),
        "prefill_s": found["prefill_s"],
        "pass_s": pass_s,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved(),
    }


def _room(model: Model, batch: int, budget: int) -> int:
    """What of a budget modules may keep that stay on the GPU: not the largest one that comes and goes, nor the KV cache, nor a quarter
    for activations."""
    shape = model.shape
    largest = 2 * shape.experts * 3 * shape.hidden * shape.moe_intermediate
    kv = 4 * batch * (model.prompt_len + model.gen_len) * shape.layers * shape.kv_heads * shape.head_dim
    return max(0, budget - largest - kv - budget // 4)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
