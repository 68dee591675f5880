"""Gather: after the search, one pass that takes each row's code, adds up its error and, by atomic additions, the sums
of an EMA update.

Read: x once, codes from cache. Written: the quantized rows and an error each.
"""

import torch
import triton
import triton.language as tl

from vqops.reference import TINY
from vqops.triton_kernels.blocks import gathered, hot_rows
from vqops.triton_kernels.code_sums import add_rows, rivals_of
from vqops.triton_kernels.distance import squared_norm
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.strides import strides

SMALLEST_NORM = tl.constexpr(TINY)


@triton.jit
def stored_as(value, dtype: tl.constexpr):
    """value in the dtype of a result, rounded to nearest. The interpreter cuts bfloat16 where hardware rounds it."""
    if dtype == tl.bfloat16:
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        result = tl.where(value == value, even.to(tl.float32, bitcast=True), value).to(tl.bfloat16)
    else:
        result = value.to(dtype)
    return result


@Kept
@triton.jit(do_not_specialize=["rows", "N"])
def norms_kernel(
    x,  # [H, N, D]
    norms,  # [H, N] float64
    rows, N, D, h_stride, n_stride, i_stride, A: tl.constexpr,
):  # fmt: skip
    """max(|x|, 1e-6) of each row in float64, in the order of distance.py."""
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    live = row < rows
    h = row // N
    given = (x + h * h_stride + (row - h * N) * n_stride)[:, None]
    square, _ = squared_norm(given, i_stride, live[:, None], D)
    tl.store(norms + row, tl.maximum(tl.sqrt(square), tl.full((A,), SMALLEST_NORM, tl.float64)), mask=live)


@Kept
@triton.jit(do_not_specialize=["rows", "N", "K", "mask_h_stride", "w_h_stride"])
def gather_kernel(
    x,  # [H, N, D]
    codebook,  # [H, K, D]
    indices,  # [H, N] int64
    mask,  # [H, N] bool, or None
    norms,  # [H, N] float64 for cosine, else None
    quantized,  # [H, N, D]
    error,  # [H, N]
    weight,  # [H, N], or None, of the sums
    counts,  # [H, K] int64, float32 with weight, and
    sums,  # [H, K, D] float32, or None
    rows, N, K, D, h_stride, n_stride, i_stride,
    c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride, w_h_stride, w_n_stride,
    HOT: tl.constexpr, A: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    inside = row < rows
    h = row // N
    n = row - h * N
    k = tl.load(indices + row, mask=inside, other=-1)
    chosen = k >= 0
    absent = tl.where(inside, float("nan"), 0.0)  # rows without a code: NaN, or 0 where masked
    if mask is not None:
        keeps = tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
        absent = tl.where(keeps, absent, 0.0)
    if sums is not None:
        place = tl.where(chosen, h * K + k, -1)
        rivals = rivals_of(place, chosen)
        if weight is None:
            one = chosen.to(tl.int64)
        else:
            one = tl.load(weight + h * w_h_stride + n * w_n_stride, mask=chosen, other=0.0).to(tl.float32)
    total = tl.zeros((A,), tl.float64)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        there = chosen[:, None] & (i < D)
        given = tl.load(x + (h * h_stride + n * n_stride)[:, None] + i * i_stride, mask=there, other=0.0).to(tl.float64)
        if norms is not None:
            given = given / tl.load(norms + row, mask=chosen, other=1.0)[:, None]
        q = tl.load(codebook + (h * c_h_stride + k * c_k_stride)[:, None] + i * c_i_stride, mask=there, other=0.0)
        e = given - q.to(tl.float64)
        total += tl.sum(e * e, 1)
        value = tl.where(chosen[:, None], q.to(error.dtype.element_ty), absent[:, None].to(error.dtype.element_ty))
        value = stored_as(value, quantized.dtype.element_ty)
        tl.store(quantized + row[:, None] * D + i, value, mask=inside[:, None] & (i < D))
        if sums is not None:
            added = given.to(tl.float32)
            if weight is not None:
                added = added * one[:, None]
            add_rows(sums, counts, added, one, place, rivals, i, D, d == 0, HOT)
    total = tl.where(chosen, total, absent)
    tl.store(error + row, total.to(error.dtype.element_ty), mask=inside)


def norms_of(x):  # [H, N, D] -> [H, N] float64
    H, N, D = x.shape
    norms = x.new_empty((H, N), dtype=torch.float64)
    with torch.cuda.device_of(x):
        norms_kernel[(cdiv(H * N, 64),)](
            x, norms, H * N, N, D, *strides(x, 3), 64, num_warps=4, enable_fp_fusion=False
        )
    return norms


def gather(x, codebook, indices, mask, units, weight=None, counts=None, sums=None):
    """Quantized [H, N, D], error [H, N], and where rows become units their norms [H, N], else None. The rows are added
    to counts and sums, if they are given."""
    H, N, D = x.shape
    quantized = x.new_empty((H, N, D))
    error = x.new_empty((H, N), dtype=torch.promote_types(x.dtype, torch.float32))
    if indices.numel() == 0:
        return quantized, error, None
    norms = norms_of(x) if units else None
    rows, step = gathered(D, x.device)
    with torch.cuda.device_of(x):
        gather_kernel[(cdiv(H * N, rows),)](
            x, codebook, indices, mask, norms, quantized, error, weight, counts, sums,
            H * N, N, codebook.shape[1], D, *strides(x, 3), *strides(codebook, 3), *strides(mask, 2),
            *strides(weight, 2), hot_rows(rows), rows, step, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return quantized, error, norms
