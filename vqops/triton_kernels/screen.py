"""Screening, the fast pass of the search. One program: a block of rows against all K codes, in tiles.
  registers      two least bounds per slot of the tile
  shared memory  the rows (D <= 256), and stages of codes
Read: the rows once, the packed codebook once per block. Written: one index per row, and for the few rows that the bound
leaves open their candidates, at most 16, and a place in the queue. Operations: 2 N K D' on tensor cores; three
multiplications or additions, three minima and two bit operations per score.
A slot is a column of the tile. It keeps the least lower bound of its codes in a group of 16 tiles, with the number of
the tile in its low bits, and the second least. After each group the slots that may hold the nearest code join the row's
list.
Where the blocks of rows are fewer than the processors, a program takes a part of the codes, and another kernel merges
what the parts of a row leave open; shapes alone say how many. Workspace: 76 bytes per row and part, of which there are
less than 128 per processor; 1.3 MB on 132.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.triton_kernels.blocks import ROWS, screen_blocks, screen_parts
from vqops.triton_kernels.bound import HUGE, SLACK, load_row_bound, tile_bounds
from vqops.triton_kernels.distance import NO_CODE
from vqops.triton_kernels.layout import Packed
from vqops.triton_kernels.queue import ENTRY, SCANNED, SCREENED, enqueue
from vqops.triton_kernels.rows import Rows

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


@triton.jit(do_not_specialize=["N", "tiles", "tiles_per_part"])
def screen_kernel(
    stored,  # [H, N', D'] float16
    row_bounds,  # [4, H, N'], see bound.py
    states,  # [H, N'] int8
    start,  # [H, K']
    radius,  # [H, K']
    unit,  # [H, K']
    codes,  # [H, K', D'] float16
    indices,  # [H, N] int64
    lists,  # [parts, H, N, CANDIDATES] int32
    part_bounds,  # [parts, 2, H, N'], a part's threshold and lowest; None where a program has all codes
    counts,  # [parts, H, N'] int32; None likewise
    queue,  # [H N] int64
    counters,  # [COUNTERS] int64
    N, padded, codes_padded, tiles, tiles_per_part,
    WIDTH: tl.constexpr, ENTRY: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    row_radius, spread, lift, rest = load_row_bound(row_bounds, here, total)
    state = tl.load(states + here)
    usable = state == SCREENED
    rows = stored + here[:, None] * WIDTH + tl.arange(0, BD)[None, :]
    whole = None
    if BD == WIDTH:
        whole = tl.load(rows)

    threshold = tl.full((BN,), HUGE, tl.float32)  # least upper bound so far
    lowest = tl.full((BN,), HUGE, tl.float32)  # least lower bound among what the list holds or hides
    count = tl.zeros((BN,), tl.int32)  # in the list; CANDIDATES + 1 where it does not hold everything
    only = tl.zeros((BN,), tl.int32)  # the code joined last
    slot = tl.arange(0, BK)
    part = tl.program_id(2).to(tl.int64)
    place = lists + ((part * tl.num_programs(1) + h) * N + n) * CANDIDATES
    codes_before = h * codes_padded
    first, last = 0, tiles
    if part_bounds is not None:
        first = tl.program_id(2) * tiles_per_part
        last = tl.minimum(first + tiles_per_part, tiles)
    for group in range(first, last, GROUP):
        least = tl.full((BN, BK), HUGE, tl.float32)
        second = tl.full((BN, BK), HUGE, tl.float32)
        for tile in range(group, tl.minimum(group + GROUP, last)):
            lower, _lifted, _radius = tile_bounds(
                rows, whole, row_radius, lift, start, radius, unit, codes, codes_before + tile * BK, WIDTH, BN, BK, BD
            )
            bits = (lower.to(tl.int32, bitcast=True) & -GROUP) | (tile - group)
            lower = bits.to(tl.float32, bitcast=True)
            second = tl.minimum(second, tl.maximum(least, lower))
            least = tl.minimum(least, lower)

        best, winner = least_slot(least, group, slot, GROUP, BK)
        hidden = tl.min(second, 1)
        margin = spread * tl.load(radius + codes_before + winner) + rest
        margin += tl.abs(tl.load(start + codes_before + winner)) * lift * SLACK
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

    if part_bounds is None:
        settle(indices, queue, counters, h, n, N, state, count, only, CANDIDATES, ENTRY)
    else:
        tl.store(part_bounds + 2 * part * total + here, threshold)
        tl.store(part_bounds + (2 * part + 1) * total + here, lowest)
        tl.store(counts + part * total + here, count)


@triton.jit(do_not_specialize=["N", "parts"])
def merge_lists_kernel(
    states,  # [H, N'] int8
    part_bounds,  # [parts, 2, H, N']
    counts,  # [parts, H, N'] int32
    indices,  # [H, N] int64
    lists,  # [parts, H, N, CANDIDATES] int32
    queue,  # [H N] int64
    counters,  # [COUNTERS] int64
    N, padded, parts, CANDIDATES: tl.constexpr, ENTRY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Merges into the first part's list those of all parts that the least upper bound does not exclude."""
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    state = tl.load(states + here)
    j = tl.arange(0, CANDIDATES)[None, :]
    place = (lists + (h * N + n) * CANDIDATES)[:, None] + j
    threshold = tl.full((BN,), HUGE, tl.float32)
    for part in range(0, parts):
        threshold = tl.minimum(threshold, tl.load(part_bounds + 2 * part * total + here))
    count = tl.zeros((BN,), tl.int32)
    only = tl.zeros((BN,), tl.int32)
    for part in range(0, parts):
        held = tl.load(counts + part * total + here)
        held = tl.where(tl.load(part_bounds + (2 * part + 1) * total + here) > threshold, 0, held)
        known = (state == SCREENED)[:, None] & (j < held[:, None])
        code = tl.load(place + part * tl.num_programs(1) * N * CANDIDATES, mask=known, other=0)
        if part > 0:
            tl.store(place + count[:, None], code, mask=known & (j + count[:, None] < CANDIDATES))
        only = tl.where(held > 0, tl.sum(tl.where(j == 0, code, 0), 1), only)
        count = tl.minimum(count + held, CANDIDATES + 1)
    settle(indices, queue, counters, h, n, N, state, count, only, CANDIDATES, ENTRY)


