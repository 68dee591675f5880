"""The figures of a run: means over the steps since the last row, and how well the codes of each level are used."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops.quantizers.codebook.ranks import num_ranks, sum_over_ranks
from vqops.vqvae2.metrics import count_codes, perplexity
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config, as_float


class Meter:
    """Adds up the steps since the last row on the device, so that no step waits for it.

    In several processes a row is that of their joint batches.
    """

    def __init__(self, *names: str):
        self.names = names
        self.restart()

    def restart(self) -> None:
        self.images = 0
        self.values = []  # a tensor a step: [len(names)]
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, images: int, *values: Tensor) -> None:
        self.images += images
        self.values.append(torch.stack([value.detach() for value in values]))

    def figures(self) -> dict[str, float]:
        (total,) = sum_over_ranks(torch.stack(self.values).mean(0), dtype=torch.float32)
        return dict(zip(self.names, (total / num_ranks()).tolist(), strict=True))

    def row(self) -> dict[str, float]:
        """The means, and images per second. Restarts."""
        row = self.figures()
        row["images_per_second"] = self.images * num_ranks() / (time.perf_counter() - self.started)
        self.restart()
        return row


class CodeMeter(Meter):
    """Measures also the mean perplexity of a batch, and the share of the codes used at least once."""

    def __init__(self, config: VQVAE2Config, *names: str):
        self.config = config
        super().__init__(*names)

    def restart(self) -> None:
        super().restart()
        self.counts = []  # a tensor a step: [levels, K]

    @torch.no_grad()
    def add_codes(self, indices: tuple[Tensor, ...]) -> None:
        if self.config.discrete:
            self.counts.append(torch.stack([count_codes(level, self.config.codebook_size) for level in indices]))

    def figures(self) -> dict[str, float]:
        row = super().figures()
        if self.config.discrete:
            (counts,) = sum_over_ranks(torch.stack(self.counts), dtype=torch.int64)  # [steps, levels, K]
            perplexities = torch.stack([torch.stack([perplexity(level) for level in step]) for step in counts])
            row |= per_level("perplexity", self.config, perplexities.mean(0).tolist())
            row |= per_level("used", self.config, (counts.sum(0) > 0).float().mean(1).tolist())
        return row


def per_level(name: str, config: VQVAE2Config, values: list[float]) -> dict[str, float]:
    return {f"{name}_{level}": value for level, value in zip(config.level_names, values, strict=True)}


@torch.no_grad()
def validate(model: VQVAE2, batches: Iterable[Tensor]) -> dict[str, float]:  # uint8 [B, C, H, W] each
    """MSE of the clamped reconstructions on [0, 1], and the use of the codes over the batches of all processes."""
    with evaluating(model):
        error, values, counts = sums_of(model, batches)
    config = model.config
    if num_ranks() > 1:
        (counts,) = sum_over_ranks(counts, dtype=torch.int64)
        sums = torch.tensor([error, values], dtype=torch.float64, device=counts.device)
        error, values = sum_over_ranks(sums, dtype=torch.float64)[0].tolist()
    row = {"val_mse": error / values}
    if not config.discrete:
        return row
    row |= per_level("val_perplexity", config, [perplexity(level).item() for level in counts])
    return row | per_level("val_used", config, (counts > 0).float().mean(1).tolist())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def sums_of(model: VQVAE2, batches: Iterable[Tensor]) -> tuple[float, int, Tensor]:
    """Sum of the squared errors, how many values they are of, and how often each code was used [levels, K]."""
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
    return error, values, counts
