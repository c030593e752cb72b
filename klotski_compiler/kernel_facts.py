"""What the runtime's kernels are like, as far as prices and budgets depend on it: known to both sides from here."""

from __future__ import annotations

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ROW_READERS = 16  # threads that gather embedding rows: single pages, each of which waits behind large reads
# Of 16-bit matmuls by the package's kernel: rows and columns of the product at a time, of which a panel has so many rows at most; for how
# many blocks of rows there is room between an expert's matmuls; and in what steps an expert's rows are computed.
BLOCK_ROWS, BLOCK_COLUMNS, PANEL_ROWS, INNERS, OWN_STEP = 128, 48, 64, 3, 8
WORKERS = 2  # threads of a CPU, with kernels of their own, that experts and large matmuls are shared among
FIXED_ROWS = 10  # rows that take as long to multiply by an expert's weights as these take to read
# With 16-bit kernels of a CPU an expert computes more rows than the first number in multiples of the second.
FEW_ROWS, ROW_STEP = 16, 32
# Embedding rows that are read from disk at a time; of which those that are so near are one request, up to so many bytes of the matrix.
GATHERED_ROWS, ROW_GAP_BYTES, ROW_SPAN_BYTES = 512, 128 << 10, 256 << 10


def own_takes(rows: int, least_own_rows: int, most_own_rows: int) -> bool:
    """Whether the package's own kernel multiplies so many rows, which it does from the least of them on (0: never) up to the most (0: any
    number)."""
    return own_finds(rows, least_own_rows) and (not most_own_rows or rows <= most_own_rows)


def own_finds(rows: int, least_own_rows: int) -> bool:
    """Whether it finds the greatest product of each of so many rows, and keeps no other: also of more rows than it multiplies."""
    return 0 < least_own_rows <= rows


def own_kernels_bytes(widest: int) -> int:
    """What one thread needs to multiply so by weights of up to ``widest`` columns: packed rows, columns of a weight packed and as they
    are, and two blocks of sums."""
    return 4 * BLOCK_ROWS * widest + 6 * BLOCK_COLUMNS * widest + 8 * BLOCK_COLUMNS * BLOCK_ROWS


def inner_bytes(width: int) -> int:
    """What all threads need for what lies between the matmuls of experts of such a width."""
    return 4 * INNERS * BLOCK_ROWS * width
