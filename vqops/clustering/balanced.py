"""k-means whose clusters hold at most ceil(N / K) rows each."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.clustering.means import means_of, square_distances, total_of
from vqops.ops.search import LARGEST_K, nearest_topk

PATIENCE = 5  # iterations without a smaller error


def balanced_kmeans(x: Tensor, codes: Tensor, iters: int) -> tuple[Tensor, Tensor, int]:  # [N, D], [K, D]
    """The codes [K, D], the cluster of each row [N] and the iterations it took; no cluster has more than ceil(N / K).

    Each iteration has three steps:
    1. Prices: a cluster too many rows prefer becomes dearer, one too few prefer cheaper. A row prefers the smallest
       |x - c_k|^2 + price_k, the optimality condition of the assignment with capacities (Bertsekas, The auction
       algorithm, 1988). As |(x, 0) - (c_k, sqrt(price_k))|^2, this is a search for the nearest code.
    2. Rows take clusters up to the capacity: `fill`.
    3. Each code becomes the mean of its rows.
    The best assignment of all iterations is kept; it ends after 5 without a better one.
    """
    N, K = len(x), len(codes)
    capacity = -(-N // K)
    lifted = F.pad(x, (0, 1))
    prices = torch.zeros(K, dtype=torch.float64, device=x.device)
    best, least, since, iteration = None, math.inf, 0, 0
    for iteration in range(1, max(iters, 1) + 1):
        indices, distances = (t.squeeze(-1) for t in nearest_topk(lifted, lift(codes, prices), 1))
        load = torch.bincount(indices, minlength=K)
        scale = total_of(distances - prices[indices]) / N
        prices = prices + 2 / (4 + iteration) * scale * (load / capacity - 1).clamp(-1, 1)
        prices = (prices - prices.min()).nan_to_num(0, 0, 0)
        indices = fill(lifted, lift(codes, prices), capacity)
        if iters:
            codes = means_of(x, indices, codes)[1]
        error = float(total_of(square_distances(x, codes[indices])))
        since += 1
        if best is None or error < least:
            best, least, since = (codes, indices), error, 0
        if since == PATIENCE:
            break
    return *best, min(iteration, iters)


def lift(codes: Tensor, prices: Tensor) -> Tensor:  # [K, D], [K] -> [K, D + 1]
    root = prices.sqrt().clamp_max(torch.finfo(codes.dtype).max).to(codes.dtype)
    return torch.cat([codes, root.unsqueeze(-1)], 1)


def fill(x: Tensor, codes: Tensor, capacity: int) -> Tensor:  # [N, D], [K, D] -> [N] int64
    """A cluster for each row, none with more than `capacity` rows, for K capacity >= N.

    In rounds: each row that waits lists its nearest codes among the clusters with room and applies to them one after
    the other; a cluster takes, up to its room, those that lose most by going on: by distance to the code minus
    distance to the next of the list, equal ones in the order of the rows. A row refused by a cluster finds it full from
    then on, so each round ends with all rows placed or a cluster more that is full: at most K rounds, and none of them
    needs more than the lists, [N, 32].
    """
    (N, _), K = x.shape, len(codes)
    indices = torch.full((N,), -1, device=x.device)
    room = torch.full((K,), capacity, device=x.device)
    waiting, listed = torch.arange(N, device=x.device), 2  # most rows need no more
    while len(waiting):
        open_codes = codes.masked_fill((room == 0).unsqueeze(-1), math.nan)  # a code that is no number is never found
        found, distances = nearest_topk(x[waiting], open_codes, min(listed, K))
        loss = (distances - F.pad(distances[:, 1:], (0, 1), value=math.inf)).nan_to_num(0, math.inf, -math.inf)
        for choice, key in zip(found.unbind(1), loss.unbind(1), strict=True):
            rows = ((indices[waiting] < 0) & (choice >= 0)).nonzero().squeeze(-1)
            if not len(rows):
                break
            rows = rows[key[rows].argsort(stable=True)]
            rows = rows[choice[rows].argsort(stable=True)]
            of = choice[rows]
            counts = torch.bincount(of, minlength=K)
            rank = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[of]
            taken = rank < room[of]
            indices[waiting[rows[taken]]] = of[taken]
            room -= torch.minimum(counts, room)
        waiting, listed = waiting[indices[waiting] < 0], LARGEST_K
    return indices
