"""The loss of a quantizer and its terms."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.ops.checks import Metric
from vqops.ops.cross_entropy import code_cross_entropy
from vqops.reference import TINY


class LossBreakdown(NamedTuple):
    """The terms of the loss before their weights; 0 for a term without a weight."""

    commitment: Tensor  # shape of the loss
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def mean_error(error: Tensor, mask: Tensor | None, dim: int) -> Tensor:  # error [H, N], bool mask [H, N]
    """The mean of the squared differences whose sums over `dim` features are `error`, without the masked; 0 of none."""
    rows = max(error.numel(), 1) if mask is None else mask.sum().clamp_min(1)
    return error.sum() / rows / dim


def mean_cross_entropy(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    targets: Tensor,  # [H, N] int64
    mask: Tensor | None,  # [H, N] bool
    metric: Metric,
) -> Tensor:  # ()
    """The mean of `code_cross_entropy` over the rows that are not masked and whose target is not -1; 0 of none."""
    if metric == "cosine":
        x, codebook = (
            F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1, eps=TINY) for t in (x, codebook)
        )
    if mask is not None:
        targets = targets.masked_fill(~mask, -1)
    return code_cross_entropy(x, codebook, targets, metric).sum() / (targets >= 0).sum().clamp_min(1)


def weighted(commitment: Tensor, weight: float, training: bool) -> tuple[Tensor, LossBreakdown]:
    """The loss, and its terms.

    The losses of candidates [*positions, k] are for ranking them, in eval too, then with a weight of 1 instead of 0.
    """
    nothing = commitment.new_zeros(())
    if training and weight == 0:
        commitment = torch.zeros_like(commitment)
    loss = commitment * (weight or 1.0)
    # So that loss.backward() works with a frozen encoder too; a compiled graph can't return such a tensor.
    if training and not torch.compiler.is_compiling() and torch.is_grad_enabled() and not loss.requires_grad:
        loss.requires_grad_()
    return loss, LossBreakdown(commitment, nothing, nothing, nothing)
