"""k-means of one level, of all rows at once or a batch after the other."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vqops.clustering.means import means_of, square_distances, sums_of, total_of
from vqops.clustering.start import LEAST_ROWS, ROWS_PER_CODE, far_codes, first_codes
from vqops.ops.search import nearest, nearest_topk

LEAST_GAIN = 1e-4  # of a pass of mini-batches, as a share of the error before it
TRIED = 5  # iterations from each start


def sample_size(num_codes: int) -> int:
    """Rows among which `better_start` looks."""
    return 4 * max(ROWS_PER_CODE * num_codes, LEAST_ROWS)


def better_start(sample: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:  # [n, D] -> [K, D]
    """Greedy k-means++ or random rows, whichever is the better after 5 iterations on the sample, whose rows are in a
    random order.

    Where there are clusters k-means++ finds a third less of error. In many dimensions without clusters, as what several
    levels leave, it is drawn to rows near the mean and ends up to 4 % worse.
    """
    greedy = first_codes(sample[: max(ROWS_PER_CODE * num_codes, LEAST_ROWS)], num_codes, generator)
    if len(sample) <= num_codes:
        return greedy
    starts, errors = (sample[:num_codes], greedy), []
    for start in starts:
        codes, _ = lloyd(sample, start, TRIED, generator)
        errors.append(total_of(square_distances(sample, codes[nearest(sample, codes)])))
    return starts[int(errors[1] <= errors[0])].clone()


def lloyd(x: Tensor, codes: Tensor, iters: int, generator: torch.Generator) -> tuple[Tensor, int]:  # [N, D], [K, D]
    """Lloyd's algorithm, and the iterations it took: each code the mean of the rows it is nearest to, until no index
    changes. Clusters without rows are moved to rows far from their codes, if there are any at a distance.

    Source: Lloyd, Least squares quantization in PCM, 1982.
    """
    indices = nearest(x, codes)
    for iteration in range(iters):
        counts, codes = means_of(x, indices, codes)
        empty = (counts == 0).nonzero().squeeze(-1)
        moved = False
        if len(empty):
            far, apart = far_codes(x, square_distances(x, codes[indices]), len(empty), generator)
            codes[empty] = far.where(apart.unsqueeze(-1), codes[empty])
            moved = bool(apart.any())
        before, indices = indices, nearest(x, codes)
        if not moved and bool((indices == before).all()):
            return codes, iteration + 1
    return codes, iters


def mini_batches(
    passes: Callable[[], Iterable[Tensor]],  # the batches [B, D] of one pass over the rows, in a random order
    codes: Tensor,  # [K, D]
    iters: int,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Mini-batch k-means, and the passes it took: at most `iters`, until one improves the mean error by less than
    0.01 %. Each batch moves its codes to the mean of all rows that they have had,

        codes[k] += (sum of its rows - their number codes[k]) / seen[k],

    where each pass begins with half of what was seen, so that the first assignments fade. Codes without a row in a pass
    move to far rows of its last batch. Source: Sculley, Web-scale k-means clustering, 2010.
    """
    seen = torch.zeros(len(codes), 1, dtype=torch.float64, device=codes.device)
    error = torch.inf
    for iteration in range(iters):
        in_pass, total = torch.zeros(len(codes), dtype=torch.int64, device=codes.device), 0.0
        seen /= 2
        for x in passes():
            indices, distances = (t.squeeze(-1) for t in nearest_topk(x, codes, 1))
            counts, sums = sums_of(x, indices, len(codes))
            n = counts.unsqueeze(-1).double()
            seen += n
            step = (sums - n * codes) / seen.clamp_min(1)
            new = (codes + step).to(codes.dtype)
            codes = new.where((n > 0) & new.isfinite(), codes)
            in_pass += counts
            total += total_of(distances)
        empty = (in_pass == 0).nonzero().squeeze(-1)
        moved = False
        if len(empty):
            far, apart = far_codes(x, distances.double(), len(empty), generator)
            codes[empty] = far.where(apart.unsqueeze(-1), codes[empty])
            seen[empty] = 0
            moved = bool(apart.any())
        before, error = error, float(total / in_pass.sum().clamp_min(1))
        if not moved and not error < before * (1 - LEAST_GAIN):
            return codes, iteration + 1
    return codes, iters
