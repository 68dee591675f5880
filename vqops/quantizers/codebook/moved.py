"""Codes of each row's own that a network makes of shared ones, when they are looked at."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqops.ops.checks import Gradient, Metric
from vqops.ops.quantize import Quantized
from vqops.quantizers.codebook.chosen import quantize_chosen
from vqops.quantizers.codebook.searched import RowCodes, Searched, SharedCodes, unit

BLOCK_VALUES = 1 << 22  # of the codes of a block of rows: 16 MB, and as much for each layer of the network


@dataclass(frozen=True, eq=False)
class MovedCodes(Searched):
    """network(c_k, s_n) in the place of code k for row n.

    A search makes them in blocks of rows, without a gradient, and those that it chooses once more: so memory is of size
    N x D. Only the losses that weigh all codes hold those of all rows at once.
    """

    codes: Tensor  # [H, K, D]
    network: Callable[[Tensor, Tensor], Tensor]  # of axes that broadcast
    condition: Tensor  # [H, N, D]
    metric: Metric
    learn: bool  # with a gradient

    def quantize(self, x: Tensor, mask: Tensor | None, gradient: Gradient, with_sums: bool, scale: float) -> Quantized:
        indices = self.topk(x, 1, mask)
        codes = self.at(indices) if scale else self.at(indices).detach()
        found = quantize_chosen(x, codes, indices, mask, self.metric, gradient)
        return Quantized(*(t.squeeze(2) for t in found), x.new_empty(0), x.new_empty(0))

    def topk(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        N, found = x.shape[1], []
        if N == 0:
            return torch.empty(x.shape[0], 0, k, dtype=torch.int64, device=x.device)
        size = max(1, BLOCK_VALUES // self.codes.numel())
        # A graph would hold the loop as often as there are blocks, and be of one N.
        starts, size = ((0,), N) if torch.compiler.is_compiling() else (range(0, N, size), size)
        with torch.no_grad():
            for start in starts:
                rows = slice(start, start + size)
                made = self.made(self.codes.unsqueeze(1), self.condition[:, rows].unsqueeze(2))
                kept = None if mask is None else mask[:, rows]
                found.append(RowCodes(made, self.metric).topk(x[:, rows], k, kept))
        return torch.cat(found, 1)

    def sample(self, x: Tensor, temperature: Tensor, seed: Tensor, k: int | None, mask: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self.whole().sample(x, temperature, seed, k, mask)

    def at(self, indices: Tensor) -> Tensor:  # [H, N, k] -> [H, N, k, D]; -1 gives zeros
        codes = SharedCodes(self.codes, self.metric).at(indices)
        return self.made(codes, self.condition.unsqueeze(2)).masked_fill((indices < 0).unsqueeze(-1), 0)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.whole().cross_entropy(x, targets)

    def entropy(self, x: Tensor, sharpness: Tensor, mask: Tensor | None, grouped: Callable) -> Tensor:
        return self.whole().entropy(x, sharpness, mask, grouped)

    def soft(self, x: Tensor, temperature: Tensor, mask: Tensor | None) -> Tensor:
        return self.whole().soft(x, temperature, mask)

    def made(self, codes: Tensor, condition: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            made = self.network(codes, condition.to(codes.dtype))
        made = made if self.learn else made.detach()
        return unit(made) if self.metric == "cosine" else made

    def whole(self) -> RowCodes:
        return RowCodes(self.made(self.codes.unsqueeze(1), self.condition.unsqueeze(2)), self.metric)
