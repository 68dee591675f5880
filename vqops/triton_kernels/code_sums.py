"""Count and add up the rows of each code, in one of two orders.

In the reference's order: a stable sort of the indices, then a program adds up to 256 rows of a code, in order, for
several codes side by side, and another those runs, in order. x is read once; one partial sum per run. The same bits on
every device.
By atomic additions: a program reads a block of rows and adds each to its code; codes that many of them share (all rows
on one, Zipf) it sums first and adds once, so that they contend once per block. Nothing is sorted, but the order and so
the last bits vary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.reference import RUN
from vqops.triton_kernels.blocks import hot_rows, tile
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.strides import strides


class Runs(NamedTuple):
    """The rows of each code, in order, cut in runs of 256. Heads are one after the other, in rows and in codes."""

    order: Tensor  # [H N] row numbers, by code
    start: Tensor  # [H K + 1] where the rows of a code start in `order`
    first: Tensor  # [H K + 1] its first run
    code: Tensor  # [runs] the code of each run; H K for one that is not used


def runs_of(indices: Tensor, K: int) -> Runs:  # [H, N]
    H, N = indices.shape
    device, codes = indices.device, H * K
    code = torch.where(indices >= 0, indices + K * torch.arange(H, device=device)[:, None], codes).flatten()
    code, order = code.sort(stable=True)
    start = torch.searchsorted(code, torch.arange(codes + 1, device=device))
    last = ((start.diff() + RUN - 1) // RUN).cumsum(0)
    number = torch.arange(codes + H * N // RUN, device=device)  # as many runs as there can be
    return Runs(order, start, torch.nn.functional.pad(last, (1, 0)), torch.searchsorted(last, number, right=True))


@Kept
@triton.jit(do_not_specialize=["runs", "N", "codes", "w_h_stride"])
def runs_kernel(
    x,  # [H, N, D]
    weight,  # [H, N], or None
    divisor,  # [H, N] float64, or None
    order,  # [H N] int64, and the next three, as in Runs
    start,  # [H K + 1]
    first,  # [H K + 1]
    code,  # [runs]
    partial,  # [runs, D]
    runs, N, D, codes,
    h_stride, n_stride, i_stride, w_h_stride, w_n_stride, RUN: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """partial[run] = the sum of its rows, from zero, in order; M runs side by side."""
    run = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    i = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    k = tl.load(code + run, mask=run < runs, other=codes)
    used = k < codes
    begin = tl.load(start + k, mask=used, other=0) + RUN * (run - tl.load(first + k, mask=used, other=0))
    length = tl.minimum(tl.load(start + k + 1, mask=used, other=0) - begin, RUN)
    length = tl.where(used, length, 0)
    total = tl.zeros((M, BD), partial.dtype.element_ty)
    for r in range(0, tl.max(length, 0)):
        live = r < length
        row = tl.load(order + begin + r, mask=live, other=0)
        h = row // N
        n = row - h * N
        inside = live[:, None] & (i < D)
        value = tl.load(x + (h * h_stride + n * n_stride)[:, None] + i * i_stride, mask=inside, other=0.0)
        if divisor is not None:
            value = value.to(tl.float64) / tl.load(divisor + row, mask=live, other=1.0)[:, None]
        value = value.to(partial.dtype.element_ty)
        if weight is not None:
            factor = tl.load(weight + h * w_h_stride + n * w_n_stride, mask=live, other=0.0)
            value = value * factor.to(partial.dtype.element_ty)[:, None]
        total = tl.where(inside, total + value, total)
    tl.store(partial + run[:, None] * D + i, total, mask=used[:, None] & (i < D))


@Kept
@triton.jit(do_not_specialize=["codes"])
def fold_kernel(
    partial,  # [runs, D]
    first,  # [H K + 1]
    sums,  # [H, K, D]
    codes, D, M: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sums[code] = the sum of its runs, from zero, in order; M codes side by side."""
    k = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    i = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    known = k < codes
    begin = tl.load(first + k, mask=known, other=0)
    length = tl.load(first + k + 1, mask=known, other=0) - begin
    total = tl.zeros((M, BD), sums.dtype.element_ty)
    for run in range(0, tl.max(length, 0)):
        inside = (run < length)[:, None] & (i < D)
        value = tl.load(partial + (begin + run)[:, None] * D + i, mask=inside, other=0.0)
        total = tl.where(inside, total + value, total)
    tl.store(sums + k[:, None] * D + i, total, mask=known[:, None] & (i < D))


@triton.jit
def rivals_of(place, live):
    """How many rows of the block have each row's code; 0 for rows that are not live."""
    code = place.to(tl.int32)  # compared with half the registers; codes are fewer than 2^32
    return tl.sum((live[:, None] & (code[:, None] == code[None, :])).to(tl.int32), 1)


