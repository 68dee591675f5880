"""Steps of the codes that the caller asks for, outside forward."""

import torch
from torch import Tensor, nn

from vqops.ops.checkpointing import check_first_run
from vqops.ops.checks import check_device
from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.codebook.steps import step_of, take_steps_
from vqops.quantizers.interface.layout import Layout


class Updating(nn.Module):
    """What a quantizer with one codebook adds."""

    _codebook: Codebook
    _layout: Layout
    owner: str
    project_in: nn.Module

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """A step of the codes with the vectors x and the indices they got, as a training forward makes it.

        x, indices and mask as in forward; index -1 leaves a vector out. Also in eval and with freeze_codebook, since it
        is asked for. A learnable codebook has nothing to update, unless threshold_ema_dead_code keeps averages.
        """
        layout = self._layout
        indices = self._check_call(layout, x, indices, None, None, None)
        mask = layout.mask(x, mask, None)
        if not self._codebook.collects():
            return
        check_first_run(self._codebook.embed, self.owner)
        rows = layout.rows(x, self.project_in, mask)
        self._codebook.keep_float32_()
        chosen = layout.index_rows(indices)
        if mask is not None:
            chosen = chosen.masked_fill(~layout.mask_rows(mask), -1)
        take_steps_([step_of(self._codebook, rows, *self._codebook.statistics(rows, chosen))])

    update_ema_indices = update_indices

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """Replace the codes that threshold_ema_dead_code calls dead by random vectors of x, an input of forward.

        Only in training. All ranks must call it, and get the same codes.
        """
        self._layout.check_input(x)
        check_device(self.owner, x, codebook=self._codebook.embed)
        if self.training and self._codebook.replaces_dead:
            self._codebook.expire_codes_(self._layout.rows(x, self.project_in))
