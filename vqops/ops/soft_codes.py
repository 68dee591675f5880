"""The mean of all codes under the softmax of their distances, without a matrix of distances."""

from torch import Tensor

from vqops.dispatch.library import Autograd, Implementation, define, select, without_second_derivative
from vqops.ops.checks import Metric, check_scalar, check_search
from vqops.ops.heads import with_heads


def soft_codes(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor,  # [K, D] or [H, K, D]
    temperature: Tensor | float,  # > 0; a 0-d tensor where it changes from step to step
    mask: Tensor | None = None,  # bool, shape of x without D
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # x's dtype and shape; 0 for masked rows
    """sum_k p_k c_k with p = softmax_k(l / temperature), l_k = -|x - c_k|, or x.c_k for "cosine" (of vectors that the
    caller normalised).

    The softmax is summed block by block of distances, and its backward computes them again: memory grows with N + K.
    Gradients flow to x and to the codebook, through p and through c, with the codebook's values at the time of the
    call; none to the temperature. A code that is not finite has probability 0. A row that is not finite becomes NaN, as
    its gradient, and sends nothing to the codebook. Second derivatives raise NotImplementedError. Straight through,
    `q + y - y.detach()` has the value of the code q and the gradient of y. Source: Jang et al. 2017.

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, ValueError for a number that is no
    temperature.

    Equivalent to:
        logits = -(x[..., None, :] - codebook).norm(dim=-1)
        return (logits / temperature).softmax(-1) @ codebook
    """
    op = "soft_codes"
    check_search(op, x, codebook, mask, metric)
    temperature = check_scalar(op, "temperature", temperature, x)
    heads = with_heads(x, codebook)
    found = select(op, implementation)(heads.x, heads.codebook, temperature, heads.row(mask), metric)
    return heads.rows_back(found[0])


def fake_soft_codes(x, codebook, temperature, mask=None, metric="euclidean"):
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


def save_for_backward(ctx, inputs, output):
    x, _, temperature, mask, ctx.metric = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], temperature, mask)


def backward(ctx, grad, _unused, *, op):
    x_needed, codebook_needed = ctx.needs_input_grad[:2]
    grad_x, grad_codebook = op(grad, *ctx.saved_tensors, ctx.metric, x_needed, codebook_needed)
    return grad_x if x_needed else None, grad_codebook if codebook_needed else None, None, None, None


def fake_backward(grad, x, codebook, temperature, mask, metric, x_needed, codebook_needed):
    return x.new_empty(x.shape if x_needed else 0), codebook.new_empty(codebook.shape if codebook_needed else 0)


define(
    "soft_codes_backward",
    "(Tensor grad, Tensor x, Tensor codebook, Tensor temperature, Tensor? mask, str metric, bool x_needed, "
    "bool codebook_needed) -> (Tensor, Tensor)",
    fake_backward,
    autograd=without_second_derivative("soft_codes_backward"),
)
define(
    "soft_codes",
    "(Tensor x, Tensor codebook, Tensor temperature, Tensor? mask=None, str metric='euclidean') -> (Tensor, Tensor)",
    fake_soft_codes,
    autograd=Autograd(save_for_backward, backward, "soft_codes_backward"),
)
