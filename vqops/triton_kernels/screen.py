"""Screening, the fast pass of the search. One program: a block of rows against all K codes, in tiles.
  registers      two least bounds per slot of the tile
  shared memory  the rows as fp16 (D <= 256), and stages of codes
Read: the rows once, the packed codebook once per block. Written: one index per row, and for the few rows that the bound
leaves open their candidates, at most 16, and a place in the queue. Operations: 2 N K D' on tensor cores; three
multiplications or additions, three minima and two bit operations per score.
A slot is a column of the tile. It keeps the least lower bound of its codes in a group of 16 tiles, with the number of
the tile in its low bits, and the second least. After each group the slots that may hold the nearest code join the row's
list.
Where the blocks of rows are fewer than the processors, a program takes a part of the codes, and the last of a block to
end merges what the parts leave open; shapes alone say how many. Workspace: 76 bytes per row and part, for D > 64 2 D'
more; of parts times rows there are less than 128 per processor.
"""

import triton
import triton.language as tl

from vqops.triton_kernels.blocks import screen_blocks, screen_parts
from vqops.triton_kernels.bound import HUGE, SLACK, accumulation, decision_error, tile_bounds
from vqops.triton_kernels.codebook import bounds_of, head_of
from vqops.triton_kernels.distance import NO_CODE
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.layout import HEADER, STEP, padded_codes, padded_dimensions
from vqops.triton_kernels.queue import COUNTERS, ENTRY, enqueue, last_to_arrive, sections_of
from vqops.triton_kernels.rows import (
    SCANNED,
    SCREENED,
    SETTLED,
    bound_rows,
    count_lost,
    kept,
    padded_rows,
    round_rows,
    round_rows_into,
)
from vqops.triton_kernels.strides import strides

CANDIDATES = 16  # per row; more go to the scan
GROUP = 16  # tiles whose numbers share the low bits of a bound; bound.py has what they cost


@triton.jit
def slot_codes(least, group, slot, GROUP: tl.constexpr, BK: tl.constexpr):
    """The codes whose bounds the slots hold: the number of the tile is in the low bits."""
    return (group + (least.to(tl.int32, bitcast=True) & (GROUP - 1))) * BK + slot[None, :]


@triton.jit
def least_slot(least, group, slot, GROUP: tl.constexpr, BK: tl.constexpr):
    """Each row's least bound, and its code."""
    best = tl.min(least, 1)
    code = tl.where(least == best[:, None], slot_codes(least, group, slot, GROUP, BK), NO_CODE)
    return best, tl.min(code, 1)


@triton.jit
def merge_lists(lists, part_bounds, counts, h, n, N, here, total, parts, CANDIDATES: tl.constexpr):
    """Merges into the first part's list those of all parts that the least upper bound does not exclude. Returns how
    many candidates each row has, and its only one."""
    j = tl.arange(0, CANDIDATES)[None, :]
    place = (lists + (h * N + n) * CANDIDATES)[:, None] + j
    threshold = tl.full(n.shape, HUGE, tl.float32)
    for part in range(0, parts):
        threshold = tl.minimum(threshold, tl.load(part_bounds + 2 * part * total + here))
    count = tl.zeros(n.shape, tl.int32)
    only = tl.zeros(n.shape, tl.int32)
    for part in range(0, parts):
        held = tl.load(counts + part * total + here)
        held = tl.where(tl.load(part_bounds + (2 * part + 1) * total + here) > threshold, 0, held)
        known = (n < N)[:, None] & (j < held[:, None]) & (held <= CANDIDATES)[:, None]
        code = tl.load(place + part * total * CANDIDATES, mask=known, other=0)
        if part > 0:
            tl.store(place + count[:, None], code, mask=known & (j + count[:, None] < CANDIDATES))
        only = tl.where(held > 0, tl.sum(tl.where(j == 0, code, 0), 1), only)
        count = tl.minimum(count + held, CANDIDATES + 1)
    return count, only


@triton.jit
def settle(indices, queue, counters, h, n, N, count, only, CANDIDATES: tl.constexpr, ENTRY: tl.constexpr):
    """A row with one candidate is done, one with a negative number has been; others are queued."""
    tl.store(indices + h * N + n, only.to(tl.int64), mask=count == 1)
    scanned = (count > CANDIDATES) | (count == 0)
    enqueue(queue, counters, h, n, N, count, (count > 1) & (count <= CANDIDATES), scanned, ENTRY)


