"""The optimizer that moves a learnable codebook within forward."""

from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.codebook.ranks import num_ranks, sum_over_ranks
from vqops.quantizers.codebook.searched import RowCodes, SharedCodes
from vqops.quantizers.interface.losses import mean_error


class InPlaceOptimizer(nn.Module):
    """What a quantizer with `in_place_codebook_optimizer` adds."""

    _codebook: Codebook
    in_place_codebook_optimizer: Optimizer | None
    manual_in_place_optimizer_update: bool

    def _optimize_in_place(
        self,
        rows: Tensor,  # [H, N, D], without gradient
        searched: SharedCodes | RowCodes,
        mask: Tensor | None,  # [H, N] bool
    ) -> Tensor:  # ()
        """A step of the codes on the mean squared error of the nearest ones, which it returns."""
        loss = mean_error(searched.quantize(rows, mask, "none", False, 1.0).error, mask, rows.shape[-1])
        loss.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss.detach()

    @contextmanager
    def _optimizer_kept_on_failure(self):
        """Its state, and the gradients of its parameters."""
        parameters, state = list(self._codebook.parameters()), deepcopy(self.in_place_codebook_optimizer.state_dict())
        grads = [p.grad if p.grad is None else p.grad.clone() for p in parameters]
        try:
            yield
        except BaseException:
            self.in_place_codebook_optimizer.load_state_dict(state)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            raise

    @torch.no_grad()
    def update_in_place_optimizer(self) -> None:
        """The step of `in_place_codebook_optimizer`, with the mean of the ranks' gradients; nothing without one."""
        if self.in_place_codebook_optimizer is None:
            return
        sync = self._codebook.sync
        if num_ranks(sync) > 1:
            grads = [p.grad for p in self._codebook.parameters() if p.grad is not None]
            totals = sum_over_ranks(*grads, dtype=torch.float32, sync=sync) if grads else []
            for grad, total in zip(grads, totals, strict=True):
                grad.copy_(total / num_ranks(sync))
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()
