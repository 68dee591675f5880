"""The entropy of the mean of soft assignments, block by block."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.reference import soft
from vqops.reference.blocks import blocks
from vqops.reference.soft import Codes, Rows, Total, steepness

LEAST = 1e-5  # probability of which a logarithm is taken; the value of vector-quantize-pytorch


def assignment_entropy(
    x: Tensor,  # [H, G, M, D]
    codebook: Tensor,  # [H, K, D]
    inverse_temperature: Tensor,  # ()
    mask: Tensor | None = None,  # [H, G, M] bool
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # entropy [G], saved [3, H, G, M], means [G, min(K, H M)], codebook
    """-sum_k q_k log max(q_k, 1e-5) of the mean q of p = softmax_k(l inverse_temperature) over the rows of a group.

    float32, for float64 x float64. For the backward: the softmax's sums and sum_k p_k times the entropy's derivative by
    q_k, 0 where one block holds all codes; q, where it is not larger than the rows; and the copy of the codebook. A row
    that is not finite is left out, as one that is masked.
    """
    (H, G, M, _), K, real = x.shape, codebook.shape[1], torch.promote_types(x.dtype, torch.float32)
    entropy, saved = x.new_zeros(G, dtype=real), x.new_zeros(3, H, G, M, dtype=real)
    means = x.new_zeros(G, min(K, H * M), dtype=real)
    with torch.autocast(x.device.type, enabled=False):
        heads, scale = [Codes(codes, metric, real) for codes in codebook], steepness(inverse_temperature)
        for groups in group_blocks(x, K):
            parts = parts_of(x, heads, scale, mask, groups)
            open_parts = parts if K > soft.CODES else []
            for part in open_parts:
                part.add_up()
            for codes in blocks(K, soft.CODES):
                mean = mean_of(parts, codes)
                entropy[groups] -= (mean * mean.clamp_min(LEAST).log_()).sum(1)
                if means.shape[1] == K:
                    means[groups, codes] = mean
                derivative = derivative_of(mean) if open_parts else None
                for part in open_parts:
                    part.level += (part.softmax(codes).p * derivative).sum(2, keepdim=True)
            for part in open_parts:
                saved[:, part.head, groups, part.members] = part.saved()
    return entropy, saved, means, codebook.clone(memory_format=torch.contiguous_format)


def assignment_entropy_backward(
    grad: Tensor,  # [G]
    x: Tensor,  # [H, G, M, D]
    codebook: Tensor,  # [H, K, D], as it was in the forward
    inverse_temperature: Tensor,  # ()
    mask: Tensor | None,  # [H, G, M] bool
    saved: Tensor,  # [3, H, G, M], of the forward
    means: Tensor,  # [G, min(K, H M)], of the forward
    metric: str,
    x_needed: bool,
    codebook_needed: bool,
) -> tuple[Tensor, Tensor]:  # grad_x [H, G, M, D] and grad_codebook [H, K, D], or [0]
    """grad / rows p_k (e_k - sum_j p_j e_j) inverse_temperature times the gradients of l_k, e = d entropy / d q."""
    K, real = codebook.shape[1], saved.dtype
    grad_x = torch.zeros(x.shape if x_needed else 0, dtype=x.dtype, device=x.device)
    grad_c = torch.zeros(codebook.shape if codebook_needed else 0, dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        heads, scale = [Codes(codes, metric, real) for codes in codebook], steepness(inverse_temperature)
        for groups in group_blocks(x, K):
            parts = parts_of(x, heads, scale, mask, groups)
            for part in parts if K > soft.CODES else []:
                part.load(saved[:, part.head, groups, part.members])
            factor = grad[groups].to(real).view(-1, 1, 1) / size_of(parts)
            for codes in blocks(K, soft.CODES):
                mean = means[groups, codes] if means.shape[1] == K else mean_of(parts, codes)
                derivative = derivative_of(mean)
                for part in parts:
                    _, rows, costs, p = part.softmax(codes)
                    level = (p * derivative).sum(2, keepdim=True) if part.total is None else part.level
                    pull = (derivative - level).mul_(p).mul_(factor).flatten(0, 1)
                    part.last = None  # since the costs are overwritten
                    to_x, to_codes = part.codes.spread(pull, costs, rows, codes, scale, x_needed, codebook_needed)
                    if x_needed:
                        part.to_x += to_x
                    if codebook_needed:
                        grad_c[part.head, codes] += to_codes
            for part in parts if x_needed else []:
                grad_x[part.head, groups, part.members] = part.to_x.view_as(part.x).to(x.dtype)
    return grad_x, grad_c.to(codebook.dtype)


class Block(NamedTuple):
    codes: slice
    rows: Rows
    costs: Tensor  # [g m, k]
    p: Tensor  # [g, m, k], 0 for rows that are left out


class Part:
    """Rows of some groups in one head. The block of codes that was met last is kept, if there is room."""

    def __init__(
        self, head: int, members: slice, x: Tensor, codes: Codes, scale: Tensor, mask: Tensor | None, keep: bool
    ):
        self.head, self.members, self.x, self.codes, self.scale, self.keep = head, members, x, codes, scale, keep
        valid = x.isfinite().all(-1, keepdim=True) & ~codes.none
        self.valid = (valid if mask is None else valid & mask.unsqueeze(-1)).to(codes.real)  # [g, m, 1]
        self.total: Total | None = None  # over all codes, if they are more than one block
        self.level = torch.zeros_like(self.valid)  # sum_k p_k times the entropy's derivative by q_k
        self.last: Block | None = None
        self.to_x = 0.0

    def add_up(self) -> None:
        total = None
        for codes in blocks(len(self.codes.values), soft.CODES):
            part = self.meet(codes)[3]
            total = part if total is None else total.joined(part, self.scale)
        self.total = total

    def saved(self) -> Tensor:  # [3, g, m]
        total = self.total.saved(self.codes.real).unflatten(1, self.x.shape[:2])
        return torch.cat([total, self.level.squeeze(2).unsqueeze(0)])

    def load(self, saved: Tensor) -> None:
        self.total, self.level = Total(*saved[:2].double().flatten(1).unsqueeze(2)), saved[2].unsqueeze(2)

    def softmax(self, codes: slice) -> Block:
        if self.last is not None and self.last.codes == codes:
            return self.last
        rows, costs, p, part = self.meet(codes)
        share = self.valid
        if self.total is not None:
            share = share * self.total.share(part, self.scale).exp().to(p.dtype).view_as(share)
        block = Block(codes, rows, costs, p.view(*self.x.shape[:2], -1).mul_(share))
        self.last = block if self.keep else None
        return block

    def meet(self, codes: slice) -> tuple[Rows, Tensor, Tensor, Total]:
        rows = self.codes.rows(self.x.flatten(0, 1))
        costs = self.codes.costs(rows, codes)
        return rows, costs, *self.codes.softmax(costs, rows, codes, self.scale)


def group_blocks(x: Tensor, K: int) -> Iterator[slice]:  # of x [H, G, M, D]
    H, G, M, D = x.shape
    return blocks(G if H * M else 0, max(1, soft.rows_at_once(K, D) // max(H * M, 1)))


def parts_of(x: Tensor, heads: list[Codes], scale: Tensor, mask: Tensor | None, groups: slice) -> list[Part]:
    (H, _, M, D), parts = x.shape, []
    room = soft.rows_at_once(len(heads[0].values), D) if heads else 1
    for h, codes in enumerate(heads):
        for rows in blocks(M, room):
            wanted = None if mask is None else mask[h, groups, rows]
            parts.append(Part(h, rows, x[h, groups, rows], codes, scale, wanted, room >= H * M))
    return parts


def size_of(parts: list[Part]) -> Tensor:  # [g, 1, 1]
    return sum(part.valid.sum(1, keepdim=True) for part in parts).clamp_min(1)


def mean_of(parts: list[Part], codes: slice) -> Tensor:  # [g, k]
    """q, 0 in a group without rows."""
    return sum(part.softmax(codes).p.sum(1) for part in parts) / size_of(parts).squeeze(2)


def derivative_of(mean: Tensor) -> Tensor:  # [g, k] -> [g, 1, k]
    """Of the entropy by q."""
    return mean.clamp_min(LEAST).log_().neg_().sub_((mean >= LEAST).to(mean.dtype)).unsqueeze(1)
