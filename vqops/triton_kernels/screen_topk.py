"""The k nearest codes of each row, in order, certified.

Two passes over the codes. The first keeps the least upper bound a slot (a column of the tile): the k-th least of these
holds k different codes, so no code above it matters. The second collects every code whose lower bound does not exceed
it, at most four or so times k a row; more go to the scan. Both are ranked in float64 (decide.py, scan.py). Bounds as
in search.py.
"""

import torch
import triton
import triton.language as tl

from vqops.triton_kernels.blocks import TOPK
from vqops.triton_kernels.codebook import prepare
from vqops.triton_kernels.decide import ENTRY, decide
from vqops.triton_kernels.layout import padded_dimensions, unpack
from vqops.triton_kernels.scan import scan
from vqops.triton_kernels.search import COUNTERS, HUGE, LOST, SCANNED, SCREENED, queue_up, round_rows


@triton.jit
def tile_bounds(
    x, begin, radius, unit, codes, at, slope, weight, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Lower bounds of BK codes from `at`, and their radii and starts."""
    slot = tl.arange(0, BK)
    rows = codes + at * WIDTH + slot[:, None] * WIDTH + tl.arange(0, BD)[None, :]
    product = tl.zeros((BN, BK), tl.float32)
    for d in range(0, WIDTH, BD):
        product = tl.dot(tl.load(x + d), tl.trans(tl.load(rows + d)), product)
    around = tl.load(radius + at + slot)[None, :]
    start = tl.load(begin + at + slot)[None, :] * weight[:, None]
    bound = start - around * slope[:, None]
    bound -= product * tl.load(unit + at + slot)[None, :]
    return bound, around, start


@triton.jit
def topk_kernel(
    halves, facts, states, begin, radius, unit, codes, lists, queue, counters, N, padded, tiles, top,
    CODES: tl.constexpr, WIDTH: tl.constexpr, ENTRY: tl.constexpr, CANDIDATES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
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
    codes_before = h * CODES

    least = tl.full((BN, BK), HUGE, tl.float32)
    for tile in range(0, tiles):
        at = codes_before + tile * BK
        bound, around, start = tile_bounds(x, begin, radius, unit, codes, at, slope, weight, WIDTH, BN, BK, BD)
        least = tl.minimum(least, bound + (around * reach[:, None] + start * 2.0**-15))
    threshold = tl.full((BN,), -HUGE, tl.float32)
    for _turn in range(0, top):
        threshold = tl.min(tl.where(least > threshold[:, None], least, HUGE), 1)
    threshold = tl.minimum(threshold + constant, 2.0**69 * weight)  # below the bounds of codes left out

    count = tl.zeros((BN,), tl.int32)
    place = lists + (h * N + n) * CANDIDATES
    slot = tl.arange(0, BK)[None, :]
    for tile in range(0, tiles):
        at = codes_before + tile * BK
        bound, _around, _start = tile_bounds(x, begin, radius, unit, codes, at, slope, weight, WIDTH, BN, BK, BD)
        following = tl.min(tl.where(bound <= threshold[:, None], slot, BK), 1)
        joins = usable & (following < BK) & (count <= CANDIDATES)
        while tl.max(joins.to(tl.int32), 0) > 0:
            tl.store(place + count, tile * BK + following, mask=joins & (count < CANDIDATES))
            count = tl.minimum(count + joins.to(tl.int32), CANDIDATES + 1)
            later = (bound <= threshold[:, None]) & (slot > following[:, None])
            following = tl.min(tl.where(later, slot, BK), 1)
            joins = usable & (following < BK) & (count <= CANDIDATES)

    scanned = (state == SCANNED) | (usable & (count > CANDIDATES))
    entry = (h * N + n) * ENTRY + count
    queue_up(queue, counters, 1, entry, usable & (scanned == 0))
    last = tl.num_programs(1).to(tl.int64) * N - 1
    queue_up(queue + last, counters + 1, -1, entry, scanned)


def nearest_topk(x, codebook, k, mask=None, metric="euclidean", prepared=None):
    H, N, D = x.shape
    indices = x.new_full((H, N, k), -1, dtype=torch.int64)
    distances = x.new_full((H, N, k), torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
    counters = x.new_zeros(COUNTERS, dtype=torch.int64)
    if indices.numel() == 0:
        return indices, distances
    with torch.cuda.device_of(x):
        if torch.float64 in (x.dtype, codebook.dtype):
            scan(x, codebook, mask, metric, indices, distances, None, counters, k)
            return indices, distances
        packed = unpack(prepare(codebook, metric) if prepared is None else prepared, *codebook.shape)
        rows = round_rows(x, packed, mask, metric, True, indices, counters)
        candidates = triton.next_power_of_2(2 * k + 16)
        lists = x.new_empty((H * N, candidates), dtype=torch.int32)
        queue = x.new_empty(H * N, dtype=torch.int64)
        block = TOPK._replace(step=min(TOPK.step, padded_dimensions(D)))
        codes, width = packed.codes.shape[1:]
        topk_kernel[(rows.padded // block.rows, H)](
            rows.halves, rows.facts, rows.states, packed.start[1], packed.radius, packed.unit, packed.codes, lists,
            queue, counters, N, rows.padded, codes // block.codes, k, codes, width, ENTRY, candidates, block.rows,
            block.codes, block.step, num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
        )  # fmt: skip
        decide(x, codebook, metric, indices, distances, lists, queue, counters, k)
        scan(x, codebook, None, metric, indices, distances, queue, counters, k)
        lost = (rows.states[:, :N] == LOST.value).unsqueeze(-1)
    return indices, distances.masked_fill_(lost, torch.nan)
