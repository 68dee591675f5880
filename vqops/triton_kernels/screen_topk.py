"""Screening for the k nearest codes: two passes over the codes.

The first keeps the least upper bound per slot (a column of the tile): the k-th least of these holds k different codes,
so no code above it matters. The second collects every code whose lower bound does not exceed it, at most four or so
times k per row; more go to the scan. Both are ranked in float64 (decide.py, scan.py).
"""

import triton
import triton.language as tl

from vqops.triton_kernels.blocks import TOPK
from vqops.triton_kernels.bound import FAR_BOUND, HUGE, SLACK, accumulation, decision_error, tile_bounds
from vqops.triton_kernels.codebook import head_of
from vqops.triton_kernels.launch import Kept
from vqops.triton_kernels.layout import HEADER, padded_codes, padded_dimensions
from vqops.triton_kernels.queue import ENTRY, enqueue, sections_of
from vqops.triton_kernels.rows import SCANNED, SCREENED, bound_rows, count_lost, kept, padded_rows, round_rows_into
from vqops.triton_kernels.strides import strides


@Kept
@triton.jit(do_not_specialize=["N", "tiles", "top", "mask_h_stride"])
def screen_topk_kernel(
    x,  # [H, N, D]
    mask,  # [H, N] bool, or None
    packed,  # uint8, see layout.py
    work,  # uint8, see queue.py
    distances,  # [H, N, top]: NaN for rows that are not finite
    counters,  # [COUNTERS] int64
    N, padded, D, codes_padded, tiles, top,
    h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride, accumulation, decision,
    COSINE: tl.constexpr, HEADER: tl.constexpr, WIDTH: tl.constexpr, ENTRY: tl.constexpr, CANDIDATES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.num_programs(1).to(tl.int64) * padded
    header, centre, bounds, codes = head_of(packed, h, codes_padded, WIDTH, HEADER)
    queue, lists, _part_bounds, _counts, stored = sections_of(work, total, 1, CANDIDATES)
    keep = kept(mask, h, n, N, mask_h_stride, mask_n_stride)
    row = x + h * h_stride + n[:, None] * n_stride
    # In 64 bits the program's place alone: those of its rows would not all stay in registers.
    mine = stored + (h * padded + tl.program_id(0).to(tl.int64) * BN) * WIDTH + tl.arange(0, BN)[:, None] * WIDTH
    usable, fits, largest, lift, square, lost = round_rows_into(
        mine, row, header, centre, i_stride, keep, D, COSINE, WIDTH, BD
    )
    row_radius, spread, lift, rest, state, settled = bound_rows(
        header, usable, fits, largest, lift, square, lost, D, accumulation, decision, COSINE, True
    )
    for t in range(0, top):
        tl.store(distances + (h * N + n) * top + t, float("nan"), mask=keep & (usable == 0))
    count_lost(counters, n < N, settled)
    screened = state == SCREENED
    rows = mine + tl.arange(0, BD)[None, :]

    least = tl.full((BN, BK), HUGE, tl.float32)
    for tile in range(0, tl.where(tl.max(screened.to(tl.int32), 0) > 0, tiles, 0)):
        lower, lifted, code_radius = tile_bounds(
            rows, None, row_radius, lift, bounds, codes, tile, 3, WIDTH, BN, BK, BD
        )
        least = tl.minimum(least, lower + (code_radius * spread[:, None] + lifted * SLACK))
    threshold = tl.full((BN,), -HUGE, tl.float32)
    for _turn in range(0, top):
        threshold = tl.min(tl.where(least > threshold[:, None], least, HUGE), 1)
    threshold += rest
    usable = screened & (threshold < FAR_BOUND * lift)  # else a code left out, or fewer than k bounds

    count = tl.zeros((BN,), tl.int32)
    place = lists + (h * N + n) * CANDIDATES
    slot = tl.arange(0, BK)[None, :]
    for tile in range(0, tl.where(tl.max(usable.to(tl.int32), 0) > 0, tiles, 0)):
        lower, _lifted, _radius = tile_bounds(rows, None, row_radius, lift, bounds, codes, tile, 3, WIDTH, BN, BK, BD)
        following = tl.min(tl.where(lower <= threshold[:, None], slot, BK), 1)
        joins = usable & (following < BK) & (count <= CANDIDATES)
        while tl.max(joins.to(tl.int32), 0) > 0:
            tl.store(place + count, tile * BK + following, mask=joins & (count < CANDIDATES))
            count = tl.minimum(count + joins.to(tl.int32), CANDIDATES + 1)
            later = (lower <= threshold[:, None]) & (slot > following[:, None])
            following = tl.min(tl.where(later, slot, BK), 1)
            joins = usable & (following < BK) & (count <= CANDIDATES)

    scanned = (state == SCANNED) | (screened & ((usable == 0) | (count > CANDIDATES)))
    enqueue(queue, counters, h, n, N, count, screened & (scanned == 0), scanned, ENTRY)


def candidates_of(k: int) -> int:
    return 1 << (2 * k + 15).bit_length()


def screen_topk(x, codebook, packed, mask, metric, work, distances, counters, k: int) -> None:
    """Queues every row that can have codes."""
    (H, N, D), codes, cosine = x.shape, padded_codes(codebook.shape[1]), metric == "cosine"
    padded, width = padded_rows(N), padded_dimensions(D)
    block = TOPK._replace(step=min(TOPK.step, width))
    screen_topk_kernel[(padded // block.rows, H)](
        x, mask, packed, work, distances, counters, N, padded, D, codes, codes // block.codes, k, *strides(x, 3),
        *strides(mask, 2), accumulation(D), decision_error(D, cosine), cosine, HEADER, width, ENTRY, candidates_of(k),
        block.rows, block.codes, block.step, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
    )  # fmt: skip
