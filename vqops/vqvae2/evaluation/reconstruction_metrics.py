"""How good reconstructions are, and how many bits they pass: on [0, 1], clamped, whole images."""

import math
from collections.abc import Collection

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from vqops.vqvae2.metrics import count_codes, perplexity, psnr
from vqops.vqvae2.networks.bottlenecks import Gaussian
from vqops.vqvae2.networks.vqvae2 import VQVAE2, as_float
from vqops.vqvae2.progress import counted

SSIM_WINDOW = 7  # pixels; structural_similarity's usual one


@torch.no_grad()
def measure(model: VQVAE2, batches: Collection[Tensor]) -> dict[str, float]:  # uint8 [B, C, H, W] each
    """MSE, PSNR, SSIM, bits per dimension, and for codes the perplexity and share used of each level.

    PSNR is that of the mean squared error over all values. SSIM is scikit-image's with a uniform 7 x 7 window, averaged
    over channels and images, NaN for images smaller than the window. Bits per dimension: of codes the log2 K that each
    takes without a prior, of "gaussian" the KL, of "none" NaN.
    """
    config, device = model.eval().config, next(model.parameters()).device
    error, similarity, values, images_seen, nats = 0.0, 0.0, 0, 0, 0.0
    counts = torch.zeros(config.levels, config.codebook_size, dtype=torch.int64, device=device)
    for pixels in counted("batches measured", batches):
        images = as_float(pixels.to(device))
        output = model(images)
        reconstructions = output.reconstruction.clamp(0, 1)
        error += (reconstructions - images).double().square().sum().item()
        values += images.numel()
        images_seen += len(images)
        similarity += sum(map(ssim, images.cpu().numpy(), reconstructions.cpu().numpy()))
        for level, indices in enumerate(output.indices):
            counts[level] += count_codes(indices, config.codebook_size)
            nats += indices.numel() * math.log(config.codebook_size)
        if config.bottleneck == "gaussian":
            nats += sum(module.rate.item() for module in model.quantizers if isinstance(module, Gaussian)) * len(images)
    mse = error / values
    row = {"images": images_seen, "mse": mse, "psnr": psnr(mse), "ssim": similarity / images_seen}
    row["bits_per_dim"] = nats / math.log(2) / values if config.bottleneck != "none" else math.nan
    for name, level in zip(config.level_names if config.discrete else (), counts, strict=False):
        row |= {f"perplexity_{name}": perplexity(level).item(), f"codes_used_{name}": int((level > 0).sum())}
    return row


def ssim(image: np.ndarray, other: np.ndarray) -> float:  # [C, H, W] in [0, 1]
    if min(image.shape[1:]) < SSIM_WINDOW:
        return math.nan
    return float(structural_similarity(image, other, win_size=SSIM_WINDOW, channel_axis=0, data_range=1.0))
