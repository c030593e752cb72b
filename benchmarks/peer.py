"""One run of one peer: a model, a file of prompts of equal length, greedy tokens by a plain loop; prints one JSON object.

``peers.py`` starts it, each time in a process of its own. Prefill and decode are timed apart; ``load_s`` is all that comes before them
and after the imports. ``--idle`` imports what the peer imports and stops: what that takes is no peer's doing.

    python benchmarks/peer.py disk_offload MODEL prompts.jsonl --setting '{"batch": 8, "experts": "eager"}'
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

from klotski_runtime.memory import PeakRss, rss_bytes, storage_read_bytes  # noqa: E402

Setting = dict[str, Any]
Rows = list[list[int]]
CONTEXT_STEP = 256  # llama.cpp rounds the context of a sequence up to a multiple of this
LLAMA_MMAP = 1  # LLAMA_LOAD_MODE_MMAP of llama.h


class Batch(Protocol):
    """Prompts in flight."""

    def prefill(self) -> list[int]:
        """The first token of each."""

    def decode(self, tokens: list[int]) -> list[int]:
        """The next token of each."""


Start = Callable[[Rows], Batch]


def main(argv: list[str] | None = None) -> int:
    """Runs one peer."""
    parser = argparse.ArgumentParser(description="Run one peer once; peers.py compares them.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("input", type=Path, help='JSON lines {"prompt": [token ids]}, all of one length')
    parser.add_argument("--prompts", type=int, default=sys.maxsize, help="so many, from the first on")
    parser.add_argument("--gen-len", type=int, default=16)
    parser.add_argument("--setting", type=json.loads, default={}, help="as JSON: batch, threads and what the peer has")
    parser.add_argument("--idle", action="store_true", help="import and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="write the files that the peer needs beside the model, once"
    )
    arguments = parser.parse_args(argv)
    imports, load, prepare = PEERS[arguments.peer]
    imports(arguments.model)
    idle = rss_bytes()
    if arguments.prepare:
        prepare(arguments.model, arguments.setting)
        return 0
    if arguments.idle:
        print(json.dumps({"idle_rss_bytes": idle}))
        return 0
    lines = arguments.input.read_text().splitlines()[: arguments.prompts]
    prompts = [json.loads(line)["prompt"] for line in lines]
    read = storage_read_bytes()
    with PeakRss() as peak:
        report = generate(lambda: load(arguments.model, arguments.setting, arguments.gen_len), prompts, arguments)
    report |= {
        "idle_rss_bytes": idle,
        "peak_rss_bytes": peak.nbytes,
        "storage_read_bytes": storage_read_bytes() - read,
    }
    print(json.dumps(report))
    return 0


def generate(load: Callable[[], Start], prompts: Rows, asked: argparse.Namespace) -> dict[str, Any]:
    """Load, then all prompts, batch by batch: seconds and tokens."""
    began = time.perf_counter()
    start = load()
    loaded = time.perf_counter()
    prefill_s = decode_s = 0.0
    passes, rows = 0, []
    for first in range(0, len(prompts), asked.setting["batch"]):
        at = time.perf_counter()
        batch = start(prompts[first : first + asked.setting["batch"]])
        tokens = batch.prefill()
        prefill_s += time.perf_counter() - at
        steps = [tokens]
        at = time.perf_counter()
        for _ in range(asked.gen_len - 1):
            tokens = batch.decode(tokens)
            steps.append(tokens)
        decode_s += time.perf_counter() - at
        passes += 1
        rows += [list(row) for row in zip(*steps, strict=True)]
        del batch  # its cache goes before the next one comes
    return {
        "load_s": loaded - began,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "prefill_passes": passes,
        "decode_passes": passes * (asked.gen_len - 1),
        "wall_s": time.perf_counter() - began,
        "prompt_tokens": sum(map(len, prompts)),
        "generated_tokens": sum(map(len, rows)),
        "tokens": rows,
    }


# ------------------------------------------------------------------------------------------------------ transformers


def import_deepspeed(model: Path) -> None:
    """The same and DeepSpeed."""
    import_torch(model)
    import deepspeed  # noqa: F401


def import_torch(model: Path) -> None:
    """What every run with transformers imports, the model's own module too."""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def import_klotski(model: Path) -> None:
    """What klotski-run imports before it counts what an idle process takes."""
    from klotski_runtime.memory import tune_libraries

    tune_libraries()
    from klotski_runtime import engine  # noqa: F401
    from klotski_runtime.skeleton import import_model

    import_model(model)


def import_accelerate(model: Path) -> None:
    """The same and accelerate."""
    import_torch(model)
    import accelerate  # noqa: F401


def load_resident(model: Path, setting: Setting, gen_len: int) -> Start:
    """All weights in memory."""
    return started(from_pretrained(model, setting), setting)


def load_disk_offload(model: Path, setting: Setting, gen_len: int) -> Start:
    """``accelerate.disk_offload``: each module's weights are read when it runs, from the folder that was prepared."""
    import accelerate
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, experts_implementation=setting.get("experts")
        )
    found = accelerate.disk_offload(empty, setting["offload"], execution_device=torch.device("cpu"))
    return started(found, setting)


