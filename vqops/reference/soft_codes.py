"""The mean of all codes under the softmax of their distances, block by block."""

import math

import torch
from torch import Tensor

from vqops.reference import soft
from vqops.reference.blocks import blocks
from vqops.reference.soft import Codes, Rows, Total, steepness


def soft_codes(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # ()
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor]:  # y [H, N, D]; the codebook for the backward
    """y = sum_k p_k c_k with p = softmax_k(l / temperature), l_k = -|x - c_k|, or x.c_k for "cosine".

    0 for rows that are masked, NaN for others that are not finite.
    """
    (H, N, D), K, real = x.shape, codebook.shape[1], torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        scale = steepness(temperature.double().reciprocal())
        for h in range(H):
            head = Codes(codebook[h], metric, real)
            for block in blocks(N, soft.rows_at_once(K, D)):
                rows = head.rows(x[h, block])
                mean = mean_under(head, rows, scale)[1] + head.centre
                mean = mean.masked_fill_(~rows.finite | head.none, math.nan).to(x.dtype)
                y[h, block] = mean if mask is None else mean.masked_fill_(~mask[h, block].unsqueeze(1), 0)
    return y, codebook.clone(memory_format=torch.contiguous_format)


def soft_codes_backward(
    grad: Tensor,  # [H, N, D]
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D], as it was in the forward
    temperature: Tensor,  # ()
    mask: Tensor | None,  # [H, N] bool
    metric: str,
    x_needed: bool,
    codebook_needed: bool,
) -> tuple[Tensor, Tensor]:  # grad_x [H, N, D] and grad_codebook [H, K, D], or [0]
    """p_k (g.c_k - g.y) / temperature times the gradients of l_k, and sum_n p_nk g_n to the codes.

    A row that is not finite has the gradient NaN, 0 where it is masked, and sends nothing to the codebook.
    """
    (H, N, D), K, real = x.shape, codebook.shape[1], torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.zeros(x.shape if x_needed else 0, dtype=x.dtype, device=x.device)
    grad_c = torch.zeros(codebook.shape if codebook_needed else 0, dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        scale = steepness(temperature.double().reciprocal())
        for h in range(H):
            head = Codes(codebook[h], metric, real)
            for block in blocks(N, soft.rows_at_once(K, D)):
                rows = head.rows(x[h, block])
                wanted = torch.ones_like(rows.finite) if mask is None else mask[h, block].unsqueeze(1)
                g = grad[h, block].to(real).masked_fill(~(rows.finite & wanted), 0)
                to_x = torch.zeros_like(rows.x, dtype=torch.float64)
                if K > soft.CODES:
                    total, level = mean_under(head, rows, scale, g)
                    level = level.to(real)
                for codes in blocks(K, soft.CODES):
                    costs = head.costs(rows, codes)
                    p, part = head.softmax(costs, rows, codes, scale)
                    gains = g @ head.rounded[codes].mT  # g.c_k around the centre
                    if K > soft.CODES:
                        p *= total.share(part, scale).exp().to(real)
                    else:
                        level = (p * gains).sum(1, keepdim=True)
                    if codebook_needed:
                        grad_c[h, codes] += (g.mT @ p).mT
                    pull = gains.sub_(level).mul_(p)
                    one, other = head.spread(pull, costs, rows, codes, scale, x_needed, codebook_needed)
                    if x_needed:
                        to_x += one
                    if codebook_needed:
                        grad_c[h, codes] += other
                if x_needed:
                    grad_x[h, block] = to_x.masked_fill_(~rows.finite & wanted, math.nan).to(x.dtype)
    return grad_x, grad_c.to(codebook.dtype)


def mean_under(head: Codes, rows: Rows, scale: Tensor, g: Tensor | None = None) -> tuple[Total, Tensor]:
    """The softmax over all codes, and its mean of the codes around the centre [n, D], or of g.c_k [n, 1]."""
    total = head.nothing(rows)
    mean = 0.0
    for codes in blocks(len(head.values), soft.CODES):
        p, part = head.softmax(head.costs(rows, codes), rows, codes, scale)
        both, values = total.joined(part, scale), head.rounded[codes]
        here = p @ values if g is None else (g @ values.mT).mul_(p).sum(1, keepdim=True)
        mean = mean * both.share(total, scale).exp() + here * both.share(part, scale).exp()
        total = both
    return total, mean
