"""The constants of the screen's bounds, which docs/exactness.md derives."""

import torch

FAR = {torch.float32: 2.0**40, torch.float64: 2.0**300}  # longer codes, and rows near that, are not screened
ABSENT = {torch.float32: 2.0**100, torch.float64: 2.0**900}  # the start of a code that no row takes
DEEPEST = 1 << 16  # D of float32 products: beyond, (D + 4) eps is no longer small
SMALLEST_RADIUS = 2.0**-60
UNDERFLOW = 2.0**-90
NORM_UNDERFLOW = 2.0**-54
# Cosine: rows scale by their largest element. Beyond this, and for float64 below its inverse, x.c may leave the range.
FIT = {torch.float32: 2.0**126, torch.float64: 2.0**400}


def decision(D: int) -> float:
    """Of the float64 distance, relative to |X|^2 + |C|^2."""
    return 1.01 * (D / 8 + 8) * 2.0**-53


def accumulation(D: int, dtype: torch.dtype) -> float:
    """Of a product of D + 2 terms and the rounding of its operands, relative to the sum of magnitudes.

    Each operation may cut instead of rounding: eps, not eps / 2.
    """
    return 1.05 * (D + 8) * torch.finfo(dtype).eps


def row_error(D: int, dtype: torch.dtype, metric: str) -> float:
    """Of X.C, relative to |X| and the code's radius."""
    normalised = 0 if metric == "euclidean" else 1.05 * (D + 16) * 2.0**-53
    return accumulation(D, dtype) + normalised


def start_error(D: int, dtype: torch.dtype) -> float:
    """Of |C|^2 / 2, relative."""
    return accumulation(D, dtype) + 12 * decision(D)


def row_rest(norm: torch.Tensor, D: int, metric: str) -> torch.Tensor:
    """Of the decision, twice: the part common to a row, which lower bounds leave out."""
    if metric == "euclidean":
        return 2.1 * decision(D) * norm.square() + UNDERFLOW
    return 8.4 * (D + 16) * 2.0**-53 * norm + UNDERFLOW
