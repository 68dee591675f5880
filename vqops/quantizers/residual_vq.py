"""ResidualVQ: a sequence of quantizers, each of what the ones before have left."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_device
from vqops.ops.search import LARGEST_K
from vqops.quantizers.codebook.steps import Step, take_steps_
from vqops.quantizers.interface.failure import joined
from vqops.quantizers.interface.gradients import towards
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.options.checks import as_number, check_counts, check_fraction, check_not_both
from vqops.quantizers.residual.beam import quantize_by_beam
from vqops.quantizers.residual.gradient import with_gradient_once
from vqops.quantizers.residual.implicit_codebook import ImplicitCodes, moved_codes
from vqops.quantizers.residual.level_dropout import LevelDropout
from vqops.quantizers.residual.levels import Quantized, Way, quantize_in_turn
from vqops.quantizers.residual.together import fits, quantize_together
from vqops.quantizers.vector_quantize import VectorQuantize


class Residual(NamedTuple):
    """A forward that has not moved its codebooks yet."""

    results: tuple[Tensor, ...]
    steps: list[Step]


class ResidualVQ(nn.Module):
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
            same on all ranks; the others give index -1 and loss 0, and learn nothing.
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
        sizes = sizes_of(owner, codebook_size, num_quantizers)
        count = len(sizes)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_counts(owner, dim=dim, codebook_dim=codebook_dim)
        check_counts(owner, quantize_dropout_multiple_of=quantize_dropout_multiple_of)
        if heads != 1:
            raise ValueError(f"{owner}: heads must be 1, got {heads}; GroupedResidualVQ quantizes parts of a vector")
        if not 0 <= quantize_dropout_cutoff_index < (count if quantize_dropout else float("inf")):
            raise ValueError(
                f"{owner}: quantize_dropout_cutoff_index must be in [0, num_quantizers={count}), "
                f"got {quantize_dropout_cutoff_index}"
            )
        quant_grad_frac = as_number(owner, "quant_grad_frac", quant_grad_frac)
        check_fraction(owner, quant_grad_frac=quant_grad_frac)
        check_not_both(owner, accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)
        if not gradient_per_level and (diveq or quant_grad_frac > 0):
            raise ValueError(f"{owner}: gradient_per_level=False needs quant_grad_frac=0 and diveq=False")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"{owner}: shared_codebook needs levels of one size, got codebook_size={list(sizes)}")
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
        self.beam_size = self._checked_beam(beam_size, "beam_size")
        eval_beam_size = self._checked_beam(eval_beam_size, "eval_beam_size")
        self.eval_beam_size = self.beam_size if eval_beam_size is None else eval_beam_size
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
        if self.layers[0].heads != 1:
            raise ValueError(f"{owner}: heads must be 1")
        self.mlps = None
        if implicit_neural_codebook:
            kwargs = {"l2norm_output": self.layers[0].use_cosine_sim, **(mlp_kwargs or {})}
            self.mlps = nn.ModuleList(ImplicitCodes(codebook_dim, **kwargs) for _ in range(count - 1))
        weights = [1.0] * count if beam_score_quantizer_weights is None else list(beam_score_quantizer_weights)
        if len(weights) != count:
            raise ValueError(
                f"{owner}: beam_score_quantizer_weights must be num_quantizers={count} numbers, got {len(weights)}"
            )
        self.register_buffer("beam_score_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)
        cutoff, multiple = quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        self.level_dropout = LevelDropout(count, cutoff, multiple, self.layers[0]._codebook.sync)

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:  # [Q, K, D], or Q of [K, D] if the sizes differ
        codebooks = tuple(layer.codebook for layer in self.layers)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

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
            return_all_codes: a fourth value, the codes [Q, b, ..., D] that add up to the output (before `project_out`).
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
        given = mask, indices, return_all_codes, sample_codebook_temp, freeze_codebook, beam_size
        with self._kept_on_failure(x, freeze_codebook):
            levels = None if indices is not None else self._levels(x, rand_quantize_dropout_fixed_seed)
            found = self._quantize(x, *given, levels, lens)
            take_steps_(found.steps)
            self._optimize_shared()
        return found.results

    def _levels(self, x: Tensor, seed: int | None) -> int | Tensor | None:
        """How many a step uses, if not all."""
        return self.level_dropout.draw(x, seed) if self.training and self.quantize_dropout else None

    def _kept_on_failure(self, x: Tensor, freeze_codebook: bool | None) -> AbstractContextManager:
        """Of all levels (interface/quantizing.py)."""
        self._layout.check_input(x)
        check_device(self.owner, x, codebook=self.layers[0]._codebook.embed)
        return joined(layer._kept_on_failure(layer._call(x, None, None, freeze_codebook)) for layer in self.layers)

    def _quantize(
        self,
        x: Tensor,
        mask: Tensor | None,
        indices: Tensor | Sequence[Tensor] | None,
        return_all_codes: bool,
        temperature: Tensor | float | None,
        freeze_codebook: bool | None,
        beam_size: int | None,
        levels: int | Tensor | None,  # how many are used; None: all
        lens: Tensor | None,
    ) -> Residual:
        layout, training, way = self._layout, self.training, self._way
        mask = layout.mask(x, mask, lens)
        positions, row_mask = layout.positions(x), layout.mask_rows(mask)
        targets = None if indices is None else self._targets(indices, positions)
        beam = self.beam_size if training else self.eval_beam_size
        beam = beam if beam_size is None else self._checked_beam(beam_size, "beam_size")
        if beam == 1:
            beam = None
        if beam is not None and targets is not None:
            raise ValueError(f"{self.owner}: indices and beam search can't both be asked for")
        levels = self.num_quantizers if levels is None else levels
        calls = [layer._call(x, beam, temperature, freeze_codebook) for layer in self.layers]

        rows = layout.rows(x, self.project_in, mask)
        if beam is not None:
            found = quantize_by_beam(way, rows, row_mask, positions, calls, int(levels), self.beam_score_weights)
        elif targets is None and fits(way, calls):
            found = quantize_together(way, rows, row_mask, calls, levels, self.gradient_per_level)
        else:
            found = quantize_in_turn(way, rows, row_mask, positions, calls, levels, targets)
            found = self._with_gradient_once(found, rows, row_mask)
        results = self._results(x, rows, mask, positions, found, targets is not None, return_all_codes)
        return Residual(results, found.steps)

    def _results(
        self,
        x: Tensor,
        rows: Tensor,  # [1, N, D]
        mask: Tensor | None,  # bool [*positions]
        positions: tuple[int, ...],
        found: Quantized,
        entropy: bool,
        return_all_codes: bool,
    ) -> tuple[Tensor, ...]:
        layout, quantized = self._layout, found.quantized
        if self.diveq and self.training:
            given = rows.to(quantized.dtype)
            if mask is not None:
                given = given.masked_fill(~layout.mask_rows(mask).unsqueeze(-1), 0)
            quantized = towards(given, quantized, self.layers[0].numbers["directional_reparam_variance"])
        quantized = self.project_out(layout.rows_back(quantized.to(rows.dtype), positions))
        quantized = layout.output(quantized, mask, x, self.return_zeros_for_masked_padding)
        if entropy:
            return quantized, found.losses
        chosen = found.indices.view(*positions, self.num_quantizers)
        results = quantized, chosen, found.losses
        return (*results, self.get_codes_from_indices(chosen)) if return_all_codes else results

    def _with_gradient_once(self, found: Quantized, rows: Tensor, mask: Tensor | None) -> Quantized:
        if self.gradient_per_level or not self.training:
            return found
        rotates = self.layers[0].rotation_trick
        return found._replace(quantized=with_gradient_once(found.quantized, rows, mask, rotates))

    def _optimize_shared(self) -> None:
        """The step that the levels of a shared codebook have left to the end."""
        first = self.layers[0]
        if self.shared_codebook and self.training and first.in_place_codebook_optimizer is not None:
            first.update_in_place_optimizer()

    def _targets(self, indices: Tensor | Sequence[Tensor], positions: tuple[int, ...]) -> Tensor:  # [1, N, Q]
        if not isinstance(indices, Tensor):
            indices = torch.stack(list(indices), -1)
        expected = [*positions, self.num_quantizers]
        if list(indices.shape) != expected:
            raise ValueError(f"{self.owner}: indices must have shape {expected}, got {list(indices.shape)}")
        every = zip(indices.unbind(-1), self.codebook_sizes, strict=True)
        return torch.stack([self._layout.indices(one, size, positions) for one, size in every], -1).flatten(0, -2)[None]

    def _checked_beam(self, beam_size: int | None, name: str) -> int | None:
        if beam_size is None:
            return None
        check_counts(self.owner, **{name: beam_size})
        if beam_size > LARGEST_K:
            raise ValueError(f"{self.owner}: {name} must be at most {LARGEST_K}, got {beam_size}")
        return beam_size

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [b, ..., q], q at most Q: [Q, b, ..., D], zeros for -1 and for levels from q on."""
        given = indices.shape[-1] if indices.dim() else 0
        if not 1 <= given <= self.num_quantizers:
            raise ValueError(
                f"{self.owner}: indices must end in an axis of 1 to num_quantizers={self.num_quantizers} levels, "
                f"got {list(indices.shape)}"
            )
        codes: list[Tensor] = []
        condition = None
        for layer, network, level in zip(self.layers, self._way.networks, indices.unbind(-1), strict=False):
            level = self._layout.indices(level, layer.codebook_size)
            rows = layer._codebook.codes_at(level.reshape(1, -1))
            rows = moved_codes(rows, condition, network).masked_fill((level < 0).view(1, -1, 1), 0)
            condition = rows if condition is None else condition + rows
            codes.append(rows.view(*level.shape, rows.shape[-1]))
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - given)
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized vectors that forward returned with these indices, if the codes are the same.

        Fewer levels give a coarser output; -1 adds nothing, and vectors of nothing but -1 are zeros.
        """
        total = torch.zeros(())
        for codes in self.get_codes_from_indices(indices):
            total = total.to(codes) + codes
        if self.has_projections:
            total = self.project_out(total.to(self.project_out.weight.dtype))
            total = total.masked_fill((indices < 0).all(-1, keepdim=True), 0)
        return self._layout.features_back(total)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_quantizers={self.num_quantizers}"


def sizes_of(owner: str, codebook_size: int | Sequence[int], num_quantizers: int | None) -> tuple[int, ...]:
    if num_quantizers is not None:
        check_counts(owner, num_quantizers=num_quantizers)
    if not isinstance(codebook_size, Sequence):
        if num_quantizers is None:
            raise ValueError(f"{owner}: num_quantizers is needed where codebook_size is one number")
        check_counts(owner, codebook_size=codebook_size)
        return (codebook_size,) * num_quantizers
    sizes = tuple(codebook_size)
    if not sizes or (num_quantizers is not None and len(sizes) != num_quantizers):
        raise ValueError(f"{owner}: codebook_size must be num_quantizers={num_quantizers} numbers, got {len(sizes)}")
    for size in sizes:
        check_counts(owner, codebook_size=size)
    return sizes