def prepare_disk_offload(model: Path, setting: Setting) -> None:
    """The folder that ``disk_offload`` would write at its first call."""
    from accelerate.utils import offload_state_dict

    offload_state_dict(setting["offload"], from_pretrained(model, setting).state_dict())


def load_device_map(model: Path, setting: Setting, gen_len: int) -> Start:
    """``from_pretrained`` with a device map: modules of ``cpu_bytes`` stay in memory, the others are read when they run."""
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    places = placed(empty, setting["cpu_bytes"])
    folder = tempfile.TemporaryDirectory(dir=setting["scratch"])
    found = from_pretrained(model, setting, device_map=places, offload_folder=folder.name)
    found.offload_folder_kept = folder  # lives as long as the model
    return started(found, setting)


def load_gpu_offload(model: Path, setting: Setting, gen_len: int) -> Start:
    """The same on a GPU that torch lets this process have ``cap_bytes`` of: modules of ``gpu_bytes`` stay there, the others are copied
    from host memory when they run."""
    import accelerate
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _, total = torch.cuda.mem_get_info(0)
    torch.cuda.set_per_process_memory_fraction(setting["cap_bytes"] / total, 0)
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return started(from_pretrained(model, setting, device_map=placed(empty, setting["gpu_bytes"], 0, "cpu")), setting)


def load_zero_inference(model: Path, setting: Setting, gen_len: int) -> Start:
    """DeepSpeed ZeRO-Inference, set as its own example sets it: weights in locked host memory, a layer's are fetched while the one before
    computes. cap_bytes: of a GPU's memory that torch lets this process have."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoConfig
    from transformers.integrations import HfDeepSpeedConfig

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update(alone)
    if "cap_bytes" in setting:
        _, total = torch.cuda.mem_get_info(0)
        torch.cuda.set_per_process_memory_fraction(setting["cap_bytes"] / total, 0)
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    hidden = config.hidden_size
    asked = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
            "stage3_prefetch_bucket_size": 2 * hidden * hidden,
            "stage3_param_persistence_threshold": hidden,
            "stage3_max_live_parameters": 2 * hidden * hidden,
        },
    }
    partitioned = HfDeepSpeedConfig(asked)  # as long as it lives, weights are partitioned as they are read
    engine, *_ = deepspeed.initialize(model=from_pretrained(model, setting), config=asked)
    del partitioned
    return started(engine.module, setting, get_accelerator().current_device_name())


def free_port() -> str:
    """A port on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def placed(model: Any, room_bytes: int, near: str | int = "cpu", far: str = "disk") -> dict[str, str | int]:
    """A device map: small modules first, then whatever still fits. Every module is read once in a pass, so only bytes count."""
    sizes = {}
    for name, module in units(model):
        sizes[name] = sum(tensor.nbytes for tensor in module.parameters())
    places: dict[str, str | int] = {}
    for name, nbytes in sorted(sizes.items(), key=lambda item: item[1]):
        places[name] = near if nbytes <= room_bytes else far
        room_bytes -= nbytes if nbytes <= room_bytes else 0
    return places


def units(module: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a device map places: the parts of decoder layers, and what stands beside the layers."""
    import torch

    for part, child in module.named_children():
        path = f"{name}.{part}" if name else part
        layered = any(isinstance(inner, torch.nn.ModuleList) for inner in child.modules())
        if layered or isinstance(module, torch.nn.ModuleList):
            yield from units(child, path)
        else:
            yield path, child


def from_pretrained(model: Path, setting: Setting, **options: Any) -> Any:
    """The model in the checkpoint's own precision."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model,
        dtype="auto",
        local_files_only=True,
        **({"experts_implementation": setting["experts"]} if "experts" in setting else {}),
        **options,
    )


def started(model: Any, setting: Setting, device: str = "cpu") -> Start:
    """How a loaded model takes a batch. device: where token ids go."""
    import torch

    torch.set_num_threads(setting.get("threads") or os.cpu_count() or 1)
    model.eval()
    return lambda prompts: TorchBatch(model, prompts, device)


class TorchBatch:
    """Forward calls with transformers' own cache."""

    def __init__(self, model: Any, prompts: Rows, device: str) -> None:
        from transformers import DynamicCache

        self.model, self.prompts, self.device = model, prompts, device
        # transformers 5.24 calls it so, and warns of the old name.
        name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        self.cache = {name: DynamicCache(config=model.config), "use_cache": True}

    def prefill(self) -> list[int]:
        return self._forward(self.prompts)

    def decode(self, tokens: list[int]) -> list[int]:
        return self._forward([[token] for token in tokens])

    def _forward(self, ids: Rows) -> list[int]:
        import torch

        with torch.inference_mode():
            found = self.model(torch.tensor(ids, device=self.device), **self.cache, logits_to_keep=1)
            tokens: list[int] = found.logits[:, -1].argmax(-1).tolist()
        return tokens


# -------------------------------------------------------------------------------------------------------- llama.cpp


