"""Writes the results of a batch as JSON lines in OpenAI's shape: what is finished is safe at once, the whole is in input order.

Rows go to ``OUTPUT.partial`` as they finish, and a run that finds it goes on from there; at the end the whole file is written and
takes OUTPUT's place in one step.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from klotski_compiler.errors import ConfigError, ExecError
from klotski_compiler.output import is_device, write_stdout
from klotski_compiler.prompts import Request, Tokenizer

BEGIN = b'{"id": "batch-'  # of a row


class Results:
    """The rows of one run. ``output``: a file, or None for standard output, which gets all rows at ``finish`` or ``keep``."""

    def __init__(self, output: Path | None, requests: Sequence[Request], ids: Sequence[str]) -> None:
        """Finds what an earlier run has finished; ``ids`` are the requests' (``request_id``). Raises ConfigError where the output cannot
        be a file or another run's rows are in its way."""
        if output and output.is_symlink() and not is_device(output):
            output = output.resolve()  # a link stays a link
        self._output, self._expected = output, len(requests)
        self._finished: dict[int, bytes] = {}
        self._refused = {p: _line(_refusal(r)) for p, r in enumerate(requests) if r.refused}
        self._partial = None if output is None or is_device(output) else output.with_name(output.name + ".partial")
        if self._partial is not None:
            self._file = self._open(self._partial)
            self._finished = self._earlier(self._partial, {known: place for place, known in enumerate(ids)})

    @property
    def finished(self) -> frozenset[int]:
        """Places in the input of the rows that are."""
        return frozenset(self._finished)

    def add(self, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Save finished rows, each with its place in the input. Raises ExecError where that fails; earlier rows stay saved."""
        fresh = {place: _line(row) for place, row in rows}
        if self._partial is not None:
            begin = os.fstat(self._file).st_size
            try:
                _write(self._file, b"".join(fresh.values()))
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, begin)  # no half row
                raise ExecError(f"{self._partial} cannot be written: {error.strerror}") from error
        self._finished |= fresh

    def finish(self) -> None:
        """Write all rows in input order. Raises ExecError where that fails."""
        text = b"".join(line for _, line in sorted((self._finished | self._refused).items()))
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
            why = f"{self._output} cannot be written: {error.strerror}; what is finished is saved in {self._partial}"
            raise ExecError(why) from error
        else:
            self._partial.unlink(missing_ok=True)
        finally:
            os.close(self._file)

    def keep(self) -> str:
        """Leave what is finished where it can be found after a failure; returns a line that says where."""
        finished = len(self._finished)
        if self._partial is not None:
            rows = self._whole_rows()
            finished = len(rows)  # the file knows best: an interrupt may come between a write and what follows it
            os.ftruncate(self._file, sum(map(len, rows)))
            if not finished:
                self._partial.unlink(missing_ok=True)
            os.close(self._file)
        count = f"{finished:,} of {self._expected:,} rows are finished"
        if finished and self._partial is not None:
            return f"{count} and saved in {self._partial}; the same command goes on from there"
        if not finished:  # refusals alone are not worth keeping: the next run finds them again
            return count
        where = self._output or "standard output"
        try:
            self.finish()
        except ExecError:
            return f"{where} took no rows"
        return f"{count} and in {where}"

    def _earlier(self, partial: Path, places: dict[str, int]) -> dict[int, bytes]:
        """What an earlier run has saved, by its place in the input, of which ``places`` has every request's."""
        rows, found = self._whole_rows(), dict[int, bytes]()
        for row in rows:
            with suppress(ValueError, LookupError, TypeError):
                found[places[json.loads(row)["response"]["request_id"]]] = row
        if len(found) < len(rows) or (not rows and os.pread(self._file, len(BEGIN), 0) not in (b"", BEGIN)):
            os.close(self._file)
            why = f"of its {len(rows)} rows only {len(found)} are finished rows of this run"
            others = "others may be of other prompts, another model or plan, or another --max-new-tokens"
            raise ConfigError(partial, "", f"{why}; {others}; take them out, or move the file away")
        os.ftruncate(self._file, sum(map(len, rows)))
        return found

    def _whole_rows(self) -> list[bytes]:
        """What is saved, without half a row at its end."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            text = file.read()
        return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)

    def _open(self, partial: Path) -> int:
        """Locked for this run alone, where the file system has locks."""
        while True:
            try:
                file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            except OSError as error:
                why = f"cannot be written ({error.strerror}); name another file"
                raise ConfigError("--output", "", f"{self._output} {why}") from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise ConfigError("--output", "", f"{self._output} is what another klotski-run is writing") from None
            except OSError:
                return file
            if os.path.exists(partial) and os.path.samestat(os.fstat(file), os.stat(partial)):
                return file
            os.close(file)  # a run that ended at this moment took it away

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
    request: Request, known: str, tokens: list[int], reason: str, model: str, tokenizer: Tokenizer, began_s: float
) -> dict[str, Any]:
    """The result of a request that ran; ``known`` is its id."""
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
    response = {"status_code": 200, "request_id": known, "body": body}
    return {"id": f"batch-{request.line}", "custom_id": request.custom_id, "response": response, "error": None}


def request_id(request: Request, answering: str) -> str:
    """Names a line of an input and what it asks. answering: whatever else its answer depends on."""
    asked = json.dumps([answering, request.ids, request.new_tokens, request.chat, request.custom_id])
    return f"req-{request.line}-{sha256(asked.encode()).hexdigest()[:16]}"


def _refusal(request: Request) -> dict[str, Any]:
    error = {"code": "invalid_request", "message": request.refused}
    return {"id": f"batch-{request.line}", "custom_id": request.custom_id, "response": None, "error": error}


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
