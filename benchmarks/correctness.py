"""Is a result right? Indices are compared with float64 distances, before anything is timed."""

import torch
from torch import Tensor

import vqops

PRODUCTS = 2**29  # in float64, of a check: two seconds on one core
GROSS = 0.05  # an index whose squared distance is larger than the best by this share is no rounding error


class WrongResult(Exception):
    """A method that does not compute what is measured: it is reported, not timed."""


def checked_rows(x: Tensor, codebook: Tensor) -> slice:
    """As many rows as the check affords, spread over all."""
    products = PRODUCTS if x.device.type == "cpu" else 32 * PRODUCTS
    return slice(None, None, max(1, -(-len(x) * codebook.numel() // products)))


def exact_indices(x: Tensor, codebook: Tensor) -> Tensor:
    """The definition of nearest: float64, equal distances to the lowest index."""
    return vqops.nearest(x, codebook, implementation="reference")


def wrong_indices(found: Tensor, exact: Tensor, x: Tensor, codebook: Tensor) -> tuple[int, float]:
    """How many of the indices are not the nearest code's, and how much longer their squared distances are on average,
    where the nearest is not at 0.

    A code as near as the nearest, to the last bit, is right. Raises WrongResult for an index that is no code.
    """
    if found.shape != exact.shape or not bool(((found >= 0) & (found < len(codebook))).all()):
        raise WrongResult("the result is not an index for each vector")
    x, codebook = x.double(), codebook.double()
    distance, best = ((x - codebook[i]).square().sum(1) for i in (found, exact))
    wrong = (found != exact) & (distance > best)
    far = wrong & (best > 0)
    excess = float((distance / best - 1)[far].mean()) if bool(far.any()) else 0.0
    return int(wrong.sum()), excess


def same_statistics(found: tuple[Tensor, Tensor], counts: Tensor, sums: Tensor, sizes: Tensor) -> None:
    """Raises WrongResult unless counts are equal and sums agree within float32 rounding.

    `sizes` are the sums of the absolute values: what rounding is relative to.
    """
    if not torch.equal(found[0].view_as(counts).to(counts.dtype), counts):
        raise WrongResult("the counts are wrong")
    wrong = int(((found[1].view_as(sums).double() - sums).abs() > 1e-5 * sizes + 1e-6).sum())
    if wrong:
        raise WrongResult(f"{wrong} of {sums.numel()} sums are wrong")


def close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found.double() - expected.double()).abs().max())
    if not error <= tolerance:
        raise WrongResult(f"{name} differ by up to {error:.2g}, allowed are {tolerance:.2g}")
