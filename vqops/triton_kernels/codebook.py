"""Preparation of a codebook for the screening pass: centre, scale, repeats, and the codes as fp16 with their bounds.

Four kernels: the centre (a program per slice of dimensions), the scale (a program per head), a table of keys that
finds repeats, packing (each reads its codes two to four times, from cache). Float64 throughout: the codebook is small
next to the search. Errors are measured as docs/exactness.md wants them, with the constants of bound.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from vqops.triton_kernels.layout import HEADER, STEP, packed_bytes, padded_codes, padded_dimensions, unpack
from vqops.triton_kernels.strides import strides

SAMPLE = 32  # codes that the centre and the scale are taken from
INF_BITS = tl.constexpr(0x7F800000)

# Words of the header.
FIRST = tl.constexpr(0)  # the lowest index of a finite code, or NO_CODE
SCALE = tl.constexpr(1)  # exponent of the scale
WORST = tl.constexpr(2)  # bits of the largest |C - stored| / radius
CLOSEST = tl.constexpr(3)  # bits of the smallest radius


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
    """For codes at c [M, 1]: what to divide them by (cosine: their norm, 1 if it is 0), NaN where not finite."""
    square = tl.zeros((c.shape[0],), tl.float64)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=known & (i < D), other=0.0).to(tl.float64)
        square += tl.sum(v * v if COSINE else v * 0.0, 1)
    if COSINE:
        norm = tl.sqrt(square)
        norm = tl.where(norm == 0, 1.0, norm)
        norm = tl.where(norm < float("inf"), norm, float("nan"))
    else:
        norm = square + 1.0
    return norm


@triton.jit
def sampled(codebook, h, h_stride, k_stride, K, every, COUNT: tl.constexpr):
    """Pointers [COUNT, 1] to the sampled codes, and which there are."""
    k = (tl.arange(0, COUNT).to(tl.int64) * every)[:, None]
    return codebook + h * h_stride + k * k_stride, k < K


@triton.jit
def median_of(v, count):
    """The median of each column of v [M, B], where all but `count` values are inf, by their ranks; 0 without values."""
    M: tl.constexpr = v.shape[0]
    row = tl.arange(0, M)
    before = v[None, :, :] < v[:, None, :]
    before |= (v[None, :, :] == v[:, None, :]) & (row[None, :] < row[:, None])[:, :, None]
    rank = tl.sum(before.to(tl.int32), 1)
    return tl.sum(tl.where((rank == count // 2) & (count > 0), v, 0.0), 0)


@triton.jit(do_not_specialize=["K", "every"])
def centre_kernel(
    codebook,  # [H, K, D]
    centre,  # [H, D] float32
    K, D, every, h_stride, k_stride, i_stride,
    COSINE: tl.constexpr, SAMPLE: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The median of the sample in each dimension: any centre is correct, and this one no single code can move."""
    h = tl.program_id(1).to(tl.int64)
    c, known = sampled(codebook, h, h_stride, k_stride, K, every, SAMPLE)
    norm = norm_of(c, i_stride, known, D, COSINE, BD)
    valid = known & (norm == norm)[:, None]
    i = (tl.program_id(0) * BI + tl.arange(0, BI)).to(tl.int64)
    v = tl.load(c + i[None, :] * i_stride, mask=valid & (i < D)[None, :], other=0.0).to(tl.float64)
    v = tl.where(valid, v / tl.where(norm == norm, norm, 1.0)[:, None], float("inf")).to(tl.float32)
    median = median_of(v, tl.sum(valid.to(tl.int32), 0))
    tl.store(centre + h * D + i, tl.where(tl.abs(median) < float("inf"), median, 0.0), mask=i < D)


