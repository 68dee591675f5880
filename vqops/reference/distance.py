"""The distance, to the last bit: everything that decides between codes goes through these functions."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-6  # smallest norm that a vector is divided by; the value of vector-quantize-pytorch


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def asking_is_free(device: torch.device) -> bool:
    """Whether what a tensor holds can be looked at without making the host wait."""
    return device.type == "cpu"


def is_finite(t: Tensor) -> Tensor:  # [..., D] -> bool [...]
    """Whether all of a vector is; faster than isfinite().all(-1) on a CPU."""
    return t.abs().amax(-1) < math.inf


def lanes(t: Tensor) -> Tensor:  # [..., D] -> float64 [ceil(D / 8), ..., 8]
    """Element i in lane i mod 8, padded with zeros."""
    if not has_float64(t.device):
        raise RuntimeError(f"vqops: device {t.device.type} has no float64, which this needs; move x to the CPU")
    t, short = t.double(), -t.shape[-1] % 8
    return (F.pad(t, (0, short)) if short else t).unflatten(-1, (-1, 8)).movedim(-2, 0)


def lane_sum(steps: Iterable[Tensor]) -> Tensor:  # each [..., 8] -> [...]
    """Eight partial sums over the steps in order, then their sum in a fixed tree. Multiply and add round separately."""
    p = None
    for step in steps:
        p = step if p is None else p.add_(step)
    p0, p1, p2, p3, p4, p5, p6, p7 = p.unbind(-1)
    return ((p0 + p4) + (p2 + p6)) + ((p1 + p5) + (p3 + p7))


def squared_distance(x: Tensor, c: Tensor) -> Tensor:  # [..., D], [..., D] -> float64 [...]
    """sum_i (x_i - c_i)^2 in float64, broadcast over the leading axes."""
    return lane_sum((a - b).square_() for a, b in zip(lanes(x), lanes(c), strict=True))


def squared_error(x: Tensor, c: Tensor) -> Tensor:  # [..., D], [..., D] -> float64 [...]
    """The same, with D float64 values at once for each pair: faster where the pairs are few."""
    difference = x.double() - c.double()
    return lane_sum(lanes(difference.square_()))


def dot(x: Tensor, c: Tensor) -> Tensor:  # [..., D], [..., D] -> float64 [...]
    """sum_i x_i c_i in float64, in the same order."""
    return lane_sum(a * b for a, b in zip(lanes(x), lanes(c), strict=True))


def root(square: Tensor) -> Tensor:
    """The square root in float64, correctly rounded.

    torch.sqrt is an ulp off for one value in a hundred where a vector library computes it; one Newton step with an
    exact residual (Dekker 1971) rounds it correctly. Powers of two keep the residual in range.
    """
    large, small = square > 2.0**500, square < 2.0**-500
    v = torch.where(large, square * 2.0**-500, torch.where(small, square * 2.0**500, square))
    s = v.sqrt()
    high = s * (2.0**27 + 1)
    high = high - (high - s)
    low = s - high
    residual = ((v - high * high) - 2 * high * low) - low * low
    s = torch.where((v > 0) & v.isfinite(), s + residual / (2 * s), s)
    return torch.where(large, s * 2.0**250, torch.where(small, s * 2.0**-250, s))


def norm(x: Tensor) -> Tensor:  # [..., D] -> float64 [...]
    return root(dot(x, x))


def unit(x: Tensor) -> Tensor:  # [..., D] -> float64 [..., D]
    """x / max(|x|, 1e-6)."""
    return x.double() / norm(x).clamp_min_(TINY).unsqueeze(-1)


def cost(
    x: Tensor,  # [..., D]
    c: Tensor,  # [..., D], codes
    metric: str,
    square: Callable[[Tensor, Tensor], Tensor] = squared_distance,
) -> Tensor:  # float64, broadcast over the leading axes
    """The cost that the nearest code minimises: |x - c|^2, for "cosine" -x.c / |c| on x as given, 0 for a zero code.

    NaN marks a code that can't be chosen.
    """
    if metric == "euclidean":
        result = square(x, c)
    else:
        length = norm(c)
        result = (-dot(x, c) / length).masked_fill_(~(length > 0), 0)
        result = result.masked_fill_(result.isnan(), math.inf)  # float64 overflow: a value, the worst one
    return result.masked_fill_(~is_finite(c), math.nan)
