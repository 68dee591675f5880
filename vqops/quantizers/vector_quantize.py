"""VectorQuantize: a discrete bottleneck with an EMA codebook or a learnable one."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from vqops.quantizers.codebook.affine import AffineCodebook
from vqops.quantizers.codebook.codebook import Codebook, UpdateWeight
from vqops.quantizers.codebook.steps import take_steps_
from vqops.quantizers.interface.calls import Calls
from vqops.quantizers.interface.decoding import Decoding
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.interface.quantizing import Quantizing
from vqops.quantizers.interface.settings import Settings
from vqops.quantizers.interface.updating import Updating
from vqops.quantizers.options.checks import (
    as_number,
    check_counts,
    check_fraction,
    check_needs,
    check_not_both,
    check_not_negative,
)
from vqops.quantizers.options.numbers import Numbers


class VectorQuantize(Calls, Decoding, Quantizing, Settings, Updating):
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
        commitment_use_cross_entropy_loss: the loss is the cross entropy of the chosen codes under the softmax of
            -|z - c_k| (for cosine z.c_k) instead of the squared error.
        orthogonal_reg_weight: of a loss that makes the codes orthogonal (arXiv 2112.00384, equation 2); above 0 the
            codes are a Parameter. With ema_update the next average undoes what it did.
        orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: only for the codes of the batch; for so many of
            them at random.
        codebook_diversity_loss_weight: of minus the entropy of the mean assignment, the softmax of
            -codebook_diversity_temperature |z - c_k| averaged over the samples and heads, at each position.
        codebook_diversity_temperature: what the logits are multiplied by there.
        stochastic_sample_codes: in training codes are drawn, with probability softmax(-|z - c_k| / T).
        sample_codebook_temp: T, in forward too; 0 takes the nearest code.
        straight_through: the output's gradient is straight-through; with route_gradients_to_input=False it is that of
            the mean of all codes under these probabilities. Turns rotation_trick off.
        rotation_trick: how the output's gradient reaches the input: turned and scaled as the input is onto its code
            (True), or as it is (False, straight-through). None: True if dim > 1, but for straight_through and
            directional_reparam.
        directional_reparam: DiVeQ (https://openreview.net/forum?id=KRVnpTbx7R): the output is z moved by |z - c_e|
            towards its code and noise of directional_reparam_variance; its gradient moves learnable codes, without a
            loss. Needs threshold_ema_dead_code.
        sync_codebook: the ranks of a `torch.distributed` job update with their joint batch and keep equal codes. None:
            whenever there is such a job. False: nothing is exchanged, each rank learns codes of its own.
        sync_affine_param: the statistics of affine_param are those of all ranks' batch.
        ema_update: the codes follow the averages; None: unless learnable_codebook. Forward's argument of this name
            overrides it. Without it the codes stay, except that dead ones are replaced.
        vq_bridge: a module that maps the codes [H, K, D] to those that are searched; the codes are learnable.
        manual_ema_update: steps move the averages, but the codes only when `_codebook.update_ema()` is called.
        learnable_codebook: the codes are a Parameter, moved by the gradient of the loss and not by averages. None: with
            directional_reparam or vq_bridge.
        in_place_codebook_optimizer: makes an optimizer of the codebook's parameters, which takes a step within forward,
            on the mean of (z - c_e)^2, before the batch is quantized.
        manual_in_place_optimizer_update: the step is taken only when `update_in_place_optimizer()` is called.
        affine_param: the codes that are searched are scaled and shifted to the mean and variance of the batches, which
            run with affine_param_batch_decay; those of the codes run with affine_param_codebook_decay.
        sync_update_v: the output's gradient counts 1 + this, equation (21) of
            https://minyoungg.github.io/vqtorch/assets/draft_050523.pdf; for learnable codes, in [0, 1].
        return_zeros_for_masked_padding: masked positions of the output are zeros; False: the input's values.
        route_gradients_to_input: False: no gradient of the output reaches the input, but for that of straight_through;
            it goes to the codes if they are learnable.
        codebook_loss_weight: of a loss of the learnable codes alone, so that the two terms have weights of their own:
            commitment_weight mean((z - sg(c_e))^2) + codebook_loss_weight mean((sg(z) - c_e)^2), sg without gradient.
            None: one term, whose gradient reaches both with commitment_weight. Not of vector-quantize-pytorch.

    decay, all weights, temperatures and variances, and `_codebook`'s threshold_ema_dead_code and affine decays may be
    set between steps, also of a compiled module, which stays one graph.

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
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        codebook_loss_weight: float | None = None,
    ):
        owner = type(self).__name__
        codebook_dim = dim if codebook_dim is None else codebook_dim
        if learnable_codebook is None:
            learnable_codebook = directional_reparam or vq_bridge is not None
        ema_update = not learnable_codebook if ema_update is None else ema_update
        if rotation_trick is None:
            rotation_trick = dim > 1 and not (directional_reparam or straight_through)
        numbers = {
            "commitment_weight": commitment_weight,
            "codebook_loss_weight": 0.0 if codebook_loss_weight is None else codebook_loss_weight,
            "orthogonal_reg_weight": orthogonal_reg_weight,
            "codebook_diversity_loss_weight": codebook_diversity_loss_weight,
            "codebook_diversity_temperature": codebook_diversity_temperature,
            "sample_codebook_temp": sample_codebook_temp,
            "directional_reparam_variance": directional_reparam_variance,
            "sync_update_v": sync_update_v,
        }
        numbers = {name: as_number(owner, name, value) for name, value in numbers.items()}
        check_not_negative(owner, **numbers)
        check_fraction(owner, sync_update_v=sync_update_v)
        threshold_ema_dead_code = as_number(owner, "threshold_ema_dead_code", threshold_ema_dead_code)
        counts = {"dim": dim, "codebook_size": codebook_size, "codebook_dim": codebook_dim, "heads": heads}
        if orthogonal_reg_max_codes is not None:
            counts["orthogonal_reg_max_codes"] = orthogonal_reg_max_codes
        check_counts(owner, **counts, kmeans_iters=kmeans_iters)
        check_not_negative(owner, eps=as_number(owner, "eps", eps))
        check_not_both(owner, use_cosine_sim=use_cosine_sim, learnable_codebook=learnable_codebook)
        check_not_both(owner, use_cosine_sim=use_cosine_sim, affine_param=affine_param)
        check_not_both(owner, ema_update=ema_update, learnable_codebook=learnable_codebook)
        check_not_both(owner, accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)
        check_not_both(
            owner,
            straight_through=straight_through,
            rotation_trick=rotation_trick,
            directional_reparam=directional_reparam,
        )
        check_not_both(owner, straight_through=straight_through, learnable_codebook=learnable_codebook)
        dead = "threshold_ema_dead_code above 0, or codes that are never near stay where they are"
        check_needs(owner, "directional_reparam", directional_reparam, dead, threshold_ema_dead_code > 0)
        for name, given in (
            ("vq_bridge", vq_bridge is not None),
            ("in_place_codebook_optimizer", in_place_codebook_optimizer is not None),
            ("sync_update_v", sync_update_v > 0),
            ("codebook_loss_weight", codebook_loss_weight is not None),
        ):
            check_needs(owner, name, given, "learnable_codebook=True", learnable_codebook)

        super().__init__()
        self.owner = owner  # for messages
        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.learnable_codebook = learnable_codebook
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.stochastic_sample_codes = stochastic_sample_codes
        self.straight_through = straight_through
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self.has_codebook_loss = codebook_loss_weight is not None
        self.numbers = Numbers(**numbers)

        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if self.has_projections:
            self.project_in, self.project_out = nn.Linear(dim, inner), nn.Linear(inner, dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        affine = {
            "sync_affine_param": sync_affine_param,
            "affine_param_batch_decay": affine_param_batch_decay,
            "affine_param_codebook_decay": affine_param_codebook_decay,
        }
        self._codebook = (AffineCodebook if affine_param else Codebook)(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            owner=owner,
            decay=as_number(owner, "decay", decay),
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
            moved_by_error=learnable_codebook and codebook_loss_weight is None,
            parameter=learnable_codebook or orthogonal_reg_weight > 0,
            vq_bridge=vq_bridge,
            **(affine if affine_param else {}),
        )
        make = in_place_codebook_optimizer
        self.in_place_codebook_optimizer = None if make is None else make(self._codebook.parameters())

    @property
    def codebook(self) -> Tensor:  # [K, D], or [heads, K, D] with separate_codebook_per_head
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != self.codebook.shape:
            raise ValueError(
                f"{self.owner}: codebook must have shape {list(self.codebook.shape)}, got {list(codes.shape)}"
            )
        self._codebook.set_(codes.view(self._codebook.embed.shape))

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def _layout(self) -> Layout:
        image = 2 if self.accept_image_fmap else 3 if self.accept_3d_fmap else None
        features_second = image is not None or not self.channel_last
        return Layout(self.owner, self.dim, self.heads, self.separate_codebook_per_head, features_second, image)

    def forward(
        self,
        x: Tensor,  # [b, ..., dim], or [b, dim, ...]
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: Tensor | float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: UpdateWeight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize x: (quantized, indices, loss). In training then update the codes.

        Arguments:
            x: float32, float64, float16 or bfloat16, in the axes that channel_last, accept_image_fmap and
                accept_3d_fmap say.
            indices: integers, shaped as returned. The result is then (quantized, the mean cross entropy of these codes)
                under the softmax of -|z - c_k|, for cosine of z.c_k; -1 is left out.
            mask: bool, shape of x without its feature axis; False leaves a vector out of everything.
            lens: [b] integers, for x [b, n, dim]: the mask that keeps the first lens[i] vectors of each sequence.
            topk: return the codes of the k nearest (at most 32) instead of one, for one head. Nothing is updated.
            sample_codebook_temp, freeze_codebook, ema_update: as in the constructor, for this call; a temperature that
                changes from call to call is best a 0-d tensor, which a compiled graph takes as it comes.
            return_loss_breakdown: a fourth value, LossBreakdown.
            codebook_transform_fn: makes codes of each vector's own [H, b, n, K, D] of the codes [H, K, D]: n positions
                of b samples, of b heads samples where heads share a codebook.
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
        layout = self._layout
        indices = self._check_call(layout, x, indices, topk, ema_update, ema_update_weight)
        mask = layout.mask(x, mask, lens)
        how = codebook_transform_fn, ema_update, ema_update_weight, accum_ema_update
        call = self._call(x, topk, sample_codebook_temp, freeze_codebook, *how)
        with self._kept_on_failure(call):
            positions = layout.positions(x)
            rows = layout.rows(x, self.project_in, mask)
            targets = None if indices is None else layout.index_rows(indices)
            found = self._quantize(rows, layout.mask_rows(mask), positions, call, targets)
            if topk is None:
                chosen = layout.indices_back(found.indices, positions)
                quantized = layout.rows_back(found.quantized, positions)
            else:
                quantized, chosen = (t.view(*positions, *t.shape[2:]) for t in (found.quantized, found.indices))
            # Without a projection masked rows are zero already.
            zeros, padded = self.return_zeros_for_masked_padding, mask
            if zeros and not self.has_projections:
                padded = None
            quantized = layout.output(self.project_out(quantized), padded, x, zeros)
            # Last, so that nothing that fails before it leaves a trace.
            if found.step is not None:
                take_steps_([found.step])
        if indices is not None:
            return quantized, found.loss
        results = quantized, chosen, found.loss
        return (*results, found.terms.breakdown()) if return_loss_breakdown else results

    def maybe_split_heads_from_input(self, x: Tensor) -> Tensor:
        """Vectors [b, n, heads * D] by head: [heads, b, n, D] for codebooks of their own, else [1, b * heads, n, D]."""
        if self.heads == 1:
            return x
        x = x.unflatten(-1, (self.heads, -1))
        return x.movedim(2, 0) if self.separate_codebook_per_head else x.movedim(2, 1).flatten(0, 1).unsqueeze(0)

    def extra_repr(self) -> str:
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return f"dim={self.dim}, codebook_size={self.codebook_size}{heads}"
