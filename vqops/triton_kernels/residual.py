"""Residual quantization: a search a level, then one pass that takes its codes off.

Read, a level: what is left of the rows and the sum of their codes once beside the search, codes from cache. Written:
both once, an index and an error a row. No level waits for the host: `levels` is read on the device, and of levels that
don't run nothing is read or written but indices and errors. Errors of all levels are summed at the end, 8 bytes each.
"""

import torch
import triton
import triton.language as tl

from vqops.reference import RUN
from vqops.reference.residual import rows_of_level
from vqops.triton_kernels.blocks import sizes
from vqops.triton_kernels.code_sums import code_sums as sum_codes
from vqops.triton_kernels.distance import add_lanes
from vqops.triton_kernels.gather import norms_of, stored_as
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.search import nearest
from vqops.triton_kernels.strides import strides

SUMS = 32  # runs of errors that a program adds up side by side


@triton.jit
def less(rest, q):
    """rest - q in float64, rounded to rest's dtype: between float32 values that is float32's own subtraction."""
    return (rest.to(tl.float64) - q).to(rest.dtype) if q.dtype == tl.float64 else rest - q.to(rest.dtype)


@Kept
@triton.jit(do_not_specialize=["rows", "N", "Q", "level", "mask_h_stride", "mask_n_stride"])
def take_off_kernel(
    x,  # [H, N, D], what the levels before have left
    codebook,  # [H, K, D]
    chosen,  # [H, N] int64
    mask,  # [H, N] bool, or None
    norms,  # [H, N] float64 where errors are those of units, else None
    rest,  # [H, N, D], what is left now, or None
    total,  # [H, N, D], the sum of the codes before; None where only the rest is wanted, as then the next three
    summed,  # [H, N, D], with this level's: `total`, or the result in x's dtype
    indices,  # [H, N, Q] int64
    errors,  # [H, Q, N] float64
    rows, N, D, Q, level, h_stride, n_stride, i_stride,
    c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride, CONVERTS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Each value is read and written by one thread, so that `rest` may be x. The order of errors is distance.py's."""
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    inside = row < rows
    h = row // N
    n = row - h * N
    k = tl.load(chosen + row, mask=inside, other=-1)
    keeps = inside
    if mask is not None:
        keeps &= tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
    has = k >= 0
    changes = keeps | has
    absent = tl.where(keeps, float("nan"), 0.0)  # rows without a code: NaN, or 0 where masked
    place = level + tl.zeros((A,), tl.int32)
    goes_on = changes & (place + 1 < Q)
    sums_change = changes | (inside & (place == 0))
    if CONVERTS:
        sums_change = inside
    added_to = sums_change & (place > 0)
    if norms is not None:
        norm = tl.load(norms + row, mask=has, other=1.0)[:, None]
    p = tl.zeros((A, 8), tl.float64)
    for start in range(0, D, 8):
        i = (start + tl.arange(0, 8)).to(tl.int64)[None, :]
        there = has[:, None] & (i < D)
        given = tl.load(x + (h * h_stride + n * n_stride)[:, None] + i * i_stride, mask=there, other=0.0)
        q = tl.load(codebook + (h * c_h_stride + k * c_k_stride)[:, None] + i * c_i_stride, mask=there, other=0.0)
        at = row[:, None] * D + i
        if errors is not None:
            y = given.to(tl.float64)
            if norms is not None:
                y = y / norm
            e = y - q.to(tl.float64)
            p += e * e
        if rest is not None:
            left = tl.where(has[:, None], less(given.to(real), q), float("nan"))
            tl.store(rest + at, left, mask=goes_on[:, None] & (i < D))
        if summed is not None:
            value = tl.load(total + at, mask=added_to[:, None] & (i < D), other=0.0)
            value += tl.where(has[:, None], q.to(real), absent[:, None].to(real))
            tl.store(summed + at, stored_as(value, summed.dtype.element_ty), mask=sums_change[:, None] & (i < D))
    if errors is not None:
        error = tl.sum(add_lanes(tl.reshape(p, (A, 1, 8))), 1)
        tl.store(errors + (h * Q + level) * N + n, tl.where(has, error, absent.to(tl.float64)), mask=inside)
        tl.store(indices + row * Q + level, k, mask=inside)


@Kept
@triton.jit(do_not_specialize=["number", "runs", "N", "LENGTH"])
def sum_runs_kernel(
    values,  # [groups, N] float64
    sums,  # [groups, runs]
    number, runs, N, LENGTH, M: tl.constexpr,
):  # fmt: skip
    """sums[g, r] = the sum of LENGTH values from r LENGTH on, in order; M of `number` runs side by side."""
    at = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    group = at // runs
    first = (at - group * runs) * LENGTH
    length = tl.where(at < number, tl.minimum(N - first, LENGTH), 0)
    total = tl.zeros((M,), tl.float64)
    for i in range(0, tl.max(length, 0)):
        total += tl.load(values + group * N + first + i, mask=i < length, other=0.0)
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=at < number)