@Kept
@triton.jit(do_not_specialize=["N", "tiles", "tiles_per_part", "mask_h_stride"])
def screen_kernel(
    x,  # [H, N, D]
    mask,  # [H, N] bool, or None
    packed,  # uint8, see layout.py
    work,  # uint8, see queue.py
    indices,  # [H, N] int64
    counters,  # [COUNTERS + one a block of rows, if in parts] int64: the latter zeros, and left so
    N, padded, D, codes_padded, tiles, tiles_per_part,
    h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride, accumulation, decision,
    COSINE: tl.constexpr, HEADER: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, KEPT: tl.constexpr,
    ENTRY: tl.constexpr, COUNTERS: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    header, centre, bounds, codes = head_of(packed, h, codes_padded, WIDTH, HEADER)
    queue, lists, part_bounds, counts, stored = sections_of(work, total, parts, CANDIDATES)
    keep = kept(mask, h, n, N, mask_h_stride, mask_n_stride)
    row = x + h * h_stride + n[:, None] * n_stride
    rows, whole = None, None
    if KEPT:
        whole, usable, fits, largest, lift, square, lost = round_rows(
            row, header, centre, i_stride, keep, D, COSINE, WIDTH
        )
    else:
        mine = stored + (part * total + here)[:, None] * WIDTH
        usable, fits, largest, lift, square, lost = round_rows_into(
            mine, row, header, centre, i_stride, keep, D, COSINE, WIDTH, STEP
        )
        rows = mine + tl.arange(0, BD)[None, :]
        if BD == WIDTH:
            whole = tl.load(rows)
    row_radius, spread, lift, rest, state, settled = bound_rows(
        header, usable, fits, largest, lift, square, lost, D, accumulation, decision, COSINE, False
    )
    if part == 0:
        tl.store(indices + h * N + n, settled.to(tl.int64), mask=(n < N) & (state == SETTLED))
        count_lost(counters, n < N, settled)
    usable = state == SCREENED

    threshold = tl.full((BN,), HUGE, tl.float32)  # least upper bound so far
    lowest = tl.full((BN,), HUGE, tl.float32)  # least lower bound among what the list holds or hides
    count = tl.zeros((BN,), tl.int32)  # in the list; CANDIDATES + 1 where it does not hold everything
    only = tl.zeros((BN,), tl.int32)  # the code joined last
    slot = tl.arange(0, BK)
    place = lists + (part * total + h * N + n) * CANDIDATES
    first = tl.program_id(2) * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles)
    last = tl.where(tl.max(usable.to(tl.int32), 0) > 0, last, first)
    for group in range(first, last, GROUP):
        least = tl.full((BN, BK), HUGE, tl.float32)
        second = tl.full((BN, BK), HUGE, tl.float32)
        for tile in range(group, tl.minimum(group + GROUP, last)):
            lower, _lifted, _radius = tile_bounds(
                rows, whole, row_radius, lift, bounds, codes, tile, 0, WIDTH, BN, BK, BD
            )
            bits = (lower.to(tl.int32, bitcast=True) & -GROUP) | (tile - group)
            lower = bits.to(tl.float32, bitcast=True)
            second = tl.minimum(second, tl.maximum(least, lower))
            least = tl.minimum(least, lower)

        best, winner = least_slot(least, group, slot, GROUP, BK)
        hidden = tl.min(second, 1)
        about = bounds_of(bounds, winner, BK)
        margin = spread * tl.load(about + BK) + rest
        margin += tl.abs(tl.load(about)) * lift * SLACK
        threshold = tl.minimum(threshold, best + margin)
        over = lowest > threshold  # everything before is excluded
        count = tl.where(over, 0, count)
        lowest = tl.where(over, HUGE, lowest)
        joins = best <= threshold
        only = tl.where(joins, winner, only)
        lowest = tl.minimum(lowest, tl.where(joins, best, HUGE))
        lowest = tl.minimum(lowest, tl.where(hidden <= threshold, hidden, HUGE))
        count = tl.where(hidden <= threshold, CANDIDATES + 1, count)
        joins &= usable
        while tl.max(joins.to(tl.int32), 0) > 0:
            tl.store(place + count, winner, mask=joins & (count < CANDIDATES))
            count = tl.minimum(count + joins.to(tl.int32), CANDIDATES + 1)
            taken = slot_codes(least, group, slot, GROUP, BK) == winner[:, None]
            least = tl.where(taken, HUGE, least)
            best, winner = least_slot(least, group, slot, GROUP, BK)
            joins = usable & (best <= threshold) & (count <= CANDIDATES)

    # Settled rows, and rows that are scanned whatever the parts find.
    count = tl.where(state == SCANNED, CANDIDATES + 1, tl.where(usable, count, -1))
    if parts == 1:
        settle(indices, queue, counters, h, n, N, count, only, CANDIDATES, ENTRY)
    else:
        tl.store(part_bounds + 2 * part * total + here, threshold)
        tl.store(part_bounds + (2 * part + 1) * total + here, tl.where(usable, lowest, -HUGE))
        tl.store(counts + part * total + here, count)
        done = counters + COUNTERS + h * tl.num_programs(0) + tl.program_id(0)
        if last_to_arrive(done, parts):
            tl.store(done, 0)
            count, only = merge_lists(lists, part_bounds, counts, h, n, N, here, total, parts, CANDIDATES)
            settle(indices, queue, counters, h, n, N, count, only, CANDIDATES, ENTRY)


def parts_of(H: int, N: int, K: int, D: int, device) -> int:
    """In how many parts the codes are screened."""
    block = screen_blocks(D, device)
    return screen_parts(padded_rows(N) // block.rows * H, padded_codes(K) // block.codes, device)


def stored_width(D: int) -> int:
    """Dimensions of the rows that pass through memory."""
    return 0 if padded_dimensions(D) <= STEP else padded_dimensions(D)


def screen(x, codebook, packed, mask, metric, work, indices, counters, parts: int) -> None:
    """Settles or queues every row."""
    (H, N, D), K = x.shape, codebook.shape[1]
    cosine, padded, codes, block = metric == "cosine", padded_rows(N), padded_codes(K), screen_blocks(D, x.device)
    width, tiles = padded_dimensions(D), codes // block.codes
    screen_kernel[(padded // block.rows, H, parts)](
        x, mask, packed, work, indices, counters, N, padded, D, codes, tiles, cdiv(tiles, parts),
        *strides(x, 3), *strides(mask, 2), accumulation(D), decision_error(D, cosine), cosine, HEADER, width,
        min(width, STEP), stored_width(D) == 0, ENTRY, COUNTERS, GROUP, CANDIDATES, block.rows, block.codes, block.step,
        num_warps=block.warps, num_stages=block.stages, maxnreg=block.registers, enable_fp_fusion=True,
    )  # fmt: skip
