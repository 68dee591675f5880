"""Quantize: after the search, one pass that gathers the codes and adds up the errors. Read: x once, codes from cache.
Written: the quantized rows and an error each. The sums of an EMA update read x once more (code_sums.py).
"""

import torch
import triton
import triton.language as tl

from vqops.reference import TINY
from vqops.triton_kernels.blocks import tile
from vqops.triton_kernels.code_sums import code_sums as sum_codes
from vqops.triton_kernels.lanes import row_facts, stored_as
from vqops.triton_kernels.search import nearest

SMALLEST = tl.constexpr(TINY)


@triton.jit
def norms_kernel(x, norms, rows, N, D, h_stride, n_stride, i_stride, A: tl.constexpr):
    """max(|x|, 1e-6) of each row in float64, in the order of lanes.py."""
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    live = row < rows
    h = row // N
    start = (x + h * h_stride + (row - h * N) * n_stride)[:, None]
    square, _ = row_facts(start, i_stride, live[:, None], D)
    tl.store(norms + row, tl.maximum(tl.sqrt(square), tl.full((A,), SMALLEST, tl.float64)), mask=live)


@triton.jit
def gather_kernel(
    x, codebook, indices, mask, norms, quantized, error, rows, N, D, h_stride, n_stride, i_stride,
    c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride, A: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    inside = row < rows
    h = row // N
    n = row - h * N
    k = tl.load(indices + row, mask=inside, other=-1)
    chosen = k >= 0
    absent = tl.where(inside, float("nan"), 0.0)  # what a row without a code becomes: NaN, or 0 where it is masked
    if mask is not None:
        keeps = tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
        absent = tl.where(keeps, absent, 0.0)
    total = tl.zeros((A,), tl.float64)
    for start in range(0, D, BD):
        i = (start + tl.arange(0, BD)).to(tl.int64)[None, :]
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
    total = tl.where(chosen, total, absent)
    tl.store(error + row, total.to(error.dtype.element_ty), mask=inside)


def quantize(
    x,
    codebook,
    mask=None,
    weight=None,
    metric="euclidean",
    gradient="straight_through",
    code_sums=False,
    codebook_error_scale=0.0,
    snapshot=True,
    prepared=None,
):
    H, N, D = x.shape
    indices = nearest(x, codebook, mask, metric, prepared)
    quantized = x.new_empty((H, N, D))
    error = x.new_empty((H, N), dtype=torch.promote_types(x.dtype, torch.float32))
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    norms = None
    mask_strides = (0, 0) if mask is None else mask.stride()
    rows, step = tile(D, x.device)
    with torch.cuda.device_of(x):
        if indices.numel() and metric == "cosine":
            norms = x.new_empty((H, N), dtype=torch.float64)
            norms_kernel[(triton.cdiv(H * N, 64),)](
                x, norms, H * N, N, D, *x.stride(), 64, num_warps=4, enable_fp_fusion=False
            )
        if indices.numel():
            gather_kernel[(triton.cdiv(H * N, rows),)](
                x, codebook, indices, mask, norms, quantized, error, H * N, N, D, *x.stride(), *codebook.stride(),
                *mask_strides, rows, step, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    if code_sums:
        counts, sums = sum_codes(x, indices, codebook.shape[1], weight, norms)
    old = codebook.clone(memory_format=torch.contiguous_format) if snapshot else codebook.new_empty(0)
    return quantized, indices, error, counts, sums, old
