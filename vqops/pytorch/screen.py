"""The fast pass: lower bounds of a block of rows and all codes in one product, of which the two least count."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.pytorch import bound
from vqops.pytorch.codebook import GROUP, Codes, columns, power_of_two
from vqops.reference.blocks import blocks, row_blocks

IN_CACHE, ON_DEVICE = 1 << 19, 1 << 26  # bounds of one block: 2 MB stay in a core's cache, 256 MB fill a GPU


class Rows(NamedTuple):
    """Rows of x as the product takes them."""

    matrix: Tensor  # [H, N, columns(D)]: (X', A, 1, zeros), so that the product with a code's column is its L
    error: Tensor  # [H, N], A
    rest: Tensor  # [H, N]
    fits: Tensor  # [H, N] bool, whether the bounds hold for the row


def prepare_rows(x: Tensor, codes: Codes, k: int, metric: str) -> Rows:  # [H, N, D]
    (H, N, D), dtype = x.shape, codes.matrix.dtype
    wide = torch.promote_types(x.dtype, dtype)
    if metric == "euclidean":
        scale, fits = codes.scale.to(wide), codes.fits.unsqueeze(1) > 0
        shift = -scale * codes.centre.to(wide)
    else:
        largest = x.abs().amax(-1).to(wide)
        shift, fit = x.new_zeros((), dtype=wide), bound.FIT[wide]
        scale = 1 / power_of_two(largest.clamp_min(1 / fit)).unsqueeze(-1)
        fits = (codes.fits.unsqueeze(1) > 0) & (largest < fit)
        fits = fits if wide == torch.float32 else fits & (largest > 1 / fit)  # of float32, float64 loses no product
    matrix = x.new_empty((H, N, columns(D)), dtype=dtype)
    torch.addcmul(shift, x.to(wide), scale, out=matrix[..., :D])  # one rounding: the product with scale is exact
    norm = torch.linalg.vector_norm(matrix[..., :D], dim=-1)
    norm = norm * (1 + (D + 8) * torch.finfo(dtype).eps) + bound.NORM_UNDERFLOW
    fits = fits & (2.02 * norm + codes.radii[:, k - 1 : k] < bound.FAR[dtype] / 4)
    if dtype == torch.float32 and D > bound.DEEPEST:
        fits = torch.zeros_like(fits)
    matrix[..., D] = error = bound.row_error(D, dtype, metric) * norm + 2.0**-100
    matrix[..., D + 1] = 1
    matrix[..., D + 2 :] = 0
    return Rows(matrix, error, bound.row_rest(norm, D, metric), fits)


def upper_bounds(lower: Tensor, index: Tensor, rows: Rows, codes: Codes, D: int) -> Tensor:  # each [H, N, j]
    radius, start = (codes.matrix[..., i].gather(1, index.flatten(1)).view_as(lower) for i in (D, D + 1))
    error, rest, dtype = rows.error.unsqueeze(-1), rows.rest.unsqueeze(-1), lower.dtype
    above = rest - 2.1 * error * radius + 2.2 * bound.start_error(D, dtype) * start  # the radius is stored negative
    return lower + 2 * torch.finfo(dtype).eps * lower.abs() + above


class Products:
    """Blocks of lower bounds, in one buffer; `parts` times as many where each has temporaries of its own."""

    def __init__(self, codes: Tensor, parts: int = 1):  # [H, K, columns(D)]
        H, K, _ = codes.shape
        self.codes = codes.mT
        self.step = max(1, (IN_CACHE if codes.device.type == "cpu" else ON_DEVICE) // (parts * H * K))
        self.buffer = codes.new_empty(0)

    def of(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:  # [H, N, columns(D)]
        """Slices of rows and their bounds [H, n, K], each of which ends with the next."""
        (H, N, _), K = rows.shape, self.codes.shape[-1]
        size = H * min(N, self.step) * K
        self.buffer = self.buffer if self.buffer.numel() >= size else rows.new_empty(size)
        for some in blocks(N, self.step):
            part = rows[:, some]
            yield some, torch.bmm(part, self.codes, out=self.buffer[: H * part.shape[1] * K].view(H, -1, K))


def two_least(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [H, N, n], changed -> index, least, second [H, N]
    least, index = values.min(-1)
    taken = torch.arange(values.shape[-1], device=values.device) == index.unsqueeze(-1)
    return index, least, values.masked_fill_(taken, torch.inf).amin(-1)


def two_least_of_groups(bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [H, N, padded(K)]
    """The same in one pass over the bounds: the least of each group, and then of the group that has it."""
    groups = bounds.unflatten(-1, (GROUP, -1))  # code i n + g is in group g of n: minima of whole vectors
    group, _, second = two_least(groups.amin(-2))
    inside = groups.gather(-1, group[..., None, None].expand(*group.shape, GROUP, 1)).squeeze(-1)
    place, least, behind = two_least(inside)
    return place * groups.shape[-1] + group, least, torch.minimum(second, behind)


def screen(x: Tensor, codes: Codes, metric: str) -> tuple[Tensor, Tensor]:  # [H, N, D]
    """The code [H, N] with the least lower bound, and whether [H, N] the bounds leave another one possible."""
    H, N, D = x.shape
    index, is_open = x.new_empty((H, N), dtype=torch.int64), x.new_empty((H, N), dtype=torch.bool)
    products = Products(codes.matrix)
    for outer in row_blocks(x):
        rows = prepare_rows(x[:, outer], codes, 1, metric)
        parts = [two_least_of_groups(bounds) for _, bounds in products.of(rows.matrix)]
        code, least, second = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        upper = upper_bounds(least.unsqueeze(-1), code.unsqueeze(-1), rows, codes, D).squeeze(-1)
        index[:, outer], is_open[:, outer] = code, ~((second > upper) & rows.fits)
    return index, is_open
