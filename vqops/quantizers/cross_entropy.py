"""Cross entropy of given codes under the distances to all codes, without a matrix of distances."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.ops.library import no_second_derivative
from vqops.reference import TINY
from vqops.reference.blocks import blocks

ROWS, CODES = 1024, 1024  # of one block of distances: 8 MB in float64


def mean_cross_entropy(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    targets: Tensor,  # [H, N] int64
    mask: Tensor | None,  # [H, N] bool
    metric: str,
) -> Tensor:  # ()
    """The mean of `code_cross_entropy` over the rows that are not masked and whose target is not -1; 0 of none."""
    if metric == "cosine":
        x, codebook = normalized(x), normalized(codebook)
    if mask is not None:
        targets = targets.masked_fill(~mask, -1)
    return code_cross_entropy(x, codebook, targets, metric).sum() / (targets >= 0).sum().clamp_min(1)


def normalized(t: Tensor) -> Tensor:
    return F.normalize(t.to(real_dtype(t)), dim=-1, eps=TINY)


def code_cross_entropy(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    targets: Tensor,  # [H, N] int64, -1 for rows without a target
    metric: str,
) -> Tensor:  # [H, N] float32 (float64 for float64 x), 0 without a target
    """-log softmax_k(l)[target] with l_k = -|x - c_k|, or x.c_k for "cosine" (of vectors that the caller normalised).

    The softmax is summed block by block of at most 1024 x 1024 distances, and its backward computes them again: memory
    grows with N + K. The gradient to the codebook is that of its values at the time of the call. A code that is not
    finite has probability 0. Second derivatives raise NotImplementedError.
    """
    return torch.ops.vqops.code_cross_entropy(x, codebook, targets, metric)[0]


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


def real_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


@torch.library.custom_op("vqops::code_cross_entropy", mutates_args=())
def forward(x: Tensor, codebook: Tensor, targets: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """The cross entropy, the log of the softmax's denominator, and the codebook that the backward needs."""
    (H, N, _), K, real = x.shape, codebook.shape[1], real_dtype(x)
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


def position(target: Tensor, codes: slice) -> tuple[Tensor, Tensor]:  # [n] bool, [n, 1] int64
    """Which targets are in the block of codes, and where; 0 for the others."""
    here = (target >= codes.start) & (target < codes.stop)
    return here, (target - codes.start).where(here, 0).unsqueeze(1)


@forward.register_fake
def fake(x, codebook, targets, metric):
    real = real_dtype(x)
    shape = x.shape[:2]
    return x.new_empty(shape, dtype=real), x.new_empty(shape, dtype=real), codebook.new_empty(codebook.shape)


@torch.library.custom_op("vqops::code_cross_entropy_backward", mutates_args=())
def backward(
    grad: Tensor,  # [H, N]
    x: Tensor,
    codebook: Tensor,
    targets: Tensor,
    total: Tensor,
    metric: str,
    x_needed: bool,
    codebook_needed: bool,
) -> tuple[Tensor, Tensor]:
    """a x - sum_k a_k c_k cancels near a code, so the sums over codes and rows are in float64, too."""
    (H, N, _), K, real = x.shape, codebook.shape[1], real_dtype(x)
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
                    pull.scatter_add_(1, place, -scale.where(here.unsqueeze(1), 0))
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


@backward.register_fake
def fake_backward(grad, x, codebook, targets, total, metric, x_needed, codebook_needed):
    return x.new_empty(x.shape if x_needed else 0), codebook.new_empty(codebook.shape if codebook_needed else 0)


def save_for_backward(ctx, inputs, output):
    x, _, targets, ctx.metric = inputs
    _, total, old = output
    ctx.mark_non_differentiable(total, old)
    ctx.save_for_backward(x, old, targets, total)


def gradients(ctx, grad, *_unused):
    x_needed, codebook_needed = ctx.needs_input_grad[:2]
    grad_x, grad_c = torch.ops.vqops.code_cross_entropy_backward(
        grad, *ctx.saved_tensors, ctx.metric, x_needed, codebook_needed
    )
    return grad_x if x_needed else None, grad_c if codebook_needed else None, None, None


forward.register_autograd(gradients, setup_context=save_for_backward)
backward.register_autograd(
    no_second_derivative("code_cross_entropy_backward"), setup_context=lambda ctx, inputs, output: None
)
