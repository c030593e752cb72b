"""Writes the results of a batch as JSON lines in OpenAI's shape: what is finished is safe at once, the whole is in input order.

Rows go to ``OUTPUT.partial`` as they finish; at the end the whole file is written and takes OUTPUT's place in one step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from klotski_compiler.errors import ConfigError, ExecError
from klotski_compiler.output import is_device, write_stdout
from klotski_runtime.prompts import Request, Tokenizer


class Results:
    """The rows of one run. ``output``: a file, or None for standard output, which gets all rows at ``finish`` or ``keep``."""

    def __init__(self, output: Path | None, expected: int) -> None:
        """expected: how many rows there will be. Raises ConfigError where the output cannot be a file."""
        output = output.resolve() if output and output.is_symlink() else output  # a link stays a link
        self._output, self._expected = output, expected
        self._lines: dict[int, bytes] = {}
        self._partial = None if output is None or is_device(output) else output.with_name(output.name + ".partial")
        if self._partial is not None:
            self._file = self._open(self._partial)

    def add(self, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Save finished rows, each with its place in the input. Raises ExecError where that fails; earlier rows stay saved."""
        fresh = {place: json.dumps(row, ensure_ascii=False).encode() + b"\n" for place, row in rows}
        if self._partial is not None:
            begin = os.fstat(self._file).st_size
            try:
                _write(self._file, b"".join(fresh.values()))
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, begin)  # no half row
                raise ExecError(f"{self._partial} cannot be written: {error.strerror}") from error
        self._lines |= fresh

    def finish(self) -> None:
        """Write all rows in input order. Raises ExecError where that fails."""
        text = b"".join(self._lines[place] for place in sorted(self._lines))
        if self._partial is None:
            self._print(text)
            return
        assert self._output is not None
        whole = self._output.with_name(self._output.name + ".ordered")
        try:
            file = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write(file, text)
                os.fsync(file)
            finally:
                os.close(file)
            whole.replace(self._output)
        except OSError as error:
            whole.unlink(missing_ok=True)
            why = f"{self._output} cannot be written: {error.strerror}; all rows are saved in {self._partial}"
            raise ExecError(why) from error
        self._partial.unlink()
        os.close(self._file)

    def keep(self) -> str:
        """Leave what is finished where it can be found after a failure; returns a line that says where."""
        finished = sum(json.loads(line)["error"] is None for line in self._saved())
        count = f"{finished:,} of {self._expected} rows are finished"
        if not finished:  # refusals alone are not worth keeping: the next run finds them again
            if self._partial is not None:
                self._partial.unlink()
            return count
        if self._partial is not None:
            return f"{count} and saved in {self._partial}"
        where = self._output or "standard output"
        try:
            self.finish()
        except ExecError:
            return f"{where} took no rows"
        return f"{count} and in {where}"

    def _saved(self) -> list[bytes]:
        """The rows that are safe. The file knows best: an interrupt may come between a write and what follows it."""
        if self._partial is None:
            return list(self._lines.values())
        whole = self._partial.read_bytes().rpartition(b"\n")
        os.truncate(self._partial, len(whole[0] + whole[1]))  # no half row
        return whole[0].splitlines()

    def _open(self, partial: Path) -> int:
        try:
            if partial.exists() and partial.stat().st_size:
                why = "holds the finished rows of a run that was interrupted; move or remove it"
                raise ConfigError(partial, "", why)
            return os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        except OSError as error:
            why = f"cannot be written ({error.strerror}); name another file"
            raise ConfigError("--output", "", f"{self._output} {why}") from None

    def _print(self, text: bytes) -> None:
        if self._output is None:
            write_stdout(text.decode())
            return
        try:
            with self._output.open("wb", buffering=0) as device:
                _write(device.fileno(), text)
        except OSError as error:
            raise ExecError(f"{self._output} cannot be written: {error.strerror}") from error


def completed(
    request: Request, tokens: list[int], reason: str, model: str, tokenizer: Tokenizer, began_s: float
) -> dict[str, Any]:
    """The result of a request that ran."""
    text = tokenizer.decode(request.ids, tokens) if tokenizer.exists else ""
    answer: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if request.chat else {"text": text}
    if not tokenizer.exists:
        answer["token_ids"] = tokens
    body = {
        "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{request.line}",
        "object": "chat.completion" if request.chat else "text_completion",
        "created": int(began_s),
        "model": model,
        "choices": [{"index": 0, **answer, "logprobs": None, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": len(request.ids),
            "completion_tokens": len(tokens),
            "total_tokens": len(request.ids) + len(tokens),
        },
    }
    response = {"status_code": 200, "request_id": f"req-{request.line}", "body": body}
    return {"id": f"batch-{request.line}", "custom_id": request.custom_id, "response": response, "error": None}


def refused(request: Request) -> dict[str, Any]:
    """The result of a request that could not be run."""
    error = {"code": "invalid_request", "message": request.refused}
    return {"id": f"batch-{request.line}", "custom_id": request.custom_id, "response": None, "error": error}


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
