"""The options of the commands that measure: reconstruct, evaluate and compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqops.vqvae2.errors import InputError
from vqops.vqvae2.networks.vqvae2 import level_strides
from vqops.vqvae2.training.options import DEVICE_PATTERN, require

Bottleneck = Literal["none", "gaussian", "gumbel", "vq"]


@dataclass(frozen=True)
class ReconstructOptions:
    """Pass images through the codes of a trained model and write what comes back as PNG files."""

    run: Path
    """The run folder of `vqops train`, or its model.safetensors."""
    images: tuple[Path, ...]
    """Image files of any size."""
    out: Path
    """Folder for the reconstructions. It must be empty or new."""

    def __post_init__(self):
        if not self.images:
            raise InputError("name at least one image file after the run")


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained model on images: error, use of the codes, and what priors and a classifier make of them.

    Every number is written with its scale, range and split.
    """

    run: Path
    """The run folder of `vqops train`, or its model.safetensors."""
    data: str
    """Images to measure on, as of `vqops train`; take some that the model was not trained on."""
    out: Path
    """Folder for evaluation.json, evaluation.md and pictures. It must be empty or new."""
    data_key: str | None = None
    """Array or column of the images."""
    label_key: str | None = None
    """Array or column of their labels, which --prior and --classifier-data use."""
    prior: tuple[Path, ...] = ()
    """Priors of `vqops train-prior`, one a level: their likelihood of the codes of the images is measured, and the
    classification accuracy score of their samples."""
    classifier_data: str | None = None
    """Labelled images for the classification accuracy score: a small classifier learns from them as they are, from
    their reconstructions, and (with --prior) from samples, and is tested on --data."""
    classifier_key: str | None = None
    """Array or column of these images."""
    classifier_label_key: str | None = None
    """Array or column of their labels."""
    classifier_steps: int = 500
    """Training steps of each classifier, of 64 images."""
    classifier_images: int = 2000
    """Images each classifier learns from; so many samples are drawn."""
    image_size: int | None = None
    """Take the middle of each image, of this size (default: the crop size of the training)."""
    batch_size: int = 64
    """Images at a time."""
    seed: int = 0
    """Seed of samples and classifiers."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        require(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        for name in ("classifier_steps", "classifier_images", "batch_size"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        require(self, "device", DEVICE_PATTERN.fullmatch(self.device), "auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class CompareOptions:
    """Train one model a bottleneck on the same images and steps, and lay the results side by side."""

    out: Path
    """Folder for the runs, comparison.md and the pictures. It must be empty or new."""
    data: str | None = None
    """Training images, as of `vqops train`."""
    data_key: str | None = None
    """Array or column of the training images."""
    val_data: str | None = None
    """Validation images; without them 5 % of the training images are held out."""
    val_key: str | None = None
    """Array or column of the validation images."""
    label_key: str | None = None
    """Array or column of the labels of the validation images, for the picture of the latent space."""
    bottleneck: tuple[Bottleneck, ...] = ("none", "gaussian", "gumbel", "vq")
    """The bottlenecks to compare."""
    levels: Literal[1, 2, 3] = 1
    """Levels of each model."""
    strides: tuple[int, ...] = ()
    """What a code covers along an axis at each level, as of `vqops train`."""
    steps: int = 1000
    """Training steps of each model."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    image_size: int = 64
    """Train on random crops of this size."""
    codebook_size: int = 512
    """Codes per level (K)."""
    code_dim: int = 64
    """Dimensions of a code, or of a latent (D)."""
    channels: int = 128
    """Channels of the convolutions."""
    seed: int = 0
    """Seed of every model."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        require(self, "bottleneck", self.bottleneck, "at least one of none, gaussian, gumbel, vq")
        require(self, "bottleneck", len(set(self.bottleneck)) == len(self.bottleneck), "different ones")
        level_strides(self.strides, self.levels)
