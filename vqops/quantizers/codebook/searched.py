"""What a forward searches: codes that all rows of a head share, or codes of each row's own.

Both have the same methods, on x [H, N, D] and a bool mask [H, N].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.ops.checks import Gradient, Metric
from vqops.ops.cross_entropy import code_cross_entropy
from vqops.ops.entropy import assignment_entropy
from vqops.ops.quantize import Quantized, quantize_rows
from vqops.ops.sample import sample, sample_topk
from vqops.ops.search import PreparedCodebook, nearest_topk
from vqops.ops.soft_codes import soft_codes
from vqops.reference import TINY
from vqops.reference.entropy import LEAST


class Searched:
    codes: Tensor  # their features last

    def codebook_error(self, x: Tensor, indices: Tensor) -> Tensor:  # [H, N(, k)], without the features
        """|x - c|^2 of the chosen codes with the gradient to the codes alone; 0 without one."""
        each = indices if indices.dim() == 3 else indices.unsqueeze(-1)
        real = torch.promote_types(x.dtype, torch.float32)
        gap = x.detach().to(real).unsqueeze(2) - self.at(each).to(real)
        gap = gap.masked_fill((each < 0).unsqueeze(-1), 0)
        return gap.square().sum(-1).view(indices.shape)


@dataclass(frozen=True, eq=False)
class SharedCodes(Searched):
    codes: Tensor  # [H, K, D]
    metric: Metric
    prepared: PreparedCodebook | None = None  # of these codes, without a gradient

    def quantize(self, x: Tensor, mask: Tensor | None, gradient: Gradient, with_sums: bool, scale: float) -> Quantized:
        packed = None if self.prepared is None else self.prepared.packed
        return quantize_rows(x, self.codes, packed, mask, None, self.metric, gradient, with_sums, scale)

    def topk(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:  # [H, N, k]
        codes = self.codes.detach() if self.prepared is None else self.prepared
        return nearest_topk(x.detach(), codes, k, mask, self.metric)[0]

    def sample(self, x: Tensor, temperature: Tensor, seed: Tensor, k: int | None, mask: Tensor | None) -> Tensor:
        """One drawn code a row [H, N], or k different ones [H, N, k]."""
        x, codes = x.detach(), self.codes.detach()
        if k is None:
            return sample(x, codes, temperature, seed, mask, self.metric)
        return sample_topk(x, codes, temperature, seed, k, mask, self.metric)

    def at(self, indices: Tensor) -> Tensor:  # [H, N, k] -> [H, N, k, D]; -1 gives zeros
        H, K, _ = self.codes.shape
        place = indices.clamp_min(0) + K * torch.arange(H, device=indices.device).view(-1, 1, 1)
        return F.embedding(place, self.codes.flatten(0, 1)).masked_fill((indices < 0).unsqueeze(-1), 0)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:  # [H, N] -> [H, N], 0 for target -1
        x, codes = (unit(t) for t in (x, self.codes)) if self.metric == "cosine" else (x, self.codes)
        return code_cross_entropy(x, codes, targets, self.metric)

    def entropy(self, x: Tensor, sharpness: Tensor, mask: Tensor | None, grouped: Callable) -> Tensor:  # [G]
        """Of the mean assignment of each group of rows; `grouped` takes [H, N, ...] to [H, G, M, ...]."""
        x, codes = (unit(t) for t in (x, self.codes)) if self.metric == "cosine" else (x, self.codes)
        return assignment_entropy(grouped(x), codes, sharpness, None if mask is None else grouped(mask), self.metric)

    def soft(self, x: Tensor, temperature: Tensor, mask: Tensor | None) -> Tensor:  # [H, N, D]
        x, codes = (unit(t) for t in (x, self.codes)) if self.metric == "cosine" else (x, self.codes)
        return soft_codes(x, codes.detach(), temperature, mask, self.metric)


@dataclass(frozen=True, eq=False)
class RowCodes(Searched):
    """Codes [H, N, K, D], which the caller's function made: a head for each row, and logits as a matrix, since both are
    smaller than what there is already."""

    codes: Tensor  # [H, N, K, D]
    metric: Metric

    @property
    def as_heads(self) -> SharedCodes:
        return SharedCodes(self.codes.flatten(0, 1), self.metric)

    def quantize(self, x: Tensor, mask: Tensor | None, gradient: Gradient, with_sums: bool, scale: float) -> Quantized:
        found = self.as_heads.quantize(heads_of(x), heads_of(mask), gradient, False, scale)
        return Quantized(*(t.view(*x.shape[:2], *t.shape[2:]) for t in found[:3]), *found[3:])

    def topk(self, x: Tensor, k: int, mask: Tensor | None) -> Tensor:
        return self.as_heads.topk(heads_of(x), k, heads_of(mask)).view(*x.shape[:2], k)

    def sample(self, x: Tensor, temperature: Tensor, seed: Tensor, k: int | None, mask: Tensor | None) -> Tensor:
        drawn = self.as_heads.sample(heads_of(x), temperature, seed, k, heads_of(mask))
        return drawn.view(*x.shape[:2], *drawn.shape[2:])

    def at(self, indices: Tensor) -> Tensor:
        place = indices.clamp_min(0).unsqueeze(-1).expand(*indices.shape, self.codes.shape[-1])
        return self.codes.gather(2, place).masked_fill((indices < 0).unsqueeze(-1), 0)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        entropy = F.cross_entropy(self.logits(x).movedim(-1, 1), targets, ignore_index=-1, reduction="none")
        return entropy + torch.zeros_like(entropy).masked_fill(~x.isfinite().all(-1) & (targets >= 0), torch.nan)

    def entropy(self, x: Tensor, sharpness: Tensor, mask: Tensor | None, grouped: Callable) -> Tensor:
        kept = grouped(x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask)
        p = grouped((self.logits(x) * sharpness).softmax(-1)).masked_fill(~kept.unsqueeze(-1), 0)
        mean = p.sum((0, 2)) / kept.sum((0, 2)).clamp_min(1).unsqueeze(-1)
        return -(mean * mean.clamp_min(LEAST).log()).sum(-1)

    def soft(self, x: Tensor, temperature: Tensor, mask: Tensor | None) -> Tensor:
        p = (self.logits(x, self.codes.detach()) / temperature.clamp_min(1e-30)).softmax(-1)
        return (p.unsqueeze(-2) @ self.codes.detach().to(p.dtype)).squeeze(-2).to(x.dtype)

    def logits(self, x: Tensor, codes: Tensor | None = None) -> Tensor:  # [H, N, K]
        codes = self.codes if codes is None else codes
        real = torch.promote_types(x.dtype, torch.float32)
        x = x.masked_fill(~x.isfinite().all(-1, keepdim=True), 0).to(real).unsqueeze(-2)
        with torch.autocast(x.device.type, enabled=False):
            if self.metric == "cosine":
                return (unit(x) @ codes.to(real).mT).squeeze(-2)
            return -(x - codes.to(real)).norm(dim=-1)


def heads_of(t: Tensor | None) -> Tensor | None:  # [H, N, ...] -> [H N, 1, ...]
    return t if t is None else t.flatten(0, 1).unsqueeze(1)


def unit(t: Tensor) -> Tensor:  # [..., D]
    return F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1, eps=TINY)
