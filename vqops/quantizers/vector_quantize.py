"""VectorQuantize: a discrete bottleneck with an EMA codebook or a learnable one."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vqops.ops.checkpointing import check_first_run
from vqops.ops.checks import check_device
from vqops.quantizers.codebook.codebook import Codebook, UpdateWeight
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.interface.losses import mean_cross_entropy, mean_error, weighted
from vqops.quantizers.interface.options import check_counts, check_decay, check_not_both, check_not_negative, refuse


class VectorQuantize(nn.Module):
    """Replace each vector by its nearest code, let gradients through, and learn the codes.

        e = argmin_k |z - c_k|^2,  output = c_e,  loss = commitment_weight mean((z - c_e)^2)

    where z is the input, after a linear projection if codebook_dim differs from dim, and, with use_cosine_sim, after
    division by its norm. The codes follow the moving averages of the vectors they stand for,
        N_k <- decay N_k + (1 - decay) n_k,  m_k <- decay m_k + (1 - decay) sum of the z of code k,  c_k = m_k / N_k,
    or, with learnable_codebook, the gradient of the loss. A training step searches and quantizes with the codes it
    found, then updates them, then replaces dead ones.

    Arguments:
        dim: features of the input.
        codebook_size: number of codes, K.
        codebook_dim: features of a code, D, by default dim. Where heads * codebook_dim is not dim, linear layers
            `project_in` and `project_out` stand between.
        heads: each vector is cut in this many parts, and each part gets a code.
        separate_codebook_per_head: a codebook [heads, K, D] instead of one [K, D] for all parts.
        decay: of the moving averages, in [0, 1].
        eps: Laplace smoothing of the average counts.
        freeze_codebook: no update of the codes in training; forward's argument of this name overrides it.
        kmeans_init: the first batch decides the first codes, by k-means; without it they are random.
        kmeans_iters: iterations of that k-means.
        sync_kmeans: k-means on the joint batch of all ranks, with a collective per iteration; False: on the batch of
            the rank that has most vectors. Either way all ranks start with the same codes.
        use_cosine_sim: the nearest code is the one of largest cosine; vectors and codes have norm 1.
        layernorm_after_project_in: a LayerNorm after `project_in`, if there is one.
        threshold_ema_dead_code: a code whose average count falls below this restarts from a random vector of the
            batch, with this count; 0 never.
        channel_last: the input is [b, ..., dim]; False: [b, dim, ...].
        accept_image_fmap: the input is [b, dim, h, w], whatever channel_last says.
        accept_3d_fmap: the input is [b, dim, d, h, w], whatever channel_last says.
        commitment_weight: weight of the loss.
        rotation_trick: how the output's gradient reaches the input: turned and scaled as the input is onto its code
            (True), or as it is (False, straight-through). None: True if dim > 1.
        sync_codebook: the ranks of a `torch.distributed` job update with their joint batch and keep equal codes. None:
            whenever there is such a job. False: nothing is exchanged, each rank learns codes of its own.
        ema_update: the codes follow the averages; None: unless learnable_codebook. Forward's argument of this name
            overrides it. Without it the codes stay, except that dead ones are replaced.
        manual_ema_update: steps move the averages, but the codes only when `_codebook.update_ema()` is called.
        learnable_codebook: the codes are a Parameter, moved by the gradient of the loss and not by averages.
        return_zeros_for_masked_padding: masked positions of the output are zeros; False: the input's values.
        route_gradients_to_input: False: no gradient of the output reaches the input; it goes to the codes if they are
            learnable.

    In a `torch.distributed` job all ranks must call forward in training and for the first batch, in the same order. A
    step is one collective, with dead codes a small one more; k-means one per iteration.

    Raises TypeError or ValueError for arguments that don't fit.

    Arguments, results and `state_dict` are those of vector-quantize-pytorch; docs/differences.md lists where the
    behaviour differs on purpose. Sources: van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1 for the averages;
    Fifty et al. 2024 (arXiv 2410.06424) for the rotation.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        **unsupported,
    ):
        owner = type(self).__name__
        refuse(owner, unsupported)
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        learnable_codebook = bool(learnable_codebook)
        ema_update = not learnable_codebook if ema_update is None else ema_update
        counts = {"dim": dim, "codebook_size": codebook_size, "codebook_dim": codebook_dim, "heads": heads}
        check_counts(owner, **counts, kmeans_iters=kmeans_iters)
        check_decay(owner, decay)
        check_not_negative(
            owner, eps=eps, threshold_ema_dead_code=threshold_ema_dead_code, commitment_weight=commitment_weight
        )
        check_not_both(owner, use_cosine_sim=use_cosine_sim, learnable_codebook=learnable_codebook)
        check_not_both(owner, ema_update=ema_update, learnable_codebook=learnable_codebook)
        check_not_both(owner, accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)

        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.freeze_codebook = freeze_codebook
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in, self.project_out = nn.Linear(dim, inner), nn.Linear(inner, dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            owner=owner,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync_codebook=sync_codebook is not False,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            learnable_codebook=learnable_codebook,
        )

    @property
    def codebook(self) -> Tensor:  # [K, D], or [heads, K, D] with separate_codebook_per_head
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != self.codebook.shape:
            raise ValueError(
                f"{type(self).__name__}: codebook must have shape {list(self.codebook.shape)}, got {list(codes.shape)}"
            )
        self._codebook.set_(codes.view(self._codebook.embed.shape))

    @property
    def decay(self) -> float:
        """Of the moving averages; may be set between steps, for a warm-up."""
        return self._codebook.decay

    @decay.setter
    def decay(self, value: float) -> None:
        check_decay(type(self).__name__, value)
        self._codebook.decay = value

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def _layout(self) -> Layout:
        image = 2 if self.accept_image_fmap else 3 if self.accept_3d_fmap else None
        features_second = image is not None or not self.channel_last
        return Layout(
            type(self).__name__, self.dim, self.heads, self.separate_codebook_per_head, features_second, image
        )

    def forward(
        self,
        x: Tensor,  # [b, ..., dim], or [b, dim, ...]
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        *,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        ema_update_weight: UpdateWeight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        **unsupported,
    ) -> tuple[Tensor, ...]:
        """Quantize x: (quantized, indices, loss). In training then update the codes.

        Arguments:
            x: float32, float64, float16 or bfloat16, in the axes that channel_last, accept_image_fmap and
                accept_3d_fmap say.
            indices: int64, shaped as returned. The result is then (quantized, the mean cross entropy of these codes)
                under the softmax of -|z - c_k|, for cosine of z.c_k; -1 is left out.
            mask: bool, shape of x without its feature axis; False leaves a vector out of everything.
            lens: [b] integers, for x [b, n, dim]: the mask that keeps the first lens[i] vectors of each sequence.
            topk: return the codes of the k nearest (at most 32) instead of one, for one head. Nothing is updated.
            freeze_codebook, ema_update: as in the constructor, for this call.
            return_loss_breakdown: a fourth value, LossBreakdown.
            ema_update_weight: [K] or [heads, K] in [0, 1], or a function of the sums [H, K, D] and counts [H, K] of
                all ranks that returns this: scales how far each code's averages move.
            accum_ema_update: only keep this call's counts and sums, for the next call without it to add to its own.

        Returns:
            quantized: shape and dtype of x (of the projection, if there is one); topk: k before the features, or after
                all axes if the features come second.
            indices: int64, shape of x without its feature axis, then heads (if more than one) or k; -1 for masked
                vectors and for those with a NaN or Inf, whose quantized values and loss are NaN and which take no part
                in any update.
            loss: (), float32 (float64 for float64 x), the mean over vectors that are not masked; 0 in eval and for an
                empty batch. topk: the shape of the indices, in eval as well.

        In eval nothing is updated and no gradient reaches x, except of the cross entropy; but a first batch still
        initialises by k-means. An empty batch, or one without a valid vector on any rank, moves no average.

        Raises TypeError or ValueError for inputs that don't fit, IndexError for indices that are no codes, and
        RuntimeError when activation checkpointing repeats a step that has updated the codebook, before any change.
        """
        owner, layout, codebook = type(self).__name__, self._layout, self._codebook
        refuse(f"{owner}.forward", unsupported)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        learning = self.training and not frozen
        collect = learning and topk is None and codebook.collects(ema_update)
        self._check_call(x, indices, topk, ema_update, ema_update_weight)
        mask = layout.mask(x, mask, lens)
        if collect:
            check_first_run(codebook.embed.detach(), owner)
        ready = codebook.is_initted or torch.compiler.is_compiling()
        with nullcontext() if ready else codebook.restored_on_failure():
            positions, row_mask = layout.positions(x), layout.mask_rows(mask)
            rows = layout.rows(x, self.project_in, mask)
            codebook.ready_(rows.detach(), row_mask)
            gradient = "rotation" if self.rotation_trick else "straight_through"
            if not self.route_gradients_to_input:
                gradient = "none"

            # In eval only the cross entropy reaches the input.
            given = rows if self.training else rows.detach()
            if topk is None:
                found = codebook(given, row_mask, gradient=gradient, learn=learning, collect=collect)
                quantized = layout.rows_back(found.quantized, positions)
                chosen = layout.indices_back(found.indices, positions)
                error = found.error
                commitment = mean_error(error, row_mask, rows.shape[-1]) if self.training else error.new_zeros(())
            else:
                k = min(topk, self.codebook_size)
                found = codebook.topk(given, k, row_mask, gradient=gradient, learn=learning)
                quantized = found.quantized.view(*positions, k, rows.shape[-1])
                chosen = found.indices.view(*positions, k)
                commitment = found.error.view(*positions, k) / rows.shape[-1]
            quantized = self._output(self.project_out(quantized), mask, x)

            if indices is None:
                loss, breakdown = weighted(commitment, self.commitment_weight, self.training)
                results = (quantized, chosen, loss, breakdown) if return_loss_breakdown else (quantized, chosen, loss)
            else:
                codes, targets = codebook.codes(learning), layout.index_rows(indices)
                results = quantized, mean_cross_entropy(rows, codes, targets, row_mask, codebook.metric)
            # Last, so that nothing that fails before it leaves a trace.
            if collect:
                update = {"ema_update": ema_update, "weight": ema_update_weight, "accumulate": accum_ema_update}
                codebook.update_(rows.detach(), found.indices, found.counts, found.sums, **update)
        return results

    def _output(self, quantized: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
        """The output in the caller's axes, with its values at masked positions."""
        layout = self._layout
        if mask is not None:
            kept, original = mask.unsqueeze(-1), layout.features_last(x)
            if quantized.dim() > original.dim():  # [*positions, k, dim]
                kept, original = kept.unsqueeze(-1), original.unsqueeze(-2)
            if not self.return_zeros_for_masked_padding:
                quantized = torch.where(kept, quantized, original.to(quantized.dtype))
            elif self.has_projections:
                quantized = quantized.masked_fill(~kept, 0)
        return layout.features_back(quantized)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [b, ...]: [b, ..., D], or [b, D, ...] if the input is [b, dim, ...]. -1 gives zeros.

        With heads, indices are [b, ..., heads], and their codes stand one behind the other in the features.
        """
        return self._layout.features_back(self._joined_codes(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized vectors that forward returned with these indices, if the codes are the same. -1 gives zeros."""
        codes = self._joined_codes(indices)
        if self.has_projections:
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
            missing = (indices < 0).all(-1) if self.heads > 1 else indices < 0
            codes = codes.masked_fill(missing.unsqueeze(-1), 0)
        return self._layout.features_back(codes)

    def _joined_codes(self, indices: Tensor) -> Tensor:  # [*positions(, heads)] -> [*positions, heads * D]
        layout = self._layout
        layout.check_indices(indices, self.codebook_size)
        positions = tuple(indices.shape[:-1] if self.heads > 1 else indices.shape)
        return layout.rows_back(self._codebook.codes_at(layout.index_rows(indices)), positions)

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """A step of the codes with the vectors x and the indices they got, as a training forward makes it.

        x, indices and mask as in forward; index -1 leaves a vector out. Also in eval and with freeze_codebook, since it
        is asked for. A learnable codebook has nothing to update, unless threshold_ema_dead_code keeps averages.
        """
        self._check_call(x, indices, None, None, None)
        layout = self._layout
        mask = layout.mask(x, mask, None)
        if not self._codebook.collects():
            return
        check_first_run(self._codebook.embed.detach(), type(self).__name__)
        rows = layout.rows(x, self.project_in, mask)
        self._codebook.keep_float32_()
        chosen = layout.index_rows(indices)
        if mask is not None:
            chosen = chosen.masked_fill(~layout.mask_rows(mask), -1)
        self._codebook.update_(rows, *self._codebook.statistics(rows, chosen))

    update_ema_indices = update_indices

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """Replace the codes that threshold_ema_dead_code calls dead by random vectors of x, an input of forward.

        Only in training. All ranks must call it, and get the same codes.
        """
        self._layout.check_input(x)
        check_device(type(self).__name__, x, codebook=self._codebook.embed)
        if self.training and self._codebook.threshold_ema_dead_code > 0:
            self._codebook.expire_codes_(self._layout.rows(x, self.project_in))

    def _check_call(
        self,
        x: Tensor,
        indices: Tensor | None,
        topk: int | None,
        ema_update: bool | None,
        ema_update_weight: UpdateWeight | None,
    ) -> None:
        owner = type(self).__name__
        self._layout.check_input(x)
        check_device(owner, x, codebook=self._codebook.embed, indices=indices)
        if indices is not None:
            self._layout.check_indices(indices, self.codebook_size, self._layout.positions(x))
        if topk is not None:
            check_counts(owner, topk=topk)
            if self.heads > 1:
                raise ValueError(f"{owner}: topk ranks the codes of one head, got heads={self.heads}")
            if indices is not None:
                raise ValueError(f"{owner}: topk and indices can't both be given")
        if ema_update and self._codebook.learnable_codebook:
            raise ValueError(f"{owner}: ema_update=True, but learnable_codebook=True: no averages move the codes")
        weight = ema_update_weight
        if not (weight is None or isinstance(weight, Tensor) or callable(weight)):
            raise TypeError(f"{owner}: ema_update_weight must be a tensor or a function, got {type(weight).__name__}")

    def extra_repr(self) -> str:
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return f"dim={self.dim}, codebook_size={self.codebook_size}{heads}"
