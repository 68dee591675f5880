"""Preparation of a codebook for the screening pass: centre, scale, repeats, and the codes as fp16 with their bounds.

Two kernels: one looks at the codes (a program finds the scale of a head, others the centre of a slice of dimensions,
others write a table of keys that finds repeats), one packs them (each code is read two to four times, from cache).
Float64 where errors are measured: the codebook is small next to the search. docs/exactness.md says what is measured,
bound.py has the constants.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.triton_kernels import MOST_CODES
from vqops.triton_kernels.blocks import sizes
from vqops.triton_kernels.bound import (
    ABSENT,
    CODE,
    CODE_COSINE,
    CODE_UNDERFLOW,
    FAR_CODE,
    SMALLEST_RADIUS,
    START,
    TWICE,
    UPWARD,
    decision_error,
)
from vqops.triton_kernels.distance import NO_CODE
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.layout import HEADER, STEP, TILE, packed_bytes, padded_codes, padded_dimensions
from vqops.triton_kernels.strides import strides

SAMPLE = 32  # codes that the centre and the scale are taken from
HELD_BACK = 2.0**-8  # of sums of differences, so that those of large float32 don't overflow
INF_BITS = tl.constexpr(0x7F800000)

# Words of the header.
FIRST = tl.constexpr(0)  # the lowest index of a finite code, or NO_CODE
SCALE = tl.constexpr(1)  # exponent of the scale
WORST = tl.constexpr(2)  # bits of the largest |C - stored| / radius
CLOSEST = tl.constexpr(3)  # bits of the smallest radius


@triton.jit
def head_of(packed, h, codes_padded, WIDTH: tl.constexpr, HEADER: tl.constexpr):
    """Pointers to the header, the centre, the bounds and the codes of head h, see layout.py."""
    WORDS: tl.constexpr = HEADER + (WIDTH if WIDTH > HEADER else HEADER)
    codes_padded = codes_padded.to(tl.int64)
    header = (packed + h * (4 * WORDS + codes_padded * (16 + 2 * WIDTH))).to(tl.pointer_type(tl.int32), bitcast=True)
    centre = (header + HEADER).to(tl.pointer_type(tl.float32), bitcast=True)
    bounds = (header + WORDS).to(tl.pointer_type(tl.float32), bitcast=True)
    codes = (bounds + codes_padded * 4).to(tl.pointer_type(tl.float16), bitcast=True)
    return header, centre, bounds, codes


@triton.jit
def bounds_of(bounds, k, TILE: tl.constexpr):
    """Pointers to the starts of codes k; the other bounds of a code follow, TILE words apart."""
    return bounds + k // TILE * (4 * TILE) + k % TILE


@triton.jit
def exponent_of(value):
    """floor(log2(value)) of positive float32; -127 for zero and denormals, 128 for inf."""
    return ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def norm_of(c, i_stride, known, D, COSINE: tl.constexpr, BD: tl.constexpr):
    """For codes at c [M, 1]: their norm for cosine, 1 if it is 0, else 1; and whether they are finite."""
    square = tl.zeros((c.shape[0],), tl.float64 if COSINE else tl.float32)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=known & (i < D), other=0.0).to(square.dtype)
        square += tl.sum(v * v if COSINE else v * 0.0, 1)
    if COSINE:
        finite = square < float("inf")
        norm = tl.sqrt(tl.where(finite & (square > 0), square, 1.0))
    else:
        finite = square == 0
        norm = square + 1.0
    return norm, finite


@triton.jit
def sampled(codebook, h, h_stride, k_stride, number, every):
    """Pointers [COUNT, 1] to sampled codes by their numbers in the sample."""
    return codebook + h * h_stride + (number.to(tl.int64) * every)[:, None] * k_stride


@triton.jit
def median_of(v, count):
    """The median of each column of v [M, B], where all but `count` values are inf, by their ranks; 0 without values."""
    M: tl.constexpr = v.shape[0]
    row = tl.arange(0, M)
    before = v[None, :, :] < v[:, None, :]
    before |= (v[None, :, :] == v[:, None, :]) & (row[None, :] < row[:, None])[:, :, None]
    rank = tl.sum(before.to(tl.int32), 1)
    return tl.sum(tl.where((rank == count // 2) & (count > 0), v, 0.0), 0)


@triton.jit
def centre_of(c, i_stride, known, i, D, COSINE: tl.constexpr, BD: tl.constexpr):
    """The median of the sample in dimensions i: any centre is correct, and this one no single code can move."""
    norm, finite = norm_of(c, i_stride, known, D, COSINE, BD)
    valid = known & finite[:, None]
    v = tl.load(c + i[None, :] * i_stride, mask=valid & (i < D)[None, :], other=0.0).to(norm.dtype)
    if COSINE:
        v /= norm[:, None]
    median = median_of(tl.where(valid, v.to(tl.float32), float("inf")), tl.sum(valid.to(tl.int32), 0))
    return tl.where(tl.abs(median) < float("inf"), median, 0.0)


@triton.jit
def exponent_of_scale(c, other, i_stride, known, D, share, HELD_BACK: tl.constexpr, BD: tl.constexpr):
    """Of a power of two that brings the typical distance from the centre to about 1: any is correct. It is the median,
    over sampled codes, of what others of the sample are apart; over sqrt(D), sums of absolute differences of Gaussian
    codes are 1.1 times as large."""
    apart = tl.zeros((c.shape[0],), tl.float32)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=known & (i < D), other=0.0).to(tl.float32)
        v -= tl.load(other + i * i_stride, mask=known & (i < D), other=0.0).to(tl.float32)
        apart += tl.sum(tl.abs(v) * share, 1)
    valid = (apart > 0) & (apart < float("inf"))
    count = tl.sum(valid.to(tl.int32), 0)
    median = tl.sum(median_of(tl.where(valid, apart, float("inf"))[:, None], count), 0)
    return tl.minimum(tl.maximum(-exponent_of(tl.where(count > 0, median / HELD_BACK, 1.0)), -126), 126)


@triton.jit
def keys_of(c, i_stride, known, D, BD: tl.constexpr):
    """Two 32-bit keys of the codes at c [M, 1]; equal codes have equal keys, also where -0 meets 0."""
    one = tl.zeros((c.shape[0],), tl.uint32)
    two = one
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=known & (i < D), other=0.0).to(tl.float32) + 0.0
        bits = v.to(tl.uint32, bitcast=True)
        odd = (i * 2 + 1).to(tl.uint32)
        one += tl.sum((bits ^ (bits >> 15)) * (odd * 0x9E3779B1), 1)
        two += tl.sum((bits ^ (bits >> 11)) * (odd * 0x85EBCA77), 1)
    one = (one ^ (one >> 16)) * 0x85EBCA6B
    two = (two ^ (two >> 16)) * 0xC2B2AE35
    return one ^ (one >> 13), two ^ (two >> 13)


@Kept
@triton.jit(do_not_specialize=["K", "every"])
def survey_kernel(
    codebook,  # [H, K, D]
    packed,  # uint8, see layout.py; the bounds and codes are pack_kernel's
    table,  # [H, 2, slots] int32: per key, modulo slots, the lowest index of a code that has it
    K, codes_padded, D, every, slots, share, h_stride, k_stride, i_stride,
    COSINE: tl.constexpr, SAMPLE: tl.constexpr, HELD_BACK: tl.constexpr, HEADER: tl.constexpr, WIDTH: tl.constexpr,
    M: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    header, centre, _bounds, _codes = head_of(packed, h, codes_padded, WIDTH, HEADER)
    SLICES: tl.constexpr = (WIDTH + BI - 1) // BI
    if tl.program_id(0) <= SLICES:
        number = tl.arange(0, SAMPLE)
        count = tl.minimum(tl.cdiv(K, every), SAMPLE)
        known = (number < count)[:, None]
        c = sampled(codebook, h, h_stride, k_stride, number, every)
        if tl.program_id(0) == 0:
            exponent = 0
            if not COSINE:
                # Not half the sample further on: codebooks are repeated, or sorted.
                other = sampled(codebook, h, h_stride, k_stride, (number + count // 3 + 1) % count, every)
                exponent = exponent_of_scale(c, other, i_stride, known, D, share, HELD_BACK, BD)
            place = tl.arange(0, HEADER)
            values = tl.where(place == FIRST, NO_CODE, 0)
            values = tl.where(place == SCALE, exponent, values)
            tl.store(header + place, tl.where(place == CLOSEST, INF_BITS, values))
        else:
            i = ((tl.program_id(0) - 1) * BI + tl.arange(0, BI)).to(tl.int64)
            tl.store(centre + i, centre_of(c, i_stride, known, i, D, COSINE, BD), mask=i < WIDTH)
    else:
        k = (tl.program_id(0) - SLICES - 1) * M + tl.arange(0, M)
        c = codebook + h * h_stride + k.to(tl.int64)[:, None] * k_stride
        one, two = keys_of(c, i_stride, (k < K)[:, None], D, BD)
        first = table + 2 * h * slots
        tl.atomic_min(first + (one & (slots - 1).to(tl.uint32)).to(tl.int64), k, mask=k < K, sem="relaxed")
        tl.atomic_min(first + slots + (two & (slots - 1).to(tl.uint32)).to(tl.int64), k, mask=k < K, sem="relaxed")


@triton.jit
def equal_codes(c, other, i_stride, known, D, BD: tl.constexpr):
    """Whether the codes at c and at other, [M, 1] each, are equal."""
    different = tl.zeros((c.shape[0],), tl.int32)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        a = tl.load(c + i * i_stride, mask=known & (i < D), other=0.0)
        b = tl.load(other + i * i_stride, mask=known & (i < D), other=0.0)
        different += tl.sum((a != b).to(tl.int32), 1)
    return different == 0


@triton.jit
def brought(c, i_stride, used, i, D, norm, centre, scale, COSINE: tl.constexpr):
    """Dimensions i of the codes at c, centred, in units of the scale."""
    v = tl.load(c + i * i_stride, mask=used & (i < D), other=0.0).to(tl.float64)
    if COSINE:
        v /= norm[:, None]
    return tl.where(used, (v - tl.load(centre + i).to(tl.float64)) * scale, 0.0)


@Kept
@triton.jit(do_not_specialize=["K"])
def pack_kernel(
    codebook,  # [H, K, D]
    table,  # [H, 2, slots] int32
    packed,  # uint8, see layout.py
    K, codes_padded, D, slots, h_stride, k_stride, i_stride, decision,
    COSINE: tl.constexpr, HEADER: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    header, centre, bounds, codes = head_of(packed, h, codes_padded, WIDTH, HEADER)
    k = tl.program_id(0) * M + tl.arange(0, M)
    known = (k < K)[:, None]
    head = codebook + h * h_stride
    c = head + k.to(tl.int64)[:, None] * k_stride
    norm, finite = norm_of(c, i_stride, known, D, COSINE, BD)
    finite &= k < K
    used = finite[:, None]

    one, two = keys_of(c, i_stride, known, D, BD)
    first = table + 2 * h * slots
    low = tl.load(first + (one & (slots - 1).to(tl.uint32)).to(tl.int64), mask=k < K, other=0)
    also = tl.load(first + slots + (two & (slots - 1).to(tl.uint32)).to(tl.int64), mask=k < K, other=0)
    repeat = (low < k) & equal_codes(c, head + low.to(tl.int64)[:, None] * k_stride, i_stride, known, D, BD)
    repeat |= (also < k) & equal_codes(c, head + also.to(tl.int64)[:, None] * k_stride, i_stride, known, D, BD)

    scale = power_of_two(tl.load(header + SCALE)).to(tl.float64)
    square = tl.zeros((M,), tl.float64)
    largest = tl.zeros((M,), tl.float64)
    for d in range(0, WIDTH, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = brought(c, i_stride, used, i, D, norm, centre, scale, COSINE)
        square += tl.sum(v * v, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    near = finite & (square <= FAR_CODE * FAR_CODE)

    # fp16 with the largest element in [2^14, 2^15), so that small elements stay clear of underflow.
    lift = 14 - exponent_of(tl.where(near, largest, 1.0).to(tl.float32))
    lift = tl.minimum(lift, 100)
    grow = power_of_two(lift).to(tl.float64)[:, None]
    shrink = power_of_two(-lift).to(tl.float64)
    lost = tl.zeros((M,), tl.float64)
    place = codes + k.to(tl.int64)[:, None] * WIDTH
    for d in range(0, WIDTH, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = brought(c, i_stride, used, i, D, norm, centre, scale, COSINE) * grow
        v = tl.where(near[:, None], v, 0.0)
        half = v.to(tl.float16)
        e = v - half.to(tl.float64)
        lost += tl.sum(e * e, 1)
        tl.store(place + i, -half, mask=(k < codes_padded)[:, None])

    length = tl.sqrt(square)
    error = tl.sqrt(lost) * shrink + length * CODE + CODE_UNDERFLOW
    if COSINE:
        error += (D + 16) * CODE_COSINE
    around = tl.maximum((length + error) * UPWARD, SMALLEST_RADIUS).to(tl.float32)
    half_square = 0.0 if COSINE else square / 2 * (1 - START - TWICE * decision)
    value = tl.where(near, half_square, ABSENT).to(tl.float32)
    at = bounds_of(bounds, k.to(tl.int64), TILE)
    tl.store(at, tl.where(repeat, ABSENT, value), mask=k < codes_padded)
    tl.store(at + TILE, tl.where(near, around, 0.0), mask=k < codes_padded)
    tl.store(at + 2 * TILE, tl.where(near, shrink, 0.0).to(tl.float32), mask=k < codes_padded)
    tl.store(at + 3 * TILE, value, mask=k < codes_padded)

    worst = tl.max(tl.where(near, error / around.to(tl.float64) * UPWARD, 0.0), 0).to(tl.float32)
    closest = tl.min(tl.where(near & (repeat == 0), around, float("inf")), 0)
    tl.atomic_min(header + FIRST, tl.min(tl.where(finite, k, NO_CODE), 0), sem="relaxed")
    tl.atomic_max(header + WORST, worst.to(tl.int32, bitcast=True), sem="relaxed")
    tl.atomic_min(header + CLOSEST, closest.to(tl.int32, bitcast=True), sem="relaxed")


def prepare(codebook: Tensor, metric: str = "euclidean") -> Tensor:
    if codebook.dtype == torch.float64:  # its rows are compared in float64 throughout
        return codebook.new_empty(0, dtype=torch.uint8)
    H, K, D = codebook.shape
    if K > MOST_CODES:
        raise ValueError(f"prepare: implementation 'triton' takes K <= {MOST_CODES}, codebook has K={K}")
    cosine = metric == "cosine"
    packed = codebook.new_empty(packed_bytes(H, K, D), dtype=torch.uint8)
    slots = 4 * max(16, 1 << (K - 1).bit_length())
    table = codebook.new_full((H, 2, slots), NO_CODE.value, dtype=torch.int32)
    width, padded, given = padded_dimensions(D), padded_codes(K), strides(codebook, 3)
    step = min(width, STEP)
    dimensions, codes = sizes(codebook.device)[:2]
    with torch.cuda.device_of(codebook):
        survey_kernel[(1 + cdiv(width, dimensions) + cdiv(K, codes), H)](
            codebook, packed, table, K, padded, D, -(-K // SAMPLE), slots, HELD_BACK / math.sqrt(D), *given, cosine,
            SAMPLE, HELD_BACK, HEADER, width, codes, step, dimensions, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        pack_kernel[(cdiv(padded, codes), H)](
            codebook, table, packed, K, padded, D, slots, *given, decision_error(D, False), cosine, HEADER, TILE,
            width, codes, step, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return packed
