"""Quantization to codes that something other than a search for the nearest has chosen."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.ops.checks import Gradient, Metric
from vqops.reference import LARGEST_SCALE, TINY


class Chosen(NamedTuple):
    quantized: Tensor  # [H, N, k, D], dtype of x
    indices: Tensor  # [H, N, k] int64
    error: Tensor  # [H, N, k] float32 (float64 for float64 x)


def quantize_chosen(
    x: Tensor,  # [H, N, D]
    codes: Tensor,  # [H, N, k, D], those of the indices
    indices: Tensor,  # [H, N, k]; -1 without a code
    mask: Tensor | None,  # [H, N] bool
    metric: Metric,
    gradient: Gradient,
) -> Chosen:
    """`vqops.quantize` for k given codes of each row, with its gradients for codebook_error_scale=1. Everything is of
    size N x k x D.
    """
    real = torch.promote_types(x.dtype, torch.float32)
    start = x.to(real).unsqueeze(-2)
    length = start.detach().norm(dim=-1, keepdim=True)
    if metric == "cosine":
        start = F.normalize(start, dim=-1, eps=TINY)
    q = codes.to(real)
    absent = torch.zeros_like(indices, dtype=real).masked_fill_(indices < 0, math.nan)
    if mask is not None:
        off = ~mask.unsqueeze(-1)
        absent = absent.masked_fill(off, 0)
        start = start.masked_fill(off.unsqueeze(-1), 0)
        q = q.masked_fill(off.unsqueeze(-1), 0)
    error = (start - q).square().sum(-1) + absent
    q = q.detach()
    if gradient != "none":
        moved = start if gradient == "straight_through" else rotated(start, q, length)
        q = q + (moved - moved.detach())  # adds zero: the value is the code's to the last bit
    return Chosen((q + absent.unsqueeze(-1)).to(x.dtype), indices, error)


def rotated(
    x: Tensor,  # [..., D], as q is
    q: Tensor,
    given: Tensor,  # [..., 1], |x| before x was divided by it
) -> Tensor:
    """x turned and scaled onto q, with the turn and the scale held constant (arXiv 2410.06424, section 4.2), or x
    itself: by the rule of `vqops.reference.rotate_back`."""
    with torch.no_grad():
        x_norm, q_norm = x.norm(dim=-1, keepdim=True).clamp_min(TINY), q.norm(dim=-1, keepdim=True)
        u, v = x / x_norm, q / q_norm.clamp_min(TINY)
        w = F.normalize(u + v, dim=-1, eps=TINY)
        scale = (q_norm / x_norm).clamp_max_(LARGEST_SCALE)
    turned = (x - 2 * w * (w * x).sum(-1, keepdim=True) + 2 * v * (u * x).sum(-1, keepdim=True)) * scale
    return x.where((given <= TINY) | (q_norm <= TINY), turned)


def with_gradient_to(codes: Tensor | None, quantized: Tensor) -> Tensor:
    """The output with a gradient to its codes alone, if they have one."""
    quantized = quantized.detach()
    if codes is None or not codes.requires_grad:
        return quantized
    return quantized + (codes - codes.detach()).to(quantized.dtype)  # adds zero
