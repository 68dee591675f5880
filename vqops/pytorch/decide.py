"""Rows that the screen leaves open: their codes of least lower bound in float64, in the one order of operations."""

import torch
from torch import Tensor

from vqops.pytorch.codebook import Codes
from vqops.pytorch.screen import Products, Rows, prepare_rows, upper_bounds
from vqops.reference.blocks import BLOCK, blocks, row_blocks
from vqops.reference.distance import cost, squared_error
from vqops.reference.search import search

CANDIDATES = 16  # of a row, beside the k that it returns


def decide(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    codes: Codes,
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:  # costs [H, N, k] float64, indices [H, N, k], decided [H, N] bool
    """The k nearest codes among the candidates of each row, and whether no other code can be one of them."""
    (H, N, D), K = x.shape, codebook.shape[1]
    number = min(K, k + CANDIDATES + 1)
    costs = x.new_empty((H, N, k), dtype=torch.float64)
    indices = x.new_empty((H, N, k), dtype=torch.int64)
    decided = x.new_ones((H, N), dtype=torch.bool)
    head = torch.arange(H, device=x.device)[:, None, None]
    products = Products(codes.matrix[:, :K])
    for outer in row_blocks(x):
        rows = prepare_rows(x[:, outer], codes, k, metric)
        for inner, bounds in products.of(rows.matrix):
            some = slice(outer.start + inner.start, outer.start + inner.stop)
            lower, candidates = bounds.topk(number, largest=False)
            if number < K:
                part = Rows(*(values[:, inner] for values in rows))
                upper = upper_bounds(lower[..., :k], candidates[..., :k], part, codes, D)
                decided[:, some] = (lower[..., -1] > upper.amax(-1)) & part.fits
            candidates = candidates.sort(-1).values  # and a stable sort of the costs: equal ones keep that order
            for few in blocks(candidates.shape[1], max(1, BLOCK // (H * number * D))):
                given, chosen = x[:, some][:, few].unsqueeze(2), candidates[:, few]
                exact, order = cost(given, codebook[head, chosen], metric, squared_error).sort(dim=-1, stable=True)
                costs[:, some][:, few] = exact[..., :k]
                indices[:, some][:, few] = chosen.gather(-1, order[..., :k])
    return costs, indices.masked_fill_(costs.isnan(), -1), decided


def scan(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    metric: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from all codes."""
    costs, indices = search(x, codebook, k, None, metric)
    return costs, indices, torch.ones_like(indices[..., 0], dtype=torch.bool)
