"""Codes to start from, and those that empty clusters take: rows far from the codes that are there."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_PER_CODE, LEAST_ROWS = 8, 4096  # among which codes are chosen: all rows would take N D K operations in K steps
CHUNK = 128  # values summed before the sums are
BLOCK = 1 << 20  # differences at a time


def first_codes(x: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:  # [N, D] -> [K, D]
    """Greedy k-means++: the first code is a row of x at random, each further one the best of 2 + ln K rows drawn
    with probabilities in proportion to |x - c|^2, c their nearest code so far. Codes are equal only where x has
    fewer distinct rows. Source: Arthur and Vassilvitskii, k-means++, 2007.
    """
    row = torch.randint(len(x), (1,), generator=generator, device=x.device)
    scaled = to_scale(x)[0]
    rows, _ = spread(scaled, distances_between(scaled, row).squeeze(0), num_codes - 1, generator)
    return x[torch.cat([row, rows])]


def far_codes(x: Tensor, squares: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` rows to be codes, and which of them are any better than the codes that are there.

    x [N, D], squares [N] float64 of the distances of the rows to their codes -> [count, D], [count] bool. Candidates
    are drawn with probabilities in proportion to the squares; of these each code is chosen as in `first_codes`.
    """
    keys = squares / exponential(squares, generator)
    some = keys.sort(descending=True, stable=True).indices[: ROWS_PER_CODE * count]
    scaled, scale = to_scale(x[some])
    rows, apart = spread(scaled, squares[some].sqrt() / scale, count, generator)
    return x[some[rows]], apart


def spread(
    x: Tensor,  # [N, D]
    near: Tensor,  # [N] float64, the distance of each row to its nearest code
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # [count] int64, [count] bool
    """The numbers of `count` rows, and which were at a distance from all codes before them."""
    chosen, apart = torch.zeros(count, dtype=torch.int64, device=x.device), near.new_zeros(count, dtype=torch.bool)
    trials = min(2 + int(math.log(count + 1)), len(x))
    for k in range(count):
        # The largest of w / e, e exponential, are draws with probabilities w, and need no sum in any order.
        squares = near.square()
        rows = (squares / exponential(squares, generator)).topk(trials).indices
        left = torch.minimum(near, distances_between(x, rows))
        best = sum_of_each(left.square()).argmin()
        row = rows[best]
        apart[k] = near[row] > 0
        chosen[k] = row.where(apart[k], 0)
        near = left[best]
    return chosen, apart


def to_scale(x: Tensor) -> tuple[Tensor, Tensor]:  # [N, D]
    """x / s and s, float64, so that no square overflows, nor underflows unless others are much larger."""
    s = x.abs().amax().double().clamp_min(torch.finfo(torch.float64).tiny)
    return (x / s).to(x.dtype), s


def distances_between(x: Tensor, rows: Tensor) -> Tensor:  # [N, D], [k] -> [k, N] float64, 0 for equal vectors
    codes = x[rows].unsqueeze(1)
    return torch.cat([(block - codes).norm(dim=-1) for block in x.split(max(1, BLOCK // codes.numel()))], 1).double()


def sum_of_each(values: Tensor) -> Tensor:  # [k, N] -> [k]
    """In an order that does not depend on the number of threads."""
    return F.pad(values, (0, -values.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK)).sum(-1).sum(-1)


def exponential(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like).exponential_(generator=generator).clamp_min_(torch.finfo(like.dtype).tiny)
