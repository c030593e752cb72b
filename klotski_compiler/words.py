"""Quantities as a person reads them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes as a person reads them: ``16.0 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def span(us: float) -> str:
    """A time as a person reads it: ``3.12 s``, ``2 h 05 min``."""
    if us < 1000:
        return f"{us:.0f} us"
    if us < 1e6:
        return f"{us / 1000:.1f} ms"
    if us < 600e6:
        return f"{us / 1e6:.2f} s" if us < 100e6 else f"{us / 1e6:.0f} s"
    minutes = round(us / 60e6)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def bar(share: float, width: int = 30) -> str:
    """A share of a whole as so many columns."""
    filled = round(width * min(1.0, share))
    return "#" * filled + "." * (width - filled)


def count(number: int, what: str) -> str:
    """``1 batch``, ``2 batches``."""
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("ch") or what.endswith("ss") else "s")
