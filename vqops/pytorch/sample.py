"""Codes by the largest of noisy logits: upper bounds of all keys in float32, float64 for the few that may be largest.

The screen of the search bounds each distance from below, and two operations on its word bound the noise from above.
Per row the codes of largest bound are decided in float64, by the keys that define the op; where the next bound does not
exclude the others, which is rare, the row is compared with all codes.
"""

import math

import torch
from torch import Tensor

from vqops.pytorch import bound
from vqops.pytorch.codebook import Codes, prepare_codes, with_repeats
from vqops.pytorch.host import on_host
from vqops.pytorch.precision import full_precision
from vqops.pytorch.screen import Products, Rows, prepare_rows
from vqops.pytorch.search import may_wait, slotted
from vqops.reference.blocks import BLOCK, blocks, row_blocks
from vqops.reference.distance import cost, dot, is_finite, root, squared_error
from vqops.reference.noise import WORD, gumbel, words
from vqops.reference.sample import descending, draw, logits, temperature_of

CANDIDATES = 7  # of a row, beside the k that it returns
PARTS = 8  # the words of a pair and what they come from take 40 bytes beside the 4 of its bound


@on_host
def sample(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float32
    seed: Tensor,  # [2] int64
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
) -> Tensor:  # [H, N] int64
    return find(x, codebook, temperature, seed, 1, mask, metric).squeeze(-1)


@on_host
def sample_topk(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float32
    seed: Tensor,  # [2] int64
    k: int,
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
) -> Tensor:  # [H, N, k] int64
    return find(x, codebook, temperature, seed, k, mask, metric)


def find(
    x: Tensor, codebook: Tensor, temperature: Tensor, seed: Tensor, k: int, mask: Tensor | None, metric: str
) -> Tensor:
    usable = is_finite(x) if mask is None else is_finite(x) & mask
    temperature = temperature_of(temperature)
    with full_precision(x.device):
        codes = with_repeats(prepare_codes(codebook, metric, torch.float32))
        indices, decided = decide(x, codebook, codes, temperature, seed, k, metric)
    return compare_all(x, codebook, temperature, seed, metric, usable & ~decided, indices).masked_fill_(
        ~usable.unsqueeze(-1), -1
    )


