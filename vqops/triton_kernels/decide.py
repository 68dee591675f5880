"""The decision: candidates of a row compared in float64.

A fixed number of programs walks the queue from the front. Costs of [rows, codes] at a time are eight float64 sums each,
in registers, over the dimensions in order (distance.py).
"""

import triton
import triton.language as tl

from vqops.triton_kernels.distance import NO_CODE, costs, squared_norm


@triton.jit
def next_best(cost, code, possible, previous, previous_code):
    """Per row of cost [A, B]: the least (cost, code) after the previous one, among those possible; NO_CODE for none."""
    after = (cost > previous[:, None]) | ((cost == previous[:, None]) & (code > previous_code[:, None]))
    possible = possible & (after | (previous_code[:, None] < 0))
    least = tl.min(tl.where(possible, cost, float("inf")), 1)
    at_least = possible & (cost == least[:, None])
    return least, tl.min(tl.where(at_least, code, NO_CODE), 1)


@triton.jit
def distance_of(cost, norm_square, COSINE: tl.constexpr):
    if COSINE:
        norm = tl.sqrt(norm_square)
        distance = 1.0 + tl.where(norm > 0, cost / tl.where(norm > 0, norm, 1.0), 0.0)
    else:
        distance = cost
    return distance


@triton.jit
def decide(
    x, codebook, indices, distances, lists, queue, counters, N, D, top,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride,
    COSINE: tl.constexpr, ENTRY: tl.constexpr, CANDIDATES: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The rows queued from the front, A at a time."""
    queued = tl.load(counters)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(queued, A), tl.num_programs(0)):
        r = tl.arange(0, A).to(tl.int64) + block * A
        live = r < queued
        entry = tl.load(queue + r, mask=live, other=0)
        row = entry // ENTRY
        h = row // N
        n = row - h * N
        j = tl.arange(0, CANDIDATES)[None, :]
        known = live[:, None] & (j < (entry - row * ENTRY)[:, None])
        code = tl.load(lists + row[:, None] * CANDIDATES + j, mask=known, other=0)
        given = (x + h * h_stride + n * n_stride)[:, None]
        c = codebook + (h * c_h_stride)[:, None] + code.to(tl.int64) * c_k_stride
        cost, _ = costs(given, i_stride, live[:, None], c, c_i_stride, known, D, COSINE)
        if distances is not None:
            square, _ = squared_norm(given, i_stride, live[:, None], D)
            previous = tl.zeros((A,), tl.float64)
            previous_code = tl.full((A,), -1, tl.int32)
            for t in range(0, top):
                previous, previous_code = next_best(cost, code, known, previous, previous_code)
                found = previous_code != NO_CODE
                tl.store(indices + row * top + t, tl.where(found, previous_code, -1).to(tl.int64), mask=live)
                distance = tl.where(found, distance_of(previous, square, COSINE), float("inf"))
                tl.store(distances + row * top + t, distance.to(distances.dtype.element_ty), mask=live)
        else:
            none = tl.full((A,), -1, tl.int32)
            _, best = next_best(cost, code, known, tl.zeros((A,), tl.float64), none)
            tl.store(indices + row, best.to(tl.int64), mask=live)
