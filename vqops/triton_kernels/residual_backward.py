"""Backward of residual_quantize: one pass in which each row walks through its levels.

What is left of a row, its gradient and the sum of its gradients stay in registers. Read: the gradient and x once, codes
from cache. Written: grad_x once. Gradients of codebooks take another walk, a level a pass, as the rows that a level
sums by code need room.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl

from vqops.reference.residual import rows_of_level
from vqops.triton_kernels.blocks import walked_rows
from vqops.triton_kernels.gather import stored_as
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.quantize_backward import (
    divisor_of,
    length,
    over,
    quantize_backward,
    through_division,
    turn_back,
)
from vqops.triton_kernels.residual import less, take_off
from vqops.triton_kernels.strides import strides


@Kept
@triton.jit(do_not_specialize=["rows", "N", "Q", "e_h_stride", "e_q_stride", "mask_h_stride", "mask_n_stride"])
def residual_backward_kernel(
    grad_quantized,  # [H, N, D], or None
    grad_error,  # [H, Q], or None
    x,  # [H, N, D]
    codebooks,  # [H, sum K, D]
    starts,  # [Q] int64, where a level's codes start
    indices,  # [H, N, Q] int64
    mask,  # [H, N] bool, or None
    levels,  # () int64, or None
    grad_x,  # [H, N, D]
    rows, N, D, Q,
    g_h_stride, g_n_stride, g_i_stride, e_h_stride, e_q_stride, h_stride, n_stride, i_stride,
    c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride,
    WIDE: tl.constexpr, UNITS: tl.constexpr, ROTATE: tl.constexpr, PER_LEVEL: tl.constexpr,
    A: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    of_rest: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    inside = row < rows
    h = row // N
    n = row - h * N
    keeps = inside
    if mask is not None:
        keeps &= tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
    i = tl.arange(0, BD).to(tl.int64)[None, :]
    there = keeps[:, None] & (i < D)
    place = x + (h * h_stride + n * n_stride)[:, None] + i * i_stride
    rest = tl.load(place, mask=there, other=0.0).to(of_rest)
    total = tl.zeros((A, BD), of_rest)
    passing = tl.zeros((A, BD), real)
    if grad_quantized is not None:
        at = grad_quantized + (h * g_h_stride + n * g_n_stride)[:, None] + i * g_i_stride
        passing = tl.load(at, mask=there, other=0.0).to(real)
    result = tl.zeros((A, BD), real)
    running = Q
    if levels is not None:
        running = tl.minimum(tl.load(levels), Q).to(tl.int32)
    for level in range(0, running):
        g = passing if PER_LEVEL else tl.zeros((A, BD), real)
        if UNITS or ROTATE or grad_error is not None:
            k = tl.load(indices + row * Q + level, mask=keeps, other=-1)
            code = codebooks + (h * c_h_stride + (tl.load(starts + level) + k) * c_k_stride)[:, None]
            q = tl.load(code + i * c_i_stride, mask=there & (k >= 0)[:, None], other=0.0).to(real)
            q = tl.where(there & (k < 0)[:, None], float("nan"), q)
            given = rest.to(real)
            if UNITS or (ROTATE and PER_LEVEL):
                x_length = length(given)
                norm = divisor_of(x_length)
                if UNITS:
                    given = over(given, norm)
                if ROTATE and PER_LEVEL:
                    g = turn_back(g, given, q, x_length)
            if grad_error is not None:
                factor = tl.load(grad_error + h * e_h_stride + level * e_q_stride, mask=keeps, other=0.0).to(real)
                g += 2 * (given - q) * factor[:, None]
            if UNITS:
                g = through_division(g, given, norm)
            rest = less(rest, q)
            if ROTATE and not PER_LEVEL:
                total += q.to(of_rest)
        result += g
    if not PER_LEVEL:
        if ROTATE:
            given = tl.load(place, mask=there, other=0.0).to(real)
            passing = turn_back(passing, given, total.to(real), length(given))
        result += passing
    result = tl.where(keeps[:, None], result, 0.0)
    tl.store(grad_x + row[:, None] * D + i, stored_as(result, grad_x.dtype.element_ty), mask=inside[:, None] & (i < D))


def starts_of(sizes, device):  # -> [Q] int64
    """Filled in on the device: a copy of numbers from the host would wait for it."""
    if len(set(sizes)) == 1:
        return torch.arange(0, sum(sizes), sizes[0], device=device)
    return torch.stack([torch.full((), start, device=device) for start in accumulate(sizes[:-1], initial=0)])


def codebook_gradients(grad_error, x, codebooks, indices, mask, levels, metric, scale, normalize):
    """Of each level, as `quantize_backward` has them of what is left. Views are copied: Triton would compile anew for
    one that does not start at a multiple of 16 bytes."""
    (H, N, D), Q = x.shape, len(codebooks)
    real = torch.promote_types(x.dtype, torch.float32)
    given, gradients = x, []
    rest = x.new_empty((H, N, D), dtype=real) if Q > 1 else None
    for level, codebook in enumerate(codebooks):
        kept, e = rows_of_level(mask, levels, level, x), grad_error[:, level, None].repeat(1, N)
        chosen, codebook = (t.clone(memory_format=torch.contiguous_format) for t in (indices[..., level], codebook))
        how = metric, "none", scale, normalize, False, True
        gradients.append(quantize_backward(None, e, given, codebook, chosen, None, *how)[1])
        if rest is not None:
            take_off(given, codebook, chosen, kept, None, rest, None, None, None, None, Q, level)
        given = rest
    return torch.cat(gradients, 1)


def residual_quantize_backward(
    grad_quantized,
    grad_error,
    x,
    codebooks,
    sizes,
    indices,
    mask=None,
    levels=None,
    metric="euclidean",
    gradient="straight_through",
    per_level=True,
    codebook_error_scale=0.0,
    normalize=True,
    x_needed=True,
    codebooks_needed=False,
):
    (H, N, D), Q = x.shape, len(sizes)
    wide = torch.float64 in (x.dtype, codebooks.dtype)
    grad_x = x.new_empty((H, N, D) if x_needed else 0)
    g = None if gradient == "none" else grad_quantized
    rotate = gradient == "rotation" and g is not None
    rows, width = walked_rows(D, wide, x.device)
    if grad_x.numel():
        with torch.cuda.device_of(x):
            residual_backward_kernel[(cdiv(H * N, rows),)](
                g, grad_error, x, codebooks, starts_of(sizes, x.device), indices.contiguous(), mask, levels, grad_x,
                H * N, N, D, Q, *strides(g, 3), *strides(grad_error, 2), *strides(x, 3), *strides(codebooks, 3),
                *strides(mask, 2), wide, metric == "cosine" and normalize, rotate, per_level, rows, width,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    if not codebooks_needed:
        return grad_x, codebooks.new_empty(0)
    if grad_error is None or not indices.numel():
        return grad_x, codebooks.new_zeros(codebooks.shape)
    how = metric, codebook_error_scale, normalize
    return grad_x, codebook_gradients(grad_error, x, codebooks.split(sizes, 1), indices, mask, levels, *how)
