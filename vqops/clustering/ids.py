"""IDs of rows: their indices level by level, how many share one, and a position more that makes them unique."""

import torch
from torch import Tensor


def unique_ids(indices: Tensor) -> Tensor:  # [N, Q] int64 -> [N, Q + 1]
    """Append a position that tells apart the rows of equal IDs: 0, 1, 2, ... in the order of the rows.

    Rows without an ID, with a -1 in it, get -1. The position takes as many values as the most rows that share an ID:
    `unique_ids(indices)[:, -1].max() + 1`. Source: Rajput et al. 2023 (TIGER, arXiv 2305.05065), section 3.1.

    Raises TypeError where indices are not int64, ValueError where they are not [N, Q] or below -1.

    Equivalent to:
        same = (indices[:, None] == indices).all(-1).tril(-1)
        position = same.sum(-1).where((indices >= 0).all(-1), -1)
        return torch.cat([indices, position[:, None]], 1)
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        given = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"unique_ids: indices must be an int64 tensor, got {given}")
    if indices.dim() != 2 or indices.shape[1] == 0:
        raise ValueError(f"unique_ids: indices must be [N, Q] with a level at least, got {list(indices.shape)}")
    if len(indices) == 0:
        return indices.new_empty(0, indices.shape[1] + 1)
    if (least := int(indices.min())) < -1:
        raise ValueError(f"unique_ids: indices must be -1 or a code, got {least}")
    *_, (group, size) = prefixes(indices)
    order = group.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    position = place - (size.cumsum(0) - size)[group]
    position = position.masked_fill((indices < 0).any(1), -1)
    return torch.cat([indices, position.unsqueeze(-1)], 1)


def prefixes(indices: Tensor):  # [N, Q], N >= 1
    """For each level the number [N] of each row's prefix up to it among the distinct ones, and their sizes."""
    group = torch.zeros_like(indices[:, 0])
    for level in indices.unbind(1):
        _, level = level.unique(return_inverse=True)
        _, group, size = (group * (level.max() + 1) + level).unique(return_inverse=True, return_counts=True)
        yield group, size


def collisions(indices: Tensor) -> tuple[Tensor, Tensor]:  # [N, Q] -> [Q] float64, [Q] int64
    """For each level the share of rows whose prefix up to it another row has, too, and the number of distinct prefixes.

    Of the rows that have an index at the level; 0 where none has.
    """
    rates, distinct = [], []
    for level in range(indices.shape[1]):
        rows = indices[(indices[:, : level + 1] >= 0).all(1), : level + 1]
        size = rows.new_zeros(0)
        if len(rows):
            *_, (_, size) = prefixes(rows)
        rates.append(size[size > 1].sum().double() / max(len(rows), 1))
        distinct.append(torch.tensor(len(size), device=indices.device))
    return torch.stack(rates), torch.stack(distinct)
