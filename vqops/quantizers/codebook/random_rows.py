"""One random row of the batch for each code: the start of k-means, and the new vectors of dead codes.

Everything happens on the device without a host synchronisation, and every rank decides the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.quantizers.codebook.ranks import num_ranks, rank, sum_over_ranks


class Choice(NamedTuple):
    row: Tensor  # [H, K] int64, of this rank's rows
    mine: Tensor  # [H, K] bool, whether it is the choice, not another rank's
    distinct: Tensor  # [H, K] bool, no two of these codes have the same row; all codes if there are K valid rows


class RandomRows(NamedTuple):
    vectors: Tensor  # [H, K, D] float32, zero where another rank has the row: their sum over the ranks is the choice
    distinct: Tensor  # as in Choice


def choose_rows(
    valid: Sequence[Tensor],  # [H, N] bool each
    num_codes: Sequence[int],
    sync: bool = True,  # False: of this rank's rows alone
) -> list[Choice]:
    """Choose a valid row of the ranks' joint batch (in the order of the ranks) for each code of each codebook.

    The n valid rows are cut in K strata of n / K consecutive rows, and each stratum gives one row at random to one
    code. That costs O(N + K log N) and needs no permutation of the rows; unlike every (n / K)-th row it can't fall in
    step with the width of an image. With n < K, n strata hold one row and the others repeat one: only the first are
    `distinct`. Which code has which stratum is shifted at random, so that each has its turn.

    The random numbers are those of rank 0's generator, so ranks that were seeded differently still agree.
    """
    ends = [rows.cumsum(1) for rows in valid]  # [H, N] valid rows up to and with each row
    counts = [rows.sum(1) for rows in valid]
    drawn = [
        torch.rand(len(rows), K + 1, dtype=torch.float64, device=rows.device)
        for rows, K in zip(valid, num_codes, strict=True)
    ]
    totals, befores, drawn = share(counts, drawn, sync)
    every = zip(ends, counts, totals, befores, drawn, num_codes, strict=True)
    return [choice(*one) for one in every]


def choice(ends: Tensor, count: Tensor, total: Tensor, before: Tensor, random: Tensor, K: int) -> Choice:
    stratum = (torch.arange(K, device=ends.device) + (random[:, K:] * K).long()) % K  # [H, K]
    start = stratum * total[:, None] // K
    length = (stratum + 1) * total[:, None] // K - start
    position = start + (random[:, :K] * length).long() - before[:, None]
    mine = (position >= 0) & (position < count[:, None])
    row = torch.searchsorted(ends, position + 1).clamp(0, max(ends.shape[1] - 1, 0))
    return Choice(row, mine, length > 0)


def random_rows(
    x: Tensor,  # [H, N, D]
    valid: Tensor,  # [H, N] bool
    num_codes: int,
    sync: bool = True,
) -> RandomRows:
    """The rows of x that `choose_rows` chooses."""
    (choice,) = choose_rows([valid], [num_codes], sync)
    if x.shape[1] == 0:
        return RandomRows(x.new_zeros(x.shape[0], num_codes, x.shape[2], dtype=torch.float32), choice.distinct)
    vectors = rows_at(x, choice.row).float().masked_fill(~choice.mine.unsqueeze(-1), 0)
    return RandomRows(vectors, choice.distinct)


def rows_at(x: Tensor, row: Tensor) -> Tensor:  # [H, N, D], [H, K] -> [H, K, D]
    return x.gather(1, row.unsqueeze(-1).expand(*row.shape, x.shape[-1]))


def share(
    counts: list[Tensor],  # [H] each
    random: list[Tensor],  # [H, K + 1] float64 each
    sync: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """The ranks' total counts, the counts of the ranks before this one, and the random numbers of rank 0.

    A collective of its own, of 8 (ranks + K + 1) bytes per head, before the one that carries the vectors: which rows
    are chosen depends on how many valid rows every rank has. Without knowing, each rank would have to send a candidate
    for every code, ranks x K x D values.
    """
    if num_ranks(sync) == 1:
        return counts, [torch.zeros_like(count) for count in counts], random
    heads = [len(count) for count in counts]
    count = torch.cat(counts)
    of_ranks = count.new_zeros(num_ranks(), len(count))
    of_ranks[rank()] = count
    # float64 holds integers up to 2^53 exactly, so that one collective carries both.
    of_ranks, *random = sum_over_ranks(of_ranks, *(r * (rank() == 0) for r in random), dtype=torch.float64)
    of_ranks = of_ranks.long()
    return of_ranks.sum(0).split(heads), of_ranks[: rank()].sum(0).split(heads), random
