"""Rows and codes in blocks, which bound the temporaries."""

from collections.abc import Iterator

from torch import Tensor

BLOCK = 1 << 20  # float64 values of one temporary: 8 MB
ON_CPU, ELSEWHERE = 1 << 18, 1 << 24  # values of rows at once: 2 MB in float64, or enough to fill a GPU


def blocks(size: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def row_blocks(x: Tensor) -> Iterator[slice]:  # [H, N, D]
    """Slices of rows of which all heads together are one temporary."""
    H, N, D = x.shape
    return blocks(N, max(1, (ON_CPU if x.device.type == "cpu" else ELSEWHERE) // max(H * D, 1)))
