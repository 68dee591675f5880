"""The figures of a run: means over the steps since the last row, and how well the codes of each level are used."""

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.vqvae2.metrics import count_codes, perplexity
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config, as_float
from vqops.vqvae2.training.processes import mean_over_ranks, num_ranks, sum_over_ranks


class TrainingMeter:
    """Adds up the steps since the last row on the device, so that no step waits for it.

    In several processes a row is that of their joint batches.
    """

    def __init__(self, config: VQVAE2Config, device: torch.device):
        self.config, self.device = config, device
        self.restart()

    def restart(self) -> None:
        self.images = 0
        self.losses, self.counts = [], []  # a tensor a step: [2] loss and MSE, [levels, K]
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, loss: Tensor, mse: Tensor, indices: tuple[Tensor, ...], images: int) -> None:
        self.images += images
        self.losses.append(torch.stack([loss, mse]))
        if self.config.discrete:
            self.counts.append(torch.stack([count_codes(level, self.config.codebook_size) for level in indices]))

    def row(self) -> dict[str, float]:
        """Mean loss, MSE and batch perplexity; share of the codes used at least once; images per second. Restarts."""
        loss, mse = mean_over_ranks(torch.stack(self.losses).mean(0)).tolist()
        row = {"loss": loss, "mse": mse}
        if self.config.discrete:
            counts = sum_over_ranks(torch.stack(self.counts))  # [steps, levels, K]
            perplexities = torch.stack([torch.stack([perplexity(level) for level in step]) for step in counts])
            row |= per_level("perplexity", self.config, perplexities.mean(0).tolist())
            row |= per_level("used", self.config, (counts.sum(0) > 0).float().mean(1).tolist())
        row["images_per_second"] = self.images * num_ranks() / (time.perf_counter() - self.started)
        self.restart()
        return row


def per_level(name: str, config: VQVAE2Config, values: list[float]) -> dict[str, float]:
    return {f"{name}_{level}": value for level, value in zip(config.level_names, values, strict=True)}


@torch.no_grad()
def validate(model: VQVAE2, batches: Iterable[Tensor]) -> dict[str, float]:  # uint8 [B, C, H, W] each
    """MSE of the clamped reconstructions on [0, 1], and the use of the codes over the batches of all processes."""
    was_training = model.training
    model.eval()
    config, device = model.config, next(model.parameters()).device
    error, values = 0.0, 0
    counts = torch.zeros(config.levels, config.codebook_size, dtype=torch.int64, device=device)
    for pixels in batches:
        images = as_float(pixels.to(device))
        output = model(images)
        error += F.mse_loss(output.reconstruction.clamp(0, 1), images, reduction="sum").item()
        values += images.numel()
        for level, indices in enumerate(output.indices):
            counts[level] += count_codes(indices, config.codebook_size)
    model.train(was_training)
    counts = sum_over_ranks(counts)
    if num_ranks() > 1:
        error, values = sum_over_ranks(torch.tensor([error, values], dtype=torch.float64, device=device)).tolist()
    row = {"val_mse": error / values}
    if not config.discrete:
        return row
    row |= per_level("val_perplexity", config, [perplexity(level).item() for level in counts])
    return row | per_level("val_used", config, (counts > 0).float().mean(1).tolist())
