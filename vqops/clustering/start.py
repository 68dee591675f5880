"""Codes to start from, and those that empty clusters take: rows far from the codes that are there."""

import math

import torch
from torch import Tensor

from vqops.clustering.means import square_distances

ROWS_PER_CODE = 16  # among which a code is chosen: all rows would take N D K operations one code after the other


def first_codes(x: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:  # [N, D] -> [K, D]
    """Greedy k-means++: the first code is a row of x at random, each further one the best of 2 + ln K rows drawn with a
    probability in proportion to |x - c|^2, c their nearest code so far. Codes are equal only where x has fewer distinct
    rows. Source: Arthur and Vassilvitskii, k-means++, 2007.
    """
    row = torch.randint(len(x), (1,), generator=generator, device=x.device)
    first = x[row]
    return torch.cat([first, add_codes(x, square_distances(x, first), num_codes - 1, generator)[0]])


def far_codes(x: Tensor, distances: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` rows to be codes, and which of them are any better than the codes that are there.

    x [N, D], distances [N] of the rows to their codes -> [count, D], [count] bool. Candidates are drawn with a
    probability in proportion to their distance; of these each code is chosen as in `first_codes`.
    """
    keys = distances / exponential(len(x), distances, generator)
    rows = keys.sort(descending=True, stable=True).indices[: ROWS_PER_CODE * count]
    return add_codes(x[rows], distances[rows], count, generator)


def add_codes(x: Tensor, distances: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Greedy k-means++ from distances [N] on: `count` rows, and which were at a distance from all codes before them."""
    codes, apart = x.new_empty(count, x.shape[1]), torch.empty(count, dtype=torch.bool, device=x.device)
    trials = 2 + int(math.log(count + 1))
    for k in range(count):
        # The largest of w / e, e exponential, is a draw with probabilities w, and needs no sum in any order.
        rows = [(distances / exponential(len(x), distances, generator)).argmax() for _ in range(trials)]
        left = torch.stack([torch.minimum(distances, square_distances(x, x[row])) for row in rows])
        best = left.sum(1).argmin()
        row = torch.stack(rows)[best]
        codes[k], apart[k], distances = x[row], distances[row] > 0, left[best]
    return codes, apart


def exponential(size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.empty(size, dtype=torch.float64, device=like.device).exponential_(generator=generator)
    return drawn.clamp_min_(torch.finfo(torch.float64).tiny)
