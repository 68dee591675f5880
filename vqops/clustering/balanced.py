"""k-means whose clusters hold at most ceil(N / K) rows each."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.clustering.means import means_of, square_distances, total_of
from vqops.ops.search import LARGEST_K, nearest_topk

PATIENCE = 5  # iterations without a smaller error
AUCTIONS = 2  # of an iteration
FADE = 0.9  # of the price of a cluster with room


def balanced_kmeans(x: Tensor, codes: Tensor, iters: int) -> tuple[Tensor, Tensor, int]:  # [N, D], [K, D]
    """The codes [K, D], the cluster of each row [N] and the iterations it took; no cluster has more than ceil(N / K).

    Each iteration has three steps:
    1. Prices, by two rounds of `auction`, go on from those of the iteration before. A row prefers the cluster with the
       smallest |x - c_k|^2 + price_k = |(x, 0) - (c_k, sqrt(price_k))|^2: a search for the nearest code.
    2. Rows take clusters up to the capacity: `fill`.
    3. Each code becomes the mean of its rows.
    The best assignment of all iterations is kept; it ends after 5 without a better one.
    """
    N, K = len(x), len(codes)
    capacity = -(-N // K)
    lifted = F.pad(x, (0, 1))
    prices = torch.zeros(K, dtype=torch.float64, device=x.device)
    best, least, since, took = None, math.inf, 0, 0
    while took < max(iters, 1) and since < PATIENCE:
        for _ in range(AUCTIONS):
            prices = auction(lifted, codes, prices, capacity)
        indices = fill(lifted, lift(codes, prices), capacity)
        if iters:
            codes = means_of(x, indices, codes)[1]
        error = float(total_of(square_distances(x, codes[indices])))
        took, since = took + 1, since + 1
        if best is None or error < least:
            best, least, since = (codes, indices), error, 0
    return *best, min(took, iters)


def auction(x: Tensor, codes: Tensor, prices: Tensor, capacity: int) -> Tensor:  # [N, D + 1], [K, D], [K] -> [K]
    """The prices after one round: a cluster that more rows prefer than it can hold becomes dearer by what the first row
    beyond its capacity would lose with the next best cluster, so that at this price it keeps `capacity` rows; one that
    has room becomes 10 % cheaper. Source: Bertsekas, The auction algorithm, 1988.
    """
    if len(codes) == 1:
        return prices
    found, distances = nearest_topk(x, lift(codes, prices), 2)
    loss = (distances[:, 1].double() - distances[:, 0]).nan_to_num(0)
    rows, counts, starts = by_cluster(found[:, 0], loss, len(codes))
    bids = loss[rows[(starts + capacity).clamp_max(len(x) - 1)]]
    prices = torch.where(counts > capacity, prices + bids, torch.where(counts < capacity, prices * FADE, prices))
    return (prices - prices.min()).nan_to_num(0, 0, 0)


def lift(codes: Tensor, prices: Tensor) -> Tensor:  # [K, D], [K] -> [K, D + 1]
    root = prices.sqrt().clamp_max(torch.finfo(codes.dtype).max).to(codes.dtype)
    return torch.cat([codes, root.unsqueeze(-1)], 1)


def fill(x: Tensor, codes: Tensor, capacity: int) -> Tensor:  # [N, D], [K, D] -> [N] int64
    """A cluster for each row, none with more than `capacity` rows, for K capacity >= N.

    In rounds: each row that waits lists its nearest codes among the clusters with room and applies to them one after
    the other; a cluster takes, up to its room, those that would lose most by going on: the distance to the next of the
    list minus that to the code, equal ones in the order of the rows. A row refused by a cluster finds it full from then
    on, so each round ends with all rows placed or a cluster more that is full: at most K rounds, and none of them needs
    more than the lists, [N, 32].
    """
    (N, _), K = x.shape, len(codes)
    indices = torch.full((N,), -1, device=x.device)
    room = torch.full((K,), capacity, device=x.device)
    waiting, listed = torch.arange(N, device=x.device), 2  # most rows need no more
    while len(waiting):
        open_codes = codes.masked_fill((room == 0).unsqueeze(-1), math.nan)  # a code that is no number is never found
        found, distances = nearest_topk(x[waiting], open_codes, min(listed, K))
        losses = (F.pad(distances[:, 1:], (0, 1), value=math.inf) - distances).nan_to_num(0, math.inf)
        for choice, loss in zip(found.unbind(1), losses.unbind(1), strict=True):
            apply = ((indices[waiting] < 0) & (choice >= 0)).nonzero().squeeze(-1)
            if not len(apply):
                break
            rows, counts, starts = by_cluster(choice[apply], loss[apply], K)
            rows = apply[rows]
            of = choice[rows]
            taken = torch.arange(len(rows), device=x.device) - starts[of] < room[of]
            indices[waiting[rows[taken]]] = of[taken]
            room -= torch.minimum(counts, room)
        waiting, listed = waiting[indices[waiting] < 0], LARGEST_K
    return indices


def by_cluster(clusters: Tensor, loss: Tensor, num_codes: int) -> tuple[Tensor, Tensor, Tensor]:  # [N], [N]
    """The rows [N] cluster by cluster, those that lose most first; the number of each and where it starts, [K]."""
    rows = loss.argsort(descending=True, stable=True)
    rows = rows[clusters[rows].argsort(stable=True)]
    counts = torch.bincount(clusters, minlength=num_codes)
    return rows, counts, counts.cumsum(0) - counts
