"""ResidualVQ: a sequence of quantizers, each of what the ones before have left."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_device
from vqops.quantizers.codebook.failure import joined
from vqops.quantizers.codebook.shared_seeds import SharedSeeds
from vqops.quantizers.codebook.steps import Step, take_steps_
from vqops.quantizers.interface.gradients import towards
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.interface.quantizing import Call
from vqops.quantizers.options.checks import as_number, check_counts, check_fraction, check_not_both, level_sizes
from vqops.quantizers.residual.beam import quantize_by_beam
from vqops.quantizers.residual.decoding import LevelDecoding
from vqops.quantizers.residual.gradient import with_gradient_once
from vqops.quantizers.residual.implicit_codebook import ImplicitCodes
from vqops.quantizers.residual.level_dropout import draw_levels
from vqops.quantizers.residual.levels import Levels, Way, quantize_in_turn
from vqops.quantizers.residual.options import beam_of, check_cutoff, check_gradient_once, score_weights
from vqops.quantizers.residual.together import fits, quantize_together
from vqops.quantizers.vector_quantize import VectorQuantize


class Request(NamedTuple):
    """What a forward was asked for, after all checks."""

    positions: tuple[int, ...]
    mask: Tensor | None  # bool [*positions]
    targets: Tensor | None  # [1, N, Q]
    beam: int | None
    calls: list[Call]  # of the levels
    return_all_codes: bool


class Outcome(NamedTuple):
    """A forward that has not moved its codebooks yet."""

    results: tuple[Tensor, ...]
    steps: list[Step]


class ResidualVQ(LevelDecoding):
    """Replace each vector by a sum of codes: each level quantizes what the levels before have left.

        r_0 = z,  e_l = argmin_k |r_l - c_lk|^2,  r_{l+1} = r_l - c of level l,  output = sum over l of c of level l

    where z is the input, after a linear projection if codebook_dim differs from dim. A level is a VectorQuantize
    (`layers`), which learns its codes from its own rows. Residuals are float32 (float64 for float64 input), whatever
    the dtype of the input. Where the levels do nothing but search, average and measure their error, all of them are one
    op, `vqops.residual_quantize`; otherwise they are taken in turn, to the same codes.

    Arguments:
        dim: features of the input.
        num_quantizers: levels, Q; may be left out where codebook_size is a sequence.
        codebook_size: codes of each level, K, or a sequence of Q sizes.
        codebook_dim: features of a code, D, by default dim. If it is not dim, linear layers `project_in` and
            `project_out` stand around all levels.
        shared_codebook: all levels have the codebook of the first. Its averages take the rows of level after level, and
            its codes move once a step.
        diveq: DiVeQ (https://openreview.net/forum?id=KRVnpTbx7R): in training the output is z moved by its distance
            from the sum of the codes, towards it and noise; its gradient moves learnable codes, without a loss.
        heads: must be 1.
        quantize_dropout: each training step uses the first levels only, of a number drawn from
            quantize_dropout_cutoff_index + 1 to Q and rounded up to a multiple of quantize_dropout_multiple_of, the
            same on all ranks; the others give index -1 and loss 0, and learn nothing. The step whose k-means gives the
            levels their codes uses all. With beams it is no part of one compiled graph.
        accept_image_fmap, accept_3d_fmap, channel_last: the axes of the input, as VectorQuantize has them.
        implicit_neural_codebook: QINCo (arXiv 2401.14732): from the second level on a network (`mlps`) moves the codes,
            given the sum of the codes so far; the codes are learnable. All codes of a block of rows are made at a time,
            and those chosen once more for the gradient.
        mlp_kwargs: of these networks, `dim_hidden` and `depth`.
        beam_size, eval_beam_size: keep so many paths (at most 32) from level to level, by the sum of their losses, and
            take the best at the end; in eval the second, by default the first. None or 1: the nearest code, level by
            level.
        beam_score_quantizer_weights: Q weights of the levels' losses in that sum, by default 1.
        quant_grad_frac: how much of the gradient of what is subtracted from a residual passes, in [0, 1].
        return_zeros_for_masked_padding: masked positions of the output are zeros; False: the input's values.
        gradient_per_level: the gradient of the output reaches the input once a level, by the level's straight-through
            or rotation, so Q times with straight-through, as in vector-quantize-pytorch and EnCodec. False: once,
            through the sum, as in Moshi. Not of vector-quantize-pytorch.
        vq_kwargs: of the levels, as VectorQuantize has them.

    In a `torch.distributed` job all ranks must call forward in training and for the first batch, in the same order. A
    step is one collective for all levels, with dead codes a small one more; k-means one per iteration and level.

    Raises TypeError or ValueError for arguments that don't fit.

    Arguments, results and `state_dict` are those of vector-quantize-pytorch; docs/differences.md lists where the
    behaviour differs on purpose. Source: Zeghidour et al. 2021 (arXiv 2107.03312), algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | Sequence[int],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        channel_last: bool = True,
        accept_3d_fmap: bool = False,
        gradient_per_level: bool = True,
        **vq_kwargs,
    ):
        super().__init__()
        owner = type(self).__name__
        if num_quantizers is not None:
            check_counts(owner, num_quantizers=num_quantizers)
        sizes = level_sizes(owner, codebook_size, num_quantizers, shared_codebook)
        count = len(sizes)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_counts(owner, dim=dim, codebook_dim=codebook_dim)
        check_counts(owner, quantize_dropout_multiple_of=quantize_dropout_multiple_of)
        if heads != 1:
            raise ValueError(f"{owner}: heads must be 1, got {heads}; GroupedResidualVQ quantizes parts of a vector")
        check_cutoff(owner, quantize_dropout_cutoff_index, count if quantize_dropout else float("inf"))
        quant_grad_frac = as_number(owner, "quant_grad_frac", quant_grad_frac)
        check_fraction(owner, quant_grad_frac=quant_grad_frac)
        check_not_both(owner, accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)
        if not gradient_per_level:
            check_gradient_once(owner, diveq, quant_grad_frac, vq_kwargs)
        if beam_size is None and eval_beam_size is not None:
            raise ValueError(f"{owner}: eval_beam_size needs beam_size")
        if diveq:
            fixed = {"ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False}
            vq_kwargs |= {**fixed, "commitment_weight": 0.0}
        if implicit_neural_codebook:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True}
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}

        self.owner = owner  # for messages
        self.dim = dim
        self.codebook_dim = codebook_dim
        self.num_quantizers = count
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.quantize_dropout = quantize_dropout and count > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.implicit_neural_codebook = implicit_neural_codebook
        self.beam_size = beam_of(owner, "beam_size", beam_size)
        self.eval_beam_size = beam_of(owner, "eval_beam_size", beam_size if eval_beam_size is None else eval_beam_size)
        self.beam_score_weights = score_weights(owner, beam_score_quantizer_weights, count)
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.gradient_per_level = gradient_per_level

        self.has_projections = codebook_dim != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in, self.project_out = nn.Linear(dim, codebook_dim), nn.Linear(codebook_dim, dim)
        self.layers = nn.ModuleList(VectorQuantize(codebook_dim, size, **vq_kwargs) for size in sizes)
        if shared_codebook:
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook
                layer.in_place_codebook_optimizer = self.layers[0].in_place_codebook_optimizer
        for layer in self.layers:
            layer.owner = layer._codebook.owner = owner
        self.mlps = None
        if implicit_neural_codebook:
            kwargs = {"l2norm_output": self.layers[0].use_cosine_sim, **(mlp_kwargs or {})}
            self.mlps = nn.ModuleList(ImplicitCodes(codebook_dim, **kwargs) for _ in range(count - 1))
        self.seeds = SharedSeeds()

    @property
    def vq_is_ema_updating(self) -> bool:
        return self.layers[0].ema_update

    @property
    def _layout(self) -> Layout:
        image = 2 if self.accept_image_fmap else 3 if self.accept_3d_fmap else None
        return Layout(self.owner, self.dim, 1, False, image is not None or not self.channel_last, image)

    @property
    def _way(self) -> Way:
        networks = (None, *(self.mlps or [None] * (self.num_quantizers - 1)))
        return Way(tuple(self.layers), networks, self.quant_grad_frac, self.shared_codebook)

    def forward(
        self,
        x: Tensor,  # [b, ..., dim], or [b, dim, ...]
        mask: Tensor | None = None,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: Tensor | float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize x: (quantized, indices, losses). In training then update the codes.

        Arguments:
            x: float32, float64, float16 or bfloat16, in the axes that channel_last, accept_image_fmap and
                accept_3d_fmap say.
            mask, lens, sample_codebook_temp, freeze_codebook: as VectorQuantize has them.
            indices: integers, shaped as returned, or a list of those of each level. The result is then (quantized, the
                sum of the levels' mean cross entropies of these codes); -1 is left out. Levels go on from their nearest
                codes, not from these.
            return_all_codes: a fourth value, the codes [Q, b, ..., D], which add up to the output before `project_out`,
                diveq and the values at masked positions.
            beam_size: instead of the constructor's, for this call.
            rand_quantize_dropout_fixed_seed: of quantize_dropout, instead of one that is drawn.

        Returns:
            quantized: shape and dtype of x (of the projection, if there is one).
            indices: int64 [b, ..., Q]; -1 for masked vectors, levels that are not used, and, from the level on that is
                concerned, vectors with a NaN or Inf, whose quantized values are NaN, as is the loss.
            losses: [Q], float32 (float64 for float64 x), of the levels; 0 in eval, but with beam search there too.

        In eval nothing is updated and no gradient reaches x, except of the cross entropy; but a first batch still
        initialises by k-means.

        Raises as VectorQuantize does, before any change.
        """
        asked = mask, indices, return_all_codes, sample_codebook_temp, freeze_codebook, beam_size, lens
        request = self._request(x, *asked)
        with joined(self._kept_on_failure(request)):
            found = self._quantize(x, request, self._levels(x, request, rand_quantize_dropout_fixed_seed))
            take_steps_(found.steps)
            self._optimize_shared(request)
        return found.results

    def _request(
        self,
        x: Tensor,
        mask: Tensor | None,
        indices: Tensor | Sequence[Tensor] | None,
        return_all_codes: bool,
        temperature: Tensor | float | None,
        freeze_codebook: bool | None,
        beam_size: int | None,
        lens: Tensor | None,
    ) -> Request:
        owner, layout = self.owner, self._layout
        layout.check_input(x)
        for layer in self.layers:
            check_device(owner, x, codebook=layer._codebook.embed)
        mask, positions = layout.mask(x, mask, lens), layout.positions(x)
        targets = None if indices is None else self._targets(indices, positions)
        beam = self.beam_size if self.training else self.eval_beam_size
        beam = beam if beam_size is None else beam_of(owner, "beam_size", beam_size)
        beam = None if beam == 1 else beam
        if beam is not None and targets is not None:
            raise ValueError(f"{owner}: indices and beam search can't both be asked for")
        if not self.gradient_per_level and any(layer.numbers.positive["sync_update_v"] for layer in self.layers):
            raise ValueError(f"{owner}: gradient_per_level=False needs sync_update_v=0")
        calls = [layer._call(x, beam, temperature, freeze_codebook) for layer in self.layers]
        return Request(positions, mask, targets, beam, calls, return_all_codes)

    def _kept_on_failure(self, request: Request) -> list[AbstractContextManager]:
        """For a call that changes something before all that can fail is done."""
        if self.training or request.beam is not None:
            for layer in self.layers:
                layer.numbers.follow_(layer._codebook.embed)
        each = zip(self.layers[:1] if self.shared_codebook else self.layers, request.calls, strict=False)
        kept = [layer._kept_on_failure(call._replace(topk=None)) for layer, call in each]
        return [*kept, self.seeds.taken_back_on_failure()]

    def _levels(self, x: Tensor, request: Request, seed: int | None) -> int | Tensor:
        """How many are used. All where one has no codes yet, so that k-means has the same first batch for each."""
        dropped = self.training and self.quantize_dropout and request.targets is None
        if not dropped or not all(layer._codebook.knows_its_codes() for layer in self.layers):
            return self.num_quantizers
        if seed is not None and not isinstance(seed, int):
            kind = type(seed).__name__
            raise TypeError(f"{self.owner}: rand_quantize_dropout_fixed_seed must be an integer, got {kind}")
        cutoff, multiple = self.quantize_dropout_cutoff_index, self.quantize_dropout_multiple_of
        return draw_levels(self.seeds, x, seed, cutoff, self.num_quantizers, multiple, self.layers[0]._codebook.sync)

    def _quantize(self, x: Tensor, request: Request, levels: int | Tensor) -> Outcome:
        layout, way, calls, mask = self._layout, self._way, request.calls, request.mask
        rows, row_mask = layout.rows(x, self.project_in, mask), layout.mask_rows(mask)
        given = rows, row_mask, request.positions, calls
        if request.beam is None and request.targets is None and fits(way, calls):
            found = quantize_together(way, rows, row_mask, calls, levels, self.gradient_per_level)
            return Outcome(self._results(x, rows, found, request), found.steps)
        if request.beam is not None:
            found = quantize_by_beam(way, *given, int(levels), self.beam_score_weights)
        else:
            found = quantize_in_turn(way, *given, levels, request.targets)
        if not self.gradient_per_level and self.training:
            rotates = self.layers[0].rotation_trick
            found = found._replace(quantized=with_gradient_once(found.quantized, rows, row_mask, rotates))
        return Outcome(self._results(x, rows, found, request), found.steps)

    def _results(
        self,
        x: Tensor,
        rows: Tensor,  # [1, N, D]
        found: Levels,
        request: Request,
    ) -> tuple[Tensor, ...]:
        layout, quantized, mask, positions = self._layout, found.quantized, request.mask, request.positions
        if self.diveq and self.training:
            given = rows.to(quantized.dtype)
            if mask is not None:
                given = given.masked_fill(~layout.mask_rows(mask).unsqueeze(-1), 0)
            quantized = towards(given, quantized, self.layers[0].numbers["directional_reparam_variance"])
        quantized = self.project_out(layout.rows_back(quantized.to(rows.dtype), positions))
        quantized = layout.output(quantized, mask, x, self.return_zeros_for_masked_padding)
        if request.targets is not None:
            return quantized, found.losses
        chosen = found.indices.view(*positions, self.num_quantizers)
        results = quantized, chosen, found.losses
        return (*results, self.get_codes_from_indices(chosen)) if request.return_all_codes else results

    def _optimize_shared(self, request: Request) -> None:
        """The step that the levels of a shared codebook have left to the end."""
        if self.shared_codebook and self.layers[0]._optimizes(request.calls[0]):
            self.layers[0].update_in_place_optimizer()

    def _targets(self, indices: Tensor | Sequence[Tensor], positions: tuple[int, ...]) -> Tensor:  # [1, N, Q]
        if not isinstance(indices, Tensor):
            indices = torch.stack(list(indices), -1)
        expected = [*positions, self.num_quantizers]
        if list(indices.shape) != expected:
            raise ValueError(f"{self.owner}: indices must have shape {expected}, got {list(indices.shape)}")
        return torch.stack(self._checked_indices(indices), -1).flatten(0, -2)[None]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_quantizers={self.num_quantizers}"
