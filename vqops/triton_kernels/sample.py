"""Sample: the code of the largest key l + T g of each row, in one kernel.

A program takes a block of rows against all codes, tile by tile. The float32 product of rows and codes as
vqops/pytorch/codebook.py prepares them is a lower bound L of half the squared distance, and two conversions of a random
word bound its noise from above (docs/exactness.md): the upper bounds of a tile's keys, in registers. Each place of a
tile keeps its two codes of largest bound and the third bound. Then a row takes its codes by descending bound and
computes their keys in float64, until no bound reaches the largest key. If a third bound does, or no bound holds for the
row, the block is compared with all codes.

Read: the prepared rows once, the prepared codes once per block of rows, and of rows and codes as given what is decided.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqops.pytorch.codebook import columns, prepare_codes, with_repeats
from vqops.pytorch.precision import full_precision
from vqops.pytorch.sample import logit_terms, noise_terms
from vqops.pytorch.screen import prepare_rows
from vqops.reference.distance import is_finite
from vqops.reference.sample import temperature_of
from vqops.triton_kernels.blocks import sizes
from vqops.triton_kernels.distance import NO_CODE, costs, squared_norm
from vqops.triton_kernels.launch import Kept, cdiv
from vqops.triton_kernels.noise import gumbel, noise_above, word_of, words
from vqops.triton_kernels.strides import strides

LARGEST_TEMPERATURE = 2.0**60  # of bounds, in the units of the codes
NONE, BOUNDED, OPEN = (tl.constexpr(i) for i in range(3))  # rows without a code, with bounds, without


@triton.jit
def key_of(cost, norm, noise, COSINE: tl.constexpr):
    if COSINE:
        logit = tl.where(norm > 0, -cost / tl.where(norm > 0, norm, 1.0), 0.0)
        logit = tl.where(tl.abs(cost) == float("inf"), -cost, logit)
    else:
        logit = -tl.sqrt(cost)
    return logit + noise


@triton.jit
def better_of(key, cost, code, best, best_cost, best_code):
    """The larger key, then the less cost, then the lower index; NO_CODE comes last."""
    first = (key > best) | ((key == best) & ((cost < best_cost) | ((cost == best_cost) & (code < best_code))))
    won = (code != NO_CODE) & (first | (best_code == NO_CODE))
    return tl.where(won, key, best), tl.where(won, cost, best_cost), tl.where(won, code, best_code)


@triton.jit
def reaches(above, best, best_code, scaled, unit):
    """Whether a key of this bound may be the largest; 2^-20 is all that float32 rounds."""
    limit = above.to(tl.float64)
    limit += 9.5367431640625e-07 * (tl.abs(limit) + 256.0 * scaled)
    return (best_code == NO_CODE) & (above > float("-inf")) | (limit >= best * unit)


@Kept
@triton.jit(do_not_specialize=["N", "K", "D"])
def sample_kernel(
    x,  # [H, N, D]
    codebook,  # [H, K, D]
    rows,  # [H, N, WIDTH] float32
    codes,  # [H, K', WIDTH] float32
    states,  # [H, N] int8
    offsets,  # [H, N] float32
    factors,  # [H, N] float32
    steps,  # [H] float32
    mosts,  # [H] float32
    scales,  # [H] float64, the temperature in the units of the codes
    units,  # [H] float64
    temperature,  # () float64
    seed,  # [2] int64
    indices,  # [H, N] int64
    N, K, D,
    h_stride, n_stride, i_stride, c_h_stride, c_k_stride, c_i_stride, codes_stride,
    WIDTH: tl.constexpr, COSINE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    at = h.to(tl.int64) * N + n
    state = tl.load(states + at, mask=n < N, other=NONE)
    offset = tl.load(offsets + at, mask=n < N, other=0.0)[:, None]
    factor = tl.load(factors + at, mask=n < N, other=0.0)[:, None]
    step, most = tl.load(steps + h), tl.load(mosts + h)
    scaled, unit, heat = tl.load(scales + h), tl.load(units + h), tl.load(temperature)
    row = rows + at[:, None] * WIDTH
    head = codes + h.to(tl.int64) * codes_stride

    first = tl.full((A, B), float("-inf"), tl.float32)
    second, third = first, first
    first_code = tl.full((A, B), NO_CODE, tl.int32)
    second_code = first_code
    for k in range(0, K, B):
        code = k + tl.arange(0, B)
        lower = tl.zeros((A, B), tl.float32)
        for start in range(0, WIDTH, STEP):
            d = start + tl.arange(0, STEP)
            a = tl.load(row + d[None, :], mask=(n < N)[:, None] & (d < WIDTH)[None, :], other=0.0)
            there = (code < K)[None, :] & (d < WIDTH)[:, None]
            b = tl.load(head + code.to(tl.int64)[None, :] * WIDTH + d[:, None], mask=there, other=0.0)
            lower = tl.dot(a, b, lower, input_precision="ieee")
        if COSINE:
            logit = offset - lower * factor
        else:
            square = tl.minimum(tl.maximum(offset + 2.0 * lower, 0.0), 3.022314549036573e23)  # (FAR / 2)^2
            logit = -tl.sqrt_rn(square)
        four = k // 4 + tl.arange(0, B // 4)
        w0, w1, w2, w3 = words(seed, n[:, None], four[None, :], h)
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (A, B))
        above = tl.where((code < K)[None, :], logit + noise_above(word, step, most), float("-inf"))
        over_first, over_second = above > first, above > second
        third = tl.maximum(third, tl.where(over_second, second, above))
        second_code = tl.where(over_first, first_code, tl.where(over_second, code[None, :], second_code))
        second = tl.where(over_first, first, tl.where(over_second, above, second))
        first_code = tl.where(over_first, code[None, :], first_code)
        first = tl.where(over_first, above, first)

    live = (state != NONE)[:, None]
    given = (x + h * h_stride + n * n_stride)[:, None]
    book = codebook + h * c_h_stride
    norm = tl.zeros((A,), tl.float64)
    if COSINE:
        square_norm, _ = squared_norm(given, i_stride, live, D)
        norm = tl.sqrt(square_norm)
    best = tl.full((A,), float("-inf"), tl.float64)
    best_cost = tl.full((A,), float("inf"), tl.float64)
    best_code = tl.full((A,), NO_CODE, tl.int32)
    bounded = state == BOUNDED
    place = tl.arange(0, B)[None, :]
    largest = tl.max(first, 1)
    open_rows = bounded & reaches(largest, best, best_code, scaled, unit)
    while tl.max(open_rows.to(tl.int32), 0) > 0:
        where = tl.min(tl.where(first == largest[:, None], place, B), 1)
        taken = (place == where[:, None]) & open_rows[:, None]
        code = tl.min(tl.where(taken, first_code, NO_CODE), 1)
        first = tl.where(taken, second, first)
        first_code = tl.where(taken, second_code, first_code)
        second = tl.where(taken, float("-inf"), second)
        known = (open_rows & (code != NO_CODE))[:, None]
        c = book + tl.where(known, code[:, None], 0).to(tl.int64) * c_k_stride
        cost, finite = costs(given, i_stride, known, c, c_i_stride, known, D, COSINE)
        cost = tl.sum(cost, 1)
        noise = heat * gumbel(word_of(seed, n, tl.where(code == NO_CODE, 0, code), h))
        code = tl.where(tl.max((finite & known).to(tl.int32), 1) > 0, code, NO_CODE)
        best, best_cost, best_code = better_of(
            key_of(cost, norm, noise, COSINE), cost, code, best, best_cost, best_code
        )
        largest = tl.max(first, 1)
        open_rows = bounded & reaches(largest, best, best_code, scaled, unit)

    hidden = bounded & reaches(tl.max(third, 1), best, best_code, scaled, unit)
    scanned = (state == OPEN) | hidden
    if tl.max(scanned.to(tl.int32), 0) > 0:
        best = tl.where(scanned, float("-inf"), best)
        best_code = tl.where(scanned, NO_CODE, best_code)
        for k in range(0, K, FEW):
            codes_now = (k + tl.arange(0, FEW))[None, :]
            known = scanned[:, None] & (codes_now < K)
            c = book + codes_now.to(tl.int64) * c_k_stride
            cost, finite = costs(given, i_stride, scanned[:, None], c, c_i_stride, codes_now < K, D, COSINE)
            number = tl.broadcast_to(codes_now, cost.shape)
            noise = heat * gumbel(word_of(seed, tl.broadcast_to(n[:, None], cost.shape), number, h))
            key = key_of(cost, norm[:, None], noise, COSINE)
            possible = known & finite
            best_key = tl.max(tl.where(possible, key, float("-inf")), 1)
            possible = possible & (key == best_key[:, None])
            least = tl.min(tl.where(possible, cost, float("inf")), 1)
            code = tl.min(tl.where(possible & (cost == least[:, None]), number, NO_CODE), 1)
            best, best_cost, best_code = better_of(best_key, least, code, best, best_cost, best_code)
    found = (state != NONE) & (best_code != NO_CODE)
    tl.store(indices + at, tl.where(found, best_code, -1).to(tl.int64), mask=n < N)


def sample(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float32
    seed: Tensor,  # [2] int64
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
) -> Tensor:  # [H, N] int64
    (H, N, D), K = x.shape, codebook.shape[1]
    indices = x.new_empty((H, N), dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    with torch.cuda.device_of(x), full_precision(x.device):
        codes = with_repeats(prepare_codes(codebook, metric, torch.float32))
        rows = prepare_rows(x, codes, 1, metric)
        offset, factor = logit_terms(rows, D, metric)
        heat, unit = temperature_of(temperature), codes.scale.double()
        scaled = (heat * unit).clamp_min(2.0**-60)
        usable = is_finite(x) if mask is None else is_finite(x) & mask
        bounded = rows.fits & (scaled <= LARGEST_TEMPERATURE).squeeze(-1)
        states = torch.where(bounded, BOUNDED.value, OPEN.value).masked_fill_(~usable, NONE.value).to(torch.int8)
        block = sizes(x.device).sample
        sample_kernel[(cdiv(N, block.rows), H)](
            x, codebook, rows.matrix, codes.matrix, states, offset, factor, *noise_terms(scaled), scaled, unit, heat,
            seed.contiguous(), indices, N, K, D, *strides(x, 3), *strides(codebook, 3), codes.matrix.stride(0),
            columns(D), metric == "cosine", block.rows, block.codes, block.step, block.few, enable_fp_fusion=False,
            num_warps=block.warps,
        )  # fmt: skip
    return indices
