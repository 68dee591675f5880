"""The scan: rows compared with all codes in float64. The precise tier, and the whole search of float64 input.

A fixed number of programs walks blocks of rows. Where blocks are fewer, programs share the codes of a block: each
leaves the best of its part in a place of its own (`scan_kernel`), of which a row then takes the least cost, ties to the
lowest index (`merge_parts_kernel`). The number of parts depends on the queue, whose length stays on the device; the
result does not. Workspace: 12 bytes per program, row of a block and rank, whatever N and K; 50 KB on 132 processors,
for nearest_topk times k.
"""

import torch
import triton
import triton.language as tl

from vqops.triton_kernels.blocks import queue_programs, sizes
from vqops.triton_kernels.decide import distance_of, next_best
from vqops.triton_kernels.distance import NO_CODE, costs, squared_norm
from vqops.triton_kernels.queue import ENTRY
from vqops.triton_kernels.strides import strides


@triton.jit
def shares(counters, N, K, heads, QUEUED: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """How many blocks of rows there are, and in how many parts the codes of each. 32 bits: no GPU holds more blocks."""
    blocks = tl.cdiv(tl.load(counters + 1), A).to(tl.int32) if QUEUED else heads * tl.cdiv(N, A)
    parts = tl.minimum(tl.num_programs(0) // tl.maximum(blocks, 1), tl.cdiv(K, B))
    return blocks, tl.maximum(parts, 1)


@triton.jit
def row_at(
    r, mask, queue, counters, heads, N, mask_h_stride, mask_n_stride,
    QUEUED: tl.constexpr, ENTRY: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Rows number r of all blocks, their heads, which there are, and which of these the mask keeps."""
    if QUEUED:
        inside = r < tl.load(counters + 1)
        last = heads.to(tl.int64) * N - 1
        row = tl.load(queue + last - r, mask=inside, other=0) // ENTRY
        h = row // N
    else:
        padded = tl.cdiv(N, A) * A
        h = r // padded
        inside = r - h * padded < N
        row = h * N + tl.where(inside, r - h * padded, 0)
    live = inside
    if mask is not None:
        at = mask + h * mask_h_stride + (row - h * N) * mask_n_stride
        live = inside & (tl.load(at, mask=inside, other=0) != 0)
    return row, h, inside, live


@triton.jit
def put(
    indices, distances, counters, row, t, top, best, best_code, square, inside, live, usable,
    COSINE: tl.constexpr, QUEUED: tl.constexpr,
):  # fmt: skip
    """The result for rank t of the rows."""
    found = usable & (best_code != NO_CODE)
    tl.store(indices + row * top + t, tl.where(found, best_code, -1).to(tl.int64), mask=inside)
    if distances is not None:
        missing = tl.where(live & (usable == 0), float("nan"), float("inf"))
        distance = tl.where(found, distance_of(best, square, COSINE), missing)
        tl.store(distances + row * top + t, distance.to(distances.dtype.element_ty), mask=inside)
    if not QUEUED:
        lacking = tl.sum((inside & (found == 0)).to(tl.int64), 0)
        counted = tl.sum(found.to(tl.int64), 0)
        tl.atomic_add(counters + 1, tl.where(t == 0, counted, 0))
        tl.atomic_add(counters + 2, tl.where(t == 0, lacking, 0))


@triton.jit(do_not_specialize=["heads", "N", "K", "mask_h_stride"])  # top: the loop of one turn is shorter
def scan_kernel(
    x,  # [H, N, D]
    codebook,  # [H, K, D]
    mask,  # [H, N] bool, or None
    indices,  # [H, N, top] int64
    distances,  # [H, N, top], or None
    part_costs,  # [programs, A, top] float64
    part_codes,  # [programs, A, top] int32
    queue,  # [H N] int64, where QUEUED
    counters,  # [COUNTERS] int64
    heads, N, K, D, top,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride,
    COSINE: tl.constexpr, QUEUED: tl.constexpr, SHARED: tl.constexpr, ENTRY: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Rows queued from the back or, not QUEUED, all rows. SHARED: a block's rows are of one head."""
    blocks, parts = shares(counters, N, K, heads, QUEUED, A, B)
    codes_per_part = tl.cdiv(tl.cdiv(K, B), parts) * B
    for task in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = task // parts
        part = task - block * parts
        r = tl.arange(0, A) + block.to(tl.int64) * A
        row, h, inside, live = row_at(
            r, mask, queue, counters, heads, N, mask_h_stride, mask_n_stride, QUEUED, ENTRY, A
        )
        given = (x + h * h_stride + (row - h * N) * n_stride)[:, None]
        square, finite = squared_norm(given, i_stride, live[:, None], D)
        usable = live & finite
        head = (codebook + tl.max(h, 0) * c_h_stride)[None, None] if SHARED else (codebook + h * c_h_stride)[:, None]
        first = part * codes_per_part
        previous = tl.zeros((A,), tl.float64)
        previous_code = tl.full((A,), -1, tl.int32)
        for t in range(0, top):
            best = tl.full((A,), float("inf"), tl.float64)
            best_code = tl.full((A,), NO_CODE, tl.int32)
            for k in range(first, tl.minimum(first + codes_per_part, K), B):
                code = (k + tl.arange(0, B))[None, :]
                c = head + code.to(tl.int64) * c_k_stride
                known = tl.broadcast_to(code < K, c.shape)
                cost, number = costs(given, i_stride, usable[:, None], c, c_i_stride, known, D, COSINE)
                least, its_code = next_best(cost, code, number & known, previous, previous_code)
                better = (its_code != NO_CODE) & ((least < best) | (best_code == NO_CODE))
                best = tl.where(better, least, best)
                best_code = tl.where(better, its_code, best_code)
            previous = best
            previous_code = best_code
            if parts == 1:
                put(
                    indices, distances, counters, row, t, top, best, best_code, square, inside, live, usable,
                    COSINE, QUEUED,
                )  # fmt: skip
            else:
                place = (task * A + tl.arange(0, A)) * top + t
                tl.store(part_costs + place, best)
                tl.store(part_codes + place, tl.where(usable, best_code, NO_CODE))


@triton.jit(do_not_specialize=["heads", "N", "K", "mask_h_stride"])
def merge_parts_kernel(
    x,  # [H, N, D]
    mask,  # [H, N] bool, or None
    indices,  # [H, N, top] int64
    distances,  # [H, N, top], or None
    part_costs,  # [programs, A, top] float64
    part_codes,  # [programs, A, top] int32
    queue,  # [H N] int64, where QUEUED
    counters,  # [COUNTERS] int64
    heads, N, K, D, top,
    h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride,
    COSINE: tl.constexpr, QUEUED: tl.constexpr, ENTRY: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One row after the other: the parts hold their best in order, so that the next is the least of their firsts."""
    blocks, parts = shares(counters, N, K, heads, QUEUED, A, B)
    part = tl.arange(0, PARTS)
    known = part < parts
    for number in range(tl.program_id(0), tl.where(parts > 1, blocks * A, 0), tl.num_programs(0)):
        r = number + tl.arange(0, 1).to(tl.int64)
        row, h, inside, live = row_at(
            r, mask, queue, counters, heads, N, mask_h_stride, mask_n_stride, QUEUED, ENTRY, A
        )
        given = (x + h * h_stride + (row - h * N) * n_stride)[:, None]
        square, finite = squared_norm(given, i_stride, live[:, None], D)
        block = number // A
        place = ((block * parts + part) * A + number - block * A) * top
        taken = tl.zeros((PARTS,), tl.int32)
        cost = tl.load(part_costs + place, mask=known, other=float("inf"))
        code = tl.load(part_codes + place, mask=known, other=NO_CODE)
        for t in range(0, top):
            none = tl.full((1,), -1, tl.int32)
            best, best_code = next_best(cost[None, :], code[None, :], (code != NO_CODE)[None, :], square, none)
            put(
                indices, distances, counters, row, t, top, best, best_code, square, inside, live, live & finite,
                COSINE, QUEUED,
            )  # fmt: skip
            won = known & (code == tl.max(best_code, 0)) & (code != NO_CODE)
            taken += won.to(tl.int32)
            more = won & (taken < top)
            cost = tl.where(won, tl.load(part_costs + place + taken, mask=more, other=float("inf")), cost)
            code = tl.where(won, tl.load(part_codes + place + taken, mask=more, other=NO_CODE), code)


def scan(x, codebook, mask, metric, indices, distances, queue, counters, top=1) -> None:
    """The rows queued, or without a queue all rows."""
    H, N, D = x.shape
    K = codebook.shape[1]
    queued, cosine = queue is not None, metric == "cosine"
    programs = queue_programs(x.device)
    rows, codes = sizes(x.device).scan
    parts = (
        x.new_empty((programs, rows, top), dtype=torch.float64),
        x.new_empty((programs, rows, top), dtype=torch.int32),
    )
    scan_kernel[(programs,)](
        x, codebook, mask, indices, distances, *parts, queue, counters, H, N, K, D, top,
        *strides(x, 3), *strides(codebook, 3), *strides(mask, 2), cosine, queued, not queued or H == 1, ENTRY, rows,
        codes, enable_fp_fusion=False, num_warps=8,
    )  # fmt: skip
    merge_parts_kernel[(programs,)](
        x, mask, indices, distances, *parts, queue, counters, H, N, K, D, top,
        *strides(x, 3), *strides(mask, 2), cosine, queued, ENTRY, rows, codes, triton.next_power_of_2(programs),
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
