"""The gradient of a quantizer's output."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.ops.checks import Gradient
from vqops.quantizers.codebook.searched import RowCodes, SharedCodes, unit
from vqops.reference import TINY


class Passing(NamedTuple):
    """How the gradient of the output passes to the input and to learnable codes.

    "none": to the codes alone; "soft": also as that of the mean code under the probabilities of a draw; "directional":
    to both, `towards` the code. Each counts 1 + `more`.
    """

    kind: Literal["rotation", "straight_through", "none", "soft", "directional"]
    temperature: Tensor | None = None  # (), of the draw
    variance: Tensor | None = None  # (), of the noise in the direction
    more: Tensor | None = None  # ()

    def of_search(self) -> Gradient:
        return "none" if self.kind in ("soft", "directional") else self.kind


def with_gradient(
    quantized: Tensor,  # [H, N, D], or [H, N, k, D] with indices [H, N, k]
    indices: Tensor,
    rows: Tensor,  # [H, N, D]
    searched: SharedCodes | RowCodes,
    passing: Passing,
    mask: Tensor | None,  # [H, N] bool
) -> Tensor:
    """The output with the gradient that its search has not given it."""
    if passing.kind == "directional":
        given = unit(rows) if searched.metric == "cosine" else rows
        given, absent = given if quantized.dim() == 3 else given.unsqueeze(2), (indices < 0).unsqueeze(-1)
        codes = searched.at(indices if quantized.dim() == 4 else indices.unsqueeze(-1)).view(quantized.shape)
        moved = towards(given.masked_fill(absent, 0), codes, passing.variance).to(quantized.dtype)
        quantized = torch.where(absent, quantized.detach(), moved)
    if passing.kind == "soft" and quantized.dim() == 3:
        soft = searched.soft(rows, passing.temperature, mask)
        quantized = quantized + (soft - soft.detach()).to(quantized.dtype)  # adds zero
    if passing.more is not None:
        quantized = quantized + passing.more.to(quantized.dtype) * (quantized - quantized.detach())  # adds zero
    return quantized


def towards(
    x: Tensor,  # [..., D]
    q: Tensor,  # [..., D]
    variance: Tensor,  # ()
) -> Tensor:
    """x + |q - x| d with d the direction of q - x + noise, held constant: DiVeQ, whose gradient reaches x and q.

    noise ~ N(0, variance). Source: DiVeQ (https://openreview.net/forum?id=KRVnpTbx7R), figure 1.
    """
    real = torch.promote_types(x.dtype, torch.float32)
    given = x.to(real)
    difference = q.to(real) - given
    with torch.no_grad():
        noised = difference + variance.to(real).sqrt() * torch.randn_like(difference)
        direction = F.normalize(noised, dim=-1, eps=TINY)
    return (given + direction * norm(difference)).to(x.dtype)


def norm(t: Tensor) -> Tensor:  # [..., D] -> [..., 1]
    """With a gradient of 0 at 0."""
    zero = (t == 0).all(-1, keepdim=True)
    return t.masked_fill(zero, 1).norm(dim=-1, keepdim=True).masked_fill(zero, 0)
