"""The float64 comparison of the codes that bounds left open (`decide`), or of all codes (`scan`): the precise tier.

Both walk a queue of rows with a fixed number of programs; its length stays on the device. Costs of [rows, codes] at a
time are eight float64 sums each, in registers, over the dimensions in order (lanes.py).
"""

import triton
import triton.language as tl

from vqops.triton_kernels.blocks import queue_programs, sizes
from vqops.triton_kernels.lanes import costs, row_facts

NO_CODE = tl.constexpr(2147483647)
ENTRY = 256  # an entry of the queue is ENTRY * row + the number of its candidates


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
def decide_kernel(
    x, codebook, indices, distances, lists, queue, counters, N, D, top,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride,
    COSINE: tl.constexpr, RANKED: tl.constexpr, SLOTS: tl.constexpr, CANDIDATES: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Rows queued from the front: an entry is SLOTS * row + the number of its candidates."""
    queued = tl.load(counters)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(queued, A), tl.num_programs(0)):
        r = tl.arange(0, A).to(tl.int64) + block * A
        live = r < queued
        entry = tl.load(queue + r, mask=live, other=0)
        row = entry // SLOTS
        h = row // N
        n = row - h * N
        j = tl.arange(0, CANDIDATES)[None, :]
        known = live[:, None] & (j < (entry - row * SLOTS)[:, None])
        code = tl.load(lists + row[:, None] * CANDIDATES + j, mask=known, other=0)
        start = (x + h * h_stride + n * n_stride)[:, None]
        c = codebook + (h * c_h_stride)[:, None] + code.to(tl.int64) * c_k_stride
        cost, _ = costs(start, i_stride, live[:, None], c, c_i_stride, known, D, COSINE)
        if RANKED:
            square, _ = row_facts(start, i_stride, live[:, None], D)
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


@triton.jit
def scan_kernel(
    x, codebook, mask, indices, distances, queue, counters, N, K, D, top,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride,
    COSINE: tl.constexpr, RANKED: tl.constexpr, QUEUED: tl.constexpr, SHARED: tl.constexpr, MASKED: tl.constexpr,
    SLOTS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows queued from the back or, not QUEUED, all rows of head program_id(1). SHARED: rows of one head a block."""
    size = N
    if QUEUED:
        size = tl.load(counters + 1)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(size, A), tl.num_programs(0)):
        r = tl.arange(0, A).to(tl.int64) + block * A
        inside = r < size
        if QUEUED:
            row = tl.load(queue - r, mask=inside, other=0) // SLOTS
            h = row // N
        else:
            h = tl.zeros((A,), tl.int64) + tl.program_id(1)
            row = h * N + r
        n = row - h * N
        live = inside
        if MASKED:
            live = inside & (tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0)
        start = (x + h * h_stride + n * n_stride)[:, None]
        square, finite = row_facts(start, i_stride, live[:, None], D)
        usable = live & finite
        head = (codebook + tl.max(h, 0) * c_h_stride)[None, None] if SHARED else (codebook + h * c_h_stride)[:, None]
        previous = tl.zeros((A,), tl.float64)
        previous_code = tl.full((A,), -1, tl.int32)
        for t in range(0, top):
            best = tl.full((A,), float("inf"), tl.float64)
            best_code = tl.full((A,), NO_CODE, tl.int32)
            for k in range(0, K, B):
                code = (k + tl.arange(0, B))[None, :]
                c = head + code.to(tl.int64) * c_k_stride
                known = tl.broadcast_to(code < K, c.shape)
                cost, number = costs(start, i_stride, usable[:, None], c, c_i_stride, known, D, COSINE)
                least, its_code = next_best(cost, code, number & known, previous, previous_code)
                better = (its_code != NO_CODE) & ((least < best) | (best_code == NO_CODE))
                best = tl.where(better, least, best)
                best_code = tl.where(better, its_code, best_code)
            previous = best
            previous_code = best_code
            found = usable & (best_code != NO_CODE)
            tl.store(indices + row * top + t, tl.where(found, best_code, -1).to(tl.int64), mask=inside)
            if RANKED:
                missing = tl.where(live & (finite == 0), float("nan"), float("inf"))
                distance = tl.where(found, distance_of(best, square, COSINE), missing)
                tl.store(distances + row * top + t, distance.to(distances.dtype.element_ty), mask=inside)
            if not QUEUED:
                lacking = tl.sum((inside & (found == 0)).to(tl.int64), 0)
                counted = tl.sum(found.to(tl.int64), 0)
                tl.atomic_add(counters + 1, tl.where(t == 0, counted, 0))
                tl.atomic_add(counters + 2, tl.where(t == 0, lacking, 0))


def arguments(x, codebook, mask):
    mask_strides = (0, 0) if mask is None else mask.stride()
    return (*x.stride(), *codebook.stride()), mask_strides


def decide(x, codebook, metric, indices, distances, lists, queue, counters, top=1) -> None:
    strides, _ = arguments(x, codebook, None)
    decide_kernel[(queue_programs(x.device),)](
        x, codebook, indices, distances, lists, queue, counters, x.shape[1], x.shape[2], top, *strides,
        metric == "cosine", distances is not None, ENTRY, lists.shape[-1], sizes(x.device).decide,
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip


def scan(x, codebook, mask, metric, indices, distances, queue, counters, top=1) -> None:
    """The rows queued, or without a queue all rows."""
    H, N, D = x.shape
    strides, mask_strides = arguments(x, codebook, mask)
    rows, codes = sizes(x.device).scan
    everything = queue is None
    grid = (triton.cdiv(N, rows), H) if everything else (queue_programs(x.device),)
    scan_kernel[grid](
        x, codebook, mask, indices, distances, None if everything else queue[-1:], counters, N, codebook.shape[1], D,
        top, *strides, *mask_strides, metric == "cosine", distances is not None, not everything, everything or H == 1,
        mask is not None, ENTRY, rows, codes, enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip
