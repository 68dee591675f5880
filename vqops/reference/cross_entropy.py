"""Cross entropy of given codes under the distances to all codes, block by block."""

import torch
from torch import Tensor

from vqops.reference.blocks import blocks

ROWS, CODES = 1024, 1024  # of one block of distances: 8 MB in float64


def code_cross_entropy(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    targets: Tensor,  # [H, N] int64, -1 for rows without a target
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:  # entropy, total [H, N] float32 (float64 for float64 x); codebook [H, K, D]
    """entropy = total - l[target] with total = logsumexp_k(l) and l_k = -|x - c_k|, or x.c_k for "cosine".

    The total and the copy of the codebook are for the backward.
    """
    (H, N, _), K, real = x.shape, codebook.shape[1], torch.promote_types(x.dtype, torch.float32)
    entropy, total = x.new_zeros(H, N, dtype=real), x.new_full((H, N), -torch.inf, dtype=real)
    with torch.autocast(x.device.type, enabled=False):
        for h in range(H):
            head = Codes(codebook[h], metric)
            for rows in blocks(N, ROWS):
                given, target = x[h, rows].double() - head.centre, targets[h, rows]
                right = torch.full_like(entropy[h, rows], -torch.inf)
                for codes in blocks(K, CODES):
                    values = head.logits(given, codes, real)
                    total[h, rows] = torch.logaddexp(total[h, rows], values.logsumexp(1))
                    here, place = position(target, codes)
                    right = values.gather(1, place).squeeze(1).where(here, right)
                entropy[h, rows] = (total[h, rows] - right).masked_fill(target < 0, 0)
    return entropy, total, codebook.clone(memory_format=torch.contiguous_format)


def code_cross_entropy_backward(
    grad: Tensor,  # [H, N]
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D], as it was in the forward
    targets: Tensor,  # [H, N] int64
    total: Tensor,  # [H, N], of the forward
    metric: str,
    x_needed: bool,
    codebook_needed: bool,
) -> tuple[Tensor, Tensor]:  # grad_x [H, N, D] and grad_codebook [H, K, D], or [0]
    """p_k = grad (softmax_k(l) - [k = target]) times the gradients of l_k, summed over k for x and over rows for c_k.

    In float64, since a x - sum_k a_k c_k cancels near a code.
    """
    (H, N, _), K, real = x.shape, codebook.shape[1], total.dtype
    grad_x = torch.zeros(x.shape if x_needed else 0, dtype=torch.float64, device=x.device)
    grad_c = torch.zeros(codebook.shape if codebook_needed else 0, dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for h in range(H):
            head = Codes(codebook[h], metric)
            for rows in blocks(N, ROWS):
                given, target = x[h, rows].double() - head.centre, targets[h, rows]
                scale = grad[h, rows].to(real).masked_fill(target < 0, 0).unsqueeze(1)
                for codes in blocks(K, CODES):
                    values, block = head.logits(given, codes, real), head.values[codes]
                    here, place = position(target, codes)
                    pull = (values - total[h, rows].unsqueeze(1)).exp_().mul_(scale)
                    at = torch.arange(pull.shape[1], device=x.device) == place
                    pull -= scale.expand_as(pull).masked_fill(~(at & here.unsqueeze(1)), 0)
                    if head.euclidean:  # d(-|x - c|) / dx = (c - x) / |x - c|, taken as 0 where x = c
                        pull = (pull / -values).masked_fill_(values == 0, 0)
                    pull = pull.double()
                    if x_needed:
                        grad_x[h, rows] += pull @ block
                        if head.euclidean:
                            grad_x[h, rows] -= pull.sum(1, keepdim=True) * given
                    if codebook_needed:  # to which a row that is not finite sends nothing
                        finite = given.isfinite().all(1, keepdim=True)
                        pull = pull.masked_fill(~finite, 0)
                        grad_c[h, codes] += pull.mT @ given.masked_fill(~finite, 0)
                        if head.euclidean:
                            grad_c[h, codes] -= pull.sum(0).unsqueeze(1) * block
    return grad_x.to(x.dtype), grad_c.to(codebook.dtype)


class Codes:
    """The codes of one head in float64 and, for distances, around a centre: |x|^2 - 2 x.c + |c|^2 cancels far from 0.

    The centre is the median of each coordinate, which one huge code does not move.
    """

    def __init__(self, codes: Tensor, metric: str):  # [K, D]
        self.wrong = ~codes.isfinite().all(1)
        self.values = codes.double().masked_fill(self.wrong.unsqueeze(1), 0)
        self.euclidean = metric == "euclidean"
        middle = self.values.sort(0).values[len(codes) // 2]
        self.centre = middle if self.euclidean else torch.zeros_like(middle)
        self.values = self.values - self.centre
        self.square = self.values.square().sum(1)

    def logits(self, x: Tensor, codes: slice, dtype: torch.dtype) -> Tensor:  # x [n, D] around the centre -> [n, k]
        if self.euclidean:
            square = x.square().sum(1, keepdim=True) + self.square[codes]
            values = -square.addmm_(x, self.values[codes].mT, alpha=-2).clamp_min_(0).sqrt_()
        else:
            values = x @ self.values[codes].mT
        return values.to(dtype).masked_fill_(self.wrong[codes], -torch.inf)


def position(target: Tensor, codes: slice) -> tuple[Tensor, Tensor]:  # [n] bool, [n, 1] int64
    """Which targets are in the block of codes, and where; 0 for the others."""
    here = (target >= codes.start) & (target < codes.stop)
    return here, (target - codes.start).masked_fill_(~here, 0).unsqueeze(1)
