"""The arithmetic that decides between codes, to the last bit; vqops/reference/distance.py is its specification.

Kernels that use it are launched with enable_fp_fusion=False: a fused multiply-add rounds once where two are meant.
"""

import triton
import triton.language as tl

NO_CODE = tl.constexpr(2147483647)  # the index where there is none: after every other


@triton.jit
def halves(t):
    """t[..., 0, ...] + t[..., 1, ...] of the last axis, which has two places."""
    a, b = tl.split(t)
    return a + b


@triton.jit
def add_lanes(p):
    """((p0 + p4) + (p2 + p6)) + ((p1 + p5) + (p3 + p7)) of [A, B, 8]. Not tl.sum: its order depends on the layout."""
    A: tl.constexpr = p.shape[0]
    B: tl.constexpr = p.shape[1]
    fours = halves(tl.permute(tl.reshape(p, (A, B, 2, 2, 2)), (0, 1, 3, 4, 2)))
    return halves(halves(tl.permute(fours, (0, 1, 3, 2))))


@triton.jit
def cost_of(square, dot, norm_square, COSINE: tl.constexpr):
    """The cost, least for the nearest: |x - c|^2, or -x.c / |c|: 0 for a zero code, inf where float64 overflows."""
    if COSINE:
        norm = tl.sqrt(norm_square)
        score = -dot / tl.where(norm > 0, norm, 1.0)
        cost = tl.where(norm > 0, tl.where(score == score, score, float("inf")), 0.0)
    else:
        cost = square
    return cost


@triton.jit
def costs(x, x_stride, live, c, c_stride, known, D, COSINE: tl.constexpr):
    """Costs float64 [A, B] of rows at x [A, 1] and codes at c [A or 1, B]; also whether each code is finite."""
    lane = tl.arange(0, 8)[None, None, :]
    zero = tl.zeros((x.shape[0], c.shape[1], 8), tl.float64)
    p = zero
    norm = tl.zeros((c.shape[0], c.shape[1], 8), tl.float64)
    number = norm
    for start in range(0, D, 8):
        i = (start + lane).to(tl.int64)
        a = tl.load(x[:, :, None] + i * x_stride, mask=live[:, :, None] & (i < D), other=0.0).to(tl.float64)
        b = tl.load(c[:, :, None] + i * c_stride, mask=known[:, :, None] & (i < D), other=0.0).to(tl.float64)
        number += b * 0.0
        if COSINE:
            p += a * b
            norm += b * b
        else:
            e = a - b
            p += e * e
    finite = tl.sum(number, 2) == 0
    total = add_lanes(p)
    norm_square = tl.broadcast_to(add_lanes(norm), total.shape) if COSINE else total
    return cost_of(total, total, norm_square, COSINE), finite


@triton.jit
def squared_norm(x, x_stride, live, D):
    """|x|^2 of rows at x [A, 1], in the same order, and whether they are finite."""
    lane = tl.arange(0, 8)[None, None, :]
    p = tl.zeros((x.shape[0], 1, 8), tl.float64)
    number = p
    for start in range(0, D, 8):
        i = (start + lane).to(tl.int64)
        a = tl.load(x[:, :, None] + i * x_stride, mask=live[:, :, None] & (i < D), other=0.0).to(tl.float64)
        number += a * 0.0
        p += a * a
    return tl.sum(add_lanes(p), 1), tl.sum(tl.sum(number, 2), 1) == 0