@triton.jit(do_not_specialize=["K", "every"])
def scale_kernel(
    codebook,  # [H, K, D]
    centre,  # [H, D]
    header,  # [H, HEADER] int32
    K, D, every, h_stride, k_stride, i_stride,
    COSINE: tl.constexpr, SAMPLE: tl.constexpr, HEADER: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The header: a power of two that brings the sample's median distance from the centre to [1, 2)."""
    h = tl.program_id(0).to(tl.int64)
    c, known = sampled(codebook, h, h_stride, k_stride, K, every, SAMPLE)
    square = tl.zeros((SAMPLE,), tl.float64)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=known & (i < D), other=0.0).to(tl.float64)
        v -= tl.load(centre + h * D + i, mask=i < D, other=0.0).to(tl.float64)
        square += tl.sum(v * v, 1)
    distance = tl.sqrt(square).to(tl.float32)
    valid = (distance > 0) & (distance < float("inf")) & (tl.sum(known.to(tl.int32), 1) > 0)
    count = tl.sum(valid.to(tl.int32), 0)
    median = tl.sum(median_of(tl.where(valid, distance, float("inf"))[:, None], count), 0)
    exponent = tl.minimum(tl.maximum(-exponent_of(tl.where(count > 0, median, 1.0)), -126), 126)
    if COSINE:
        exponent = exponent * 0
    place = tl.arange(0, HEADER)
    values = tl.where(place == FIRST, NO_CODE, 0)
    values = tl.where(place == SCALE, exponent, values)
    values = tl.where(place == CLOSEST, INF_BITS, values)
    tl.store(header + h * HEADER + place, values)


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


