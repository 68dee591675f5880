"""The options of train. The docstring of a field is the help of its flag, as in all options."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.networks.vqvae2 import level_strides

DEVICE_PATTERN = re.compile(r"auto|cpu|mps|cuda(:\d+)?")

@dataclass(frozen=True)
class TrainOptions:
    """Train a VQ-VAE-2 on images and write its weights, metrics and pictures to a run folder.

    Raises InputError where a value is out of its range.
    """

    preset: Literal["photos", "cifar10", "fashion", "imagenet128", "ffhq256"] | None = None
    """Defaults that suit a kind of images; the flags and --config override them."""
    config: Path | None = None
    """A TOML file of options, such as the config.toml of a run; the flags override it."""
    data: str | None = None
    """Training images: a folder (searched recursively), a .npz or .npy file of uint8 images [N, H, W, C] or [N, H, W],
    a .parquet file, or the name of a Hugging Face dataset. Without it: photographs that come with scikit-image."""
    data_key: str | None = None
    """Array of the .npz, or column of the table, with the training images. Default: the only one that holds images."""
    val_data: str | None = None
    """Validation images, as --data; of a Hugging Face dataset its validation or test split. Without it: --val-key in
    --data, else 5 % of the training images are held out."""
    val_key: str | None = None
    """Array or column with the validation images, in --val-data if that is given, else in --data."""
    image_size: int = 64
    """Train on random crops of this size; images that are no larger are used whole."""
    levels: Literal[1, 2, 3] = 2
    """2 is VQ-VAE-2, 1 is VQ-VAE."""
    strides: tuple[int, ...] = ()
    """What a code covers along an axis, a number a level from the bottom up: pixels at the bottom, codes of the level
    below at each further level. Each is 2, 4, 8 or 16; images are padded to a multiple of their product."""
    bottleneck: Literal["vq", "none", "gaussian", "gumbel"] = "vq"
    """What stands between encoder and decoder at each level: vector quantization; nothing (an autoencoder); a Gaussian
    with a KL loss (a VAE); a Gumbel softmax over --codebook-size codes, cooling down (a discrete VAE)."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How the codes learn: moving averages of the vectors assigned to them, or the gradient of the codebook loss."""
    steps: int = 800
    """Training steps."""
    batch_size: int = 32
    """Images per step, of all processes together where torchrun starts several."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: as it is, or down to 0 at the last step along half a cosine."""
    warmup: int = 0
    """Steps over which the learning rate grows from 0."""
    grad_clip: float = 0.0
    """Scale the gradient down to this norm where it is longer; 0 for never."""
    weight_ema: float = 0.0
    """Decay of a moving average of the weights, which is then validated and saved in their place; 0 for none, 0.999 is
    usual for long runs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions. The codebooks are searched and updated in float32 with either."""
    seed: int = 0
    """Seed of the weights, the order of the images, their crops and the held-out part."""
    codebook_size: int = 512
    """Codes per level (K)."""
    code_dim: int = 64
    """Dimensions of a code (D)."""
    channels: int = 128
    """Channels of the convolutions, a multiple of 4."""
    decay: float = 0.99
    """Decay of the moving averages of --codebook ema."""
    commitment: float = 0.25
    """Weight of the loss that keeps the encoder near its codes (beta)."""
    eval_every: int = 100
    """Steps between two validations."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, from which --resume goes on; there is one at the end and after Ctrl-C, too."""
    num_workers: int = 0
    """Processes that load images; 0 loads them in the training process."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:N or mps."""
    out: Path | None = None
    """Run folder (default: runs/<date>-<n>). It must be empty or new."""
    overwrite: bool = False
    """Write into --out even if it holds files; those of an earlier run are replaced."""
    resume: Path | None = None
    """Go on with the run in this folder, with its options and from its last checkpoint. --steps may be given to
    lengthen it; what decides the weights cannot change."""

    def __post_init__(self):
        for name in ("image_size", "steps", "batch_size", "codebook_size", "code_dim"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_every", "checkpoint_every"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        require(self, "schedule", self.schedule in ("constant", "cosine"), "constant or cosine")
        require(self, "warmup", self.warmup >= 0, "at least 0")
        require(self, "grad_clip", 0 <= self.grad_clip < float("inf"), "at least 0")
        require(self, "weight_ema", 0 <= self.weight_ema < 1, "at least 0 and below 1")
        require(self, "precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16")
        require(self, "channels", self.channels >= 4 and self.channels % 4 == 0, "a positive multiple of 4")
        require(self, "num_workers", self.num_workers >= 0, "at least 0")
        require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        require(self, "lr", 0 < self.lr < float("inf"), "positive")
        require(self, "decay", 0 <= self.decay < 1, "at least 0 and below 1")
        require(self, "commitment", 0 <= self.commitment < float("inf"), "at least 0")
        require(self, "levels", self.levels in (1, 2, 3), "1, 2 or 3")
        level_strides(self.strides, self.levels)
        allowed = "vq, none, gaussian or gumbel"
        require(self, "bottleneck", self.bottleneck in ("vq", "none", "gaussian", "gumbel"), allowed)
        require(self, "codebook", self.codebook in ("ema", "gradient"), "ema or gradient")
        require(self, "device", DEVICE_PATTERN.fullmatch(self.device), "auto, cpu, cuda, cuda:N or mps")


def require(options: object, name: str, holds: object, *allowed: str) -> None:
    if not holds:
        raise InputError(Field(name), " must be ", *allowed, f", got {getattr(options, name)}")
