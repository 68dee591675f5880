"""VectorQuantize: a discrete bottleneck with an EMA codebook or a learnable one."""

from numbers import Integral

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_device, check_floating, check_indices
from vqops.quantizers.codebook import Codebook


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
        codebook_dim: features of a code; other than dim, it adds linear layers `project_in` and `project_out`.
        decay: of the moving averages, in [0, 1].
        eps: Laplace smoothing of the average counts.
        freeze_codebook: no update of the codes in training; forward's argument of this name overrides it.
        kmeans_init: the first batch decides the first codes, by k-means; without it they are random.
        kmeans_iters: iterations of that k-means.
        use_cosine_sim: the nearest code is the one of largest cosine; vectors and codes have norm 1.
        threshold_ema_dead_code: a code whose average count falls below this restarts from a random vector of the
            batch, with this count; 0 never.
        channel_last: the input is [b, ..., dim]; False: [b, dim, ...].
        accept_image_fmap: the input is [b, dim, h, w], whatever channel_last says.
        commitment_weight: weight of the loss.
        rotation_trick: how the output's gradient reaches the input: turned and scaled as the input is onto its code
            (True), or as it is (False, straight-through). None: True if dim > 1.
        learnable_codebook: the codes are a Parameter, moved by the gradient of the loss and not by averages.

    forward returns
        quantized: shape and dtype of the input (of the projection, if there is one).
        indices: int64, shape of the input without its feature axis; -1 for vectors with a NaN or Inf, whose quantized
            values and loss are NaN and which take no part in any update.
        loss: (), float32 (float64 for float64 input); 0 in eval and for an empty batch.

    In eval nothing is updated and no gradient reaches the input, but a first batch still initialises by k-means. An
    empty batch, or one without a finite vector on any rank, moves no average. In a `torch.distributed` job all ranks
    update with the joint batch and keep equal codes; all must call forward in training, in the same order.

    Raises TypeError or ValueError for arguments or inputs that don't fit, before anything is changed.

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
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        learnable_codebook: bool | None = None,
    ):
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        for name, value in (
            ("dim", dim),
            ("codebook_size", codebook_size),
            ("codebook_dim", codebook_dim),
            ("kmeans_iters", kmeans_iters),
        ):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"VectorQuantize: {name} must be an integer of at least 1, got {value!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"VectorQuantize: decay must be in [0, 1], got {decay}")
        for name, value in (
            ("eps", eps),
            ("threshold_ema_dead_code", threshold_ema_dead_code),
            ("commitment_weight", commitment_weight),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"VectorQuantize: {name} must be finite and at least 0, got {value}")
        if use_cosine_sim and learnable_codebook:
            raise ValueError("VectorQuantize: use_cosine_sim and learnable_codebook can't both be True")

        self.dim = dim
        self.codebook_size = codebook_size
        self.freeze_codebook = freeze_codebook
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.commitment_weight = commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.has_projections = codebook_dim != dim

        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable_codebook=bool(learnable_codebook),
        )

    @property
    def codebook(self) -> Tensor:  # [K, D]
        return self._codebook.embed.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != self.codebook.shape:
            raise ValueError(
                f"VectorQuantize: codebook must have shape {list(self.codebook.shape)}, got {list(codes.shape)}"
            )
        self._codebook.set_(codes.unsqueeze(0))

    def forward(self, x: Tensor, *, freeze_codebook: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        learning = self.training and not frozen
        self.check_input(x)
        if learning and self._codebook.collects:
            self.check_first_run()
        z = self.project_in(self.features_last(x))
        if not self.training:
            z = z.detach()
        rows = z.reshape(1, -1, z.shape[-1])  # [H, N, D]
        found = self._codebook(
            rows,
            gradient="rotation" if self.rotation_trick else "straight_through",
            learn=learning,
            collect=learning and self._codebook.collects,
        )
        quantized = self.features_back(self.project_out(found.quantized.view(z.shape)))
        loss = self.commitment_loss(found.error)
        # Last, so that nothing that fails before it leaves a trace.
        if learning and self._codebook.collects:
            self._codebook.update_(rows.detach(), found)
        return quantized, found.indices.view(z.shape[:-1]), loss

    def commitment_loss(self, error: Tensor) -> Tensor:  # error [H, N]
        if not self.training or self.commitment_weight == 0:
            loss = error.new_zeros(())
        else:
            values = error.numel() * self._codebook.embed.shape[-1]
            loss = error.sum() / max(values, 1) * self.commitment_weight
        # So that loss.backward() works with a frozen encoder too; a compiled graph can't return such a tensor.
        if self.training and not torch.compiler.is_compiling() and torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()
        return loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [b, ...]: [b, ..., D], or [b, D, ...] if the input is [b, dim, ...]. -1 gives zeros."""
        return self.features_back(self.codes_of(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returned as quantized with these indices, if the codes have not changed since. -1 gives zeros."""
        codes = self.codes_of(indices)
        if self.has_projections:
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
            codes = codes.masked_fill((indices < 0).unsqueeze(-1), 0)
        return self.features_back(codes)

    def codes_of(self, indices: Tensor) -> Tensor:
        check_indices("VectorQuantize", indices, self.codebook_size)
        codes = nn.functional.embedding(indices.clamp_min(0), self.codebook)
        return codes.masked_fill((indices < 0).unsqueeze(-1), 0)

    @property
    def features_second(self) -> bool:
        return self.accept_image_fmap or not self.channel_last

    def features_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.features_second else x

    def features_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self.features_second else x

    def check_input(self, x: Tensor) -> None:
        check_floating("VectorQuantize", x=x)
        if self.accept_image_fmap:
            layout, fits = "[b, dim, h, w]", x.dim() == 4
        elif not self.channel_last:
            layout, fits = "[b, dim, ...]", x.dim() >= 2
        else:
            layout, fits = "[b, ..., dim]", x.dim() >= 2
        if not fits or self.features_last(x).shape[-1] != self.dim:
            raise ValueError(f"VectorQuantize: x must be {layout} with dim={self.dim}, got {list(x.shape)}")
        check_device("VectorQuantize", x, codebook=self._codebook.embed)

    def check_first_run(self) -> None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "VectorQuantize: forward runs again inside backward (activation checkpointing), but the first run has "
                "updated the codebook already; leave the quantizer out of the checkpointed part, or freeze_codebook"
            )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}"
