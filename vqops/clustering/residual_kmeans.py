"""Residual k-means: semantic IDs without training."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vqops.clustering.balanced import balanced_kmeans
from vqops.clustering.ids import collisions
from vqops.clustering.lloyd import better_start, lloyd, mini_batches, sample_size
from vqops.clustering.result import ResidualKMeans, check_count, check_mask
from vqops.clustering.rows import Rows
from vqops.ops.checks import check_floating
from vqops.ops.residual_quantize import LARGEST_Q

OP = "residual_kmeans"


@torch.no_grad()
def residual_kmeans(
    x: Tensor,  # [N, D]
    sizes: Sequence[int],  # K of each of 1 to 64 levels
    iters: int = 50,
    balanced: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    mask: Tensor | None = None,  # [N] bool; False leaves the row out
    *,
    device: torch.device | str | None = None,  # that of x
) -> ResidualKMeans:
    """Codes for each of several levels by k-means on what the levels before have left, and the IDs of the rows.

    r_1 = x,  codebooks[l] = k-means(r_l),  i_l = the cluster of r_l,  r_{l+1} = r_l - codebooks[l][i_l]

    Each level starts from greedy k-means++ among max(8 K, 4096) random rows or from K random rows, whichever goes
    further in a trial on 4 times as many, and runs Lloyd's algorithm until no index changes, at most `iters`
    iterations. Clusters without rows are moved to rows far from their codes. Searches are exact (`nearest`), means are
    added in float64, nothing is of size N x K. The codes are float32, for float64 x float64.

    balanced: no cluster of a level holds more than ceil(N / K) rows, as in OneRec (arXiv 2502.18965). Prices by auction
    move the borders of clusters that too many rows prefer, then rows take clusters in rounds over their 32 nearest
    codes with room, first those that lose most by the next (`vqops.clustering.balanced`). `indices` are the balanced
    assignment; `encode` of the same rows takes the nearest code, and is not bound to the capacity.

    batch_size: mini-batch k-means (Sculley 2010) with batches in a random order, `iters` passes at most. Of x, which
    may be on the CPU or mapped from a file, batch_size rows at a time are on `device`, but for the rows of the start. A
    pass that improves the error by less than 0.01 % is the last.

    Rows that are masked or hold a NaN or Inf take no part and have index -1; a row whose residual overflows has -1 from
    there on. With fewer distinct rows than codes, codes are equal or unused, and a warning says so. The same seed gives
    the same result on one device, on the CPU with any number of threads. Each iteration waits for the device.

    Raises ValueError or TypeError for arguments out of range and where shapes, dtypes or devices disagree; ValueError
    if no row takes part. Source: RQ-KMeans as in OneRec; the IDs as in TIGER (arXiv 2305.05065).
    """
    check_arguments(x, sizes, iters, balanced, seed, batch_size, mask)
    device = x.device if device is None else torch.device(device)
    rows = Rows(x.detach(), mask, device, batch_size)
    if len(rows) == 0:
        raise ValueError(f"{OP}: x has no row that is finite and not masked, of N={len(x)}")
    order = torch.Generator(x.device).manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)

    errors, usage, iterations = [], [], []
    for level, K in enumerate(sizes):
        codes, assigned, took = cluster(rows, K, iters, balanced, batch_size is not None, order, generator)
        error, used = rows.add_level(codes, assigned)
        if (count := int(used.sum())) < K:
            warnings.warn(
                f"{OP}: of the K={K} codes of level {level} only {count} are in use, by {len(rows)} rows",
                stacklevel=3,
            )
        errors.append(error)
        usage.append(count / K)
        iterations.append(took)

    indices = rows.all_indices()
    rate, distinct = (t.cpu() for t in collisions(indices))
    error, variance = torch.stack(errors).cpu(), rows.variance().cpu()
    explained = torch.where(variance > 0, 1 - error / variance, torch.ones_like(error))
    usage = torch.tensor(usage, dtype=torch.float64)
    return ResidualKMeans(rows.codebooks, indices, rate, distinct, usage, error, explained, iterations)


def cluster(
    rows: Rows,
    num_codes: int,
    iters: int,
    balanced: bool,
    batched: bool,
    order: torch.Generator,  # of the rows, on the device of x
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None, int]:
    """The codes [K, D] of a level, the clusters of its finite rows if they are not the nearest, and the iterations."""
    some = torch.randperm(len(rows), generator=order, device=rows.x.device)[: sample_size(num_codes)]
    sample = rows.finite(some)
    if len(sample) == 0:  # all that is left has overflowed
        return torch.zeros(num_codes, rows.x.shape[1], dtype=rows.real, device=rows.device), None, 0
    codes = better_start(sample, num_codes, generator)
    if batched:
        codes, took = mini_batches(lambda: rows.passes(order), codes, iters, generator)
        return codes, None, took
    if balanced:
        return balanced_kmeans(rows.finite(rows.all()), codes, iters)
    codes, took = lloyd(rows.finite(rows.all()), codes, iters, generator)
    return codes, None, took


def check_arguments(x, sizes, iters, balanced, seed, batch_size, mask) -> None:
    check_floating(OP, x=x)
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{OP}: x must be [N, D] with a row and a dimension at least, got {list(x.shape)}")
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"{OP}: sizes must be a sequence of ints, K of each level, got {type(sizes).__name__}")
    if not 1 <= len(sizes) <= LARGEST_Q:
        raise ValueError(f"{OP}: sizes must name from 1 to {LARGEST_Q} levels, got {len(sizes)}")
    for level, size in enumerate(sizes):
        check_count(OP, f"sizes[{level}]", size, 1)
    check_count(OP, "iters", iters, 0)
    check_count(OP, "seed", seed, 0)
    if not isinstance(balanced, bool):
        raise TypeError(f"{OP}: balanced must be a bool, got {type(balanced).__name__}")
    if batch_size is not None:
        check_count(OP, "batch_size", batch_size, 1)
        if balanced:
            raise ValueError(f"{OP}: balanced=True assigns all rows at once; batch_size must be None, got {batch_size}")
    check_mask(OP, x, mask)
