"""Cross entropy of given codes under the distances to all codes, block by block."""

import math

import torch
from torch import Tensor

from vqops.reference import soft
from vqops.reference.blocks import blocks
from vqops.reference.soft import Codes, Total


def code_cross_entropy(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    targets: Tensor,  # [H, N] int64, -1 for rows without a target
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:  # entropy [H, N] float32 (float64 for float64 x), total [2, H, N] float64, codebook
    """entropy = logsumexp_k(l) - l[target] with l_k = -|x - c_k|, or x.c_k for "cosine".

    The total (`Total`) and the copy of the codebook are for the backward. In float64 a row's pulls add up to 0, however
    far it is from the codes.
    """
    (H, N, D), K, real = x.shape, codebook.shape[1], torch.promote_types(x.dtype, torch.float32)
    entropy, saved = x.new_zeros(H, N, dtype=real), x.new_zeros(2, H, N, dtype=torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        for h in range(H):
            head = Codes(codebook[h], metric, real)
            for block in blocks(N, soft.rows_at_once(K, D)):
                rows, target = head.rows(x[h, block]), targets[h, block].unsqueeze(1)
                total, right = head.nothing(rows), torch.full_like(rows.unit, math.inf)
                for codes in blocks(K, soft.CODES):
                    costs = head.costs(rows, codes)
                    here, place = position(target, codes)
                    cost = (costs.gather(1, place) * rows.unit).masked_fill_(head.absent[codes][place] < 0, math.inf)
                    right = cost.where(here, right)
                    total = total.joined(head.softmax(costs, rows, codes, 1.0)[1], 1.0)
                found = (total.log + (right - total.lowest)).masked_fill_(~rows.finite | head.none, math.nan)
                entropy[h, block] = found.masked_fill_(target < 0, 0).squeeze(1)
                saved[:, h, block] = torch.cat(total, 1).mT
    return entropy, saved, codebook.clone(memory_format=torch.contiguous_format)


def code_cross_entropy_backward(
    grad: Tensor,  # [H, N]
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D], as it was in the forward
    targets: Tensor,  # [H, N] int64
    total: Tensor,  # [2, H, N] float64, of the forward
    metric: str,
    x_needed: bool,
    codebook_needed: bool,
) -> tuple[Tensor, Tensor]:  # grad_x [H, N, D] and grad_codebook [H, K, D], or [0]
    """grad (softmax_k(l) - [k = target]) times the gradients of l_k, summed over k for x and over rows for c_k.

    A row that is not finite has the gradient NaN, and sends nothing to the codebook.
    """
    (H, N, D), K, real = x.shape, codebook.shape[1], torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.zeros(x.shape if x_needed else 0, dtype=x.dtype, device=x.device)
    grad_c = torch.zeros(codebook.shape if codebook_needed else 0, dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for h in range(H):
            head = Codes(codebook[h], metric, real)
            for block in blocks(N, soft.rows_at_once(K, D)):
                rows, target = head.rows(x[h, block]), targets[h, block].unsqueeze(1)
                every = Total(*total[:, h, block].unsqueeze(2))
                factor = grad[h, block].to(real).unsqueeze(1).masked_fill(~rows.finite | (target < 0), 0)
                to_x = torch.zeros_like(rows.x, dtype=torch.float64)
                for codes in blocks(K, soft.CODES):
                    costs = head.costs(rows, codes)
                    pull, part = head.softmax(costs, rows, codes, 1.0)
                    pull *= every.share(part, 1.0).exp().to(real) * factor
                    here, place = position(target, codes)
                    pull.scatter_(1, place, pull.gather(1, place) - factor.masked_fill(~here, 0))
                    one, other = head.spread(pull, costs, rows, codes, 1.0, x_needed, codebook_needed)
                    if x_needed:
                        to_x += one
                    if codebook_needed:
                        grad_c[h, codes] += other
                if x_needed:
                    grad_x[h, block] = to_x.masked_fill_(~rows.finite & (target >= 0), math.nan).to(x.dtype)
    return grad_x, grad_c.to(codebook.dtype)


def position(target: Tensor, codes: slice) -> tuple[Tensor, Tensor]:  # [n, 1] -> bool, int64
    """Which targets are in the block of codes, and where; 0 for the others."""
    here = (target >= codes.start) & (target < codes.stop)
    return here, (target - codes.start).masked_fill_(~here, 0)