@triton.jit
def add_rows(sums, counts, value, one, place, rivals, i, D, COUNT, HOT: tl.constexpr):
    """One addition for each code that at least HOT rows of the block have, and one for every other row."""
    most = tl.max(rivals, 0)
    while most >= HOT:
        hot_place = tl.max(tl.where(rivals == most, place, -1), 0)
        hot = place == hot_place
        total = tl.sum(tl.where(hot[:, None], value, 0.0), 0)[None, :]
        tl.atomic_add(sums + hot_place * D + i, total, mask=i < D, sem="relaxed")
        if COUNT:
            tl.atomic_add(counts + hot_place, tl.sum(tl.where(hot, one, tl.zeros_like(one)), 0), sem="relaxed")
        rivals = tl.where(hot, 0, rivals)
        most = tl.max(rivals, 0)
    left = rivals > 0
    tl.atomic_add(sums + place[:, None] * D + i, value, mask=left[:, None] & (i < D), sem="relaxed")
    if COUNT:
        tl.atomic_add(counts + place, one, mask=left, sem="relaxed")


@Kept
@triton.jit(do_not_specialize=["rows", "N", "K", "w_h_stride"])
def atomic_kernel(
    x,  # [H, N, D]
    weight,  # [H, N], or None
    divisor,  # [H, N] float64, or None
    indices,  # [H, N] int64
    counts,  # [H, K] int64, float32 with weight
    sums,  # [H, K, D] float32
    rows, N, K, D,
    h_stride, n_stride, i_stride, w_h_stride, w_n_stride, HOT: tl.constexpr, A: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    i = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)[None, :]
    k = tl.load(indices + row, mask=row < rows, other=-1)
    live = k >= 0
    h = row // N
    n = row - h * N
    inside = live[:, None] & (i < D)
    value = tl.load(x + (h * h_stride + n * n_stride)[:, None] + i * i_stride, mask=inside, other=0.0)
    if divisor is not None:
        value = value.to(tl.float64) / tl.load(divisor + row, mask=live, other=1.0)[:, None]
    value = value.to(tl.float32)
    if weight is None:
        one = live.to(tl.int64)
    else:
        one = tl.load(weight + h * w_h_stride + n * w_n_stride, mask=live, other=0.0).to(tl.float32)
        value = value * one[:, None]
    place = tl.where(live, h * K + k, -1)
    add_rows(sums, counts, value, one, place, rivals_of(place, live), i, D, tl.program_id(1) == 0, HOT)


def sum_in_order(x, runs: Runs, K: int, weight=None, divisor=None, dtype=torch.float32) -> Tensor:  # [H, K, D]
    H, N, D = x.shape
    number = runs.code.numel()
    partial = x.new_empty((number, D), dtype=dtype)
    sums = x.new_empty((H, K, D), dtype=dtype)
    rows, step = tile(D, x.device)
    rows = max(1, rows // 4)  # a program adds its runs one row after the other, so that many programs are better
    runs_kernel[(cdiv(number, rows), cdiv(D, step))](
        x, weight, divisor, runs.order, runs.start, runs.first, runs.code, partial, number, N, D, H * K,
        *strides(x, 3), *strides(weight, 2), RUN, rows, step, enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
    fold_kernel[(cdiv(H * K, rows), cdiv(D, step))](
        partial, runs.first, sums, H * K, D, rows, step, enable_fp_fusion=False, num_warps=4
    )
    return sums


def ordered(x, indices, num_codes, weight=None, divisor=None):
    runs = runs_of(indices, num_codes)
    sums = sum_in_order(x, runs, num_codes, weight, divisor)
    if weight is None:
        return runs.start.diff().view(sums.shape[:2]), sums
    counts = sum_in_order(weight.reshape(1, -1, 1), runs, sums.shape[0] * num_codes)  # the rows of all heads as of one
    return counts.view(sums.shape[:2]), sums


def atomic(x, indices, num_codes, weight=None, divisor=None):
    H, N, D = x.shape
    counts, sums = no_sums(x, num_codes, weight)
    rows, step = tile(D, x.device)
    atomic_kernel[(cdiv(H * N, rows), cdiv(D, step))](
        x, weight, divisor, indices, counts, sums, H * N, N, num_codes, D, *strides(x, 3), *strides(weight, 2),
        hot_rows(rows), rows, step, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return counts, sums


def no_sums(x, num_codes, weight) -> tuple[Tensor, Tensor]:
    """Counts and sums of no rows."""
    H, _, D = x.shape
    counts = x.new_zeros((H, num_codes), dtype=torch.int64 if weight is None else torch.float32)
    return counts, x.new_zeros((H, num_codes, D), dtype=torch.float32)


def code_sums(x, indices, num_codes, weight=None, divisor=None):
    if x.numel() == 0:
        return no_sums(x, num_codes, weight)
    with torch.cuda.device_of(x):
        return (ordered if in_order(x) else atomic)(x, indices.contiguous(), num_codes, weight, divisor)


def in_order(x) -> bool:
    return x.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
