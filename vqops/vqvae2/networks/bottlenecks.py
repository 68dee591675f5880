"""Bottlenecks between encoder and decoder: nothing, a Gaussian, a relaxed categorical, or vector quantization.

Each is a module from features [B, C, h, w] to (z [B, D, h, w], indices [B, h, w] or None, loss []), where C is its
`in_channels(D, K)`; the steps that led to the VQ-VAE can so be compared in one network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops.quantizers.codebook.ranks import num_ranks, sum_over_ranks

# KL divergences are weighed as beside 4 x MSE on [0, 1] with a decoder of variance 0.005, near the error reached on
# small photographs: 4 mse + 8 x 0.005 KL is the negative ELBO of a Gaussian decoder, per value and times 0.04.
KL_WEIGHT = 0.04
FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.5
# So that a softmax over the logits, once normalised, can be sure of a code.
LOGIT_SCALE = 8.0
VARIANCE_FLOOR = 1e-10  # logits of the first step have a variance near 1e-4
STATISTICS_WEIGHT = 0.1  # of a batch, in the averages for eval


class Plain(nn.Module):
    """An autoencoder: z are the features."""

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        return x, None, x.new_zeros(())


class Gaussian(nn.Module):
    """A variational autoencoder: z ~ N(mean, variance), KL to N(0, 1). Source: Kingma and Welling 2014, 1312.6114.

    In eval z is the mean. `rate` is the KL in nats an image of the last forward pass.
    """

    def __init__(self, image_values: int):
        super().__init__()
        self.image_values, self.rate = image_values, torch.zeros(())

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:  # [B, 2 D, h, w]
        mean, log_variance = x.chunk(2, dim=1)
        log_variance = log_variance.clamp(-14, 14)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / len(x)
        self.rate = kl.detach()
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return z, None, KL_WEIGHT * kl / self.image_values


class Gumbel(nn.Module):
    """A discrete VAE: a softmax over K codes with Gumbel noise, ever colder; KL to the uniform distribution.

    In eval the likeliest code. With `normalised` logits each code's have mean 0 and standard deviation LOGIT_SCALE over
    the batch; in eval, over the last batches. As they come from the encoder their means differ from code to code by far
    more than one code's logits from place to place, so that one code is the likeliest everywhere, and those that are
    chosen get ahead. Sources: Jang et al. 2017 (arXiv:1611.01144); Ioffe and Szegedy 2015 (arXiv:1502.03167).
    """

    def __init__(self, code_dim: int, codebook_size: int, image_values: int, normalised: bool = True):
        super().__init__()
        self.codes = nn.Embedding(codebook_size, code_dim)
        self.image_values, self.temperature = image_values, FIRST_TEMPERATURE
        self.normalised = normalised
        if normalised:
            self.register_buffer("mean", torch.zeros(codebook_size))
            self.register_buffer("variance", torch.zeros(codebook_size))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def anneal(self, progress: float) -> None:
        """The temperature falls exponentially over the training, `progress` from 0 to 1."""
        self.temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** progress

    @property
    def codebook(self) -> Tensor:  # [K, D]
        return self.codes.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # logits [B, K, h, w]
        x = self.normalise(x) if self.normalised else x
        indices = x.argmax(1)
        log_share = F.log_softmax(x, dim=1)
        uniform = torch.log(torch.tensor(float(x.shape[1]), device=x.device))
        kl = ((log_share.exp() * log_share).sum(1) + uniform).sum() / len(x)
        if not self.training:
            return self.get_codes_from_indices(indices), indices, KL_WEIGHT * kl / self.image_values
        weights = F.gumbel_softmax(x, tau=self.temperature, dim=1)
        z = torch.einsum("bkhw,kd->bdhw", weights, self.codes.weight)
        return z, indices, KL_WEIGHT * kl / self.image_values

    def normalise(self, x: Tensor) -> Tensor:  # [B, K, h, w]
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            self.follow(mean.detach(), variance.detach())
        scale = LOGIT_SCALE * torch.rsqrt(variance + VARIANCE_FLOOR)
        return (x - mean[:, None, None]) * scale[:, None, None]

    @torch.no_grad()
    def follow(self, mean: Tensor, variance: Tensor) -> None:  # [K] each, of a batch
        """Average over processes and the last batches, so that all processes hold the same."""
        self.batches += 1
        weight = torch.clamp(1 / self.batches, min=STATISTICS_WEIGHT)
        mean, variance = sum_over_ranks(mean, variance, dtype=torch.float32)
        self.mean.lerp_(mean / num_ranks(), weight)
        self.variance.lerp_(variance / num_ranks(), weight)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:  # [B, h, w]; [B, D, h, w]
        return self.codes(indices).movedim(-1, 1)


def in_channels(bottleneck: str, code_dim: int, codebook_size: int) -> int:
    return {"gaussian": 2 * code_dim, "gumbel": codebook_size}.get(bottleneck, code_dim)
