"""What a call of forward may be given."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqops.ops.checks import check_device
from vqops.quantizers.codebook.codebook import Codebook, UpdateWeight
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.options.checks import check_counts, check_not_negative
from vqops.quantizers.options.numbers import Numbers


class Calls(nn.Module):
    """The checks of a quantizer's calls."""

    _codebook: Codebook
    numbers: Numbers
    owner: str
    codebook_size: int
    heads: int
    commitment_use_cross_entropy_loss: bool
    stochastic_sample_codes: bool
    straight_through: bool
    in_place_codebook_optimizer: Optimizer | None

    def _check_call(
        self,
        layout: Layout,
        x: Tensor,
        indices: Tensor | None,
        topk: int | None,
        ema_update: bool | None,
        ema_update_weight: UpdateWeight | None,
    ) -> Tensor | None:
        """The indices as int64."""
        owner = self.owner
        codebook = self._codebook
        layout.check_input(x)
        check_device(owner, x, codebook=codebook.embed, indices=indices)
        if indices is not None:
            indices = layout.indices(indices, self.codebook_size, layout.positions(x))
        if topk is not None:
            check_counts(owner, topk=topk)
            if self.heads > 1:
                raise ValueError(f"{owner}: topk ranks the codes of one head, got heads={self.heads}")
            if indices is not None:
                raise ValueError(f"{owner}: topk and indices can't both be given")
            if self.training and self.in_place_codebook_optimizer is not None:
                raise ValueError(f"{owner}: topk is for codes that stay, but in_place_codebook_optimizer moves them")
            if self.training and self.commitment_use_cross_entropy_loss:
                raise ValueError(f"{owner}: topk has a squared error a code, not commitment_use_cross_entropy_loss")
        if ema_update and codebook.learnable_codebook:
            raise ValueError(f"{owner}: ema_update=True, but learnable_codebook=True: no averages move the codes")
        weight = ema_update_weight
        if not (weight is None or isinstance(weight, Tensor) or callable(weight)):
            raise TypeError(f"{owner}: ema_update_weight must be a tensor or a function, got {type(weight).__name__}")
        if isinstance(weight, Tensor):
            codebook.check_update_weight(weight)
        return indices

    def _temperature(self, given: Tensor | float | None, x: Tensor) -> Tensor | None:  # ()
        """Of the probabilities of codes in training; None for 0, where the nearest has all, in eval, and where nothing
        asks for them."""
        if not isinstance(given, Tensor | None):
            check_not_negative(self.owner, sample_codebook_temp=given)
        if not self.training or not (self.stochastic_sample_codes or self.straight_through):
            return None
        if given is None:
            positive = self.numbers.positive["sample_codebook_temp"]
            return self.numbers["sample_codebook_temp"] if positive else None
        if not isinstance(given, Tensor) and given == 0:
            return None
        if isinstance(given, Tensor):
            return given.to(x.device, torch.float32)
        return torch.full((), given, dtype=torch.float32, device=x.device)  # without a wait