def import_llama(model: Path) -> None:
    """llama.cpp's bindings."""
    import llama_cpp  # noqa: F401


def prepare_llama(model: Path, setting: Setting) -> None:
    """The GGUF file."""
    from benchmarks.gguf_file import write_gguf

    write_gguf(model, Path(setting["gguf"]))


def load_llama(model: Path, setting: Setting, gen_len: int) -> Start:
    """The GGUF file mapped: its pages come from the disk when they are touched, and the kernel drops them for others."""
    import llama_cpp as llama

    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 0
    if hasattr(options, "load_mode"):
        options.load_mode = LLAMA_MMAP
    else:  # before 0.3.3x
        options.use_mmap = True
    loaded = llama.llama_model_load_from_file(str(setting["gguf"]).encode(), options)
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot load {setting['gguf']}")
    start = LlamaStart(llama, loaded, setting, gen_len)
    start.quiet = quiet  # the library calls it as long as it lives
    return start


class LlamaStart:
    """How a loaded model takes a batch: one context of so many sequences, emptied between batches."""

    def __init__(self, llama: Any, model: Any, setting: Setting, gen_len: int) -> None:
        self.llama, self.model, self.setting, self.gen_len = llama, model, setting, gen_len
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.context: Any = None
        self.quiet: Any = None

    def __call__(self, prompts: Rows) -> LlamaBatch:
        if self.context is None:
            self.context = self._new(len(prompts[0]))
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        return LlamaBatch(self, prompts)

    def _new(self, prompt_len: int) -> Any:
        setting, llama = self.setting, self.llama
        sequences, positions = setting["batch"], prompt_len + self.gen_len
        threads = setting.get("threads") or os.cpu_count() or 1
        unified = bool(setting.get("unified"))
        options = llama.llama_context_default_params()
        options.n_seq_max = sequences
        options.n_ctx = sequences * (positions if unified else -(-positions // CONTEXT_STEP) * CONTEXT_STEP)
        options.n_batch = options.n_ubatch = max(setting["ubatch"], sequences, prompt_len)
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = unified
        options.no_perf = True
        if hasattr(options, "n_outputs_max"):  # else room for the logits of every token of a micro-batch is set aside
            options.n_outputs_max = sequences
        context = llama.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError(f"llama.cpp refuses a context of {sequences} sequences of {positions} tokens")
        return context


class LlamaBatch:
    """Calls of ``llama_decode`` with tokens of many sequences."""

    def __init__(self, start: LlamaStart, prompts: Rows) -> None:
        self.start, self.prompts, self.position = start, prompts, 0
        self.whole = max(1, start.setting["ubatch"] // len(prompts[0]))  # prompts of one call

    def prefill(self) -> list[int]:
        out: list[int] = []
        for first in range(0, len(self.prompts), self.whole):
            out += self._decode(first, self.prompts[first : first + self.whole])
        self.position = len(self.prompts[0])
        return out

    def decode(self, tokens: list[int]) -> list[int]:
        out = self._decode(0, [[token] for token in tokens])
        self.position += 1
        return out

    def _decode(self, first: int, rows: Rows) -> list[int]:
        """The likeliest token after each row; rows belong to sequences ``first`` and on."""
        import numpy as np

        llama, context = self.start.llama, self.start.context
        width = len(rows[0])
        batch = llama.llama_batch_init(len(rows) * width, 0, 1)
        batch.n_tokens = len(rows) * width
        for place in range(batch.n_tokens):
            row, column = divmod(place, width)
            batch.token[place] = rows[row][column]
            batch.pos[place] = self.position + column
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, first + row
            batch.logits[place] = column == width - 1
        code = llama.llama_decode(context, batch)
        llama.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode ended with {code}")
        tokens = []
        for row in range(len(rows)):
            logits = llama.llama_get_logits_ith(context, row * width + width - 1)
            tokens.append(int(np.ctypeslib.as_array(logits, (self.start.vocabulary,)).argmax()))
        return tokens


def nothing(model: Path, setting: Setting) -> None:
    """Most peers need no files of their own."""


def elsewhere(model: Path, setting: Setting, gen_len: int) -> Start:
    """Klotski has a command of its own; here it only says what it takes when idle."""
    raise SystemExit("peer: klotski-run runs Klotski; here is only --idle")


Import = Callable[[Path], None]
Load = Callable[[Path, Setting, int], Start]
Prepare = Callable[[Path, Setting], None]
PEERS: dict[str, tuple[Import, Load, Prepare]] = {
    "klotski": (import_klotski, elsewhere, nothing),
    "resident": (import_torch, load_resident, nothing),
    "disk_offload": (import_accelerate, load_disk_offload, prepare_disk_offload),
    "device_map": (import_accelerate, load_device_map, nothing),
    "gpu_offload": (import_accelerate, load_gpu_offload, nothing),
    "zero_inference": (import_deepspeed, load_zero_inference, nothing),
    "llama_cpp": (import_llama, load_llama, prepare_llama),
}


if __name__ == "__main__":
    raise SystemExit(main())
