"""The codebook and its statistics: search, EMA update, k-means initialisation, replacement of dead codes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops.ops import Quantized, ema_update_, quantize
from vqops.ops.reference import TINY
from vqops.quantizers.kmeans import kmeans
from vqops.quantizers.ranks import num_ranks, sum_over_ranks
from vqops.quantizers.rows import random_rows


class Codebook(nn.Module):
    """H codebooks of K codes, as vectors [H, K, D] and as the running averages that the vectors are the ratio of.

    State: `embed` [H, K, D], the codes, a Parameter if learnable and else a buffer; `cluster_size` [H, K] and
    `embed_avg` [H, K, D], the moving averages of count and sum of the rows of each code; `initted` (), False until
    k-means has run. Buffers stay float32 through `.to(dtype)`, `.half()` and loading; a learnable `embed` follows them.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        use_cosine_sim: bool,
        threshold_ema_dead_code: float,
        learnable_codebook: bool,
    ):
        super().__init__()
        self.decay = decay
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.metric = "cosine" if use_cosine_sim else "euclidean"
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.learnable_codebook = learnable_codebook

        embed = nn.init.kaiming_uniform_(torch.empty(num_codebooks, codebook_size, dim, dtype=torch.float32))
        if use_cosine_sim:
            embed = F.normalize(embed, dim=-1, eps=TINY)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # `initted` for the host, which would have to wait for the device to read the buffer. False says "perhaps not".
        self.is_initted = not kmeans_init

    @property
    def collects(self) -> bool:
        """Whether a training step needs the counts and sums of its rows."""
        return not self.learnable_codebook or self.threshold_ema_dead_code > 0

    def forward(self, x: Tensor, *, gradient: str, learn: bool, collect: bool) -> Quantized:  # x [H, N, D]
        """Quantize. `learn`: the error's gradient reaches a learnable codebook; `collect`: count and add up the rows."""
        self.keep_float32_()
        if not self.is_initted:
            self.initialise_(x)
        learn = learn and self.learnable_codebook
        return quantize(
            x,
            self.embed if learn else self.embed.detach(),
            metric=self.metric,
            gradient=gradient,
            code_sums=collect,
            codebook_error_scale=float(learn),
        )

    @torch.no_grad()
    def initialise_(self, x: Tensor) -> None:
        """k-means on the first batch, unless `initted` says that the state came from elsewhere.

        A cluster without rows counts as one row: with 0 the first update would divide 0 by 0 + eps and send it to the
        origin. A first batch without one finite row leaves the codes as they were drawn at construction.
        """
        if x.shape[1] == 0 and num_ranks() == 1:
            return
        means, counts, total = kmeans(x, self.embed.shape[1], self.kmeans_iters, self.metric)
        counts = counts.clamp_min(1)
        take = (~self.initted & (total > 0)).unsqueeze(-1)
        self.cluster_size.copy_(counts.where(take, self.cluster_size))
        take = take.unsqueeze(-1)
        self.embed_avg.copy_((means * counts.unsqueeze(-1)).where(take, self.embed_avg))
        self.embed.copy_(means.where(take, self.embed))
        self.initted.fill_(True)
        self.is_initted = True

    @torch.no_grad()
    def update_(self, x: Tensor, found: Quantized) -> None:
        """Take a step's statistics of all ranks into the averages, the codes from the averages, and replace dead codes.

        If no rank has a valid row, the averages stay as they are: a batch of nothing, or of nothing but NaN, is no
        evidence that codes die. Everything that can fail comes before any change.
        """
        if x.shape[1] == 0 and num_ranks() == 1:
            return
        counts, sums = found.counts, found.sums
        if self.threshold_ema_dead_code > 0:
            rows = random_rows(x, found.indices >= 0, self.embed.shape[1])
            counts, sums, vectors = sum_over_ranks(counts, sums, rows.vectors, dtype=torch.float32)
        else:
            counts, sums = sum_over_ranks(counts, sums, dtype=torch.float32)
        step = (counts.sum(-1, keepdim=True) > 0).float().expand_as(counts)
        embed = None if self.learnable_codebook else self.embed
        ema_update_(
            self.cluster_size, self.embed_avg, embed, counts, sums, self.decay, self.eps, step, metric=self.metric
        )
        if self.threshold_ema_dead_code > 0:
            self.replace_dead_(vectors, rows.distinct)

    def replace_dead_(self, vectors: Tensor, usable: Tensor) -> None:  # [H, K, D], [H, K]
        """Where a code's average count is below the threshold, restart it from its vector, with that count."""
        threshold = float(self.threshold_ema_dead_code)
        if self.metric == "cosine":
            vectors = F.normalize(vectors, dim=-1, eps=TINY)
        dead = (self.cluster_size < threshold) & usable & vectors.isfinite().all(-1)
        self.cluster_size.masked_fill_(dead, threshold)
        dead = dead.unsqueeze(-1)
        self.embed_avg.copy_(torch.where(dead, vectors * threshold, self.embed_avg))
        self.embed.copy_(torch.where(dead, vectors.to(self.embed.dtype), self.embed))

    @torch.no_grad()
    def set_(self, codes: Tensor) -> None:  # [H, K, D]
        """Replace the codes, and with them the averages, which would otherwise pull them back in the next step."""
        self.embed.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.fill_(1)
        self.initted.fill_(True)
        self.is_initted = True

    def keep_float32_(self) -> None:
        """Undo casts that bypass `_apply`: an assigned state_dict, FSDP's buffer_dtype, DeepSpeed's zero.Init."""
        for name, buffer in self._buffers.items():
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                self._buffers[name] = buffer.float()

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self.keep_float32_()
        self.is_initted = not self.initted.is_meta and bool(self.initted)
