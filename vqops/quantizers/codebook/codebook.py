"""The codebook and its statistics: search, EMA update, k-means initialisation, replacement of dead codes."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from vqops.dispatch.calls import is_captured
from vqops.ops.checks import Gradient, check_device, check_floating
from vqops.ops.code_sums import code_sums
from vqops.ops.ema import move_averages_
from vqops.ops.quantize import Quantized
from vqops.quantizers.codebook.chosen import Chosen, quantize_chosen, with_gradient_to
from vqops.quantizers.codebook.kmeans import kmeans
from vqops.quantizers.codebook.preparation import KeptPreparation
from vqops.quantizers.codebook.random_rows import random_rows
from vqops.quantizers.codebook.ranks import num_ranks, of_fullest_rank, rank, sum_over_ranks
from vqops.quantizers.codebook.searched import RowCodes, SharedCodes
from vqops.quantizers.options.checks import check_fraction, check_not_negative
from vqops.quantizers.options.numbers import Number, Numbers
from vqops.reference import TINY

UpdateWeight = Tensor | Callable[[Tensor, Tensor], Tensor]


class Codebook(nn.Module):
    """H codebooks of K codes, as vectors [H, K, D] and as the running averages that the vectors are the ratio of.

    State: `embed` [H, K, D], the codes, a Parameter if `parameter` and else a buffer; `cluster_size` [H, K] and
    `embed_avg` [H, K, D], the moving averages of count and sum of the rows of each code; `initted` (), False until
    k-means has run. Buffers stay float32 through `.to(dtype)`, `.half()` and loading; a Parameter follows them.
    `owner` is the class that the user called, for messages.
    """

    decay = Number(check_fraction)
    threshold_ema_dead_code = Number(check_not_negative)

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        owner: str,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        sync_kmeans: bool,
        use_cosine_sim: bool,
        threshold_ema_dead_code: float,
        sync_codebook: bool,
        ema_update: bool,
        manual_ema_update: bool,
        learnable_codebook: bool,
        moved_by_error: bool,  # by the gradient of the error that `quantize` returns
        parameter: bool,
        vq_bridge: nn.Module | None,
    ):
        super().__init__()
        check_fraction(owner, decay=decay)
        check_not_negative(owner, threshold_ema_dead_code=threshold_ema_dead_code)
        self.owner = owner
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.numbers = Numbers(decay=decay, threshold_ema_dead_code=threshold_ema_dead_code)
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.sync_kmeans = sync_kmeans
        self.use_cosine_sim = use_cosine_sim
        self.metric = "cosine" if use_cosine_sim else "euclidean"
        self.sync = sync_codebook
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.learnable_codebook = learnable_codebook
        self.moved_by_error = moved_by_error
        self.vq_bridge = vq_bridge

        embed = nn.init.kaiming_uniform_(torch.empty(num_codebooks, codebook_size, dim, dtype=torch.float32))
        if use_cosine_sim:
            embed = F.normalize(embed, dim=-1, eps=TINY)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if parameter:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # `initted` for the host, which would have to wait for the device to read the buffer. False says "perhaps not".
        self.is_initted = not kmeans_init
        # Counts and sums of this rank that wait for the next update. No buffer, since DDP would send rank 0's to all.
        self.pending: tuple[Tensor, Tensor] | None = None
        self.preparation = KeptPreparation((num_codebooks, codebook_size, dim))

    @property
    def replaces_dead(self) -> bool:
        return self.numbers.positive["threshold_ema_dead_code"]

    def collects(self, ema_update: bool | None = None) -> bool:
        """Whether a training step needs the counts and sums of its rows."""
        return self.averages(ema_update) or self.replaces_dead

    def averages(self, ema_update: bool | None = None) -> bool:
        """Whether a training step moves the codes to their averages."""
        return self.ema_update if ema_update is None else ema_update

    def forward(
        self,
        x: Tensor,  # [H, N, D]
        searched: SharedCodes | RowCodes,
        mask: Tensor | None = None,  # [H, N] bool
        *,
        gradient: Gradient,
        learn: bool,
        collect: bool,
        temperature: Tensor | None = None,
    ) -> Quantized:
        """Quantize. `learn`: the error's gradient reaches a learnable codebook; `collect`: with counts and sums;
        `temperature`: to codes drawn with it instead of the nearest.

        With gradient "none", the gradient of quantized goes to the codes, if they have one.
        """
        if temperature is None:
            scale = float(learn and self.moved_by_error)
            collected = collect and isinstance(searched, SharedCodes)
            found = searched.quantize(x, mask, gradient, collected, scale)
        else:
            collected = False
            indices = searched.sample(x, temperature, self.seed(x), None, mask).unsqueeze(-1)
            codes = searched.at(indices)
            codes = codes if learn and self.moved_by_error else codes.detach()
            chosen = quantize_chosen(x, codes, indices, mask, self.metric, gradient)
            found = Quantized(*(t.squeeze(2) for t in chosen), x.new_empty(0), x.new_empty(0))
        if collect and not collected:
            _, counts, sums = self.statistics(x.detach(), found.indices)
            found = found._replace(counts=counts, sums=sums)
        if gradient != "none" or not (found.quantized.requires_grad or searched.codes.requires_grad):
            return found
        codes = searched.at(found.indices.unsqueeze(-1)).squeeze(2) if searched.codes.requires_grad else None
        return found._replace(quantized=with_gradient_to(codes, found.quantized))

    def topk(
        self,
        x: Tensor,  # [H, N, D]
        searched: SharedCodes | RowCodes,
        k: int,
        mask: Tensor | None,  # [H, N] bool
        *,
        gradient: Gradient,
        learn: bool,
        temperature: Tensor | None = None,
    ) -> Chosen:
        """Quantize to each of the k nearest codes, or to k different ones drawn with a temperature."""
        if temperature is None:
            indices = searched.topk(x, k, mask)
        else:
            indices = searched.sample(x, temperature, self.seed(x), k, mask)
        codes = searched.at(indices)
        of_error = codes if learn and self.moved_by_error else codes.detach()
        found = quantize_chosen(x, of_error, indices, mask, self.metric, gradient)
        return found if gradient != "none" else found._replace(quantized=with_gradient_to(codes, found.quantized))

    def seed(self, x: Tensor) -> Tensor:  # int64 [2]
        """A new one for each call, from the generator of the device; of each rank its own."""
        key = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) + rank(self.sync)
        return torch.cat([key, torch.zeros_like(key)])

    def codes(self, learn: bool) -> Tensor:  # [H, K, D]
        """The codes that are searched; `learn`: with their gradient, if they are a Parameter."""
        codes = self.embed if learn or not self.embed.requires_grad else self.embed.detach()
        if self.vq_bridge is None:
            return codes
        with torch.autocast(codes.device.type, enabled=False):
            codes = self.vq_bridge(codes.clone())  # what it keeps for its backward must not change
        return codes if learn else codes.detach()

    def searched(self, learn: bool, x: Tensor) -> SharedCodes:  # x [H, N, D]
        codes = self.codes(learn)
        # What a bridge makes may differ between threads that share this module.
        kept = None if learn or self.vq_bridge is not None else self.preparation.of(codes, self.metric, x)
        return SharedCodes(codes, self.metric, kept)

    def codes_at(self, indices: Tensor) -> Tensor:  # [H, N] -> [H, N, D], zeros for -1
        return SharedCodes(self.codes(True), self.metric).at(indices.unsqueeze(-1)).squeeze(2)

    def in_use(self, indices: Tensor) -> Tensor:  # [H, N] or [H, N, k] -> [H, K] bool
        """The codes that are among the indices."""
        used = torch.zeros(self.num_codebooks, self.codebook_size + 1, dtype=torch.bool, device=indices.device)
        return used.scatter_(1, indices.flatten(1).remainder(self.codebook_size + 1), True)[:, :-1]  # -1 is the last

    @property
    def observes(self) -> bool:
        """Whether a training step has something to learn from its rows before their search."""
        return False

    def observe_(self, x: Tensor, mask: Tensor | None) -> None:
        """Before the search of a training step, with its rows."""

    def ready_(self, x: Tensor, mask: Tensor | None) -> None:
        """Before a search: float32 buffers, and k-means if neither a batch nor a loaded state has decided the codes."""
        self.keep_float32_(numbers=self.training)  # eval asks for none
        if self.is_initted:
            return
        if is_captured(x.device):
            raise RuntimeError(
                f"{self.owner}: kmeans_init waits for a first batch, and a CUDA graph is being captured: call forward "
                "with one before"
            )
        if self.host_may_read():
            # Written in place or by a copy of the module, perhaps, and no rank may go on to a collective alone.
            self.is_initted = bool(self.initted)
            if self.is_initted or (not self.training and self.was_written()):
                return
            if not self.training and num_ranks(self.sync) > 1:
                raise RuntimeError(
                    f"{self.owner}: kmeans_init waits for a first batch in training, of all {num_ranks()} ranks; in "
                    "eval, where a rank may be alone, it would wait for the others"
                )
        self.initialise_(x, mask)

    def knows_its_codes(self) -> bool:
        """Whether a batch or a loaded state has decided the codes; in a compiled graph False may be True."""
        if not self.is_initted and self.host_may_read():
            self.is_initted = bool(self.initted)
        return self.is_initted

    def host_may_read(self) -> bool:
        return not (torch.compiler.is_compiling() or self.initted.is_meta or is_fake(self.initted))

    def was_written(self) -> bool:
        """Whether the codes are others than at construction, as in a copy that follows only the floats of a module."""
        drawn = (self.embed_avg.to(self.embed.dtype) == self.embed).all() & (self.cluster_size == 1).all()
        return not drawn

    @torch.no_grad()
    def initialise_(self, x: Tensor, mask: Tensor | None) -> None:
        """k-means on the first batch, unless `initted` says that the state came from elsewhere.

        A cluster without rows counts as one row: with 0 the first update would divide 0 by 0 + eps and send it to the
        origin. A first batch without one valid row leaves the codes as they were drawn at construction. Without
        sync_kmeans each rank takes its own batch, but all go on with what the one of most rows found.
        """
        if x.shape[1] == 0 and num_ranks(self.sync) == 1:
            return
        together = self.sync and self.sync_kmeans
        means, counts = kmeans(x, self.embed.shape[1], self.kmeans_iters, self.metric, mask, together)
        if num_ranks(self.sync) > 1 and not together:
            means, counts = of_fullest_rank(counts.sum(-1), means, counts)
        if self.host_may_read() and (rows := int(counts.sum(-1).min())) < self.codebook_size:
            warnings.warn(
                f"{self.owner}: k-means starts with {rows} vectors for codebook_size={self.codebook_size}: some codes "
                "are equal",
                stacklevel=2,
            )
        take = ~self.initted & (counts.sum(-1, keepdim=True) > 0)
        counts = counts.clamp_min(1)
        self.cluster_size.copy_(counts.where(take, self.cluster_size))
        take = take.unsqueeze(-1)
        self.embed_avg.copy_((means * counts.unsqueeze(-1)).where(take, self.embed_avg))
        self.embed.copy_(means.where(take, self.embed))
        self.initted.fill_(True)
        self.is_initted = True

    @contextmanager
    def restored_on_failure(self):
        """For a call that changes the state before all that can fail is done: the first, with its k-means."""
        before = {name: getattr(self, name).detach().clone() for name in ("embed", *self._buffers)}
        initted = self.is_initted
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for name, tensor in before.items():
                    getattr(self, name).copy_(tensor)
            self.is_initted = initted
            raise

    @torch.no_grad()
    def statistics(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # x [H, N, D], indices [H, N]
        """The statistics of `quantize` for the caller's indices: these without invalid rows, counts, sums."""
        indices = indices.masked_fill(~x.isfinite().all(-1), -1)
        rows = F.normalize(x.float(), dim=-1, eps=TINY) if self.metric == "cosine" else x
        return indices, *code_sums(rows, indices, self.embed.shape[1], heads=True)

    def average_(
        self, counts: Tensor, sums: Tensor, share: Tensor | None, to_codes: bool, decay: Tensor | None = None
    ) -> None:
        """Move the averages, each by its share of a step, and then the codes if `to_codes`."""
        decay = self.numbers.decay if decay is None else decay
        codes = self.embed
        embed = codes.float() if to_codes else None  # a Parameter may have been cast
        move_averages_(self.cluster_size, self.embed_avg, embed, counts, sums, decay, self.eps, share, self.metric)
        if embed is not None and embed is not codes:
            codes.copy_(embed)

    def as_codes(self, x: Tensor) -> Tensor:  # [H, N, D]
        """Rows where `embed` has its codes."""
        return x

    def sums_of_codes(self, counts: Tensor, sums: Tensor) -> Tensor:  # [H, K], [H, K, D]
        """The sums of rows `as_codes`."""
        return sums

    def check_update_weight(self, weight: Tensor) -> None:
        H, K = self.cluster_size.shape
        check_floating(self.owner, ema_update_weight=weight)
        check_device(self.owner, self.embed, ema_update_weight=weight)
        if tuple(weight.shape) not in ((K,), (H, K)):
            raise ValueError(
                f"{self.owner}: ema_update_weight must have shape [{K}] or [{H}, {K}], got {list(weight.shape)}"
            )

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to the ratio of their averages: the step that manual_ema_update leaves to its user."""
        if self.learnable_codebook:
            raise RuntimeError(f"{self.owner}: update_ema, but learnable_codebook is True: no averages move the codes")
        self.keep_float32_()
        nothing = torch.zeros_like(self.cluster_size), torch.zeros_like(self.embed_avg)
        self.average_(*nothing, None, True, decay=torch.ones_like(self.numbers.decay))

    @torch.no_grad()
    def expire_codes_(self, x: Tensor, mask: Tensor | None = None) -> None:  # x [H, N, D], mask [H, N] bool
        """Replace dead codes by random rows of the ranks' joint batch."""
        valid = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
        rows = random_rows(self.as_codes(x), valid, self.embed.shape[1], self.sync)
        (vectors,) = sum_over_ranks(rows.vectors, dtype=torch.float32, sync=self.sync)
        self.keep_float32_()
        self.replace_dead_(vectors, rows.distinct)

    def replace_dead_(self, vectors: Tensor, usable: Tensor) -> None:  # [H, K, D], [H, K]
        """Where a code's average count is below the threshold, restart it from its vector, with that count."""
        threshold = self.numbers["threshold_ema_dead_code"]
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
        self.pending = None

    def keep_float32_(self, numbers: bool = True) -> None:
        """Undo casts that bypass `_apply`: an assigned state_dict, FSDP's buffer_dtype, DeepSpeed's zero.Init."""
        if numbers:
            self.numbers.follow_(self.embed)
        for name, buffer in self._buffers.items():
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                self._buffers[name] = buffer.float()

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype != old.dtype:
                self._buffers[name] = old.to(self._buffers[name].device)
        self.preparation = KeptPreparation(self.preparation.shape)
        if self.pending is not None:
            self.pending = tuple(t.to(self.cluster_size.device) for t in self.pending)
        return self

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self.keep_float32_()
        self.is_initted = not self.initted.is_meta and bool(self.initted)
        self.pending = None
