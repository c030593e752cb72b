"""The package's C code, compiled for the processor that is there when it is first needed, and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

from klotski_compiler.errors import ConfigError
from klotski_compiler.kernel_facts import BLOCK_COLUMNS, BLOCK_ROWS, INNERS, PANEL_ROWS
from klotski_runtime.structs import LONG, POINTER

SOURCE = Path(__file__).parent / "csrc" / "kernels.c"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
WORK = ("matmul", "greatest", "experts", "attend", "norm", "rotate")
"""Functions of a job, each for bf16 and for fp16."""


@cache
def kernel_library() -> ctypes.CDLL:
    """``csrc/kernels.c``, whose functions let go of Python's lock while they run.

    Raises ConfigError where it cannot be compiled.
    """
    return compile_library(SOURCE)


def can_compile() -> bool:
    """Whether the package's C code is there for this processor."""
    try:
        return bool(kernel_library())
    except ConfigError:
        return False


def compile_library(source: Path, *flags: str) -> ctypes.CDLL:
    """The compiled ``source``, from the cache if it is there. flags: beside those that it always gets.

    Raises ConfigError where no C compiler is found, or it fails.
    """
    compiler = os.environ.get("CC") or "cc"
    sizes = {
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
        "PANEL_ROWS": PANEL_ROWS,
        "INNERS": INNERS,
    }
    command = [compiler, *FLAGS, *(f"-D{name}={value}" for name, value in sizes.items()), *flags]
    built = _folder() / f"{source.stem}-{_digest(source, command)}.so"
    if not built.exists():
        _compile([*command, str(source)], built)
    library = ctypes.CDLL(str(built))
    for name in WORK:
        for function in (getattr(library, f"{name}_bf16"), getattr(library, f"{name}_fp16")):
            function.argtypes, function.restype = (POINTER, POINTER, LONG), None
    library.team_open.argtypes, library.team_open.restype = (LONG, POINTER), POINTER
    library.team_run.argtypes, library.team_run.restype = (POINTER, POINTER, POINTER, POINTER, LONG), None
    library.team_close.argtypes, library.team_close.restype = (POINTER,), None
    return library


def _digest(source: Path, command: list[str]) -> str:
    """Of all that decides what is compiled: a home folder may be shared by machines whose processors differ."""
    told = Path("/proc/cpuinfo").read_text().splitlines()
    features = sorted({line for line in told if line.startswith(("flags", "Features", "model name"))})
    texts = [path.read_text() for path in sorted(source.parent.glob("*.[ch]"))]
    parts = [*texts, *command, platform.machine(), *features]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _folder() -> Path:
    """Where compiled code is kept; a temporary folder where the user's cannot be written."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klotski"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="klotski-"))


def _compile(command: list[str], built: Path) -> None:
    # Processes that start together compile each for itself, and the last one's file stays.
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        fresh = Path(folder) / built.name
        try:
            subprocess.run([*command, "-o", str(fresh)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise ConfigError(
                "machine",
                "C compiler",
                f"{command[0]} does not compile {built.stem.split('-')[0]}.c; install gcc: {said}",
            ) from error
        fresh.replace(built)


class Team:
    """Threads of C code that do a job together: who calls ``run``, one at a time, and others, from the first call on."""

    def __init__(self, library: ctypes.CDLL, scratch: Sequence[torch.Tensor]) -> None:
        """scratch: memory of each thread, the caller's first."""
        self._library, self._scratch = library, scratch
        self._handle: int | None = None

    def run(self, work: Any, job: ctypes.Structure, widest: int, alone: bool = False) -> None:
        """Do ``job`` with the C function ``work``; alone: without the others."""
        first, address = self._scratch[0].data_ptr(), ctypes.addressof(job)
        if alone or len(self._scratch) == 1:
            work(address, first, widest)
            return
        if self._handle is None:
            others = [part.data_ptr() for part in self._scratch[1:]]
            self._handle = self._library.team_open(len(others), (POINTER * len(others))(*others))
            if not self._handle:
                raise MemoryError(f"no {len(others)} more threads")
            # Threads that work while the interpreter ends, end with the process.
            finalize(self, _close, self._library, self._handle, self._scratch).atexit = False
        self._library.team_run(self._handle, ctypes.cast(work, POINTER), address, first, widest)


def _close(library: ctypes.CDLL, handle: int, scratch: Sequence[torch.Tensor]) -> None:
    """End a team's threads, until when their memory is kept."""
    library.team_close(handle)
