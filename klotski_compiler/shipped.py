"""Finds the profiles that come with the package: models and hardware, by name.

An installed wheel holds them as a folder of this package, a checkout beside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(kind: str, name: str) -> Path | None:
    """The JSON file of the shipped profile ``name`` (any case) of ``kind`` (models, hardware), or None."""
    return _profiles(kind).get(name.lower())


def shipped_names(kind: str) -> tuple[str, ...]:
    """The names of the shipped profiles of ``kind``, sorted."""
    return tuple(sorted(_profiles(kind)))


def _profiles(kind: str) -> dict[str, Path]:
    inside = _PACKAGE / "profiles"
    # Only a checkout lacks the inner folder; beside an installed package, "profiles" would be someone else's.
    folder = inside if inside.is_dir() else _PACKAGE.parent / "profiles"
    return {path.stem: path for path in (folder / kind).glob("*.json")}
