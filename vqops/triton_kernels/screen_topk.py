"""Screening for the k nearest codes: two passes over the codes.

The first keeps the least upper bound per slot (a column of the tile): the k-th least of these holds k different codes,
so no code above it matters. The second collects every code whose lower bound does not exceed it, at most four or so
times k per row; more go to the scan. Both are ranked in float64 (decide.py, scan.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.triton_kernels.blocks import TOPK
from vqops.triton_kernels.bound import FAR_BOUND, HUGE, SLACK, load_row_bound, tile_bounds
from vqops.triton_kernels.layout import Packed
from vqops.triton_kernels.queue import ENTRY, SCANNED, SCREENED, enqueue
from vqops.triton_kernels.rows import Rows


@triton.jit(do_not_specialize=["N", "tiles", "top"])
def screen_topk_kernel(
    stored,  # [H, N', D'] float16
    row_bounds,  # [4, H, N'], see bound.py
    states,  # [H, N'] int8
    start,  # [H, K'], that of repeats as well
    radius,  # [H, K']
    unit,  # [H, K']
    codes,  # [H, K', D'] float16
    lists,  # [H, N, CANDIDATES] int32
    queue,  # [H N] int64
    counters,  # [COUNTERS] int64
    N, padded, codes_padded, tiles, top,
    WIDTH: tl.constexpr, ENTRY: tl.constexpr, CANDIDATES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    row_radius, spread, lift, rest = load_row_bound(row_bounds, here, total)
    state = tl.load(states + here)
    screened = state == SCREENED
    # In 64 bits the program's place alone: those of its rows would not all stay in registers.
    rows = stored + (h * padded + tl.program_id(0).to(tl.int64) * BN) * WIDTH
    rows += tl.arange(0, BN)[:, None] * WIDTH + tl.arange(0, BD)[None, :]
    codes_before = h * codes_padded

    least = tl.full((BN, BK), HUGE, tl.float32)
    for tile in range(0, tiles):
        lower, lifted, code_radius = tile_bounds(
            rows, None, row_radius, lift, start, radius, unit, codes, codes_before + tile * BK, WIDTH, BN, BK, BD
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
    for tile in range(0, tiles):
        lower, _lifted, _radius = tile_bounds(
            rows, None, row_radius, lift, start, radius, unit, codes, codes_before + tile * BK, WIDTH, BN, BK, BD
        )
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


def screen_topk(packed: Packed, rows: Rows, N: int, k: int, queue: Tensor, counters: Tensor) -> Tensor:
    """Queues every row that can have codes; returns their candidates [H * N, 2 k + 16 or more]."""
    H, codes, width = packed.codes.shape
    candidates = triton.next_power_of_2(2 * k + 16)
    lists = queue.new_empty((H * N, candidates), dtype=torch.int32)
    block = TOPK._replace(step=min(TOPK.step, width))
    screen_topk_kernel[(rows.padded // block.rows, H)](
        rows.stored, rows.bounds, rows.states, packed.start_topk, packed.radius, packed.unit, packed.codes, lists,
        queue, counters, N, rows.padded, codes, codes // block.codes, k, width, ENTRY, candidates, block.rows,
        block.codes, block.step, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return lists
