"""Labelled images beside their reconstructions and samples of the same classes: what a classifier makes of each set."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from vqops.vqvae2.data.batches import Batches
from vqops.vqvae2.evaluation.classifier import accuracies, trained
from vqops.vqvae2.evaluation.set_metrics import (
    Nearest,
    features,
    frechet_distance,
    nearest_images,
    precision_and_recall,
    share_near,
)
from vqops.vqvae2.pictures.grids import SHOWN_IMAGES, save_grid, save_rows

REAL, SAMPLES = "real", "samples"
SAMPLE_ROWS = 8


@dataclass(frozen=True)
class ImageSets:
    """Sets of as many images each, of the same classes in the same order, and real images that no one learned from.

    Of the latter all are there to test classifiers on, and at most as many as a set has to be measured against.
    """

    sets: dict[str, Tensor]  # uint8 [N, C, H, W]: real, reconstructions, and samples where there are priors
    labels: Tensor  # [N]
    classes: tuple[str, ...]
    training: Batches  # all images that the set of real ones is from
    tested: Batches  # all held-out images
    tested_labels: Tensor
    held_out: Tensor  # uint8 [M, C, H, W], M <= N
    held_out_reconstructions: Tensor  # [M, C, H, W]
    batch_size: int
    steps: int  # of each classifier, which sees 64 images in one
    seed: int

    def figures(self) -> dict[str, float]:
        scores = accuracies(self.classifiers, self.tested, self.tested_labels)
        found = {f"accuracy_{name}": value for name, value in scores.items()}
        reference = self.features_of(self.held_out)
        for name, images in self.sets.items():
            other = self.features_of(images[: len(reference)])
            found[f"frechet_{name}"] = frechet_distance(other, reference)
            precision, recall = precision_and_recall(reference, other)
            found |= {f"precision_{name}": precision, f"recall_{name}": recall}
        if self.drawn:
            # Both from the decoder: it blurs, and what is blurred is nearer to everything.
            unseen = nearest_images(self.held_out_reconstructions, self.training).distances
            samples = self.nearest_to_samples.distances
            found["near_samples"] = share_near(samples, unseen)
            found |= {"distance_samples": samples.median().item(), "distance_held_out": unseen.median().item()}
        return found

    @cached_property
    def classifiers(self) -> dict[str, nn.Sequential]:
        return {
            name: trained(name, images, self.labels, len(self.classes), self.steps, self.seed)
            for name, images in self.sets.items()
        }

    def features_of(self, images: Tensor) -> Tensor:
        return features(self.classifiers[REAL], images, self.batch_size)

    @cached_property
    def nearest_to_samples(self) -> Nearest:
        return nearest_images(self.sets[SAMPLES], self.training)

    def save_samples(self, path: Path) -> None:
        """The first samples of each class, a column a class; classes without any are left out."""
        columns = {name: torch.nonzero(self.labels == number).flatten() for number, name in enumerate(self.classes)}
        columns = {name: members for name, members in columns.items() if len(members)}
        rows = min(SAMPLE_ROWS, *map(len, columns.values()))
        shown = torch.stack([members[:rows] for members in columns.values()], dim=1).flatten()
        save_grid(path, self.sets[SAMPLES][shown], len(columns), list(columns))

    def save_copies(self, path: Path) -> None:
        """The samples that are nearest to a training image, over that image."""
        closest = self.nearest_to_samples.distances.argsort()[:SHOWN_IMAGES]
        nearest = self.nearest_to_samples.images[closest]
        save_rows(path, {"nearest samples": self.sets[SAMPLES][closest], "training image": nearest})

    @property
    def drawn(self) -> bool:
        """Whether there are samples."""
        return SAMPLES in self.sets
