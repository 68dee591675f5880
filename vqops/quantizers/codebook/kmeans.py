"""Lloyd's algorithm for the first codebook."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.ops.checks import Metric
from vqops.ops.quantize import quantize
from vqops.quantizers.codebook.random_rows import random_rows
from vqops.quantizers.codebook.ranks import sum_over_ranks
from vqops.reference import TINY


def kmeans(
    x: Tensor,  # [H, N, D]
    num_codes: int,
    num_iters: int,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,  # [H, N] bool
    sync: bool = True,  # False: on this rank's rows alone
) -> tuple[Tensor, Tensor]:  # means [H, K, D] and counts [H, K], float32
    """The means of `num_codes` clusters, and the number of rows of each in the last assignment.

    Starts from random rows, distinct ones if there are enough, and repeats
        means[k] = mean of the rows whose nearest mean is k,
    for "cosine" scaled to norm 1; a cluster without rows keeps its mean. Rows that are masked or hold a NaN or Inf take
    no part, and where all counts are 0 the means mean nothing. Each iteration is one search and one collective, with
    nothing of size N x K. Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    valid = x.float().isfinite().all(-1)
    if mask is not None:
        valid = valid & mask
    start = random_rows(x, valid, num_codes, sync)
    (means,) = sum_over_ranks(start.vectors, dtype=torch.float32, sync=sync)
    if metric == "cosine":
        means = F.normalize(means, dim=-1, eps=TINY)
    for _ in range(num_iters):
        found = quantize(x, means, mask, metric=metric, gradient="none", code_sums=True)
        counts, sums = sum_over_ranks(found.counts, found.sums, dtype=torch.float32, sync=sync)
        new = sums / counts.clamp_min(1).unsqueeze(-1)
        if metric == "cosine":
            new = F.normalize(new, dim=-1, eps=TINY)
        kept = (counts > 0) & new.isfinite().all(-1)
        means = new.where(kept.unsqueeze(-1), means)
    return means, counts.float()  # of one rank integers
