"""The terms of a quantizer's loss, of one forward."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from vqops.ops.quantize import Quantized
from vqops.quantizers.codebook.chosen import Chosen
from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.codebook.searched import RowCodes, SharedCodes
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.interface.losses import (
    LossTerms,
    mean_cross_entropy,
    mean_error,
    nan_if_lost,
    orthogonality,
)
from vqops.quantizers.options.numbers import Numbers


class WithLosses(nn.Module):
    """What a quantizer with these losses adds."""

    _codebook: Codebook
    _layout: Layout
    numbers: Numbers
    directional_reparam: bool
    commitment_use_cross_entropy_loss: bool
    has_codebook_loss: bool
    orthogonal_reg_active_codes_only: bool
    orthogonal_reg_max_codes: int | None

    @property
    def _commits(self) -> bool:
        return self.numbers.positive["commitment_weight"] and not self.directional_reparam

    def _terms(
        self,
        rows: Tensor,  # [H, N, D]
        found: Quantized | Chosen,
        searched: SharedCodes | RowCodes,
        mask: Tensor | None,  # [H, N] bool
        positions: tuple[int, ...],
        learning: bool,
        in_place: Tensor | None,
    ) -> tuple[LossTerms, Tensor | None]:
        """The terms of the loss, and that of codebook_loss_weight."""
        error, each, D = found.error, found.error.dim() == 3, rows.shape[-1]
        training, positive = self.training, self.numbers.positive
        commits = training and self._commits
        if each:
            commitment = error.view(*positions, error.shape[-1]) / D
            if training and not commits:
                commitment = torch.zeros_like(commitment)
        elif not commits:
            commitment = error.new_zeros(())
        elif self.commitment_use_cross_entropy_loss:
            fixed = replace(searched, codes=searched.codes.detach()) if self.has_codebook_loss else searched
            entropy = fixed.cross_entropy(rows, found.indices)
            commitment = mean_cross_entropy(entropy, found.indices) + nan_if_lost(error)
        else:
            commitment = mean_error(error, mask, D)
        diversity, orthogonal, codebook_error = None, None, None
        if training and self.has_codebook_loss:
            errors = searched.codebook_error(rows, found.indices)
            codebook_error = errors.view(commitment.shape) / D if each else mean_error(errors, mask, D)
        if training and positive["codebook_diversity_loss_weight"]:
            grouped = partial(self._layout.grouped, positions=positions)
            entropy = searched.entropy(rows, self.numbers["codebook_diversity_temperature"], mask, grouped)
            diversity = -entropy.sum() / max(entropy.numel(), 1)
        if training and positive["orthogonal_reg_weight"]:
            active = self._codebook.in_use(found.indices) if self.orthogonal_reg_active_codes_only else None
            # A clone, since the update moves the codes before the backward.
            codes = self._codebook.embed.clone() if learning else self._codebook.embed.detach()
            orthogonal = orthogonality(codes, active, self.orthogonal_reg_max_codes)
        return LossTerms(commitment, diversity, orthogonal, in_place), codebook_error