def take_off(x, codebook, chosen, mask, norms, rest, total, summed, indices, errors, Q, level) -> None:
    H, N, D = x.shape
    rows, converts = sizes(x.device).lanes, summed is not None and summed.dtype != total.dtype
    with torch.cuda.device_of(x):
        take_off_kernel[(cdiv(H * N, rows),)](
            x, codebook, chosen, mask, norms, rest, total, summed, indices, errors, H * N, N, D, Q, level,
            *strides(x, 3), *strides(codebook, 3), *strides(mask, 2), converts, rows, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def sum_in_runs(errors, dtype):  # [H, Q, N] -> [H, Q]
    """Runs of 256 rows in order, then the runs in order."""
    H, Q, N = errors.shape
    runs = cdiv(N, RUN)
    partial = errors.new_empty((H, Q, runs))
    sums = errors.new_empty((H, Q), dtype=dtype)
    with torch.cuda.device_of(errors):
        for values, out, number, length in ((errors, partial, runs, RUN), (partial, sums, 1, runs)):
            count = H * Q * number
            sum_runs_kernel[(cdiv(count, SUMS),)](
                values, out, count, number, values.shape[2], length, SUMS, num_warps=1, enable_fp_fusion=False
            )
    return sums


def residual_quantize(
    x,
    codebooks,
    mask=None,
    levels=None,
    metric="euclidean",
    gradient="straight_through",
    per_level=True,
    code_sums=False,
    codebook_error_scale=0.0,
    normalize=True,
    snapshot=True,
    prepared=None,
):
    (H, N, D), Q = x.shape, len(codebooks)
    real = torch.promote_types(x.dtype, torch.float32)
    units = metric == "cosine" and normalize and x.numel() > 0
    quantized, indices = x.new_empty((H, N, D)), x.new_empty((H, N, Q), dtype=torch.int64)
    total = quantized if real == x.dtype else x.new_empty((H, N, D), dtype=real)
    rest = x.new_empty((H, N, D), dtype=real) if Q > 1 else None
    errors = x.new_empty((H, Q, N), dtype=torch.float64)
    given, counted = x, []
    for level, codebook in enumerate(codebooks):
        kept, last = rows_of_level(mask, levels, level, x), level + 1 == Q
        chosen = nearest(given, codebook, kept, metric, None if prepared is None else prepared[level])
        norms = norms_of(given) if units else None
        if code_sums:
            counted.append(sum_codes(given, chosen, codebook.shape[1], None, norms))
        if x.numel():
            summed = quantized if last else total
            take_off(given, codebook, chosen, kept, norms, rest, total, summed, indices, errors, Q, level)
        given = rest
    error = sum_in_runs(errors, real) if x.numel() else x.new_zeros((H, Q), dtype=real)
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    if code_sums:
        counts, sums = (torch.cat(parts, 1) for parts in zip(*counted, strict=True))
    return quantized, indices, error, counts, sums, torch.cat(codebooks, 1) if snapshot else codebooks[0].new_empty(0)
