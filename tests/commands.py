"""The commands as a user runs them: real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "klotski-compile": "klotski_compiler.cli.compile",
    "klotski-inspect": "klotski_compiler.cli.inspect",
    "klotski-profile": "klotski_runtime.cli.profile",
    "klotski-run": "klotski_runtime.cli.run",
}
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'runtime'}"}

Done = subprocess.CompletedProcess[str]


def words(command: str, *arguments: object) -> list[str]:
    """What to start for a command with its arguments."""
    return [sys.executable, "-m", MODULES[command], *map(str, arguments)]


def klotski(command: str, *arguments: object, **options: Any) -> Done:
    """Run a command to its end; ``options`` are those of subprocess.run."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300} | options
    return subprocess.run(words(command, *arguments), text=True, env=ENVIRONMENT, check=False, **options)


def refused(done: Done, code: int, *said: str) -> None:
    """The command ended with this exit code and a few lines that say all of ``said``, and printed nothing else."""
    assert done.returncode == code, done.stderr
    for text in said:
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    assert not done.stdout
