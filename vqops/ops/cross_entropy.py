"""Cross entropy of given codes under the distances to all codes, without a matrix of distances."""

import torch
from torch import Tensor

from vqops.dispatch.library import Autograd, Implementation, define, select, without_second_derivative
from vqops.ops.checks import Metric, check_device, check_indices, check_search, check_shape
from vqops.ops.heads import with_heads


def code_cross_entropy(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor,  # [K, D] or [H, K, D]
    targets: Tensor,  # int64, shape of x without D; -1 for rows without a target
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # float32 (float64 for float64 x), shape of x without D; 0 without a target
    """-log softmax_k(l)[target] with l_k = -|x - c_k|, or x.c_k for "cosine" (of vectors that the caller normalised).

    The softmax is summed block by block of distances, and its backward computes them again: memory grows with N + K.
    The gradient to the codebook is that of its values at the time of the call. A code that is not finite has
    probability 0. A row that is not finite and has a target becomes NaN, as its gradient, and sends nothing to the
    codebook. Second derivatives raise NotImplementedError.

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, IndexError for a target that is no code.

    Equivalent to:
        logits = -(x[..., None, :] - codebook).norm(dim=-1)
        return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)
    """
    op = "code_cross_entropy"
    check_search(op, x, codebook, None, metric)
    check_device(op, x, targets=targets)
    check_shape(op, "targets", targets, x.shape[:-1], "of x without D")
    check_indices(op, targets, codebook.shape[-2], "targets")
    heads = with_heads(x, codebook)
    return heads.rows_back(select(op, implementation)(heads.x, heads.codebook, heads.row(targets), metric)[0])


def fake_cross_entropy(x, codebook, targets, metric):
    real = torch.promote_types(x.dtype, torch.float32)
    H, N, _ = x.shape
    total = x.new_empty((2, H, N), dtype=torch.float64)
    return x.new_empty((H, N), dtype=real), total, codebook.new_empty(codebook.shape)


def save_for_backward(ctx, inputs, output):
    x, _, targets, ctx.metric = inputs
    _, total, old = output
    ctx.mark_non_differentiable(total, old)
    ctx.save_for_backward(x, old, targets, total)


def backward(ctx, grad, *_unused, op):
    x_needed, codebook_needed = ctx.needs_input_grad[:2]
    grad_x, grad_codebook = op(grad, *ctx.saved_tensors, ctx.metric, x_needed, codebook_needed)
    return grad_x if x_needed else None, grad_codebook if codebook_needed else None, None, None


def fake_backward(grad, x, codebook, targets, total, metric, x_needed, codebook_needed):
    return x.new_empty(x.shape if x_needed else 0), codebook.new_empty(codebook.shape if codebook_needed else 0)


define(
    "code_cross_entropy_backward",
    "(Tensor grad, Tensor x, Tensor codebook, Tensor targets, Tensor total, str metric, bool x_needed, "
    "bool codebook_needed) -> (Tensor, Tensor)",
    fake_backward,
    autograd=without_second_derivative("code_cross_entropy_backward"),
)
define(
    "code_cross_entropy",
    "(Tensor x, Tensor codebook, Tensor targets, str metric) -> (Tensor, Tensor, Tensor)",
    fake_cross_entropy,
    autograd=Autograd(save_for_backward, backward, "code_cross_entropy_backward"),
)
