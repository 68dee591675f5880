"""Codes that depend on the codes chosen before them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImplicitCodes(nn.Module):
    """A network that moves the codes of a level, given the sum of a vector's codes so far: QINCo.

        h = W [s, c] + b,  then h <- h + W2 SiLU(W1 h + b1) + b2, `depth` times

    Source: Huijben et al. 2024 (arXiv 2401.14732).

    Arguments:
        dim: features of a code.
        dim_hidden: of the layers in between, by default dim.
        depth: how many there are.
        l2norm_output: codes of norm 1, for a cosine codebook.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False):
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        blocks = (nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth))
        self.layers = nn.ModuleList(blocks)
        self.l2norm_output = l2norm_output

    def forward(
        self,
        codes: Tensor,  # [..., D]
        condition: Tensor,  # [..., D], of axes that broadcast with those of the codes
    ) -> Tensor:  # [..., D]
        of_condition, of_codes = self.proj_in.weight.chunk(2, dim=1)
        h = F.linear(condition, of_condition) + F.linear(codes, of_codes, self.proj_in.bias)
        for layer in self.layers:
            h = h + layer(h)
        return F.normalize(h, dim=-1) if self.l2norm_output else h


def moved_codes(
    codes: Tensor,  # [..., D]
    condition: Tensor | None,  # [..., D]
    network: ImplicitCodes | None,  # None for the first level
) -> Tensor:
    if network is None:
        return codes
    with torch.autocast(codes.device.type, enabled=False):
        return network(codes, condition)
