"""A code drawn for each row, by the largest of noisy logits."""

import math

import torch
from torch import Tensor

from vqops.reference.blocks import BLOCK, blocks
from vqops.reference.distance import cost, dot, root
from vqops.reference.noise import gumbel, words


def sample(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float32
    seed: Tensor,  # [2] int64
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
) -> Tensor:  # [H, N] int64
    """argmax_k (l_k + T g_k), which has probability softmax_k(l_k / T); `logits` are l, `gumbel` is g.

    Equal keys go to the code of least `cost`, then of the lowest index: T = 0 is `nearest`. -1 for rows that are masked
    or not finite.
    """
    return sample_topk(x, codebook, temperature, seed, 1, mask, metric).squeeze(-1)


def sample_topk(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float32
    seed: Tensor,  # [2] int64
    k: int,
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
) -> Tensor:  # [H, N, k] int64
    """The codes of the k largest keys, descending; -1 where no finite code is left."""
    row = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    indices = draw(x, codebook, temperature_of(temperature), seed, row, k, metric)
    usable = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
    return indices.masked_fill(~usable.unsqueeze(-1), -1)


def temperature_of(given: Tensor) -> Tensor:  # () -> () float64
    """Negative and NaN are 0, infinity is the largest float32."""
    return given.float().nan_to_num(0).clamp_min(0).double()


def draw(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    temperature: Tensor,  # () float64
    seed: Tensor,  # [2] int64
    row: Tensor,  # [H, N] int64, the number of each row for the noise
    k: int,
    metric: str,
) -> Tensor:  # [H, N, k] int64
    """`sample_topk` of finite rows."""
    H, N, D = x.shape
    K = codebook.shape[1]
    indices = x.new_full((H, N, k), -1, dtype=torch.int64)
    keys, costs = (x.new_full((H, N, k), math.nan, dtype=torch.float64) for _ in range(2))
    codes_per_block = max(4, min(512, K, BLOCK // max(D, 1)) // 4 * 4)
    rows_per_block = max(1, min(BLOCK // 8 // (codes_per_block + k), BLOCK // max(D, 1)))
    for h in range(H):
        for rows in blocks(N, rows_per_block):
            norm = root(dot(x[h, rows], x[h, rows])).unsqueeze(1) if metric == "cosine" else None
            for codes in blocks(K, codes_per_block):
                codes = slice(codes.start, min(codes.stop, K))
                new = cost(x[h, rows, None], codebook[h, codes], metric)
                noise = gumbel(words(seed, h, row[h, rows, None], codes))
                key = logits(new, norm) + temperature * noise
                number = torch.arange(codes.start, codes.stop, device=x.device).expand_as(new)
                both = [
                    torch.cat(pair, 1)
                    for pair in ((keys[h, rows], key), (costs[h, rows], new), (indices[h, rows], number))
                ]
                order = descending(*both[:2])[:, :k]
                keys[h, rows], costs[h, rows], indices[h, rows] = (values.gather(1, order) for values in both)
    return indices.masked_fill_(costs.isnan(), -1)


def logits(costs: Tensor, norm: Tensor | None) -> Tensor:
    """-|x - c| of a cost |x - c|^2, or x.c / (|x| |c|) of one -x.c / |c| and the norm of x; 0 for x = 0."""
    if norm is None:
        return -root(costs)
    return torch.where(costs.isinf(), -costs, (-costs / norm).masked_fill(~(norm > 0), 0))


def descending(keys: Tensor, costs: Tensor) -> Tensor:  # [..., K] -> [..., K]
    """The order by key, equal ones by cost, then as they are. NaN, a code that can't be chosen, comes last."""
    first = costs.argsort(dim=-1, stable=True)
    return first.gather(-1, (-keys).gather(-1, first).argsort(dim=-1, stable=True))