@triton.jit(do_not_specialize=["K"])
def repeats_kernel(
    codebook,  # [H, K, D]
    table,  # [H, 2, slots] int32: per key, modulo slots, the lowest index of a code that has it
    K, D, slots, h_stride, k_stride, i_stride, M: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * M + tl.arange(0, M)
    c = codebook + h * h_stride + k.to(tl.int64)[:, None] * k_stride
    one, two = keys_of(c, i_stride, (k < K)[:, None], D, BD)
    first = table + 2 * h * slots
    tl.atomic_min(first + (one & (slots - 1).to(tl.uint32)).to(tl.int64), k, mask=k < K)
    tl.atomic_min(first + slots + (two & (slots - 1).to(tl.uint32)).to(tl.int64), k, mask=k < K)


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


@triton.jit(do_not_specialize=["K"])
def pack_kernel(
    codebook,  # [H, K, D]
    table,  # [H, 2, slots] int32
    header,  # [H, HEADER] int32
    centre,  # [H, D]
    start,  # [H, K']
    start_topk,  # [H, K']
    radius,  # [H, K']
    unit,  # [H, K']
    codes,  # [H, K', D'] float16
    K, codes_padded, D, slots, h_stride, k_stride, i_stride, decision,
    COSINE: tl.constexpr, HEADER: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * M + tl.arange(0, M)
    known = (k < K)[:, None]
    head = codebook + h * h_stride
    c = head + k.to(tl.int64)[:, None] * k_stride
    norm = norm_of(c, i_stride, known, D, COSINE, BD)
    finite = (norm == norm) & (k < K)
    divisor = tl.where(norm == norm, norm, 1.0)[:, None]
    used = known & finite[:, None]

    one, two = keys_of(c, i_stride, known, D, BD)
    first = table + 2 * h * slots
    low = tl.load(first + (one & (slots - 1).to(tl.uint32)).to(tl.int64), mask=k < K, other=0)
    also = tl.load(first + slots + (two & (slots - 1).to(tl.uint32)).to(tl.int64), mask=k < K, other=0)
    repeat = (low < k) & equal_codes(c, head + low.to(tl.int64)[:, None] * k_stride, i_stride, known, D, BD)
    repeat |= (also < k) & equal_codes(c, head + also.to(tl.int64)[:, None] * k_stride, i_stride, known, D, BD)

    scale = power_of_two(tl.load(header + h * HEADER + SCALE)).to(tl.float64)
    square = tl.zeros((M,), tl.float64)
    largest = tl.zeros((M,), tl.float64)
    for d in range(0, D, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=used & (i < D), other=0.0).to(tl.float64) / divisor
        v = (v - tl.load(centre + h * D + i, mask=i < D, other=0.0).to(tl.float64)) * scale
        v = tl.where(used, v, 0.0)
        square += tl.sum(v * v, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(v), 1))
    near = finite & (square <= FAR_CODE * FAR_CODE)

    # fp16 with the largest element in [2^14, 2^15), so that small elements stay clear of underflow.
    lift = 14 - exponent_of(tl.where(near, largest, 1.0).to(tl.float32))
    lift = tl.minimum(lift, 100)
    grow = power_of_two(lift).to(tl.float64)[:, None]
    shrink = power_of_two(-lift).to(tl.float64)
    lost = tl.zeros((M,), tl.float64)
    place = codes + (h * codes_padded + k.to(tl.int64)[:, None]) * WIDTH
    for d in range(0, WIDTH, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        v = tl.load(c + i * i_stride, mask=used & (i < D), other=0.0).to(tl.float64) / divisor
        v = (v - tl.load(centre + h * D + i, mask=i < D, other=0.0).to(tl.float64)) * scale * grow
        v = tl.where(near[:, None] & (i < D), v, 0.0)
        half = v.to(tl.float16)
        e = v - half.to(tl.float64)
        lost += tl.sum(e * e, 1)
        tl.store(place + i, half, mask=(k < codes_padded)[:, None] & (i < WIDTH))

    length = tl.sqrt(square)
    error = tl.sqrt(lost) * shrink + length * CODE + CODE_UNDERFLOW
    if COSINE:
        error += (D + 16) * CODE_COSINE
    around = tl.maximum((length + error) * UPWARD, SMALLEST_RADIUS).to(tl.float32)
    half_square = 0.0 if COSINE else square / 2 * (1 - START - TWICE * decision)
    value = tl.where(near, half_square, ABSENT).to(tl.float32)
    at = h * codes_padded + k.to(tl.int64)
    tl.store(start + at, tl.where(repeat, ABSENT, value), mask=k < codes_padded)
    tl.store(start_topk + at, value, mask=k < codes_padded)
    tl.store(radius + at, tl.where(near, around, 0.0), mask=k < codes_padded)
    tl.store(unit + at, tl.where(near, shrink, 0.0).to(tl.float32), mask=k < codes_padded)

    worst = tl.max(tl.where(near, error / around.to(tl.float64) * UPWARD, 0.0), 0).to(tl.float32)
    closest = tl.min(tl.where(near & (repeat == 0), around, float("inf")), 0)
    about = header + h * HEADER
    tl.atomic_min(about + FIRST, tl.min(tl.where(finite, k, NO_CODE), 0))
    tl.atomic_max(about + WORST, worst.to(tl.int32, bitcast=True))
    tl.atomic_min(about + CLOSEST, closest.to(tl.int32, bitcast=True))


def prepare(codebook: Tensor, metric: str = "euclidean") -> Tensor:
    if codebook.dtype == torch.float64:  # its rows are compared in float64 throughout
        return codebook.new_empty(0, dtype=torch.uint8)
    H, K, D = codebook.shape
    cosine = metric == "cosine"
    memory = codebook.new_empty(packed_bytes(H, K, D), dtype=torch.uint8)
    packed = unpack(memory, H, K, D)
    given = strides(codebook, 3)
    every = max(1, -(-K // SAMPLE))
    width = padded_dimensions(D)
    step = min(width, STEP)
    slots = 4 * max(16, 1 << (K - 1).bit_length())
    table = codebook.new_full((H, 2, slots), NO_CODE.value, dtype=torch.int32)
    dimensions, codes = sizes(codebook.device)[:2]
    launch = {"num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device_of(codebook):
        centre_kernel[(triton.cdiv(D, dimensions), H)](
            codebook, packed.centre, K, D, every, *given, cosine, SAMPLE, step, dimensions, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
        scale_kernel[(H,)](
            codebook, packed.centre, packed.header, K, D, every, *given, cosine, SAMPLE, HEADER, step, **launch
        )
        repeats_kernel[(triton.cdiv(K, codes), H)](codebook, table, K, D, slots, *given, codes, step, **launch)
        pack_kernel[(triton.cdiv(padded_codes(K), codes), H)](
            codebook, table, packed.header, packed.centre, packed.start, packed.start_topk, packed.radius, packed.unit,
            packed.codes, K, padded_codes(K), D, slots, *given, decision_error(D, False), cosine, HEADER, width, codes,
            step, **launch,
        )  # fmt: skip
    return memory
