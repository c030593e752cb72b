"""What a person, or a log, sees of a run while it lasts: on standard error, and nothing in its way."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LINE_S = 60  # from one line of a log to the next


class Progress:
    """Tokens so far, and their rate since the first group began."""

    def __init__(self) -> None:
        self.tokens, self._began, self._group = 0, 0.0, ""

    def begin(self, group: int, groups: int) -> None:
        """A group starts."""
        self._began = self._began or time.perf_counter()
        self._group = f"group {group} of {groups}"

    def advance(self, tokens: int) -> None:
        """That many tokens were generated."""
        self.tokens += tokens
        rate = self.tokens / (time.perf_counter() - self._began)
        self.show(f"{self._group}, {self.tokens:,} tokens, {rate:,.1f} tokens/s")

    def show(self, said: str) -> None:
        """To who watches."""


class Lines(Progress):
    """For a log: a line now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.perf_counter()

    def show(self, said: str) -> None:
        if (now := time.perf_counter()) - self._last > LINE_S:
            self._last = now
            print(f"klotski-run: {said}", file=sys.stderr, flush=True)


@contextmanager
def progress_of(most_tokens: int) -> Iterator[Progress]:
    """A bar on standard error where that is a terminal. most_tokens: if no row ends early."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich import progress
    from rich.console import Console

    class Bar(Progress):
        """For a person."""

        def __init__(self, shown: progress.Progress) -> None:
            super().__init__()
            self._shown, self._task = shown, shown.add_task("loading weights", total=most_tokens)

        def show(self, said: str) -> None:
            self._shown.update(self._task, completed=self.tokens, description=said)

    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn()
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield Bar(shown)
