"""How a command ends: its text on standard output, or a few lines on standard error; and its exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from klotski_compiler.errors import ExecError, KlotskiError
from klotski_compiler.output import write_stdout

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def outcome(command: str, work: Callable[[], str], interrupted: str = "interrupted") -> int:
    """Print the text that ``work`` returns; the exit code of the command. No failure of it is a traceback."""
    with _one_interrupt():
        try:
            _print(work())
        except KlotskiError as error:
            return _fail(command, error, str(error), error.exit_code)
        except KeyboardInterrupt as interrupt:
            return _fail(
                command, interrupt, interrupted, 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
            )
        except (OSError, RuntimeError, MemoryError) as error:
            # What torch or the system refuses; the user needs its words, not its stack.
            first_line, *_ = str(error).splitlines() or [type(error).__name__]
            return _fail(command, error, str(ExecError(first_line)), ExecError.exit_code)
        except Exception as fault:  # a fault of ours: say so in a line, whatever it is
            what = f"{type(fault).__name__} at {_place(fault)}: {fault}"
            return _fail(command, fault, f"internal fault, please report it: {what}", KlotskiError.exit_code)
    return 0


def _print(text: str) -> None:
    try:
        write_stdout(text)
    except ExecError as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # the reader (head, less) has seen enough
            raise


def _fail(command: str, error: BaseException, message: str, code: int) -> int:
    for line in (message, *getattr(error, "__notes__", ())):
        print(f"{command}: {line}", file=sys.stderr)
    return code


def _place(fault: BaseException) -> str:
    where = fault.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    return f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else "?"


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Lets the first Ctrl-C, or request to end, end the command and ignores those after it: what is finished is being saved, in the time
    of an op."""

    def interrupt(signum: int, frame: object) -> None:
        for name in before:
            signal.signal(name, signal.SIG_IGN)  # for good: Python, too, ends more quietly so
        raise KeyboardInterrupt(signum)

    usual = (signal.default_int_handler, signal.SIG_DFL)  # nohup ignores one, a program around this may have its own
    before = {name: kept for name in SIGNALS if (kept := signal.getsignal(name)) in usual}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for name in before:
        signal.signal(name, interrupt)
    try:
        yield
    finally:
        for name, kept in before.items():
            if signal.getsignal(name) is interrupt:
                signal.signal(name, kept)