@triton.jit
def settle(indices, queue, counters, h, n, N, state, count, only, CANDIDATES: tl.constexpr, ENTRY: tl.constexpr):
    """A row with one candidate is done; others are queued."""
    usable = state == SCREENED
    certified = usable & (count == 1)
    tl.store(indices + h * N + n, only.to(tl.int64), mask=certified)
    scanned = (state == SCANNED) | (usable & ((count > CANDIDATES) | (count == 0)))
    enqueue(queue, counters, h, n, N, count, usable & (certified == 0) & (scanned == 0), scanned, ENTRY)


def screen(packed: Packed, rows: Rows, indices: Tensor, queue: Tensor, counters: Tensor, D: int) -> Tensor:
    """Settles or queues every row; returns their candidates [H * N, CANDIDATES]."""
    (H, N), (_, codes, width) = indices.shape, packed.codes.shape
    block = screen_blocks(D, indices.device)
    tiles, programs = codes // block.codes, rows.padded // block.rows
    parts = screen_parts(programs * H, tiles, indices.device)
    lists = indices.new_empty((parts, H * N, CANDIDATES), dtype=torch.int32)
    part_bounds = counts = None
    if parts > 1:
        part_bounds = rows.bounds.new_empty((parts, 2, H, rows.padded))
        counts = lists.new_empty((parts, H, rows.padded))
    screen_kernel[(programs, H, parts)](
        rows.stored, rows.bounds, rows.states, packed.start, packed.radius, packed.unit, packed.codes, indices,
        lists, part_bounds, counts, queue, counters, N, rows.padded, codes, tiles, triton.cdiv(tiles, parts), width,
        ENTRY, GROUP, CANDIDATES, block.rows, block.codes, block.step, num_warps=block.warps, num_stages=block.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    if parts > 1:
        merge_lists_kernel[(rows.padded // ROWS, H)](
            rows.states, part_bounds, counts, indices, lists, queue, counters, N, rows.padded, parts, CANDIDATES,
            ENTRY, ROWS, num_warps=4,
        )  # fmt: skip
    return lists[0]
