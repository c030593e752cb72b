"""What the package's C code is told, field by field as its own structs have it. Numbers of what is taken or done begin at zero."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

POINTER, LONG, DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double


def _of(kind: Any, names: str) -> Iterator[tuple[str, Any]]:
    return ((name, kind) for name in names.split())


class Product(ctypes.Structure):
    """``product`` of csrc/products.h."""

    _fields_ = (
        *_of(POINTER, "x weight bias out"),
        *_of(LONG, "x_row weight_row weight_column out_row m n k"),
        ("then", POINTER),
        ("next", LONG),
    )


class Search(ctypes.Structure):
    """``search`` of csrc/greatest.h."""

    _fields_ = (
        *_of(POINTER, "x weight bias greatest where"),
        *_of(LONG, "x_row weight_row weight_column m n k threads next"),
    )


class Piece(ctypes.Structure):
    """``piece`` of csrc/experts.h."""

    _fields_ = (
        *_of(POINTER, "gate up down rows weights"),
        *_of(LONG, "count gate_row up_row down_row inner_done done"),
    )


class FeedForward(ctypes.Structure):
    """``job`` of csrc/experts.h."""

    _fields_ = (
        *_of(POINTER, "x out"),
        *_of(LONG, "x_row out_row hidden width count"),
        *_of(POINTER, "pieces inner locks"),
        ("next", LONG),
    )


class Attention(ctypes.Structure):
    """``attention`` of csrc/attention.h."""

    _fields_ = (
        *_of(POINTER, "query key value mask out"),
        *_of(LONG, "query_batch query_head query_position key_batch key_head key_position"),
        *_of(LONG, "value_batch value_head value_position mask_batch mask_query"),
        *_of(LONG, "batch heads queries kv_heads context width value_width causal"),
        ("scaling", DOUBLE),
        ("next", LONG),
    )


class Norms(ctypes.Structure):
    """``norms`` of csrc/rows.h."""

    _fields_ = (
        *_of(POINTER, "x weight out"),
        *_of(LONG, "x_row out_row rows width"),
        ("epsilon", DOUBLE),
        ("next", LONG),
    )


class Rotation(ctypes.Structure):
    """``rotation`` of csrc/rows.h."""

    _fields_ = (
        *_of(POINTER, "x cosine sine out"),
        *_of(LONG, "x_batch x_head x_position out_batch out_head out_position"),
        *_of(LONG, "cosine_batch cosine_position sine_batch sine_position"),
        *_of(LONG, "batch heads positions width next"),
    )
