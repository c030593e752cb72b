"""Keeps Python's garbage collector from looking for cycles in plans, which have none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage meanwhile; a decorator, too. A plan is some 100,000 small records that live to the end, and to look
    through them each time there are a quarter more was a quarter of the compile time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
