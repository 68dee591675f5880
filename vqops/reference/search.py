"""The nearest codes, by comparing every code."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vqops.reference.blocks import BLOCK, blocks
from vqops.reference.distance import cost, norm


def search(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    mask: Tensor | None,  # [H, N] bool
    metric: str,
) -> tuple[Tensor, Tensor]:  # costs [H, N, k] float64, indices [H, N, k]
    """The k codes of least cost, ascending, ties to the lowest index.

    Places that no code fills hold index -1 and cost NaN.
    """
    H, N, D = x.shape
    K = codebook.shape[1]
    costs = x.new_full((H, N, k), math.nan, dtype=torch.float64)
    indices = x.new_full((H, N, k), -1, dtype=torch.int64)
    codes_per_block = max(1, min(512, K, BLOCK // max(D, 1)))
    rows_per_block = max(1, min(BLOCK // 4 // (codes_per_block + k), BLOCK // max(D, 1)))
    for h in range(H):
        for rows in blocks(N, rows_per_block):
            for codes in blocks(K, codes_per_block):
                new = cost(x[h, rows, None], codebook[h, codes], metric)
                number = torch.arange(codes.start, codes.stop, device=x.device).expand_as(new)
                # Stable, so that equal costs keep the order of the indices; NaN sorts behind infinity.
                both, order = torch.cat([costs[h, rows], new], 1).sort(dim=1, stable=True)
                costs[h, rows] = both[:, :k]
                indices[h, rows] = torch.cat([indices[h, rows], number], 1).gather(1, order[:, :k])
    usable = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
    indices = indices.masked_fill(~usable[..., None] | costs.isnan(), -1)
    return costs.masked_fill(indices < 0, math.nan), indices


def nearest(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    prepared: Tensor | None = None,
) -> Tensor:  # [H, N] int64
    """The index of each row's nearest code, argmin_k `cost`; -1 for rows that are masked or not finite."""
    return search(x, codebook, 1, mask, metric)[1].squeeze(-1)


def nearest_topk(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # indices [H, N, k] int64, distances [H, N, k] float32 (float64 for float64 x)
    """Each row's k nearest codes and their distances |x - c|^2, for "cosine" 1 - x.c / (|x| |c|)."""
    costs, indices = search(x, codebook, k, mask, metric)
    return indices, distances_of(costs, indices, x, mask, metric)


def distances_of(
    costs: Tensor,  # [H, N, k] float64, NaN without a code
    indices: Tensor,  # [H, N, k], -1 without a code
    x: Tensor,  # [H, N, D]
    mask: Tensor | None,  # [H, N] bool
    metric: str,
    norm: Callable[[Tensor], Tensor] = norm,
) -> Tensor:  # [H, N, k] float32 (float64 for float64 x)
    """The distances that `nearest_topk` returns: inf where no code is left or the row is masked, NaN for a row that is
    not finite."""
    if metric == "cosine":
        length = norm(x).unsqueeze(-1)
        costs = 1 + (costs / length).masked_fill(~(length > 0), 0).masked_fill(indices < 0, math.nan)
    missing = (
        x.isfinite().all(-1, keepdim=True) if mask is None else x.isfinite().all(-1, keepdim=True) | ~mask[..., None]
    )
    distances = costs.masked_fill(missing & (indices < 0), math.inf)
    return distances.to(torch.promote_types(x.dtype, torch.float32))


def prepare(
    codebook: Tensor,  # [H, K, D]
    metric: str = "euclidean",
) -> Tensor:  # [0] uint8
    """The part of a search that depends on the codebook alone: here nothing."""
    return codebook.new_empty(0, dtype=torch.uint8)


def search_statistics(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    metric: str = "euclidean",
) -> Tensor:  # [4] int64
    """The rows by how they were decided: here [2], all codes compared in float64, or [3], without a code."""
    decided = (nearest(x, codebook, metric=metric) >= 0).sum()
    return torch.stack([torch.zeros_like(decided)] * 2 + [decided, x[..., 0].numel() - decided])
