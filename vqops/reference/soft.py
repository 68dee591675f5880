"""What the soft assignments share: costs of a block of codes, their softmax, and its part of that over all codes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.reference.distance import asking_is_free

BLOCK, CODES = 1 << 20, 8192  # costs, and codes, of one block: 8 MB in float64
SOME = 256  # codes whose median is the centre
FAR, NEAR = 2.0**100, 2.0**-60  # squares beyond which float32 has too few exponents for distances as they are


def rows_at_once(K: int, D: int) -> int:
    return max(1, BLOCK // max(min(K, CODES), D))


class Total(NamedTuple):
    """What the softmax over several codes needs of each row: p_k = exp(scale (lowest - cost_k) - log)."""

    lowest: Tensor  # [n, 1] float64, of the costs
    log: Tensor  # [n, 1] float64, of sum_k exp(scale (lowest - cost_k))

    def share(self, other: "Total", scale: Tensor | float) -> Tensor:  # [n, 1] float64
        """The log of the sum over the codes of `other` as a part of the sum over these."""
        return other.log - self.log + (self.lowest - other.lowest) * scale

    def joined(self, other: "Total", scale: Tensor | float) -> "Total":
        both = Total(torch.minimum(self.lowest, other.lowest), torch.zeros_like(self.log))
        return Total(both.lowest, torch.logaddexp(both.share(self, scale), both.share(other, scale)))

    def saved(self, real: torch.dtype) -> Tensor:  # [2, n]; Total(*saved.double().unsqueeze(2)) is the same
        return torch.cat(self, 1).clamp_(max=torch.finfo(real).max).to(real).mT


class Rows(NamedTuple):
    """Rows around the centre of a head's codes. One that is not finite is at the centre."""

    x: Tensor  # [n, D]
    factors: Tensor  # [n, E], whose products with those of the codes are costs, or their squares
    unit: Tensor  # [n, 1] float64, of the costs
    finite: Tensor  # [n, 1] bool


