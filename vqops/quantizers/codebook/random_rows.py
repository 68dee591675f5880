"""One random row of the batch for each code: the start of k-means, and the new vectors of dead codes.

Everything happens on the device without a host synchronisation, and every rank decides the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqops.quantizers.codebook.ranks import num_ranks, rank, sum_over_ranks


class RandomRows(NamedTuple):
    vectors: Tensor  # [H, K, D] float32, zero where another rank has the row: their sum over the ranks is the choice
    distinct: Tensor  # [H, K] bool, no two of these codes have the same row; all codes if there are K valid rows


def random_rows(
    x: Tensor,  # [H, N, D]
    valid: Tensor,  # [H, N] bool
    num_codes: int,
    sync: bool = True,  # False: of this rank's rows alone
) -> RandomRows:
    """Choose a valid row of the ranks' joint batch (in the order of the ranks) for each code.

    The n valid rows are cut in K strata of n / K consecutive rows, and each stratum gives one row at random to one
    code. That costs O(N + K log N) and needs no permutation of the rows; unlike every (n / K)-th row it can't fall in
    step with the width of an image. With n < K, n strata hold one row and the others repeat one: only the first are
    `distinct`. Which code has which stratum is shifted at random, so that each has its turn.

    The random numbers are those of rank 0's generator, so ranks that were seeded differently still agree.
    """
    (H, N, D), K = x.shape, num_codes
    ends = valid.cumsum(1)  # [H, N] valid rows up to and with each row
    count = valid.sum(1)
    total, before, random = share(count, torch.rand(H, K + 1, dtype=torch.float64, device=x.device), sync)

    stratum = (torch.arange(K, device=x.device) + (random[:, K:] * K).long()) % K  # [H, K]
    start = stratum * total[:, None] // K
    length = (stratum + 1) * total[:, None] // K - start
    position = start + (random[:, :K] * length).long() - before[:, None]
    mine = (position >= 0) & (position < count[:, None])
    if N == 0:
        return RandomRows(x.new_zeros(H, K, D, dtype=torch.float32), length > 0)
    row = torch.searchsorted(ends, position + 1).clamp(0, N - 1).unsqueeze(-1)
    vectors = x.gather(1, row.expand(H, K, D)).float()
    return RandomRows(vectors.masked_fill(~mine.unsqueeze(-1), 0), length > 0)


def share(count: Tensor, random: Tensor, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks' total count, the count of the ranks before this one, and the random numbers of rank 0.

    A collective of its own, of 8 (ranks + K + 1) bytes per head, before the one that carries the vectors: which rows
    are chosen depends on how many valid rows every rank has. Without knowing, each rank would have to send a candidate
    for every code, ranks x K x D values.
    """
    if num_ranks(sync) == 1:
        return count, torch.zeros_like(count), random
    counts = count.new_zeros(num_ranks(), count.numel())
    counts[rank()] = count
    # float64 holds integers up to 2^53 exactly, so that one collective carries both.
    counts, random = sum_over_ranks(counts, random * (rank() == 0), dtype=torch.float64)
    counts = counts.long()
    return counts.sum(0), counts[: rank()].sum(0), random
