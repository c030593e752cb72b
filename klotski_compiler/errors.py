"""What can go wrong, as exceptions that a command turns into a few lines and an exit code.

Every message names the file, the field, the value and the mend. Libraries raise; only the commands print.
"""

from __future__ import annotations

from collections.abc import Sequence

AROUND = 3  # lines of a plan that are shown before and after the one that is wrong


class KlotskiError(Exception):
    """Base of every error that a user can cause; ``exit_code`` is the command's."""

    exit_code = 5


class ConfigError(KlotskiError):
    """Bad usage or input: a file, a field of it, and why it cannot be used."""

    exit_code = 2

    def __init__(self, path: object, field: str, why: str) -> None:
        self.path, self.field, self.why = str(path), field, why
        where = f"{path}: {field}" if field else f"{path}"
        super().__init__(f"{where}: {why}")


class Infeasible(KlotskiError):
    """No schedule fits. ``shortfalls`` maps each conflicting budget to the bytes that it lacks."""

    exit_code = 3

    def __init__(self, shortfalls: dict[str, int], mend: str) -> None:
        self.shortfalls, self.mend = shortfalls, mend
        short = "; ".join(f"{name} is short by {value:,} bytes" for name, value in shortfalls.items())
        super().__init__(f"no schedule fits: {short}\n{mend}" if short else mend)

    def __reduce__(self) -> tuple[type[Infeasible], tuple[dict[str, int], str]]:
        """From one process to another."""
        return type(self), (self.shortfalls, self.mend)


class PlanError(KlotskiError):
    """A plan that cannot be trusted. ``window`` holds the plan lines around the fault."""

    exit_code = 4

    def __init__(self, check: str, why: str, window: str = "") -> None:
        self.check, self.why, self.window = check, why, window
        super().__init__(f"invalid plan ({check}): {why}" + (f"\n{window}" if window else ""))


class ExecError(KlotskiError):
    """An op failed while the plan ran. ``window`` holds the plan lines around it."""

    exit_code = 5

    def __init__(self, why: str, window: str = "") -> None:
        self.why, self.window = why, window
        super().__init__(f"execution failed: {why}" + (f"\n{window}" if window else ""))


def window(lines: Sequence[str], index: int) -> str:
    """The lines around ``index``, with an arrow at it: what every plan error shows."""
    first, last = max(0, index - AROUND), min(len(lines), index + AROUND + 1)
    return "\n".join(f"{'-->' if i == index else '   '} {lines[i]}" for i in range(first, last))