class Codes:
    """The codes of one head, and what each costs a row: |x - c|, or -x.c for "cosine".

    Distances are products in float64 around a centre, since |x|^2 - 2 x.c + |c|^2 cancels near a code and far from 0.
    The centre is the median of each coordinate, which one huge code does not move. A code that is not finite is at the
    centre, and absent from the softmax.
    """

    def __init__(self, codes: Tensor, metric: str, real: torch.dtype):  # [K, D], dtype of results
        self.euclidean, self.real = metric == "euclidean", real
        self.dtype = torch.float64 if self.euclidean else real  # of products
        wrong = ~codes.isfinite().all(1)
        self.none = wrong.all()
        self.absent = torch.zeros_like(wrong, dtype=real).masked_fill_(wrong, torch.finfo(real).min / 4)
        values = codes.to(self.dtype).masked_fill(wrong.unsqueeze(1), 0).mT.contiguous()  # [D, K]: faster products
        some = values[:, :: -(-len(codes) // SOME)].sort(1).values
        self.centre = some[:, some.shape[1] // 2] * self.euclidean
        values -= self.centre.unsqueeze(1)
        square = values.square().sum(0, keepdim=True)
        self.largest = square.amax()
        start = square.masked_fill(wrong, torch.finfo(self.dtype).max / 4)
        self.factors = [-2 * values, torch.ones_like(square), start] if self.euclidean else [-values, start - square]
        self.factors, self.values = torch.cat(self.factors).mT, values.mT
        self.rounded = self.values.to(real)

    def rows(self, x: Tensor) -> Rows:  # [n, D]
        finite = x.isfinite().all(1, keepdim=True)
        x = (x.to(self.dtype) - self.centre).masked_fill_(~finite, 0)
        square = x.square().sum(1, keepdim=True)
        unit = torch.ones_like(square, dtype=torch.float64)
        if self.euclidean and self.real != self.dtype:
            larger = (square + self.largest).clamp_min_(torch.finfo(self.real).tiny ** 2)  # 1 / unit is finite
            extreme = torch.where(square > FAR, square, larger.where(larger < NEAR, unit))
            unit = torch.ldexp(unit, extreme.frexp().exponent // 2)
        one = unit.to(self.dtype) ** -2
        factors = torch.cat([x * one, square * one, one] if self.euclidean else [x, one], 1)
        return Rows(x, factors, unit, finite)

    def nothing(self, rows: Rows) -> Total:
        """The total over no code."""
        most = torch.finfo(torch.float64).max / 4
        return Total(torch.full_like(rows.unit, most), torch.full_like(rows.unit, -math.inf))

    def costs(self, rows: Rows, codes: slice) -> Tensor:  # [n, k], in units of each row
        costs = (rows.factors @ self.factors[codes].mT).to(self.real)
        if not self.euclidean:
            return costs
        costs = costs.clamp_(0, torch.finfo(self.real).max / 4).sqrt_()
        return self.refined(costs, rows, codes) if self.near(costs, rows) else costs

    def refined(self, costs: Tensor, rows: Rows, codes: slice) -> Tensor:
        """With the least distance from the difference itself, also in the place of those that are rounding errors."""
        nearest = costs.argmin(1, keepdim=True)
        difference = self.values[codes].index_select(0, nearest.squeeze(1)).sub_(rows.x)
        least = difference.mul_(rows.unit.reciprocal()).square_().sum(1, keepdim=True).sqrt_().to(self.real)
        least = torch.where(self.absent[codes][nearest] < 0, costs.gather(1, nearest), least)
        noise = rows.x.square().sum(1, keepdim=True).mul_((rows.x.shape[1] + 2) * 2.0**-51).sqrt_() / rows.unit
        return torch.where(costs < noise.to(self.real), least, costs).scatter_(1, nearest, least)

    def near(self, costs: Tensor, rows: Rows) -> bool:
        """Whether a distance is small beside |x|, so that |x|^2 - 2 x.c + |c|^2 cancels, or too small for a float32
        reciprocal; True where asking waits."""
        if not self.euclidean:
            return False
        if not asking_is_free(costs.device):
            return True
        lowest = costs.amin(1, keepdim=True).double() * rows.unit
        small = (lowest.square() < rows.x.square().sum(1, keepdim=True) / 16) | (rows.unit < 1)
        return bool(small.any())

    def softmax(self, costs: Tensor, rows: Rows, codes: slice, scale: Tensor | float) -> tuple[Tensor, Total]:
        """Of -scale costs, within the block [n, k]. The largest has exp(0) / sum."""
        lowest = costs.amin(1, keepdim=True)
        factor = (rows.unit * scale).clamp_(max=torch.finfo(self.real).max).to(self.real)
        logits = torch.addcmul(self.absent[codes], lowest - costs, factor)
        largest, block = logits.amax(1, keepdim=True), logits.softmax(1)
        log = largest.double() - block.amax(1, keepdim=True).double().log()
        return block, Total(lowest.double() * rows.unit, log)

    def spread(
        self,
        pull: Tensor,  # [n, k]
        costs: Tensor,  # [n, k], overwritten
        rows: Rows,
        codes: slice,
        scale: Tensor | float,
        x_needed: bool,
        codebook_needed: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # [n, D], [k, D]
        """pull_k times the gradients of -scale cost_k: those of |x - c| are taken as 0 where x = c."""
        dtype = self.dtype
        if self.euclidean:
            dtype = torch.float64 if self.near(costs, rows) else self.real
            pull = costs.reciprocal_().nan_to_num_(posinf=0).mul_(pull).to(dtype)
        values = self.values[codes] if dtype == self.dtype else self.rounded[codes]
        x, weight = rows.x.to(dtype), rows.unit.reciprocal().to(dtype)
        to_x = to_codes = None
        if x_needed:
            to_x = pull @ values
            if self.euclidean:
                to_x = (to_x - pull.sum(1, keepdim=True) * x) * weight
            to_x = to_x.double() * scale
        if codebook_needed and self.euclidean:
            to_codes = (torch.cat([x * weight, weight], 1).mT @ pull).mT
            to_codes = (to_codes[:, :-1] - to_codes[:, -1:] * values).double() * scale
        elif codebook_needed:
            to_codes = (x.mT @ pull).mT.double() * scale
        return to_x, to_codes


def steepness(value: Tensor) -> Tensor:  # (), float64
    """Of the softmax, finite, so that no difference of 0 becomes NaN."""
    return value.double().clamp(max=torch.finfo(torch.float64).max)
