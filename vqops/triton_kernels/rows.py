"""Rows of x as the screening passes read them: centred, fp16, with the constants of their bounds.

A block of rows is rounded by the program that screens it. Up to 64 dimensions it keeps them in registers. More, as
operands in registers, would leave none to the loop: such rows are read twice, the second time from cache, and pass
through memory, where the same program reads them again, from cache as well. Written there: 2 D' bytes per row.
"""

import triton
import triton.language as tl

from vqops.triton_kernels.blocks import ROWS
from vqops.triton_kernels.bound import FAR_ROW, NORM, NORM_UNDERFLOW, TWICE, row_bound
from vqops.triton_kernels.codebook import CLOSEST, FIRST, SCALE, WORST, exponent_of, power_of_two
from vqops.triton_kernels.distance import NO_CODE
from vqops.triton_kernels.launch import cdiv

LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_HALF = tl.constexpr(65504.0)

# A row's state before screening.
SETTLED = tl.constexpr(0)
SCREENED = tl.constexpr(1)
SCANNED = tl.constexpr(2)


@triton.jit
def kept(mask, h, n, N, mask_h_stride, mask_n_stride):
    keep = n < N
    if mask is not None:
        keep &= tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=keep, other=0) != 0
    return keep


@triton.jit
def centred(x, i_stride, live, centre, i, D, scale, COSINE: tl.constexpr):
    """Rows at x [M, 1], dimensions i [1, B], as float32 in units of the typical code, and whether they are finite."""
    v = tl.load(x + i.to(tl.int64) * i_stride, mask=live & (i < D), other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(v) <= LARGEST).to(tl.int32), 1)
    if not COSINE:
        v = tl.where(live, (v - tl.load(centre + i)) * scale, 0.0)
    return v, finite


@triton.jit
def lift_of(largest, COSINE: tl.constexpr):
    """A row's power of two brings its largest element to [2^14, 2^15)."""
    exponent = 14 - exponent_of(largest)
    return power_of_two(tl.minimum(tl.maximum(exponent, -126 if COSINE else -30), 126 if COSINE else 54))


@triton.jit
def rounded(y, fits, lift):
    """fp16 of y [M, B], and the sums of the squares of what was rounded and of what rounding took."""
    y = tl.where(fits[:, None], y * lift[:, None], 0.0)
    half = tl.minimum(tl.maximum(y, -LARGEST_HALF), LARGEST_HALF).to(tl.float16)
    e = y - half.to(tl.float32)
    return half, tl.sum(y * y, 1), tl.sum(e * e, 1)


@triton.jit
def bound_rows(
    header, usable, fits, largest, lift, square, lost, D, accumulation, decision,
    COSINE: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Radius, spread, lift and rest of rows, finite for all of them; their states, and the code of settled ones."""
    worst = tl.load(header + WORST).to(tl.float32, bitcast=True)
    closest = tl.load(header + CLOSEST).to(tl.float32, bitcast=True)
    first = tl.load(header + FIRST)
    upward = 1.0 + D * NORM
    norm = tl.sqrt_rn(square) * upward + D * NORM_UNDERFLOW
    error = tl.sqrt_rn(lost) * upward + D * NORM_UNDERFLOW
    radius, spread, rest = row_bound(norm, error, lift, worst, accumulation, decision, COSINE)
    if COSINE:
        lift = tl.full(lift.shape, 1.0, tl.float32)  # of start, which is 0
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
    radius = tl.where(screened, radius, 0.0)
    spread = tl.where(screened, spread, 0.0)
    lift = tl.where(screened, lift, 1.0)
    rest = tl.where(screened, rest, 0.0)
    state = tl.where(screened, SCREENED, tl.where(settled, SETTLED, SCANNED))
    chosen = usable & (first != NO_CODE)
    return radius, spread, lift, rest, state, tl.where(chosen, first, -1)


@triton.jit
def count_lost(counters, inside, code):
    lost = tl.sum((inside & (code < 0)).to(tl.int32), 0)
    if lost > 0:
        tl.atomic_add(counters + 2, lost.to(tl.int64), sem="relaxed")


@triton.jit
def round_rows(
    row, header, centre, i_stride, keep, D, COSINE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows at row [BN, 1] as fp16 [BN, D'], and what bound_rows needs of them."""
    scale = power_of_two(tl.load(header + SCALE))
    i = tl.arange(0, WIDTH)[None, :]
    y, finite = centred(row, i_stride, keep[:, None], centre, i, D, scale, COSINE)
    largest = tl.max(tl.abs(y), 1)
    usable = keep & (finite != 0)
    fits = usable & (largest <= LARGEST)
    lift = lift_of(largest, COSINE)
    half, square, lost = rounded(y, fits, lift)
    return half, usable, fits, largest, lift, square, lost


@triton.jit
def round_rows_into(
    stored,  # [BN, 1] pointers to D' float16 each
    row, header, centre, i_stride, keep, D, COSINE: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The same by way of memory, from which the program may load them then."""
    scale = power_of_two(tl.load(header + SCALE))
    live = keep[:, None]
    largest = tl.zeros(keep.shape, tl.float32)
    finite = tl.full(keep.shape, 1, tl.int32)
    for d in range(0, WIDTH, STEP):
        y, ok = centred(row, i_stride, live, centre, (d + tl.arange(0, STEP))[None, :], D, scale, COSINE)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
        finite = tl.minimum(finite, ok)
    usable = keep & (finite != 0)
    fits = usable & (largest <= LARGEST)
    lift = lift_of(largest, COSINE)
    square = tl.zeros(keep.shape, tl.float32)
    lost = tl.zeros(keep.shape, tl.float32)
    for d in range(0, WIDTH, STEP):
        i = (d + tl.arange(0, STEP))[None, :]
        y, _ = centred(row, i_stride, live, centre, i, D, scale, COSINE)
        half, of_y, of_rest = rounded(y, fits, lift)
        square += of_y
        lost += of_rest
        tl.store(stored + i, half)
    tl.debug_barrier()  # other threads have stored what a thread loads
    return usable, fits, largest, lift, square, lost


def padded_rows(N: int) -> int:
    return cdiv(N, ROWS) * ROWS
