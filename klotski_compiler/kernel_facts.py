"""What the runtime's kernels are like, as far as prices and budgets depend on it: known to both sides from here."""

from __future__ import annotations

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ROW_READERS = 16  # threads that gather embedding rows: single pages, each of which waits behind large reads
# Of 16-bit matmuls by the package's kernel: rows, columns of the product and terms of a sum at a time; between rows so many floats more.
WIDENED_ROWS, WIDENED_COLUMNS, WIDENED_DEPTH, WIDENED_PADDING = 128, 256, 512, 16
WIDENED_TILE = 4  # columns whose weights are widened at a time
WORKERS = 2  # threads of a CPU, with kernels of their own, that experts and large matmuls are shared among
FIXED_ROWS = 10  # rows that take as long to multiply by an expert's weights as these take to read
# With 16-bit kernels of a CPU an expert computes more rows than the first number in multiples of the second.
FEW_ROWS, ROW_STEP = 16, 32
GATHERED_ROWS = 256  # embedding rows that are read from disk at a time


def widened_bytes(widest: int) -> int:
    """What one thread needs to multiply so by weights of up to ``widest`` columns: widened rows and weights, sums, and a block
    of a weight whose columns, not rows, lie in one piece."""
    row = WIDENED_DEPTH + WIDENED_PADDING
    blocks = -(-widest // WIDENED_DEPTH)
    floats = (WIDENED_ROWS * blocks + WIDENED_TILE) * row + WIDENED_ROWS * WIDENED_COLUMNS
    return 4 * floats + 4 * WIDENED_COLUMNS * WIDENED_DEPTH
