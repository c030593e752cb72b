"""Writes what a command leaves behind: a file whole or not at all, text on standard output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from klotski_compiler.errors import ConfigError, ExecError


def is_device(path: Path) -> bool:
    """Whether a path is there and not a plain file, as /dev/stdout is: such a thing cannot be replaced by a file."""
    return path.exists() and not path.is_file()


def check_file(option: str, path: Path, *named: object) -> None:
    """Refuse, before any work, what cannot be written after it, and what would take the place of another file that is ``named``. Raises
    ConfigError."""
    for other in named:
        if path == other or (path.is_file() and os.path.exists(str(other)) and path.samefile(str(other))):
            raise ConfigError(option, "", f"{path} has another use here, too; name another file")
    if path.is_dir() or not path.absolute().parent.is_dir() or path == Path("-"):
        raise ConfigError(option, "", f"{path} cannot be a file: give a file name in a folder that exists")


def write_whole(path: str | Path, text: str) -> None:
    """Write a file; where that fails, what was there before stays as it was. Raises OSError."""
    path = Path(path)
    if is_device(path):
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()  # a link stays a link
    partial = target.with_name(target.name + ".new")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_stdout(text: str) -> None:
    """Print and flush. Raises ExecError where standard output takes no more (a full disk, a closed pipe)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail again when Python exits, with a message of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ExecError(f"standard output cannot be written: {error.strerror}") from error
