"""Backward of quantize: one pass over the rows, each of which needs only itself and its code.

Read: the gradient and x once, codes from cache. Written: grad_x once. No rotation matrix is built. A gradient of the
codebook adds a row of differences each, which are then summed as in code_sums.py.
"""

import torch
import triton
import triton.language as tl

from vqops.reference import LARGEST_SCALE
from vqops.triton_kernels.blocks import whole_rows
from vqops.triton_kernels.code_sums import runs_of, sum_in_order
from vqops.triton_kernels.gather import SMALLEST_NORM, stored_as
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.strides import strides

MOST = tl.constexpr(LARGEST_SCALE)


@triton.jit
def length(v):
    """The norm of each row, with correctly rounded root."""
    square = tl.sum(v * v, 1)
    return tl.sqrt(square) if v.dtype == tl.float64 else tl.sqrt_rn(square)


@triton.jit
def divisor_of(norm):
    """max(norm, 1e-6), where NaN stays NaN."""
    least = tl.full(norm.shape, SMALLEST_NORM, norm.dtype)
    return tl.where(norm < least, least, norm)


@triton.jit
def over(v, divisor):
    """v / divisor, correctly rounded: float32 division is approximate by default."""
    divisor = tl.broadcast_to(divisor[:, None], v.shape)
    return v / divisor if v.dtype == tl.float64 else tl.div_rn(v, divisor)


@triton.jit
def turn_back(g, x, q, x_length):
    """(|q| / |x|) (g - 2 w (w.g) + 2 u (v.g)), u = x / |x|, v = q / |q|, w = (u + v) / |u + v|: the transpose of the
    rotation and scaling that takes x to q (arXiv 2410.06424, section 4.2). Without a direction, g itself."""
    least = tl.full(x_length.shape, SMALLEST_NORM, g.dtype)
    x_norm = divisor_of(length(x))
    q_norm = length(q)
    u = over(x, x_norm)
    v = over(q, divisor_of(q_norm))
    w = over(u + v, divisor_of(length(u + v)))
    turned = g - 2 * tl.sum(w * g, 1)[:, None] * w + 2 * tl.sum(v * g, 1)[:, None] * u
    scale = over(q_norm[:, None], x_norm)
    scale = tl.where(scale > MOST, tl.full(scale.shape, MOST, g.dtype), scale)  # NaN stays NaN
    return tl.where(((x_length <= least) | (q_norm <= least))[:, None], g, turned * scale)


@triton.jit
def through_division(g, unit, norm):
    """The gradient of x from that of its unit, x / norm, norm = max(|x|, 1e-6)."""
    along = tl.where(norm > tl.full(norm.shape, SMALLEST_NORM, g.dtype), tl.sum(unit * g, 1), 0.0)
    return over(g - along[:, None] * unit, norm)


@Kept
@triton.jit(do_not_specialize=["rows", "N", "e_h_stride", "mask_h_stride"])
def quantize_backward_kernel(
    grad_quantized,  # [H, N, D], or None
    grad_error,  # [H, N], or None
    x,  # [H, N, D]
    codebook,  # [H, K, D]
    indices,  # [H, N] int64
    mask,  # [H, N] bool, or None
    grad_x,  # [H, N, D], or None
    pull,  # [H, N, D], each row's share in the codebook's gradient; None where it is not wanted
    rows, N, D,
    g_h_stride, g_n_stride, g_i_stride, e_h_stride, e_n_stride, h_stride, n_stride, i_stride,
    c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride,
    WIDE: tl.constexpr, UNITS: tl.constexpr, ROTATE: tl.constexpr, A: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    if WIDE:
        real: tl.constexpr = tl.float64
    else:
        real: tl.constexpr = tl.float32
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    inside = row < rows
    h = row // N
    n = row - h * N
    keeps = inside
    if mask is not None:
        keeps &= tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
    k = tl.load(indices + row, mask=inside, other=-1)
    i = tl.arange(0, BD).to(tl.int64)[None, :]
    there = keeps[:, None] & (i < D)
    given = tl.load(x + (h * h_stride + n * n_stride)[:, None] + i * i_stride, mask=there, other=0.0).to(real)
    x_length = length(given)
    norm = divisor_of(x_length)
    if UNITS:
        given = over(given, norm)
    coded = there & (k >= 0)[:, None]
    q = tl.load(codebook + (h * c_h_stride + k * c_k_stride)[:, None] + i * c_i_stride, mask=coded, other=0.0).to(real)
    q = tl.where(there & (k < 0)[:, None], float("nan"), q)
    g = tl.zeros((A, BD), real)
    if grad_quantized is not None:
        at = grad_quantized + (h * g_h_stride + n * g_n_stride)[:, None] + i * g_i_stride
        g = tl.load(at, mask=there, other=0.0).to(real)
        if ROTATE:
            g = turn_back(g, given, q, x_length)
    if grad_error is not None:
        factor = tl.load(grad_error + h * e_h_stride + n * e_n_stride, mask=keeps, other=0.0).to(real)
        difference = 2 * (given - q) * factor[:, None]
        g += difference
        if pull is not None:
            tl.store(pull + row[:, None] * D + i, -difference, mask=coded)
    if grad_x is not None:
        if UNITS:
            g = through_division(g, given, norm)
        g = tl.where(keeps[:, None], g, 0.0)
        tl.store(grad_x + row[:, None] * D + i, stored_as(g, grad_x.dtype.element_ty), mask=inside[:, None] & (i < D))


def quantize_backward(
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
    H, N, D = x.shape
    real = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    indices = indices.contiguous()
    grad_x = x.new_empty((H, N, D)) if x_needed else None
    pulled = codebook_needed and grad_error is not None and indices.numel() > 0
    pull = x.new_empty((H, N, D), dtype=real) if pulled else None
    g = None if gradient == "none" else grad_quantized
    rows, width = whole_rows(D, x.device)
    with torch.cuda.device_of(x):
        if indices.numel() and (x_needed or pulled):
            quantize_backward_kernel[(cdiv(H * N, rows),)](
                g, grad_error, x, codebook, indices, mask, grad_x, pull, H * N, N, D,
                *strides(g, 3), *strides(grad_error, 2), *strides(x, 3), *strides(codebook, 3), *strides(mask, 2),
                real == torch.float64, metric == "cosine" and normalize, gradient == "rotation", rows, width,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        grad_codebook = codebook.new_zeros(codebook.shape) if codebook_needed else codebook.new_empty(0)
        if pulled:
            sums = sum_in_order(pull, runs_of(indices, codebook.shape[1]), codebook.shape[1], dtype=real)
            grad_codebook = sums.mul_(codebook_error_scale).to(codebook.dtype)
    return x.new_empty(0) if grad_x is None else grad_x, grad_codebook
