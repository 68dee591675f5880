"""Search: the nearest code of each row, certified exact.

Rows are rounded to fp16 first, in a pass at memory speed. Screening, one program: a block of rows against all K codes,
in tiles.
  registers      two least bounds a slot of the tile
  shared memory  the rows (D <= 256), and stages of codes
Read: the rows once, the packed codebook once a block. Written: one index a row, and for the few rows that the bound
leaves open their candidates, at most 16, and a place in a queue. Operations: 2 N K D' on tensor cores; three
multiplications or additions, three minima and two bit operations a score.
A slot is a column of the tile. It keeps the least lower bound of its codes in a group of 16 tiles, with the number of
the tile in its low bits, and the second least. After each group the slots that may hold the nearest code join the row's
list. The queue is decided in float64 (decide.py) by programs of a fixed grid, so that nothing waits for the host.
Where the blocks of rows are fewer than the processors, a program takes a part of the codes, and another kernel joins
what the parts of a row leave open; shapes alone say how many. Workspace: 76 bytes a row and part, of which there are
less than 128 a processor; 1.3 MB on 132.
exactness.md has the proof.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.triton_kernels.blocks import ROWS, row_blocks, screen_blocks, screen_parts
from vqops.triton_kernels.codebook import (
    decision_error,
    exponent_of,
    power_of_two,
    prepare,
)
from vqops.triton_kernels.decide import ENTRY, NO_CODE, decide
from vqops.triton_kernels.layout import HEADER, Packed, padded_dimensions, unpack
from vqops.triton_kernels.scan import scan

CANDIDATES = 16  # a row; more go to the scan
GROUP = 16  # tiles whose numbers share the low bits of a bound; exactness.md has what they cost
HUGE = tl.constexpr(2.0**126)  # above any bound
LARGEST = tl.constexpr(3.4028234663852886e38)
FAR_ROW = tl.constexpr(2.0**28)  # rows beyond are compared with every code; see exactness.md on far codes

# Counters of a search: rows queued from the front for a decision and from the back for a scan, rows without a code.
COUNTERS = 3
# A row's state before screening.
SETTLED = tl.constexpr(0)
SCREENED = tl.constexpr(1)
SCANNED = tl.constexpr(2)
LOST = tl.constexpr(3)  # settled, because it is not finite


@triton.jit
def centred(x, i_stride, live, centre, i, D, scale, COSINE: tl.constexpr):
    """Rows at x [M, 1], dimensions i [1, B], as float32 in units of the typical code, and whether they are finite."""
    v = tl.load(x + i * i_stride, mask=live & (i < D), other=0.0).to(tl.float32)
    finite = tl.min((tl.abs(v) <= LARGEST).to(tl.int32), 1)
    if not COSINE:
        v -= tl.load(centre + i, mask=i < D, other=0.0)
        v = tl.where(live & (i < D), v * scale, 0.0)
    return v, finite


@triton.jit
def rows_kernel(
    x, mask, centre, header, halves, facts, states, indices, counters,
    N, padded, D, h_stride, n_stride, i_stride, mask_h_stride, mask_n_stride, kappa, decision,
    COSINE: tl.constexpr, RANKED: tl.constexpr, MASKED: tl.constexpr, HEADER: tl.constexpr, WIDTH: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rows as fp16, centred and each in its own power of two, with the constants of their bounds; memory speed.

    facts[4]: the coefficient of a code's radius in the lower bound, that in the margin, the row's unit, the margin
    whatever the code. Rows that need no screening get their index here.
    """
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = n < N
    keep = inside
    if MASKED:
        keep &= tl.load(mask + h * mask_h_stride + n * mask_n_stride, mask=inside, other=0) != 0
    live = keep[:, None]
    row = x + h * h_stride + n[:, None] * n_stride
    about = header + h * HEADER
    scale = power_of_two(tl.load(about + 1))
    worst = tl.load(about + 2).to(tl.float32, bitcast=True)
    closest = tl.load(about + 3).to(tl.float32, bitcast=True)
    first = tl.load(about)
    head = centre + h * D

    # The row's power of two brings its largest element to [2^14, 2^15).
    largest = tl.zeros((BN,), tl.float32)
    finite = tl.full((BN,), 1, tl.int32)
    for d in range(0, D, BD):
        y, ok = centred(row, i_stride, live, head, (d + tl.arange(0, BD)).to(tl.int64)[None, :], D, scale, COSINE)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
        finite = tl.minimum(finite, ok)
    usable = keep & (finite != 0)
    fits = usable & (largest <= LARGEST)
    exponent = 14 - exponent_of(largest)
    exponent = tl.minimum(tl.maximum(exponent, -126 if COSINE else -30), 126 if COSINE else 54)
    lift = power_of_two(exponent)
    square = tl.zeros((BN,), tl.float32)
    lost = tl.zeros((BN,), tl.float32)
    for d in range(0, WIDTH, BD):
        i = (d + tl.arange(0, BD)).to(tl.int64)[None, :]
        y, _ = centred(row, i_stride, live, head, i, D, scale, COSINE)
        y = tl.where(fits[:, None], y * lift[:, None], 0.0)
        half = tl.minimum(tl.maximum(y, -65504.0), 65504.0).to(tl.float16)
        e = y - half.to(tl.float32)
        square += tl.sum(y * y, 1)
        lost += tl.sum(e * e, 1)
        tl.store(halves + (h * padded + n)[:, None] * WIDTH + i, half, mask=(n < padded)[:, None])

    # exactness.md: norms rounded up, the coefficient of a code's radius, and what no code changes.
    upward = 1.0 + D * 2.0**-22
    norm = tl.sqrt_rn(square) * upward + D * 2.0**-60
    residual = tl.sqrt_rn(lost) * upward + D * 2.0**-60
    slope = (residual + norm * (worst + kappa)) * (1.0 + 2.0**-9)
    if COSINE:
        weight = tl.full((BN,), 1.0, tl.float32)
        constant = 2.1 * decision * norm
        trivial = usable & (largest == 0)  # scores 0 with every code
        scanned = usable & (fits == 0)
    else:
        weight = lift
        constant = 2.1 * decision * norm * (norm / lift)
        trivial = usable & (first == NO_CODE)
        scanned = usable & ((fits == 0) | ((2.02 * norm / lift + closest < FAR_ROW) == 0))
    if RANKED:  # the order of equal scores matters beyond the first
        scanned = scanned | trivial
        trivial = trivial & (first == NO_CODE)
    settled = (usable == 0) | trivial | (first == NO_CODE)
    screened = (settled == 0) & (scanned == 0)
    at = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    # Other rows pass through the screening, too, and must stay finite there.
    tl.store(facts + at, tl.where(screened, slope, 0.0), mask=n < padded)
    tl.store(facts + total + at, tl.where(screened, 2.02 * slope + norm * 2.0**-19, 0.0), mask=n < padded)
    tl.store(facts + 2 * total + at, tl.where(screened, weight, 1.0), mask=n < padded)
    tl.store(facts + 3 * total + at, tl.where(screened, constant + 2.0**-90, 0.0), mask=n < padded)
    state = tl.where(screened, SCREENED, tl.where(settled, SETTLED, SCANNED))
    state = tl.where(keep & (usable == 0), LOST, state)
    tl.store(states + at, state.to(tl.int8), mask=n < padded)
    chosen = usable & (first != NO_CODE)
    if not RANKED:
        tl.store(indices + h * N + n, tl.where(chosen, first, -1).to(tl.int64), mask=inside & (settled != 0))
    tl.atomic_add(counters + 2, tl.sum((inside & (chosen == 0)).to(tl.int64), 0))


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
def screen_kernel(
    halves, facts, states, begin, radius, unit, codes, indices, lists, bounds, counts, queue, counters,
    N, padded, tiles, tiles_a_part,
    CODES: tl.constexpr, WIDTH: tl.constexpr, ENTRY: tl.constexpr, GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """bounds[part, 0 and 1], counts[part]: what a part leaves of each row; None where a program has all codes."""
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    slope = tl.load(facts + here)
    reach = tl.load(facts + total + here)
    weight = tl.load(facts + 2 * total + here)
    constant = tl.load(facts + 3 * total + here)
    state = tl.load(states + here)
    usable = state == SCREENED
    x = halves + here[:, None] * WIDTH + tl.arange(0, BD)[None, :]
    if BD == WIDTH:
        whole = tl.load(x)

    threshold = tl.full((BN,), HUGE, tl.float32)  # least upper bound so far
    lowest = tl.full((BN,), HUGE, tl.float32)  # least lower bound among what the list holds or hides
    count = tl.zeros((BN,), tl.int32)  # in the list; CANDIDATES + 1 where it does not hold everything
    only = tl.zeros((BN,), tl.int32)  # the code joined last
    slot = tl.arange(0, BK)
    part = tl.program_id(2).to(tl.int64)
    place = lists + ((part * tl.num_programs(1) + h) * N + n) * CANDIDATES
    codes_before = h * CODES
    first, last = 0, tiles
    if bounds is not None:
        first = tl.program_id(2) * tiles_a_part
        last = tl.minimum(first + tiles_a_part, tiles)
    for group in range(first, last, GROUP):
        least = tl.full((BN, BK), HUGE, tl.float32)
        second = tl.full((BN, BK), HUGE, tl.float32)
        for tile in range(group, tl.minimum(group + GROUP, last)):
            at = codes_before + tile * BK
            rows = codes + at * WIDTH + slot[:, None] * WIDTH + tl.arange(0, BD)[None, :]
            if BD == WIDTH:
                product = tl.dot(whole, tl.trans(tl.load(rows)))
            else:
                product = tl.zeros((BN, BK), tl.float32)
                for d in range(0, WIDTH, BD):
                    product = tl.dot(tl.load(x + d), tl.trans(tl.load(rows + d)), product)
            bound = tl.load(begin + at + slot)[None, :] * weight[:, None]
            bound -= tl.load(radius + at + slot)[None, :] * slope[:, None]
            bound -= product * tl.load(unit + at + slot)[None, :]
            bits = (bound.to(tl.int32, bitcast=True) & -GROUP) | (tile - group)
            bound = bits.to(tl.float32, bitcast=True)
            second = tl.minimum(second, tl.maximum(least, bound))
            least = tl.minimum(least, bound)

        best, winner = least_slot(least, group, slot, GROUP, BK)
        hidden = tl.min(second, 1)
        margin = reach * tl.load(radius + codes_before + winner) + constant
        margin += tl.abs(tl.load(begin + codes_before + winner)) * weight * 2.0**-15
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

    if bounds is None:
        settle(indices, queue, counters, h, n, N, state, count, only, CANDIDATES, ENTRY)
    else:
        tl.store(bounds + 2 * part * total + here, threshold)
        tl.store(bounds + (2 * part + 1) * total + here, lowest)
        tl.store(counts + part * total + here, count)


@triton.jit
def join_kernel(
    states, bounds, counts, indices, lists, queue, counters, N, padded, parts,
    CANDIDATES: tl.constexpr, ENTRY: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Joins in the first part's list those of all parts that the least upper bound does not exclude."""
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    here = h * padded + n
    total = tl.num_programs(1).to(tl.int64) * padded
    state = tl.load(states + here)
    j = tl.arange(0, CANDIDATES)[None, :]
    place = (lists + (h * N + n) * CANDIDATES)[:, None] + j
    threshold = tl.full((BN,), HUGE, tl.float32)
    for part in range(0, parts):
        threshold = tl.minimum(threshold, tl.load(bounds + 2 * part * total + here))
    count = tl.zeros((BN,), tl.int32)
    only = tl.zeros((BN,), tl.int32)
    for part in range(0, parts):
        held = tl.load(counts + part * total + here)
        held = tl.where(tl.load(bounds + (2 * part + 1) * total + here) > threshold, 0, held)
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
    entry = (h * N + n) * ENTRY + count
    queue_up(queue, counters, 1, entry, usable & (certified == 0) & (scanned == 0))
    last = tl.num_programs(1).to(tl.int64) * N - 1
    queue_up(queue + last, counters + 1, -1, entry, scanned)


@triton.jit
def queue_up(queue, counter, direction: tl.constexpr, value, which):
    """Append the values that `which` marks, from the front or, with direction -1, from the back."""
    marks = which.to(tl.int32)
    number = tl.sum(marks, 0)
    if number > 0:
        start = tl.atomic_add(counter, number.to(tl.int64))
        at = start + tl.cumsum(marks, 0) - 1
        tl.store(queue + at * direction, value, mask=which)


def kappa(D: int) -> float:
    """What rounding may add to a product with fp16 operands, relative to the norms; exactness.md has the terms."""
    return (2 * padded_dimensions(D) + 16) * 2.0**-23 + 2.0**-17


class Rows(NamedTuple):
    """What rows_kernel makes of x, with rows padded to whole blocks."""

    halves: Tensor  # [H, N', D'] float16
    facts: Tensor  # [4, H, N'] float32
    states: Tensor  # [H, N'] int8
    padded: int  # N'


def round_rows(x, packed: Packed, mask, metric, ranked, indices, counters) -> Rows:
    H, N, D = x.shape
    cosine = metric == "cosine"
    width, padded = padded_dimensions(D), triton.cdiv(N, ROWS) * ROWS
    halves = x.new_empty((H, padded, width), dtype=torch.float16)
    facts = x.new_empty((4, H, padded), dtype=torch.float32)
    states = x.new_empty((H, padded), dtype=torch.int8)
    mask_strides = (0, 0) if mask is None else mask.stride()
    rows, step = row_blocks(D, x.device)
    rows_kernel[(triton.cdiv(padded, rows), H)](
        x, mask, packed.centre, packed.header, halves, facts, states, indices, counters, N, padded, D,
        *x.stride(), *mask_strides, kappa(D), decision_error(D, cosine), cosine, ranked, mask is not None, HEADER,
        width, rows, step, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return Rows(halves, facts, states, padded)


def screen(packed: Packed, rows: Rows, indices: Tensor, queue: Tensor, counters: Tensor, D: int) -> Tensor:
    """Settles or queues every row; returns their candidates [H * N, CANDIDATES]."""
    (H, N), (_, codes, width) = indices.shape, packed.codes.shape
    block = screen_blocks(D, indices.device)
    tiles, programs = codes // block.codes, rows.padded // block.rows
    parts = screen_parts(programs * H, tiles, indices.device)
    lists = indices.new_empty((parts, H * N, CANDIDATES), dtype=torch.int32)
    bounds = counts = None
    if parts > 1:
        bounds = rows.facts.new_empty((parts, 2, H, rows.padded))
        counts = lists.new_empty((parts, H, rows.padded))
    screen_kernel[(programs, H, parts)](
        rows.halves, rows.facts, rows.states, packed.start[0], packed.radius, packed.unit, packed.codes, indices,
        lists, bounds, counts, queue, counters, N, rows.padded, tiles, triton.cdiv(tiles, parts), codes, width, ENTRY,
        GROUP, CANDIDATES, block.rows, block.codes, block.step, num_warps=block.warps, num_stages=block.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    if parts > 1:
        join_kernel[(rows.padded // ROWS, H)](
            rows.states, bounds, counts, indices, lists, queue, counters, N, rows.padded, parts, CANDIDATES, ENTRY,
            ROWS, num_warps=4,
        )  # fmt: skip
    return lists[0]


def search(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, prepared: Tensor | None):
    """Indices [H, N], and the counters: rows queued for a decision, rows scanned, rows without a code."""
    H, N, D = x.shape
    indices = x.new_empty((H, N), dtype=torch.int64)
    counters = x.new_zeros(COUNTERS, dtype=torch.int64)
    if indices.numel() == 0:
        return indices, counters
    with torch.cuda.device_of(x):
        if torch.float64 in (x.dtype, codebook.dtype):
            scan(x, codebook, mask, metric, indices, None, None, counters)
            return indices, counters
        packed = unpack(prepare(codebook, metric) if prepared is None else prepared, *codebook.shape)
        rows = round_rows(x, packed, mask, metric, False, indices, counters)
        queue = x.new_empty(H * N, dtype=torch.int64)
        lists = screen(packed, rows, indices, queue, counters, D)
        decide(x, codebook, metric, indices, None, lists, queue, counters)
        scan(x, codebook, None, metric, indices, None, queue, counters)
    return indices, counters


def nearest(x, codebook, mask=None, metric="euclidean", prepared=None):
    return search(x, codebook, mask, metric, prepared)[0]


def search_statistics(x, codebook, metric="euclidean"):
    indices, counters = search(x, codebook, None, metric, None)
    return torch.cat([indices.numel() - counters.sum(0, keepdim=True), counters])
