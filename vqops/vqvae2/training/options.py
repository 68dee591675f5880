"""The options of `vqops train`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqops.vqvae2.networks.vqvae2 import NetworkOptions
from vqops.vqvae2.options import Count, CountOrZero, Device, Level, NotNegative, Options, Positive, Seed, Share


@dataclass(frozen=True)
class SourceOptions(Options):
    """Where options come from."""

    preset: Literal["photos", "cifar10", "fashion", "imagenet128", "ffhq256"] | None = None
    """Defaults that suit a kind of images; the flags and --config override them."""
    config: Path | None = None
    """A TOML file of options, such as the config.toml of a run; the flags override it."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Where images come from."""

    data: str | None = None
    """Training images: a folder (searched recursively), a .npz or .npy file of uint8 images [N, H, W, C] or [N, H, W],
    a .parquet or .tar file, an IDX file (MNIST), a CIFAR batch or folder, or the name of a Hugging Face dataset.
    Without it: photographs that come with scikit-image."""
    data_key: str | None = None
    """Array of the .npz, or column of the table, with the training images. Default: the only one that holds images."""
    val_data: str | None = None
    """Validation images, as --data; of a Hugging Face dataset its validation or test split. Without it: --val-key in
    --data, else 5 % of the training images are held out."""
    val_key: str | None = None
    """Array or column with the validation images, in --val-data if that is given, else in --data."""
    image_size: Count = 64
    """Train on random crops of this size; images that are no larger are used whole."""
    background: Level = 255
    """Grey level from 0 (black) to 255 (white) that transparent images are laid on."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, count and name them, instead of refusing to start. One that is lost later,
    while the run trains, is named, and the image after it takes its place."""


@dataclass(frozen=True)
class TrainOptions(NetworkOptions, ImageOptions, SourceOptions):
    """Train a VQ-VAE-2 on images and write its weights, metrics and pictures to a run folder.

    Raises InputError where a value is out of its range.
    """

    steps: Count = 800
    """Training steps."""
    batch_size: Count = 32
    """Images per step, of all processes together where torchrun starts several."""
    lr: Positive = 3e-4
    """Learning rate of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: as it is, or down to 0 at the last step along half a cosine."""
    warmup: CountOrZero = 0
    """Steps over which the learning rate grows from 0."""
    grad_clip: NotNegative = 0.0
    """Scale the gradient down to this norm where it is longer; 0 for never."""
    weight_ema: Share = 0.0
    """Decay of a moving average of the weights, which is then validated and saved in their place; 0 for none, 0.999 is
    usual for long runs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions. The codebooks are searched and updated in float32 with either."""
    seed: Seed = 0
    """Seed of the weights, the order of the images, their crops and the held-out part."""
    eval_every: Count = 100
    """Steps between two validations."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints, from which --resume goes on; there is one at the end, too, and after
    Ctrl-C, SIGTERM or SIGUSR1."""
    num_workers: CountOrZero = 0
    """Processes that load images; 0 loads them in the training process."""
    device: Device = "auto"
    out: Path | None = None
    """Run folder (default: runs/<date>-<n>). It must be empty or new."""
    overwrite: bool = False
    """Write into --out even if it holds files; those of an earlier run are replaced."""
    resume: Path | None = None
    """Go on with the run in this folder, with its options and from its last checkpoint. --steps may be given to
    lengthen it; what decides the weights cannot change. The run and its --data may lie elsewhere by now."""
