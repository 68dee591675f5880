"""The options of the commands that measure: reconstruct, evaluate and compare."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.networks.vqvae2 import Bottleneck, SizeOptions
from vqops.vqvae2.options import Count, Device, Options, Positive, Run, Seed, needed
from vqops.vqvae2.prior.options import DrawingOptions
from vqops.vqvae2.training.options import ImageOptions


@dataclass(frozen=True)
class ReconstructOptions(Options):
    """Pass images through the codes of a trained model and write what comes back as PNG files."""

    run: Run
    images: tuple[Path, ...]
    """Image files of any size."""
    out: Path
    """Folder for the reconstructions. It must be empty or new."""

    def __post_init__(self):
        super().__post_init__()
        if not self.images:
            raise InputError("name at least one image file after the run")


@dataclass(frozen=True)
class EvaluateOptions(DrawingOptions):
    """Measure a trained model on images: error, use of the codes, what priors make of them, and samples beside them.

    Every number is written with its scale, range and split.
    """

    run: Run
    data: str
    """Images to measure on, as of `vqops train`; take some that the model was not trained on."""
    out: Path
    """Folder for evaluation.json, evaluation.md and pictures. It must be empty or new."""
    data_key: str | None = None
    """Array or column of the images."""
    label_key: str | None = None
    """What their labels, which --prior and --classifier-data use, are called in --data or --labels."""
    labels: Path | None = None
    """A file of their labels, as of `vqops extract`."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, count and name them."""
    prior: tuple[Path, ...] = ()
    """Priors of `vqops train-prior`, one a level: their likelihood of the codes of the images is measured, and with
    --classifier-data their samples are."""
    classifier_data: str | None = None
    """Labelled images, best those of the training: a small classifier learns from them as they are, another from their
    reconstructions, and (with --prior) one from samples, and each is tested on --data. In the features of the first,
    distance, precision and recall between each of these sets and --data; and which samples are near copies."""
    classifier_key: str | None = None
    """Array or column of these images."""
    classifier_label_key: str | None = None
    """What their labels are called."""
    classifier_labels: Path | None = None
    """A file of their labels."""
    classifier_steps: Count = 500
    """Training steps of each classifier, of 64 images."""
    classifier_images: Count = 2000
    """Images each classifier learns from; so many samples are drawn."""
    image_size: Count | None = None
    """Take the middle of each image, of this size (default: the crop size of the training)."""
    batch_size: Count = 64
    """Images at a time."""
    seed: Seed = 0
    """Seed of samples and classifiers."""
    device: Device = "auto"


@dataclass(frozen=True)
class CompareOptions(SizeOptions, ImageOptions):
    """Train one model a bottleneck on the same images and steps, and lay the results side by side."""

    out: Path | None = None
    """Folder for the runs, comparison.md and the pictures, needed without --resume. It must be empty or new."""
    label_key: str | None = None
    """What the labels of the validation images are called, for the picture of the latent space."""
    labels: Path | None = None
    """A file of these labels, as of `vqops extract`."""
    bottleneck: tuple[Bottleneck, ...] = ("none", "gaussian", "gumbel", "vq")
    """The bottlenecks to compare."""
    levels: Literal[1, 2, 3] = field(default=1, kw_only=True)
    """Levels of each model."""
    steps: Count = 1000
    """Training steps of each model."""
    batch_size: Count = 32
    """Images per step."""
    lr: Positive = 3e-4
    """Learning rate of Adam."""
    seed: Seed = 0
    """Seed of every model."""
    device: Device = "auto"
    resume: Path | None = None
    """Go on with the comparison in this folder, with its options: models that are there are kept, the one that was cut
    off goes on from its last checkpoint."""

    def __post_init__(self):
        super().__post_init__()
        needed(self, "out")
        if not self.bottleneck or len(set(self.bottleneck)) < len(self.bottleneck):
            allowed = f"at least one of {', '.join(get_args(Bottleneck))}, and different ones"
            raise InputError(Field("bottleneck"), f" must be {allowed}, got {' '.join(self.bottleneck)}")
