"""HierarchicalVQ: the residual quantized from coarse to fine, each level on a grid of its own."""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_device
from vqops.quantizers.codebook.shared_seeds import SharedSeeds
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.interface.nested_dropout import nested_cutoff
from vqops.quantizers.interface.scales import Phi, pooled, upsampled
from vqops.quantizers.options.checks import as_number, check_counts, check_fraction, check_not_both, level_sizes
from vqops.quantizers.vector_quantize import VectorQuantize


class HierarchicalVQ(nn.Module):
    """Quantize a sequence, image or volume by levels of growing grids: the multi-scale tokenizer of VAR.

        r_1 = x,  z_l = mean of r_l over the cells of level l,  q_l = phi_l(interpolation of the codes of z_l to x),
        r_{l+1} = r_l - q_l,  output = sum_l q_l,  loss = mean_l of the losses of the z_l,

    where phi_l(u) = (1 - quant_resi) u + quant_resi conv(u), with a kernel of 3. Each level is a `VectorQuantize`. With
    a shared codebook a training forward updates it once a level, in turn: level l + 1 searches the codes that level l
    has moved, and the averages decay num_levels times a step.

    Arguments:
        dim: features of the input.
        codebook_size: number of codes, K, or one for each level.
        scales: the grid of each level, from coarse to fine: its length, or lengths, of which none shrinks.
        shared_codebook: one codebook for all levels, which have equal sizes then.
        channel_first: the input is [b, dim, ...]; False: [b, ..., dim].
        sync_codebook, decay, commitment_weight, rotation_trick, kmeans_init, kmeans_iters, threshold_ema_dead_code,
        stochastic_sample_codes, sample_codebook_temp, orthogonal_reg_weight, orthogonal_reg_max_codes,
        orthogonal_reg_active_codes_only: as in VectorQuantize. k-means of a shared codebook sees the cells of the first
            level alone; where they are fewer than K, the replacement of dead codes brings the others to life.
        quant_resi: share of the convolution in phi; 0: no convolution.
        share_quant_resi: number of phis: 1 for all levels together; n: the levels in n groups; 0: one a level.
        nested_dropout: probability that a training step leaves out the last levels, from a random one on: the output
            and the loss are those of the levels before. All codebooks learn as always.
        nested_dropout_min_levels: so many levels are always kept.
        accept_image_fmap: the positions are [h, w].
        accept_3d_fmap: the positions are [d, h, w]. Otherwise they are [n].

    In a `torch.distributed` job all ranks keep the same levels, which costs one collective in the first step; with
    sync_codebook=False each draws by itself.

    Raises TypeError or ValueError for arguments that don't fit.

    Arguments, results and `state_dict` are those of vector-quantize-pytorch; docs/differences.md lists where the
    behaviour differs on purpose, docs/var.md has a complete training. Source: Tian et al. 2024 (arXiv 2404.02905).
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | Sequence[int],
        scales: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        channel_first: bool = True,
        sync_codebook: bool | None = None,
        decay: float = 0.99,
        commitment_weight: float = 1.0,
        rotation_trick: bool = False,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        threshold_ema_dead_code: float = 2,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 0.1,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_max_codes: int | None = 128,
        orthogonal_reg_active_codes_only: bool = False,
        quant_resi: float = 0.5,
        share_quant_resi: int = 1,
        nested_dropout: float = 0.0,
        nested_dropout_min_levels: int = 1,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ):
        owner = type(self).__name__
        check_not_both(owner, accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)
        spatial_dims = 2 if accept_image_fmap else 3 if accept_3d_fmap else 1
        level_shapes = grids(owner, scales, spatial_dims)
        codebook_sizes = level_sizes(owner, codebook_size, len(level_shapes), shared_codebook)
        quant_resi = as_number(owner, "quant_resi", quant_resi)
        nested_dropout = as_number(owner, "nested_dropout", nested_dropout)
        check_fraction(owner, nested_dropout=nested_dropout)
        check_counts(owner, dim=dim, nested_dropout_min_levels=nested_dropout_min_levels)
        if not isinstance(share_quant_resi, Integral):
            raise TypeError(f"{owner}: share_quant_resi must be an integer, got {share_quant_resi!r}")

        super().__init__()
        self.owner = owner  # for messages
        self.dim = dim
        self.spatial_dims = spatial_dims
        self.channel_first = channel_first
        self.scales = tuple(scales)
        self.level_shapes = level_shapes
        self.num_levels = len(level_shapes)
        self.codebook_sizes = codebook_sizes
        self.sync = sync_codebook is not False
        self.nested_dropout = nested_dropout
        self.nested_dropout_min_levels = nested_dropout_min_levels
        self.seeds = SharedSeeds()

        options = {
            "sync_codebook": sync_codebook,
            "decay": decay,
            "commitment_weight": commitment_weight,
            "rotation_trick": rotation_trick,
            "kmeans_init": kmeans_init,
            "kmeans_iters": kmeans_iters,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "stochastic_sample_codes": stochastic_sample_codes,
            "sample_codebook_temp": sample_codebook_temp,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "orthogonal_reg_max_codes": orthogonal_reg_max_codes,
            "orthogonal_reg_active_codes_only": orthogonal_reg_active_codes_only,
        }
        quantizers = [VectorQuantize(dim, size, **options) for size in codebook_sizes[: 1 if shared_codebook else None]]
        for quantizer in quantizers:
            quantizer.owner = quantizer._codebook.owner = owner
        self.vq = quantizers[0] if shared_codebook else None
        self.vqs = None if shared_codebook else nn.ModuleList(quantizers)
        count = min(share_quant_resi, self.num_levels) if share_quant_resi > 0 else self.num_levels
        phis = [Phi(dim, spatial_dims, quant_resi) for _ in range(count)]
        self.phi_shared = phis[0] if share_quant_resi == 1 else None
        self.phi_levels = None if share_quant_resi == 1 else nn.ModuleList(phis)

    @property
    def _layout(self) -> Layout:
        return Layout(self.owner, self.dim, 1, False, self.channel_first, self.spatial_dims)

    def get_vq(self, level_index: int) -> VectorQuantize:
        return self.vqs[level_index] if self.vq is None else self.vq

    def choose_phi(self, level_index: int) -> Phi:
        if self.phi_shared is not None:
            return self.phi_shared
        place = level_index / max(self.num_levels - 1, 1)
        return self.phi_levels[round(place * (len(self.phi_levels) - 1))]

    def pool_residual(
        self,
        t: Tensor,  # [b, dim, *positions]
        level_shape: tuple[int, ...],
        mask: Tensor | None = None,  # [b, *positions] bool
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors of a level [b, dim, *level_shape], means over what is kept, and which cells keep any."""
        return pooled(t, level_shape, mask)

    def upsample_to_full(self, q: Tensor, full_shape: tuple[int, ...], level_index: int) -> Tensor:
        """What the codes [b, dim, *level_shape] of a level add to the output [b, dim, *full_shape]."""
        return self.choose_phi(level_index)(upsampled(q, tuple(full_shape)))

    def forward(
        self,
        x: Tensor,  # [b, dim, *positions], or [b, *positions, dim]
        indices: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        sample_codebook_temp: Tensor | float | None = None,
        return_cutoff: bool = False,
    ) -> tuple:
        """Quantize x: (quantized, indices, loss). In training then update the codes, level by level.

        Arguments:
            x: of the dtype of the convolutions, unless autocast is on; the positions may be more or fewer than those of
                the last level.
            indices: integers of each level, shaped as returned. The result is then (quantized, the mean over the levels
                of the cross entropy of these codes), as in VectorQuantize; the residuals are those of the codes found.
            mask: bool, shape of x without its feature axis; False leaves a position out of everything. A cell without
                any other has index -1, and codes that reach over masked positions count less.
            lens: [b] integers, for sequences: the mask that keeps the first lens[i] positions of each.
            sample_codebook_temp: as in the constructor, for this call.
            return_cutoff: a last value, the index of the last level that nested dropout has kept, or None.

        Returns:
            quantized: shape and dtype of x, 0 where masked.
            indices: int64 of each level, [b, *its grid], of left out levels, too; -1 for masked cells and for those
                with a NaN or Inf in them, which take no part in any update. A NaN spreads as far as cells and
                convolutions reach: with a level of one cell to all of its sample, and to no other.
            loss: (), float32 (float64 for float64 x), the mean over the levels that are kept; 0 in eval.

        Raises TypeError or ValueError for inputs that don't fit, IndexError for indices that are no codes. A call that
        raises leaves the state as it was.
        """
        layout = self._layout
        layout.check_input(x)
        self._check_input(x)
        positions = layout.positions(x)
        mask = layout.mask(x, mask if mask is None else mask.to(x.device), lens if lens is None else lens.to(x.device))
        if indices is not None:
            indices = self._indices(indices, x.shape[0])
            if len(indices) < self.num_levels:
                raise ValueError(f"{self.owner}: indices must be of all {self.num_levels} levels, got {len(indices)}")
        with nullcontext() if torch.compiler.is_compiling() else self._restored_on_failure():
            cutoff = self._cutoff(x.device)
            kept = None
            if cutoff is not None:
                kept = torch.arange(self.num_levels, device="cpu") <= cutoff
                kept = kept.to(x.device, non_blocking=True)
            residual = x if self.channel_first else x.movedim(-1, 1)
            if mask is not None:
                residual = residual.masked_fill(~mask.unsqueeze(1), 0)
            output = torch.zeros_like(residual)
            chosen, losses = [], []
            for level, shape in enumerate(self.level_shapes):
                rows, cells = self.pool_residual(residual, shape, mask)
                found = self.get_vq(level)(
                    rows.flatten(2).mT,
                    indices=None if indices is None else indices[level].flatten(1),
                    mask=None if cells is None else cells.flatten(1),
                    sample_codebook_temp=sample_codebook_temp,
                )
                quantized = self.upsample_to_full(found[0].mT.unflatten(2, shape), positions[1:], level)
                residual = residual - quantized
                output = output + (quantized if kept is None else quantized.where(kept[level], 0))
                losses.append(found[-1])
                if indices is None:
                    chosen.append(found[1].unflatten(1, shape))
            losses = torch.stack(losses)
            loss = losses.mean() if kept is None else losses.where(kept, 0).sum() / kept.sum()
            if mask is not None:
                output = output.masked_fill(~mask.unsqueeze(1), 0)
            output = layout.features_back(output.movedim(1, -1))
        results = (output, tuple(chosen), loss) if indices is None else (output, loss)
        if not return_cutoff:
            return results
        last = self.num_levels - 1 if cutoff is None else int(cutoff)
        return (*results, None if last == self.num_levels - 1 else last)

    def get_output_from_indices(
        self,
        indices: Sequence[Tensor],
        full_shape: int | Sequence[int] | None = None,
    ) -> Tensor:
        """The quantized values that forward returned with these indices, if the codes are the same.

        Arguments:
            indices: integers of each level, [b, *its grid], or of the first levels alone: what nested dropout leaves.
                -1 adds no code.
            full_shape: the positions of the result; None: those of the last level.
        """
        full_shape = self.level_shapes[-1] if full_shape is None else full_shape
        full_shape, output = grid(self.owner, "full_shape", full_shape, self.spatial_dims), None
        for level, given in enumerate(self._indices(indices)):
            codes = self.get_vq(level).get_codes_from_indices(given.flatten(1)).mT
            codes = codes.to(self.choose_phi(level).conv.weight.dtype).unflatten(2, self.level_shapes[level])
            quantized = self.upsample_to_full(codes, full_shape, level)
            output = quantized if output is None else output + quantized
        return output if self.channel_first else output.movedim(1, -1)

    def _cutoff(self, device: torch.device) -> Tensor | None:  # int64 () on the CPU
        """The last level of this step's output and loss."""
        last = self.num_levels - 1
        if not self.training or self.nested_dropout == 0 or self.nested_dropout_min_levels > last:
            return None
        seed = self.seeds.draw(device, self.sync)
        return nested_cutoff(seed, self.nested_dropout, self.nested_dropout_min_levels - 1, last)

    def _check_input(self, x: Tensor) -> None:
        """What the levels would find only after the first have been updated."""
        if 0 in x.shape[1:]:
            raise ValueError(f"{self.owner}: x must have at least one position, got {list(x.shape)}")
        phi, weight = self.choose_phi(0), self.choose_phi(0).conv.weight
        check_device(self.owner, x, codebook=self.get_vq(0)._codebook.embed, convolution=weight)
        cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if phi.ratio > 0 and x.dtype != weight.dtype and not cast:
            raise TypeError(f"{self.owner}: x must be {weight.dtype} as the convolutions are, got {x.dtype}")

    def _indices(self, indices: Sequence[Tensor], batch: int | None = None) -> list[Tensor]:
        """The caller's indices of the first levels, as int64, after all checks."""
        if not isinstance(indices, (list, tuple)) or not all(isinstance(each, Tensor) for each in indices):
            raise TypeError(f"{self.owner}: indices must be a list or tuple of tensors, got {type(indices).__name__}")
        if not 1 <= len(indices) <= self.num_levels:
            raise ValueError(f"{self.owner}: indices must be of 1 to {self.num_levels} levels, got {len(indices)}")
        batch = indices[0].shape[:1].numel() if batch is None else batch
        checked = []
        for level, each in enumerate(indices):
            layout = self._layout._replace(owner=f"{self.owner}, level {level}")
            checked.append(layout.indices(each, self.codebook_sizes[level], (batch, *self.level_shapes[level])))
            check_device(layout.owner, self.get_vq(level)._codebook.embed, indices=each)
        return checked

    @contextmanager
    def _restored_on_failure(self):
        """For a call that has updated some levels before another fails."""
        with ExitStack() as stack:
            stack.enter_context(self.seeds.taken_back_on_failure())
            for quantizer in [self.vq] if self.vqs is None else self.vqs:
                if self.training or not quantizer._codebook.is_initted:
                    stack.enter_context(quantizer._codebook.restored_on_failure())
            yield

    def extra_repr(self) -> str:
        return f"dim={self.dim}, scales={self.scales}, codebook_sizes={self.codebook_sizes}"


def grid(owner: str, name: str, scale: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """The lengths of a grid, from one for all axes or one for each."""
    lengths = scale if isinstance(scale, Sequence) else (scale,) * axes
    if len(lengths) != axes:
        raise ValueError(f"{owner}: {name} must be an integer or {axes} of them, got {scale!r}")
    for length in lengths:
        check_counts(owner, **{name: length})
    return tuple(lengths)


def grids(owner: str, scales: Sequence[int | Sequence[int]], axes: int) -> tuple[tuple[int, ...], ...]:
    if not isinstance(scales, Sequence) or len(scales) == 0:
        raise TypeError(f"{owner}: scales must be a sequence, the grid of each level, got {scales!r}")
    shapes = tuple(grid(owner, f"scales[{level}]", scale, axes) for level, scale in enumerate(scales))
    for level, (before, shape) in enumerate(pairwise(shapes), start=1):
        if any(a > b for a, b in zip(before, shape, strict=True)):
            raise ValueError(f"{owner}: scales must not shrink, got {before} before {shape} at level {level}")
    return shapes
