"""A codebook that is scaled and shifted to the mean and variance of the batches, feature by feature."""

import torch
from torch import Tensor

from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.codebook.ranks import sum_over_ranks
from vqops.quantizers.options.checks import check_fraction
from vqops.quantizers.options.numbers import Number, Numbers

LEAST_VARIANCE = 1e-5


class AffineCodebook(Codebook):
    """The codes that are searched are (c - mean of codes) (std of batches / std of codes) + mean of batches.

    State besides: the running `batch_mean`, `batch_variance`, `codebook_mean`, `codebook_variance` [H, 1, D], and
    `codebook_mean_needs_init`, `codebook_variance_needs_init` (), True until the first training step, up to which the
    codes are searched as they are. Source: https://minyoungg.github.io/vqtorch/assets/draft_050523.pdf, section 4.1.
    """

    affine_param_batch_decay = Number(check_fraction)
    affine_param_codebook_decay = Number(check_fraction)

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        sync_affine_param: bool,
        affine_param_batch_decay: float,
        affine_param_codebook_decay: float,
        **options,
    ):
        super().__init__(dim, codebook_size, num_codebooks, **options)
        decays = {
            "affine_param_batch_decay": affine_param_batch_decay,
            "affine_param_codebook_decay": affine_param_codebook_decay,
        }
        check_fraction(self.owner, **decays)
        self.numbers = Numbers(**self.numbers.values, **decays)
        self.sync_affine_param = sync_affine_param
        for source in ("batch", "codebook"):
            self.register_buffer(f"{source}_mean", torch.zeros(num_codebooks, 1, dim, dtype=torch.float32))
            self.register_buffer(f"{source}_variance", torch.ones(num_codebooks, 1, dim, dtype=torch.float32))
        self.register_buffer("codebook_mean_needs_init", torch.tensor(True))
        self.register_buffer("codebook_variance_needs_init", torch.tensor(True))

    @property
    def observes(self) -> bool:
        return True

    @property
    def scale(self) -> Tensor:  # [H, 1, D]
        """Of the batches to that of the codes."""
        batch, codes = (v.clamp_min(LEAST_VARIANCE).sqrt() for v in (self.batch_variance, self.codebook_variance))
        return codes / batch

    def codes(self, learn: bool) -> Tensor:
        return (super().codes(learn) - self.codebook_mean) / self.scale + self.batch_mean

    def as_codes(self, x: Tensor) -> Tensor:
        return (x.float() - self.batch_mean) * self.scale + self.codebook_mean

    def sums_of_codes(self, counts: Tensor, sums: Tensor) -> Tensor:
        n = counts.unsqueeze(-1).float()
        return (sums - n * self.batch_mean) * self.scale + n * self.codebook_mean

    @torch.no_grad()
    def observe_(self, x: Tensor, mask: Tensor | None) -> None:
        valid = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
        mean, variance, count = moments(x, valid, self.sync and self.sync_affine_param)
        codes = self.embed.detach().float()
        every = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device)
        of_codes = moments(codes, every, False)[:2]
        there = (count > 0) & mean.isfinite().all(-1, True) & variance.isfinite().all(-1, True)
        decay = self.numbers["affine_param_codebook_decay"]
        self.follow_("codebook_mean", of_codes[0], decay, True)
        self.follow_("codebook_variance", of_codes[1], decay, True)
        decay = self.numbers["affine_param_batch_decay"]
        self.follow_("batch_mean", mean, decay, there)
        self.follow_("batch_variance", variance, decay, there)
        for flag in (self.codebook_mean_needs_init, self.codebook_variance_needs_init):
            flag.logical_and_(~there.all())

    def follow_(self, name: str, value: Tensor, decay: Tensor, there: Tensor | bool) -> None:
        """A step of a moving average, which starts at its first value."""
        buffer = getattr(self, name)
        moved = torch.where(self.codebook_mean_needs_init, value, decay * buffer + (1 - decay) * value)
        buffer.copy_(moved if there is True else torch.where(there, moved, buffer))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Before the first step vector-quantize-pytorch has no statistics of batches.
        if not self.codebook_mean_needs_init.is_meta and self.codebook_mean_needs_init:
            for name in ("batch_mean", "batch_variance"):
                del destination[prefix + name]

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        if (like := state_dict.get(prefix + "codebook_mean")) is not None:
            start = {"batch_mean": torch.zeros_like(like), "batch_variance": torch.ones_like(like)}
            state_dict = {prefix + name: value for name, value in start.items()} | state_dict
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def moments(x: Tensor, valid: Tensor, sync: bool) -> tuple[Tensor, Tensor, Tensor]:  # [H, N, D], [H, N] bool
    """Mean and variance [H, 1, D] of the valid rows and their number [H, 1, 1]; with `sync` those of all ranks."""
    x, n = x.float().masked_fill(~valid.unsqueeze(-1), 0), valid.sum(1).view(-1, 1, 1)
    total, n = sum_over_ranks(x.sum(1, keepdim=True), n, dtype=torch.float32, sync=sync)
    mean = total / n.clamp_min(1)
    gap = (x - mean).masked_fill(~valid.unsqueeze(-1), 0)
    (squares,) = sum_over_ranks(gap.square().sum(1, keepdim=True), dtype=torch.float32, sync=sync)
    return mean, squares / n.clamp_min(1), n
