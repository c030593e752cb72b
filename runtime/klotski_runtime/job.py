"""What is to be run and what becomes of it: the rows of a file of prompts, with results, or a plan's own workload, without."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klotski_compiler.errors import ConfigError
from klotski_compiler.plan import Plan
from klotski_compiler.prompts import Limits, Request, Tokenizer, read_requests
from klotski_runtime.results import Results, completed, request_id

if TYPE_CHECKING:  # torch takes seconds to import, and usage errors need none of it
    from klotski_runtime.engine import Row

SEED = 0
SAMPLE_BYTES = 1 << 16  # of each quarter of a file of weights
FIRST_WORD = 3
"""The seeded workload leaves out the lowest token ids, which are special ones in most vocabularies."""


class Keeper:
    """Keeps the rows of a run as they end: in rolling order that is one cohort after the other, long before the last."""

    def __init__(self, job: Job, first: int, group: Sequence[Row]) -> None:
        self.job, self.first, self.group, self.kept = job, first, group, 0

    def ended(self) -> None:
        """Keep the rows that have ended before any that has not."""
        done = self.kept
        while done < len(self.group) and self.group[done].done:
            done += 1
        if done > self.kept:
            self.job.save(self.first + self.kept, self.group[self.kept : done])
            self.kept = done

    def rest(self) -> None:
        """Keep what else has ended."""
        self.job.save(self.first + self.kept, self.group[self.kept :])
        self.kept = len(self.group)


class Job:
    """Rows to run in this order. This plain one keeps no results: a rehearsal's tokens mean nothing."""

    def __init__(self, rows: list[Row], end_tokens: frozenset[int]) -> None:
        self.rows, self.end_tokens = rows, end_tokens

    def save(self, first: int, group: Sequence[Row]) -> None:
        """Keep the finished ones of rows ``first`` onwards."""

    def keep(self) -> str:
        """After a failure: a line that says where the finished rows are."""
        return ""

    def finish(self, report: dict[str, Any]) -> None:
        """All rows have run. report: empty where there was none left to run."""


def rehearsal(plan: Plan, config: Any, new_tokens: int) -> Job:
    """The plan's own workload on seeded token ids; nothing ends a row early."""
    from klotski_runtime.engine import Row

    choose, workload = random.Random(SEED), plan.workload
    first = min(FIRST_WORD, config.vocab_size - 1)
    prompts = [
        [choose.randrange(first, config.vocab_size) for _ in range(workload.prompt_len)]
        for _ in range(workload.num_sequences)
    ]
    return Job([Row(prompt, new_tokens) for prompt in prompts], frozenset())


class Batch(Job):
    """The rows of an input file, longest prompt first: a group pads its prompts to its longest."""

    def __init__(
        self, plan: Plan, folder: Path, config: Any, source: str, output: Path | None, new_tokens: int
    ) -> None:
        """Reads the input and opens the output, which gets the refused rows. Raises ConfigError where no row can run."""
        from klotski_runtime.engine import Row

        self._model, self._tokenizer, self._began = plan.model, Tokenizer(folder), time.time()
        self._output = output or "standard output"
        envelope = plan.envelope
        limits = Limits(envelope.prompt_len, envelope.gen_len, new_tokens, config.vocab_size)
        self._requests, ends = read_requests(source, self._tokenizer, limits), end_tokens(folder)
        self._tokenizer.load()
        answering = json.dumps([plan.dtype, sorted(ends), _weights(folder)])
        self._ids = [request_id(request, answering) for request in self._requests]
        usable = [place for place, request in enumerate(self._requests) if not request.refused]
        self._results = Results(output, self._requests, self._ids)
        if not usable:
            why = f"none of {len(self._requests):,} rows can be run, the first because {self._requests[0].refused}"
            if output and output.is_file():
                self._results.keep()
                raise ConfigError(source, "", f"{why}; {self._output} stays as it was")
            self._results.finish()
            raise ConfigError(source, "", f"{why}; all reasons are in {self._output}")
        if refused := [request.refused for request in self._requests if request.refused]:
            count = f"{len(refused):,} of {len(self._requests):,} rows cannot be run"
            print(f"klotski-run: {count}, the first because {refused[0]}", file=sys.stderr)
        if twice := _twice(self._requests):
            print(f"klotski-run: {twice}; their results are told apart by id, and are in input order", file=sys.stderr)
        left = [place for place in usable if place not in self._results.finished]
        self._order = sorted(left, key=lambda place: -len(self._requests[place].ids))
        self._refused, self._earlier = len(self._requests) - len(usable), len(usable) - len(left)
        if self._earlier:
            done = f"{self._earlier:,} of {len(self._requests):,} rows are finished by an earlier run"
            print(f"klotski-run: {done}; {len(left):,} left", file=sys.stderr)
        rows = [Row(self._requests[place].ids, self._requests[place].new_tokens) for place in self._order]
        super().__init__(rows, ends)

    def save(self, first: int, group: Sequence[Row]) -> None:
        places = self._order[first : first + len(group)]
        self._results.add((p, self._completed(p, row)) for p, row in zip(places, group, strict=True) if row.done)

    def keep(self) -> str:
        return self._results.keep()

    def finish(self, report: dict[str, Any]) -> None:
        self._results.finish()
        rows = f"{len(self._requests):,} rows" + (f", {self._refused:,} of them refused" if self._refused else "")
        if self._earlier:
            rows += f", {self._earlier:,} finished by an earlier run"
        if report:
            speed = f"{report['tokens_per_s']:,.1f} tokens/s (predicted {report['predicted_tokens_per_s']:,.1f})"
            rows += f": {report['generated_tokens']:,} tokens in {report['wall_s']:,.1f} s, {speed}"
        print(f"{rows}; written to {self._output}", file=sys.stderr)

    def _completed(self, place: int, row: Row) -> dict[str, Any]:
        request = self._requests[place]
        return completed(request, self._ids[place], row.tokens, row.reason, self._model, self._tokenizer, self._began)


def _twice(requests: Sequence[Request]) -> str:
    """Which rows cannot be told apart by what they are called; empty where all can."""
    lines: dict[str, list[int]] = {}
    for request in requests:
        lines.setdefault(request.custom_id, []).append(request.line)
    repeated = {name: at for name, at in lines.items() if len(at) > 1}
    if not repeated:
        return ""
    name, (first, second, *_) = next(iter(repeated.items()))
    count = sum(map(len, repeated.values()))
    return f"{count:,} rows share a custom_id with others, the first lines {first} and {second} ({name!r})"


def _weights(folder: Path) -> str:
    """What tells a checkpoint from another, wherever it lies: a digest of a few pieces of each file."""
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for quarter in range(4):
                file.seek(quarter * size // 4)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def end_tokens(folder: Path) -> frozenset[int]:
    """The ids that end a text: those of generation_config.json or, where it names none, of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(path, "", f"cannot be read as JSON ({error}); download it again") from None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
