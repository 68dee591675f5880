"""The error bound of the fp16 screening pass, each constant with its cause in docs/exactness.md.

X = s (x - m) and C = s (c - m), with a centre m and a power of two s; cosine: X = x and C = c / |c| - m. Stored are
X' = X lift and C' = -C / unit as fp16, with a power of two per row and per code. Bounds of (|C|^2 / 2 - X.C) lift:

    lower = start lift - row radius * code radius + X'.C' unit
    upper = lower + row spread * code radius + SLACK start lift + rest

A code has start, radius and unit (layout.py); a row has radius, spread, rest and lift.
"""

import triton
import triton.language as tl

from vqops.triton_kernels.layout import padded_dimensions

HUGE = tl.constexpr(2.0**126)  # above any bound
ABSENT = tl.constexpr(2.0**70)  # start of a code left out: above any other bound, and finite in every row's unit
FAR_CODE = tl.constexpr(2.0**30)  # |C| beyond: left out
FAR_ROW = tl.constexpr(2.0**28)  # 2 |X| + the smallest radius beyond: compared with every code
FAR_BOUND = tl.constexpr(2.0**58)  # at most |C|^2 / 2 - X.C of a far code, for rows within FAR_ROW
SMALLEST_RADIUS = tl.constexpr(2.0**-24)  # so that a code at the centre has a relative error

TWICE = tl.constexpr(2.02)  # 2, and what its factors are rounded by
PRODUCT = 2.0**-17  # |X'| r: float32 operations after the product, and the tile's number in the low bits of a bound
START = tl.constexpr(2.0**-17)  # |C|^2 / 2: the same, and the rounding of start
RADIUS = tl.constexpr(1.0 + 2.0**-9)  # of a row's radius: its own share of these
SPREAD = tl.constexpr(2.0**-19)  # |X'| r: rounding of the upper bound
SLACK = tl.constexpr(2.0**-15)  # start: from the lower to the upper bound
REST = tl.constexpr(2.1)  # the decision's error in |X|^2, in both bounds
UNDERFLOW = tl.constexpr(2.0**-90)
NORM = tl.constexpr(2.0**-22)  # per dimension: a norm summed in float32, in any order
NORM_UNDERFLOW = tl.constexpr(2.0**-60)  # per dimension: squares that vanish
CODE = tl.constexpr(2.0**-45)  # |C|: float64 operations on C and on what rounding took from it
CODE_UNDERFLOW = tl.constexpr(2.0**-80)
CODE_COSINE = tl.constexpr(2.0**-51)  # per dimension and 16 more: c / |c|
UPWARD = tl.constexpr(1 + 2.0**-20)  # a code's radius and error, to float32


def accumulation(D: int) -> float:
    """Of the tensor cores and what follows, relative to the norms."""
    return (2 * padded_dimensions(D) + 16) * 2.0**-23 + PRODUCT


def decision_error(D: int, cosine: bool) -> float:
    """Of the float64 decision, relative to |X|^2 + |C|^2; cosine: to |X|."""
    return 4 * (D + 16) * 2.0**-53 if cosine else 1.01 * (D / 8 + 8) * 2.0**-53


@triton.jit
def row_bound(norm, error, lift, worst, accumulation, decision, COSINE: tl.constexpr):
    """Radius, spread and rest of rows. norm: |X'|. error: |X lift - X'|. worst: the largest such error of a code,
    relative to its radius."""
    radius = (error + norm * (worst + accumulation)) * RADIUS
    rest = REST * decision * norm
    if not COSINE:
        rest *= norm / lift
    return radius, TWICE * radius + norm * SPREAD, rest + UNDERFLOW


@triton.jit
def tile_product(
    rows,  # [BN, BD] pointers to the first dimensions of the stored rows
    whole,  # [BN, D'] the rows themselves, where they stay on chip; else None
    codes,  # [K', D'] float16
    at,
    WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Products [BN, BK] float32 with the codes from `at`: all that is asked of the tensor cores."""
    stored = codes + at * WIDTH + tl.arange(0, BK)[:, None] * WIDTH + tl.arange(0, BD)[None, :]
    if whole is not None:
        product = tl.dot(whole, tl.trans(tl.load(stored)))
    else:
        product = tl.zeros((BN, BK), tl.float32)
        for d in range(0, WIDTH, BD):
            product = tl.dot(tl.load(rows + d), tl.trans(tl.load(stored + d)), product)
    return product


@triton.jit
def tile_bounds(
    rows,  # as in tile_product
    whole,
    row_radius,  # [BN]
    lift,  # [BN]
    bounds,  # [K'/BK, 4, BK], see layout.py
    codes,  # [K', D'] float16
    tile,
    START: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Lower bounds [BN, BK] of the codes of a tile, with their starts in the rows' units and their radii. START: which
    of the four bounds that is."""
    about = bounds + tile * (4 * BK) + tl.arange(0, BK)
    product = tile_product(rows, whole, codes, tl.cast(tile, tl.int64) * BK, WIDTH, BN, BK, BD)
    code_radius = tl.load(about + BK)[None, :]
    lifted = tl.load(about + START * BK)[None, :] * lift[:, None]
    lower = lifted - code_radius * row_radius[:, None] + product * tl.load(about + 2 * BK)[None, :]
    return lower, lifted, code_radius
