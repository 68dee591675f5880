"""The loss of a quantizer and its terms."""

from typing import NamedTuple

import torch
from torch import Tensor


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
