"""Gumbel noise to the last bit; vqops/reference/noise.py is its specification.

Kernels that use it are launched with enable_fp_fusion=False, as those of distance.py.
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, row, four, head):
    """The four random words of codes 4 `four` to 4 `four` + 3, uint32 broadcast over rows, int64, and fours."""
    row, four = tl.broadcast(row + tl.load(seed + 1), four)
    zero = tl.zeros_like(four)
    return tl.philox(
        tl.load(seed), row.to(tl.uint32), (row >> 32).to(tl.uint32), (four + zero).to(tl.uint32),
        (zero + head).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def word_of(seed, row, code, head):
    """The word of each row, int64, and code, int32, of one shape."""
    a, b, c, d = words(seed, row, code // 4, head)
    place = code % 4
    return tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d))


@triton.jit
def logarithm(value):
    """Of float64, positive and normal."""
    bits = value.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = tl.zeros_like(z)
    for n in tl.static_range(10, 0, -1):
        series = series * z + 2.0 / (2 * n + 1)
    return exponent.to(tl.float64) * 0.6931471805599453 + (s * 2.0 + s * z * series)


@triton.jit
def gumbel(word):
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return -logarithm(-logarithm(u))


@triton.jit
def noise_above(word, step, most):
    """At least T g in float32: `noise_terms` of vqops/pytorch/sample.py."""
    halved = ((word ^ 0xFFFFFFFF) >> 1).to(tl.int32).to(tl.float32)
    return most - step * halved.to(tl.int32, bitcast=True).to(tl.float32)
