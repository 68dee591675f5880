"""The scan: rows compared with all codes in float64. The precise tier, and the whole search of float64 input.

A fixed number of programs walks blocks of rows. Where blocks are fewer, programs share the codes of a block: each
leaves the best of its part in a place of its own, and the last of a block to do so takes the least cost of each row,
ties to the lowest index. The number of parts depends on the queue, whose length stays on the device; the result depends
neither on it nor on who is last. Workspace: 12 bytes per program, row of a block and rank, whatever N and K; 50 KB on
132 processors, for nearest_topk times k.
"""

import triton
import triton.language as tl

from vqops.triton_kernels.decide import distance_of, next_best
from vqops.triton_kernels.distance import NO_CODE, costs, squared_norm
from vqops.triton_kernels.queue import last_to_arrive


@triton.jit
def shares(counters, N, K, heads, QUEUED: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """How many blocks of rows there are, and in how many parts the codes of each. 32 bits: no GPU holds more blocks."""
    blocks = tl.cdiv(tl.load(counters + 1), A).to(tl.int32) if QUEUED else heads * tl.cdiv(N, A)
    parts = tl.minimum(tl.num_programs(0) // tl.maximum(blocks, 1), tl.cdiv(K, B))
    return blocks, tl.maximum(parts, 1)


@triton.jit
def row_at(
    r, mask, queue, counters, heads, N, mask_h_stride, mask_n_stride,
    ENTRY: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Rows number r of all blocks, their heads, which there are, and which of these the mask keeps."""
    if queue is not None:
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
    indices, distances, counters, row, t, top, best, best_code, square, inside, live, usable, COSINE: tl.constexpr
):  # fmt: skip
    """The result for rank t of the rows; counters: of rows that no queue counts."""
    found = usable & (best_code != NO_CODE)
    tl.store(indices + row * top + t, tl.where(found, best_code, -1).to(tl.int64), mask=inside)
    if distances is not None:
        missing = tl.where(live & (usable == 0), float("nan"), float("inf"))
        distance = tl.where(found, distance_of(best, square, COSINE), missing)
        tl.store(distances + row * top + t, distance.to(distances.dtype.element_ty), mask=inside)
    if counters is not None:
        counted = tl.sum((found & (t == 0)).to(tl.int32), 0)
        lacking = tl.sum((inside & (found == 0) & (t == 0)).to(tl.int32), 0)
        if counted > 0:
            tl.atomic_add(counters + 1, counted.to(tl.int64), sem="relaxed")
        if lacking > 0:
            tl.atomic_add(counters + 2, lacking.to(tl.int64), sem="relaxed")


@triton.jit
def merge_parts(
    x, mask, indices, distances, part_costs, part_codes, queue, counters, block, parts, heads, N, D, top,
    h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride,
    COSINE: tl.constexpr, ENTRY: tl.constexpr, A: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row of a block after the other: the parts hold their best in order, so that the next is the least of their
    firsts."""
    part = tl.arange(0, PARTS)
    known = part < parts
    for a in range(0, A):
        r = block.to(tl.int64) * A + a + tl.arange(0, 1)
        row, h, inside, live = row_at(r, mask, queue, counters, heads, N, mask_h_stride, mask_n_stride, ENTRY, A)
        square = tl.zeros((1,), tl.float64)
        finite = live  # of rows that are not, no part has a code
        if distances is not None:
            given = (x + h * h_stride + (row - h * N) * n_stride)[:, None]
            square, finite = squared_norm(given, i_stride, live[:, None], D)
        place = ((block * parts + part) * A + a) * top
        taken = tl.zeros((PARTS,), tl.int32)
        cost = tl.load(part_costs + place, mask=known, other=float("inf"))
        code = tl.load(part_codes + place, mask=known, other=NO_CODE)
        for t in range(0, top):
            none = tl.full((1,), -1, tl.int32)
            best, best_code = next_best(cost[None, :], code[None, :], (code != NO_CODE)[None, :], square, none)
            put(
                indices, distances, None if queue is not None else counters, row, t, top, best, best_code, square,
                inside, live, live & finite, COSINE,
            )  # fmt: skip
            won = known & (code == tl.max(best_code, 0)) & (code != NO_CODE)
            taken += won.to(tl.int32)
            more = won & (taken < top)
            cost = tl.where(won, tl.load(part_costs + place + taken, mask=more, other=float("inf")), cost)
            code = tl.where(won, tl.load(part_codes + place + taken, mask=more, other=NO_CODE), code)


@triton.jit
def scan(
    x, codebook, mask, indices, distances, best_of_parts, queue, counters, done, heads, N, K, D, top,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride, mask_h_stride, mask_n_stride,
    COSINE: tl.constexpr, SHARED: tl.constexpr, ENTRY: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Rows queued from the back or, without a queue, all rows. SHARED: a block's rows are of one head.
    best_of_parts: [programs, A, top] float64 costs, and as many int32 codes. done: [programs] int64, zeros."""
    part_costs = best_of_parts.to(tl.pointer_type(tl.float64), bitcast=True)
    part_codes = (part_costs + tl.num_programs(0) * A * top).to(tl.pointer_type(tl.int32), bitcast=True)
    blocks, parts = shares(counters, N, K, heads, queue is not None, A, B)
    codes_per_part = tl.cdiv(tl.cdiv(K, B), parts) * B
    for task in range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        block = task // parts
        part = task - block * parts
        r = tl.arange(0, A) + block.to(tl.int64) * A
        row, h, inside, live = row_at(r, mask, queue, counters, heads, N, mask_h_stride, mask_n_stride, ENTRY, A)
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
                    indices, distances, None if queue is not None else counters, row, t, top, best, best_code, square,
                    inside, live, usable, COSINE,
                )  # fmt: skip
            else:
                place = (task * A + tl.arange(0, A)) * top + t
                tl.store(part_costs + place, best)
                tl.store(part_codes + place, tl.where(usable, best_code, NO_CODE))
        if parts > 1:  # noqa: SIM102 (`and` would ask in either case)
            if last_to_arrive(done + block, parts):
                merge_parts(
                    x, mask, indices, distances, part_costs, part_codes, queue, counters, block, parts, heads, N, D,
                    top, h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride, COSINE, ENTRY, A, PARTS,
                )  # fmt: skip
