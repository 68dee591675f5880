"""The loss of a quantizer and its terms."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.quantizers.options.numbers import Numbers
from vqops.reference import TINY


class LossBreakdown(NamedTuple):
    """The terms of the loss before their weights; 0 for a term without a weight."""

    commitment: Tensor  # shape of the loss
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class LossTerms(NamedTuple):
    """The terms of a `LossBreakdown`; None for one without a weight, but for the first."""

    commitment: Tensor
    codebook_diversity: Tensor | None = None
    orthogonal_reg: Tensor | None = None
    inplace_optimize: Tensor | None = None

    def breakdown(self) -> LossBreakdown:
        zero = self.commitment.new_zeros(())
        # A clone, since the loss, which its user may change in place, may be the commitment itself.
        return LossBreakdown(self.commitment.clone(), *(zero if term is None else term for term in self[1:]))


def mean_error(error: Tensor, mask: Tensor | None, dim: int) -> Tensor:  # error [H, N], bool mask [H, N]
    """The mean of the squared differences whose sums over `dim` features are `error`, without the masked; 0 of none."""
    rows = max(error.numel(), 1) if mask is None else mask.sum().clamp_min(1)
    return error.sum() / (rows * dim)


def mean_cross_entropy(entropy: Tensor, targets: Tensor) -> Tensor:  # [H, N], [H, N] int64 -> ()
    """The mean over the rows whose target is not -1; 0 of none."""
    return entropy.sum() / (targets >= 0).sum().clamp_min(1)


def nan_if_lost(error: Tensor) -> Tensor:  # ()
    """NaN if a row has no error because it is not finite, else 0: a loss that leaves the row out says so."""
    return torch.zeros_like(error[..., :0].sum()).masked_fill(error.detach().isnan().any(), torch.nan)


def orthogonality(
    codes: Tensor,  # [H, K, D]
    active: Tensor | None = None,  # [H, K] bool
    max_codes: int | None = None,
) -> Tensor:  # ()
    """mean_h (sum_ij (u_i.u_j)^2 / n^2 - 1 / n) over the n active codes u = c / |c|, or max_codes of them at random.

    0 of none. The smaller of the Gram matrices [n, n] and [D, D] gives the sum: |U U^T|^2 = |U^T U|^2. Source: arXiv
    2112.00384, equation 2.
    """
    H, K, D = codes.shape
    kept = codes.new_ones(H, K, 1) if active is None else active.unsqueeze(-1).to(codes.dtype)
    if max_codes is not None and max_codes < K:
        if active is None:
            chosen = torch.randperm(K, device=codes.device)[:max_codes]
            codes, kept = codes[:, chosen], kept[:, chosen]
        else:  # the active ones first, in random order
            order = torch.rand(H, K, device=codes.device) + active
            chosen = order.topk(max_codes).indices.unsqueeze(-1)
            codes, kept = codes.gather(1, chosen.expand(-1, -1, D)), kept.gather(1, chosen)
    with torch.autocast(codes.device.type, enabled=False):
        u = F.normalize(codes.to(torch.promote_types(codes.dtype, torch.float32)), dim=-1, eps=TINY) * kept
        gram = u.mT @ u if u.shape[1] > D else u @ u.mT
        n = kept.sum((1, 2)).to(u.dtype)
        return ((gram.square().sum((1, 2)) / n.clamp_min(1) - 1) / n.clamp_min(1)).masked_fill(n == 0, 0).mean()


def weighted(
    terms: LossTerms,
    codebook_error: Tensor | None,  # () or the commitment's shape, with the gradient to the codes alone
    numbers: Numbers,
    training: bool,
    commits: bool,  # whether the commitment has a weight
) -> Tensor:
    """The loss of the terms.

    The losses of candidates [*positions, k] are for ranking them, in eval too, then with a weight of 1 instead of 0.
    """
    each = terms.commitment.dim() > 0
    loss = numbers.times(terms.commitment, "commitment_weight") if commits and (training or each) else terms.commitment
    if training:
        for name, term in (
            ("codebook_loss_weight", codebook_error),
            ("codebook_diversity_loss_weight", terms.codebook_diversity),
            ("orthogonal_reg_weight", terms.orthogonal_reg),
        ):
            if term is not None and numbers.positive[name]:
                loss = loss + numbers.times(term, name)
    # So that loss.backward() works with a frozen encoder too; a compiled graph can't return such a tensor.
    if training and not torch.compiler.is_compiling() and torch.is_grad_enabled() and not loss.requires_grad:
        loss.requires_grad_()
    return loss
