"""Sums and means of each cluster's rows, the same for any number of threads."""

import torch
from torch import Tensor

BLOCK = 1 << 14  # rows that are float64 at a time


def sums_of(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:  # x [N, D], indices [N], none -1
    """Number [K] int64 and sum [K, D] float64 of each cluster's rows.

    Added in float64, a block of rows after the other and in order within it. A GPU adds with atomics in any order, so
    there the rows are sorted by cluster and each cluster is one segment.
    """
    counts = torch.bincount(indices, minlength=num_codes)
    sums = torch.zeros(num_codes, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, of in zip(x.split(BLOCK), indices.split(BLOCK), strict=True):
        if x.device.type == "cpu":
            sums.index_add_(0, of, rows.double())
        else:
            sums += segment_sums(rows.double(), of, num_codes)
    return counts, sums


def segment_sums(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:  # [N, D], [N] -> [K, D]
    lengths = torch.bincount(indices, minlength=num_codes)
    return torch.segment_reduce(x[indices.argsort(stable=True)], "sum", lengths=lengths, axis=0)


def means_of(x: Tensor, indices: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:  # [N, D], [N], [K, D]
    """Number of each cluster's rows and their mean, in the dtype of the codes; a cluster without rows keeps its code.

    A mean that overflows keeps it, too.
    """
    counts, sums = sums_of(x, indices, len(codes))
    means = (sums / counts.clamp_min(1).unsqueeze(-1)).to(codes.dtype)
    kept = (counts > 0) & means.isfinite().all(-1)
    return counts, means.where(kept.unsqueeze(-1), codes)


def total_of(values: Tensor) -> Tensor:  # [N, ...] -> [...] float64
    """The sum over rows."""
    flat = values.unsqueeze(-1).flatten(1)
    return sums_of(flat, torch.zeros(len(flat), dtype=torch.int64, device=flat.device), 1)[1].view(values.shape[1:])


def square_distances(x: Tensor, codes: Tensor) -> Tensor:  # [N, D], [N, D] or [D] -> [N] float64
    """|x - c|^2, exactly 0 for equal vectors."""
    codes = codes.expand_as(x)
    blocks = zip(x.split(BLOCK), codes.split(BLOCK), strict=True)
    return torch.cat([(a - b).double().square().sum(-1) for a, b in blocks])
