"""Rows and codes in blocks, which bound the temporaries."""

from collections.abc import Iterator

BLOCK = 1 << 20  # float64 values of one temporary: 8 MB


def blocks(size: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def row_blocks(H: int, N: int, D: int) -> Iterator[slice]:
    """Slices of rows of which all heads together are one temporary."""
    return blocks(N, max(1, BLOCK // max(H * D, 1)))
