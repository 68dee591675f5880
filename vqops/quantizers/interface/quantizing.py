"""The quantization of rows with one codebook: from their search to the loss and the step of the codes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.ops.checkpointing import check_first_run
from vqops.quantizers.codebook.codebook import UpdateWeight
from vqops.quantizers.codebook.failure import joined
from vqops.quantizers.codebook.moved import MovedCodes
from vqops.quantizers.codebook.searched import RowCodes, SharedCodes, unit
from vqops.quantizers.codebook.steps import Step, step_of
from vqops.quantizers.interface.gradients import Passing, with_gradient
from vqops.quantizers.interface.in_place import InPlaceOptimizer
from vqops.quantizers.interface.losses import LossTerms, mean_cross_entropy, weighted
from vqops.quantizers.interface.terms import WithLosses


class Call(NamedTuple):
    """How a forward quantizes its rows."""

    learning: bool  # whether the codes may change
    topk: int | None
    temperature: Tensor | None  # (), of the probabilities of codes; None: the nearest has all
    transform: Callable[[Tensor], Tensor] | None
    ema_update: bool | None
    weight: UpdateWeight | None = None
    accumulate: bool = False
    # A network that makes each row's codes of the shared ones and of its condition [H, N, D].
    network: tuple[Callable[[Tensor, Tensor], Tensor], Tensor] | None = None


class Quantization(NamedTuple):
    quantized: Tensor  # [H, N, D], topk [H, N, k, D]
    indices: Tensor  # [H, N], topk [H, N, k]
    loss: Tensor  # (), topk [*positions, k]; with targets their mean cross entropy
    terms: LossTerms | None
    step: Step | None  # of the codes, for `take_steps_`


class Quantizing(InPlaceOptimizer, WithLosses):
    """What a quantizer with one codebook does with rows."""

    codebook_size: int
    owner: str
    freeze_codebook: bool
    rotation_trick: bool
    route_gradients_to_input: bool
    stochastic_sample_codes: bool
    straight_through: bool
    use_cosine_sim: bool

    def _call(
        self,
        x: Tensor,
        topk: int | None,
        temperature: Tensor | float | None,
        freeze_codebook: bool | None,
        transform: Callable[[Tensor], Tensor] | None = None,
        ema_update: bool | None = None,
        weight: UpdateWeight | None = None,
        accumulate: bool = False,
    ) -> Call:
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        temperature = self._temperature(temperature, x)
        learning = self.training and not frozen
        return Call(learning, topk, temperature, transform, ema_update, weight, accumulate)

    def _collects(self, call: Call) -> bool:
        return call.learning and call.topk is None and self._codebook.collects(call.ema_update)

    def _observes(self, call: Call) -> bool:
        return call.learning and call.topk is None and self._codebook.observes

    def _optimizes(self, call: Call) -> bool:
        return call.learning and self.in_place_codebook_optimizer is not None

    def _kept_on_failure(self, call: Call) -> AbstractContextManager:
        """For a call whose state changes before all that can fail is done; `_quantize` goes on in it."""
        codebook, codes = self._codebook, self._codebook.embed
        if self.training or call.topk is not None:
            self.numbers.follow_(codes)
        changes = self._observes(call) or self._optimizes(call)
        if changes or self._collects(call):
            check_first_run(codes, self.owner)
        if (codebook.is_initted and not changes) or torch.compiler.is_compiling():
            return nullcontext()
        kept = [codebook.restored_on_failure()]
        return joined([*kept, self._optimizer_kept_on_failure()] if self._optimizes(call) else kept)

    def _quantize(
        self,
        rows: Tensor,  # [H, N, D]
        mask: Tensor | None,  # [H, N] bool
        positions: tuple[int, ...],
        call: Call,
        targets: Tensor | None = None,  # [H, N] int64
    ) -> Quantization:
        codebook, learning, fixed = self._codebook, call.learning, rows.detach()
        codebook.ready_(fixed, mask)
        if self._observes(call):
            codebook.observe_(fixed, mask)
        in_place = None
        if self._optimizes(call):
            with torch.enable_grad():
                searched = self._searched(rows, positions, True, call)
                in_place = self._optimize_in_place(fixed, searched, mask)
        searched = self._searched(rows, positions, learning, call)
        if not self.training and call.topk is None and targets is None:
            found = codebook(fixed, searched, mask, gradient="none", learn=False, collect=False)
            nothing = found.error.new_zeros(())
            return Quantization(found.quantized, found.indices, nothing, LossTerms(nothing), None)

        # In eval only the cross entropy reaches the input.
        given = rows if self.training else fixed
        passing = self._passing(call.temperature)
        drawn = call.temperature if self.stochastic_sample_codes else None
        how = {"gradient": passing.of_search(), "learn": learning, "temperature": drawn}
        collects = self._collects(call)
        if call.topk is None:
            found = codebook(given, searched, mask, collect=collects, **how)
        else:
            found = codebook.topk(given, searched, min(call.topk, self.codebook_size), mask, **how)
        quantized = with_gradient(found.quantized, found.indices, given, searched, passing, mask)

        step = None
        if collects:
            statistics = fixed, found.indices, found.counts, found.sums
            step = step_of(codebook, *statistics, call.ema_update, call.weight, call.accumulate)
        if targets is not None:
            targets = targets if mask is None else targets.masked_fill(~mask, -1)
            entropy = mean_cross_entropy(searched.cross_entropy(rows, targets), targets)
            return Quantization(quantized, found.indices, entropy, None, step)
        terms, codebook_error = self._terms(given, found, searched, mask, positions, learning, in_place)
        loss = weighted(terms, codebook_error, self.numbers, self.training, self._commits)
        return Quantization(quantized, found.indices, loss, terms, step)

    def _passing(self, temperature: Tensor | None) -> Passing:
        """How the output's gradient passes; in eval it does not."""
        if not self.training:
            return Passing("none")
        if not self.route_gradients_to_input:
            kind = "soft" if self.straight_through and temperature is not None else "none"
        elif self.directional_reparam:
            kind = "directional"
        else:
            kind = "rotation" if self.rotation_trick else "straight_through"
        variance = self.numbers["directional_reparam_variance"] if kind == "directional" else None
        more = self.numbers["sync_update_v"] if self.numbers.positive["sync_update_v"] else None
        return Passing(kind, temperature, variance, more)

    def _searched(
        self, rows: Tensor, positions: tuple[int, ...], learn: bool, call: Call
    ) -> SharedCodes | RowCodes | MovedCodes:
        if call.transform is None and call.network is None:
            return self._codebook.searched(learn, rows)
        codes = self._codebook.codes(learn).clone()  # what the function keeps for its backward must not change
        if call.network is not None:
            return MovedCodes(codes, *call.network, self._codebook.metric, learn)
        with torch.autocast(codes.device.type, enabled=False):
            made = self._layout.row_codes(call.transform(codes), positions, tuple(codes.shape))
        made = made if learn else made.detach()
        return RowCodes(unit(made) if self.use_cosine_sim else made, self._codebook.metric)
