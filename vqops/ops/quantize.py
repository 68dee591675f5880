"""Quantization in one op: search, gather, error and the sums for the EMA update, with the gradients of a bottleneck."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqops import reference
from vqops.dispatch.calls import call
from vqops.dispatch.library import Autograd, Implementation, define, select, without_second_derivative
from vqops.ops.checks import GRADIENTS, Gradient, Metric, check_choice, check_search, check_weight
from vqops.ops.heads import one_head, one_row, with_heads
from vqops.ops.search import PreparedCodebook, unpack
from vqops.pytorch import decomposition


class Quantized(NamedTuple):
    """The result of `quantize`. H is left out for a codebook [K, D]."""

    quantized: Tensor  # x's shape and dtype
    indices: Tensor  # int64, shape of x without D
    error: Tensor  # float32 (float64 for float64 x), shape of x without D
    counts: Tensor  # [H, K] as code_sums gives them, or [0]
    sums: Tensor  # [H, K, D] float32, or [0]


def quantize(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor | PreparedCodebook,  # [K, D] or [H, K, D]
    mask: Tensor | None = None,  # bool, shape of x without D; False leaves the row out
    weight: Tensor | None = None,  # shape of x without D, for the sums
    metric: Metric = "euclidean",
    gradient: Gradient = "straight_through",
    code_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,  # for "cosine"
    *,
    implementation: Implementation | None = None,
) -> Quantized:
    """Replace each vector by its nearest code, with a gradient that passes through.

    quantized = c[indices],  error = |x - quantized|^2,  counts and sums as `code_sums` (only with code_sums=True).

    Gradients. quantized sends to x, by `gradient`: "straight_through" g itself; "rotation" g turned and scaled as x is
    onto its code (arXiv 2410.06424); "none" nothing. error sends 2 (x - q) to x, and codebook_error_scale 2 (q - x) to
    the codebook: 0 for an EMA codebook, 1/beta for the loss of van den Oord et al. 2017 when error is weighted by beta.
    quantized sends nothing to the codebook. The backward uses the codebook as it was in the forward, also when an EMA
    update changes it in between. Second derivatives raise NotImplementedError.

    A rotation scales by min(|q| / |x|, 1000). Where |x| or |q| is at most 1e-6 there is no direction to turn, and g
    passes as it does for "straight_through".

    "cosine" takes the code of the largest x.c / |c|. In all else y = x / max(|x|, 1e-6) stands for x:

    error = |y - quantized|^2,  sums of y,  gradients of y, which then go through the division.

    With normalize=False, y = x: only the search is by direction, as in Descript's DAC (arXiv 2306.06546), which
    minimises | x/|x| - c/|c| |, and in RQ-VAEs that compare cosines. "euclidean" always has y = x.

    Masked rows: quantized, error and gradients 0, index -1. Rows with a NaN or Inf: quantized and error NaN, index -1,
    left out of counts and sums; quantized's gradient passes, error's is NaN.

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, RuntimeError for a stale preparation.

    Equivalent to:
        indices = nearest(x, codebook)
        quantized = x + (codebook[indices] - x).detach()
        error = (x - codebook[indices].detach()).square().sum(-1)
        return quantized, indices, error
    """
    op = "quantize"
    codebook, packed = unpack(op, codebook, metric, implementation)
    check_search(op, x, codebook, mask, metric)
    check_weight(op, weight, x.shape[:-1])
    check_choice(op, "gradient", gradient, GRADIENTS)
    how = metric, gradient, code_sums, codebook_error_scale, normalize, implementation
    return quantize_rows(x, codebook, packed, mask, weight, *how)


def quantize_rows(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor,  # [K, D] or [H, K, D]
    packed: Tensor | None,  # of its preparation
    mask: Tensor | None,  # bool, shape of x without D
    weight: Tensor | None,  # shape of x without D
    metric: Metric,
    gradient: Gradient,
    code_sums: bool,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    implementation: Implementation | None = None,
) -> Quantized:
    """`quantize` of arguments that are checked."""
    needed = torch.is_grad_enabled() and (x.requires_grad or codebook.requires_grad)
    how = metric, gradient, code_sums, codebook_error_scale, normalize, needed, packed
    op = select("quantize", implementation)
    return Quantized(*call(in_heads, op, x, codebook, mask, weight, *how, needed=needed)[:5])


def in_heads(op, x, codebook, mask, weight, *how):
    """The op in the callers' shapes, but for what it keeps for its backward."""
    if codebook.dim() == 3:
        return op(x, codebook, mask, weight, *how)
    heads = with_heads(x, codebook)
    quantized, indices, error, counts, sums, old = op(heads.x, heads.codebook, heads.row(mask), heads.row(weight), *how)
    rows, codes = heads.rows_back, heads.codes_back
    return rows(quantized), rows(indices), rows(error), codes(counts), codes(sums), old


