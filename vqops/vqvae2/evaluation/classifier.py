"""The classification accuracy score: how well a classifier that learned from other images names real ones.

Source: Ravuri and Vinyals 2019, arXiv:1905.10887. Theirs is a ResNet-50; this one is small, so scores compare only
with scores of this classifier, trained on as many images for as many steps.
"""

from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops.vqvae2.networks.vqvae2 import as_float
from vqops.vqvae2.progress import counted
from vqops.vqvae2.training.optimization import learning_rate, set_learning_rate

BATCH, PEAK_RATE = 64, 2e-3


def network(image_channels: int, classes: int) -> nn.Sequential:
    """Three convolutions at falling resolutions, the mean over the image, one linear layer."""
    layers, before = [], image_channels
    for channels in (32, 64, 128):
        layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def trained(name: str, images: Tensor, labels: Tensor, classes: int, steps: int, seed: int) -> nn.Sequential:
    """A classifier of uint8 images [N, C, H, W] with labels [N], on their device; images are flipped at random."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    classifier = network(images.shape[1], classes).to(images.device)
    optimizer = torch.optim.Adam(classifier.parameters())
    for step in counted(f"steps of a classifier of {name}", range(1, steps + 1)):
        set_learning_rate(optimizer, learning_rate(PEAK_RATE, "cosine", step, steps, warmup=steps // 10))
        chosen = torch.from_numpy(random.integers(0, len(images), BATCH)).to(images.device)
        batch = as_float(images[chosen])
        batch = batch.flip(3) if random.random() < 0.5 else batch
        optimizer.zero_grad()
        F.cross_entropy(classifier(batch - 0.5), labels[chosen]).backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def accuracies(
    classifiers: dict[str, nn.Module],
    batches: Collection[Tensor],  # uint8 [B, C, H, W] each
    labels: Tensor,  # [N]
) -> dict[str, float]:
    """The share of the images that each classifier names rightly."""
    right, seen = dict.fromkeys(classifiers, 0), 0
    for pixels in counted("batches classified", batches):
        truth = labels[seen : seen + len(pixels)]
        images = as_float(pixels.to(labels.device)) - 0.5
        for name, classifier in classifiers.items():
            right[name] += int((classifier(images).argmax(1) == truth).sum())
        seen += len(pixels)
    return {name: count / seen for name, count in right.items()}