def decide(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    codes: Codes,
    temperature: Tensor,  # () float64
    seed: Tensor,
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor]:  # indices [H, N, k], decided [H, N] bool
    """The k largest keys among the candidates of each row, and whether no other code can have one of them."""
    (H, N, D), K = x.shape, codebook.shape[1]
    number = min(K, k + CANDIDATES + 1)
    indices = x.new_empty((H, N, k), dtype=torch.int64)
    decided = x.new_ones((H, N), dtype=torch.bool)
    head = torch.arange(H, device=x.device)[:, None, None]
    products = Products(codes.matrix[:, :K], PARTS)
    # [H, 1, 1], in the units of the codes, as all bounds of keys; more where its 2^-30th would underflow float32.
    scaled = (temperature * codes.scale.double()).clamp_min(2.0**-60)
    for outer in row_blocks(x):
        rows = prepare_rows(x[:, outer], codes, k, metric)
        offset, factor = logit_terms(rows, D, metric)
        for inner, lower in products.of(rows.matrix):
            some = slice(outer.start + inner.start, outer.start + inner.stop)
            word = words(seed, head, torch.arange(some.start, some.stop, device=x.device)[:, None], slice(0, K))
            upper = upper_logits(lower, offset[:, inner], factor[:, inner], metric).add_(noise_above(word, scaled))
            most, candidates = upper.topk(number)
            candidates = candidates.sort(-1).values  # and a stable order of the keys
            noise, least = temperature * gumbel(word.gather(-1, candidates)), []
            for few in blocks(candidates.shape[1], max(1, BLOCK // (H * number * D))):
                given, chosen = x[:, some][:, few].unsqueeze(2), candidates[:, few]
                costs = cost(given, codebook[head, chosen], metric, squared_error)
                norm = root(dot(given, given)) if metric == "cosine" else None
                keys = logits(costs, norm) + noise[:, few]
                order = descending(keys, costs)[..., :k]
                found = chosen.gather(-1, order).masked_fill_(costs.gather(-1, order).isnan(), -1)
                indices[:, some][:, few] = found
                least.append(keys.gather(-1, order)[..., -1])
            if number < K:
                limit = most[..., -1].double()
                limit += 2.0**-20 * (limit.abs() + 256 * scaled.squeeze(-1))  # all that float32 rounds here
                above = torch.cat(least, 1) * codes.scale.double().squeeze(-1) > limit
                decided[:, some] = above & rows.fits[:, inner]
    return indices, decided


def logit_terms(rows: Rows, D: int, metric: str) -> tuple[Tensor, Tensor]:  # [H, N, 1] float32
    """Of `upper_logits`: |X|^2 - 2 rest from below, or rest / |X| and 1 / |X|, 0 for x = 0."""
    square = torch.linalg.vector_norm(rows.matrix[..., :D], dim=-1, dtype=torch.float64).square_().unsqueeze(-1)
    rest = rows.rest.double().unsqueeze(-1)
    factor = square.rsqrt().masked_fill_(square == 0, 0)
    offset = square * (1 - 2.0**-21) - 2 * rest if metric == "euclidean" else rest * factor
    return offset.float(), factor.float()


def upper_logits(lower: Tensor, offset: Tensor, factor: Tensor, metric: str) -> Tensor:
    """At least the logits of codes with lower bounds L: -sqrt(|X|^2 + 2 (L - rest)), or (rest - L) / |X|.

    Far codes, whose L says more than is true, are at least FAR / 2 away from a row that fits.
    """
    if metric == "cosine":
        return torch.addcmul(offset, lower, factor, value=-1)
    return torch.add(offset, lower, alpha=2).clamp_(0, (bound.FAR[torch.float32] / 2) ** 2).sqrt_().neg_()


def noise_above(word: Tensor, temperature: Tensor) -> Tensor:  # [H, n, K], [H, 1, 1] float64 -> float32
    """At least T g: g <= -log v with v = 1 - u, since -log u >= v, and log2 v >= e + f for v = 2^e (1 + f).

    e + f are the bits of v as a number; 31 of v's 33 are kept, which lowers it.
    """
    bits = (word ^ WORD).bitwise_right_shift_(1).float().view(torch.int32).float()
    step, most = noise_terms(temperature)
    return bits.mul_(-step).add_(most)


def noise_terms(temperature: Tensor) -> tuple[Tensor, Tensor]:  # float64 -> float32: most - step bits
    log2 = math.log(2)
    return (log2 * 2.0**-23 * temperature).float(), ((158 * log2 + 2.0**-12) * temperature).float()


def compare_all(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float64
    seed: Tensor,
    metric: str,
    is_open: Tensor,  # [H, N] bool
    indices: Tensor,  # [H, N, k]
) -> Tensor:
    """`indices` with the open rows decided by all keys.

    The host waits for the device to learn how many these are. Where it may not wait, it takes a fixed number of rows,
    and an assertion on the device fails if there are more.
    """
    (H, N, k), waits = indices.shape, may_wait(x.device)
    count = int(is_open.sum(1).max()) if waits and N > 0 else min(N, max(64, N // 16))
    if count == 0:
        return indices
    slot, taken, given = slotted(x, is_open, count)
    if not waits:
        torch._assert_async(
            (is_open == taken).all(),
            "vqops: a draw that may not wait for the GPU (in a CUDA graph, or in sync debug mode) has no room for so "
            "many rows that float32 cannot decide",
        )
    numbers = torch.arange(N, device=x.device).expand(H, N).unsqueeze(-1)
    row = slotted(numbers, is_open, count)[2].squeeze(-1)
    found = draw(given, codebook, temperature, seed, row, k, metric)
    back = slot.clamp(0, count - 1).unsqueeze(-1).expand(H, N, k)
    return found.gather(1, back).where(taken.unsqueeze(-1), indices)
