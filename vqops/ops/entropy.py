"""The entropy of the mean of soft assignments, without a matrix of distances."""

import torch
from torch import Tensor

from vqops.dispatch.library import Autograd, Implementation, define, select, without_second_derivative
from vqops.ops.checks import Metric, check_scalar, check_search


def assignment_entropy(
    x: Tensor,  # [G, M, D], or [H, G, M, D] with one codebook per head: G groups of M rows
    codebook: Tensor,  # [K, D] or [H, K, D]
    inverse_temperature: Tensor | float,  # > 0; a 0-d tensor where it changes from step to step
    mask: Tensor | None = None,  # bool, shape of x without D
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # [G] float32 (float64 for float64 x); 0 for a group without rows
    """-sum_k q_k log max(q_k, 1e-5), where q is the mean of p over a group's rows in all heads,
    p = softmax_k(l inverse_temperature) and l_k = -|x - c_k|, or x.c_k for "cosine" (of vectors that the caller
    normalised).

    The softmax is summed block by block of distances, and its backward computes them again: memory grows with N + K,
    in few large groups as in many small ones. The gradient to the codebook is that of its values at the time of the
    call; there is none to inverse_temperature. Rows that are masked or not finite are left out, with a gradient of 0. A
    code that is not finite has probability 0. Second derivatives raise NotImplementedError.

    Minus the mean of it, with positions as groups and the batch as rows, is the codebook diversity loss of
    vector-quantize-pytorch.

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, ValueError for a number that is no inverse
    temperature.

    Equivalent to:
        logits = -(x[..., None, :] - codebook).norm(dim=-1)
        q = (logits * inverse_temperature).softmax(-1).mean(1)
        return -(q * q.clamp(min=1e-5).log()).sum(-1)
    """
    op = "assignment_entropy"
    check_search(op, x, codebook, mask, metric, ("G", "M"))
    if codebook.dim() == 2 and x.dim() != 3:
        raise ValueError(f"{op}: x must be [G, M, D] for a codebook [K, D], got {list(x.shape)}")
    inverse_temperature = check_scalar(op, "inverse_temperature", inverse_temperature, x)
    if codebook.dim() == 2:
        x, codebook, mask = x.unsqueeze(0), codebook.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    return select(op, implementation)(x, codebook, inverse_temperature, mask, metric)[0]


def fake_assignment_entropy(x, codebook, inverse_temperature, mask=None, metric="euclidean"):
    (H, G, M, _), real = x.shape, torch.promote_types(x.dtype, torch.float32)
    means = x.new_empty((G, torch.sym_min(codebook.shape[1], H * M)), dtype=real)
    return x.new_empty(G, dtype=real), x.new_empty((3, H, G, M), dtype=real), means, codebook.new_empty(codebook.shape)


def save_for_backward(ctx, inputs, output):
    x, _, inverse_temperature, mask, ctx.metric = inputs
    _, saved, means, old = output
    ctx.mark_non_differentiable(saved, means, old)
    ctx.save_for_backward(x, old, inverse_temperature, mask, saved, means)


def backward(ctx, grad, *_unused, op):
    x_needed, codebook_needed = ctx.needs_input_grad[:2]
    grad_x, grad_codebook = op(grad, *ctx.saved_tensors, ctx.metric, x_needed, codebook_needed)
    return grad_x if x_needed else None, grad_codebook if codebook_needed else None, None, None, None


def fake_backward(grad, x, codebook, inverse_temperature, mask, saved, means, metric, x_needed, codebook_needed):
    return x.new_empty(x.shape if x_needed else 0), codebook.new_empty(codebook.shape if codebook_needed else 0)


define(
    "assignment_entropy_backward",
    "(Tensor grad, Tensor x, Tensor codebook, Tensor inverse_temperature, Tensor? mask, Tensor saved, Tensor means, "
    "str metric, bool x_needed, bool codebook_needed) -> (Tensor, Tensor)",
    fake_backward,
    autograd=without_second_derivative("assignment_entropy_backward"),
)
define(
    "assignment_entropy",
    "(Tensor x, Tensor codebook, Tensor inverse_temperature, Tensor? mask=None, str metric='euclidean') "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake_assignment_entropy,
    autograd=Autograd(save_for_backward, backward, "assignment_entropy_backward"),
)
