"""Rows of x as the screening pass reads them: centred, fp16, with the constants of their bounds; memory speed.

Read: x twice, the second time from cache. Written: 2 D' + 17 bytes per row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.triton_kernels.blocks import ROWS, row_blocks
from vqops.triton_kernels.bound import (
    FAR_ROW,
    NORM,
    NORM_UNDERFLOW,
    TWICE,
    accumulation,
    decision_error,
    row_bound,
    store_row_bound,
)
from vqops.triton_kernels.codebook import CLOSEST, FIRST, SCALE, WORST, exponent_of, power_of_two
from vqops.triton_kernels.distance import NO_CODE
from vqops.triton_kernels.layout import HEADER, Packed, padded_dimensions
from vqops.triton_kernels.queue import LOST, SCANNED, SCREENED, SETTLED
from vqops.triton_kernels.strides import strides

LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def centred(x, i_stride, live, centre, i, D, scale, COSINE: tl.constexpr):
    """Rows at x [M, 1], dimensions i [1, B], as float32 in units of the typical code, and whether they are finite."""
    v = tl.load(x + i * i_stride, mask=live & (i < D), other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(v) <= LARGEST).to(tl.int32), 1)
    if not COSINE:
        v -= tl.load(centre + i, mask=i < D, other=0.0)
        v = tl.where(live & (i < D), v * scale, 0.0)
    return v, finite


@triton.jit(do_not_specialize=["N", "mask_h_stride"])
def round_rows_kernel(
    x,  # [H, N, D]
    mask,  # [H, N] bool
    centre,  # [H, D]
    header,  # [H, HEADER] int32
    stored,  # [H, N', D'] float16
    row_bounds,  # [4, H, N'], see bound.py
    states,  # [H, N'] int8
    indices,  # [H, N] int64, of the rows that need no screening
    counters,  # [COUNTERS] int64
    N, padded, D, h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride, accumulation, decision,
    COSINE: tl.constexpr, RANKED: tl.constexpr, MASKED: tl.constexpr, HEADER: tl.constexpr, WIDTH: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < N
    keep = inside
    if MASKED:
        keep &= tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
    live = keep[:, None]
    row = x + h * h_stride + n[:, None] * n_stride
    about = header + h * HEADER
    scale = power_of_two(tl.load(about + SCALE))
    worst = tl.load(about + WORST).to(tl.float32, bitcast=True)
    closest = tl.load(about + CLOSEST).to(tl.float32, bitcast=True)
    first = tl.load(about + FIRST)
    head = centre + h * D

    # The row's power of two brings its largest element to [2^14, 2^15).
    largest = tl.zeros((BN,), tl.float32)
    finite = tl.full((BN,), 1, tl.int32)
    for d in range(0, D, BD):
        y, ok = centred(row, i_stride, live, head, (d + tl.arange(0, BD)).to(tl.int64)[None, :], D, scale, COSINE)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
        finite = tl.minimum(finite, ok)
    usable = keep & (finite != 0)
    fits = usable & (largest <= LARGEST)
    exponent = 14 - exponent_of(largest)
    exponent = tl.minimum(tl.maximum(exponent, -126 if COSINE else -30), 126 if COSINE else 54)
    lift = power_of_two(exponent)
    square = tl.zeros((BN,), tl.float32)
    lost = tl.zeros((BN,), tl.float32)
    for d in range(0, WIDTH, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        y, _ = centred(row, i_stride, live, head, i, D, scale, COSINE)
        y = tl.where(fits[:, None], y * lift[:, None], 0.0)
        half = tl.minimum(tl.maximum(y, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
        e = y - half.to(tl.float32)
        square += tl.sum(y * y, 1)
        lost += tl.sum(e * e, 1)
        tl.store(stored + (h * padded + n)[:, None] * WIDTH + i, half, mask=(n < padded)[:, None])

    upward = 1.0 + D * NORM
    norm = tl.sqrt_rn(square) * upward + D * NORM_UNDERFLOW
    error = tl.sqrt_rn(lost) * upward + D * NORM_UNDERFLOW
    radius, spread, rest = row_bound(norm, error, lift, worst, accumulation, decision, COSINE)
    if COSINE:
        lift = tl.full((BN,), 1.0, tl.float32)  # of start, which is 0
        trivial = usable & (largest == 0)  # scores 0 with every code
        scanned = usable & (fits == 0)
    else:
        trivial = usable & (first == NO_CODE)
        scanned = usable & ((fits == 0) | ((TWICE * norm / lift + closest < FAR_ROW) == 0))
    if RANKED:  # the order of equal scores matters beyond the first
        scanned = scanned | trivial
        trivial = trivial & (first == NO_CODE)
    settled = (usable == 0) | trivial | (first == NO_CODE)
    screened = (settled == 0) & (scanned == 0)
    at = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    store_row_bound(row_bounds, at, total, n < padded, screened, radius, spread, lift, rest)
    state = tl.where(screened, SCREENED, tl.where(settled, SETTLED, SCANNED))
    state = tl.where(keep & (usable == 0), LOST, state)
    tl.store(states + at, state.to(tl.int8), mask=n < padded)
    chosen = usable & (first != NO_CODE)
    if not RANKED:
        tl.store(indices + h * N + n, tl.where(chosen, first, -1).to(tl.int64), mask=inside & (settled != 0))
    tl.atomic_add(counters + 2, tl.sum((inside & (chosen == 0)).to(tl.int64), 0))


class Rows(NamedTuple):
    """The results of round_rows, with N' rows: N rounded up to whole blocks."""

    stored: Tensor  # [H, N', D'] float16
    bounds: Tensor  # [4, H, N'] float32
    states: Tensor  # [H, N'] int8
    padded: int  # N'


def round_rows(x, packed: Packed, mask, metric, ranked, indices, counters) -> Rows:
    H, N, D = x.shape
    cosine = metric == "cosine"
    width, padded = padded_dimensions(D), triton.cdiv(N, ROWS) * ROWS
    stored = x.new_empty((H, padded, width), dtype=torch.float16)
    bounds = x.new_empty((4, H, padded), dtype=torch.float32)
    states = x.new_empty((H, padded), dtype=torch.int8)
    rows, step = row_blocks(D, x.device)
    round_rows_kernel[(triton.cdiv(padded, rows), H)](
        x, mask, packed.centre, packed.header, stored, bounds, states, indices, counters, N, padded, D,
        *strides(x, 3), *strides(mask, 2), accumulation(D), decision_error(D, cosine), cosine, ranked, mask is not None,
        HEADER, width, rows, step, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return Rows(stored, bounds, states, padded)