def fake_quantize(
    x,
    codebook,
    mask=None,
    weight=None,
    metric="euclidean",
    gradient="straight_through",
    code_sums=False,
    codebook_error_scale=0.0,
    normalize=True,
    snapshot=True,
    prepared=None,
):
    (H, N, _), (_, K, D) = x.shape, codebook.shape
    counted = torch.int64 if weight is None or not code_sums else torch.float32
    return (
        x.new_empty(x.shape),
        x.new_empty((H, N), dtype=torch.int64),
        x.new_empty((H, N), dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty((H, K) if code_sums else 0, dtype=counted),
        x.new_empty((H, K, D) if code_sums else 0, dtype=torch.float32),
        codebook.new_empty((H, K, D) if snapshot else 0),
    )


def save_for_backward(ctx, inputs, output):
    x, codebook, mask, _, ctx.metric, ctx.gradient, _, ctx.codebook_error_scale, ctx.normalize, snapshot, _ = inputs
    _, indices, _, counts, sums, old = output
    if not snapshot:
        raise RuntimeError("quantize: a gradient is needed, so call it with snapshot=True")
    ctx.mark_non_differentiable(indices, counts, sums, old)
    ctx.set_materialize_grads(False)
    ctx.single = codebook.dim() == 2
    ctx.save_for_backward(x, old, indices, mask)


def backward(ctx, grad_quantized, _indices, grad_error, *_unused, op):
    x, old, indices, mask = ctx.saved_tensors
    x_needed, codebook_needed = ctx.needs_input_grad[:2]
    codebook_needed = codebook_needed and ctx.codebook_error_scale != 0
    rows = grad_quantized, grad_error, x, indices, mask
    if ctx.single:
        rows = one_head(grad_quantized), one_row(grad_error), one_head(x), one_row(indices), one_row(mask)
    how = ctx.metric, ctx.gradient, ctx.codebook_error_scale, ctx.normalize, x_needed, codebook_needed
    grad_x, grad_codebook = op(*rows[:3], old, *rows[3:], *how)
    if ctx.single:
        grad_x = grad_x.view(x.shape) if x_needed else None
        grad_codebook = grad_codebook.squeeze(0) if codebook_needed else None
    return grad_x if x_needed else None, grad_codebook if codebook_needed else None, *[None] * 9


def fake_backward(
    grad_quantized,
    grad_error,
    x,
    codebook,
    indices,
    mask=None,
    metric="euclidean",
    gradient="straight_through",
    codebook_error_scale=0.0,
    normalize=True,
    x_needed=True,
    codebook_needed=False,
):
    grad_x = x.new_empty(x.shape if x_needed else 0)
    return grad_x, codebook.new_empty(codebook.shape if codebook_needed else 0)


def of_other_ops(*arguments):
    ops = torch.ops.vqops
    return reference.quantize(*arguments, find_nearest=ops.nearest, sum_codes=ops.code_sums)


define(
    "quantize_backward",
    "(Tensor? grad_quantized, Tensor? grad_error, Tensor x, Tensor codebook, Tensor indices, Tensor? mask=None, "
    "str metric='euclidean', str gradient='straight_through', float codebook_error_scale=0.0, bool normalize=True, "
    "bool x_needed=True, bool codebook_needed=False) -> (Tensor, Tensor)",
    fake_backward,
    autograd=without_second_derivative("quantize_backward"),
)
define(
    "quantize",
    "(Tensor x, Tensor codebook, Tensor? mask=None, Tensor? weight=None, str metric='euclidean', "
    "str gradient='straight_through', bool code_sums=False, float codebook_error_scale=0.0, bool normalize=True, "
    "bool snapshot=True, Tensor? prepared=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake_quantize,
    fallback=of_other_ops,
    autograd=Autograd(save_for_backward, backward, "quantize_backward"),
    decomposition=decomposition.quantize,
)
