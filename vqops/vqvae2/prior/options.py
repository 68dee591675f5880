"""The options of the commands that follow training: codes, priors, samples, completions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.training.options import DEVICE_PATTERN, require


@dataclass(frozen=True)
class ExtractOptions:
    """Write the codes of images to memory-mapped arrays, for `vqops train-prior`. Cut off, it goes on where it was."""

    run: Path
    """The run folder of `vqops train`, or its model.safetensors."""
    data: str
    """Images, as of `vqops train`. The labels of a folder's images are its subfolders, if each is in one."""
    out: Path
    """Folder for the codes: new, or with the beginning of the same extraction."""
    data_key: str | None = None
    """Array or column of the images."""
    label_key: str | None = None
    """Array of the .npz, or column of the .parquet file, with the labels: integers or names."""
    image_size: int | None = None
    """Take the middle of each image, of this size (default: the crop size of the training)."""
    batch_size: int = 64
    """Images at a time."""
    num_workers: int = 0
    """Processes that load images; 0 loads them in this one."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        require(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        require(self, "batch_size", self.batch_size >= 1, "at least 1")
        require(self, "num_workers", self.num_workers >= 0, "at least 0")
        require(self, "device", DEVICE_PATTERN.fullmatch(self.device), "auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class TrainPriorOptions:
    """Train a transformer on the codes of one level, which `vqops sample` then draws from.

    The top level's sees the class, if there are labels; those below it also see all levels above.
    """

    codes: Path
    """The folder of `vqops extract`."""
    level: Literal["top", "middle", "bottom"]
    """The level to learn. Each has a prior of its own; with one level it is the bottom."""
    out: Path
    """Folder for the prior. It must be empty or new."""
    steps: int = 2000
    """Training steps at most."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Peak of the learning rate of AdamW, which then falls to 0 at the last step along half a cosine."""
    warmup: int = 50
    """Steps over which the learning rate grows from 0."""
    weight_decay: float = 0.01
    """Of AdamW, for the matrices."""
    width: int = 192
    """Width of the transformer, a multiple of twice --heads."""
    layers: int = 4
    """Layers of the transformer."""
    heads: int = 4
    """Attention heads of a layer."""
    dropout: float = 0.1
    """Share of activations set to 0 in training."""
    class_dropout: float = 0.1
    """Share of the training images whose class is hidden, so that --guidance can compare with and without."""
    grad_clip: float = 1.0
    """Scale the gradient down to this norm where it is longer; 0 for never."""
    eval_every: int = 100
    """Steps between two measurements on the held-out codes. The best prior so far is what is kept."""
    patience: int = 5
    """Stop after so many measurements in a row without a better one."""
    seed: int = 0
    """Seed of the weights, the order of the codes and the held-out part (5 %)."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "width", "layers", "heads", "eval_every", "patience"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        allowed = "a multiple of twice ", Field("heads"), f" {self.heads}"
        require(self, "width", self.width % (2 * self.heads) == 0, *allowed)
        require(self, "lr", 0 < self.lr < float("inf"), "positive")
        for name in ("warmup", "weight_decay", "grad_clip"):
            require(self, name, 0 <= getattr(self, name) < float("inf"), "at least 0")
        for name in ("dropout", "class_dropout"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        require(self, "level", self.level in ("top", "middle", "bottom"), "top, middle or bottom")
        require(self, "device", DEVICE_PATTERN.fullmatch(self.device), "auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class DrawOptions:
    """How codes are drawn from a prior."""

    run: Path
    """The run folder of `vqops train`, or its model.safetensors."""
    prior: tuple[Path, ...]
    """The folders of `vqops train-prior`, one a level, in any order."""
    out: Path
    """Folder for the pictures. It must be empty or new."""
    classes: tuple[str, ...] = ()
    """Draw images of these classes, in turn; without it, of the classes as the priors learned them without one."""
    temperature: float = 1.0
    """Divides the logits: below 1 the likely codes become likelier. 0 takes the likeliest."""
    top_k: int = 0
    """Draw from the k likeliest codes only; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest codes that together have at least this probability."""
    guidance: float = 1.0
    """How far the class moves the logits: 1 as learned, more for clearer and less varied images, 0 not at all."""
    seed: int = 0
    """Seed of the draws."""
    batch_size: int = 64
    """Images drawn at a time; it changes which images a seed gives."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        if not self.prior:
            raise InputError(Field("prior"), " names no folder: one of vqops train-prior for each level is needed")
        require(self, "temperature", 0 <= self.temperature < float("inf"), "at least 0")
        require(self, "top_k", self.top_k >= 0, "at least 0")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require(self, "guidance", 0 <= self.guidance < float("inf"), "at least 0")
        require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        require(self, "batch_size", self.batch_size >= 1, "at least 1")
        require(self, "device", DEVICE_PATTERN.fullmatch(self.device), "auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class SampleOptions(DrawOptions):
    """Draw codes from the priors, level after level, and decode them to images."""

    count: int = 16
    """Images to draw."""

    def __post_init__(self):
        super().__post_init__()
        require(self, "count", self.count >= 1, "at least 1")


@dataclass(frozen=True)
class CompleteOptions(DrawOptions):
    """Keep the upper half of images and draw the codes of the lower half.

    The lower half is hidden from the encoder, too: it sees the upper half mirrored in its place.
    """

    images: tuple[Path, ...] = ()
    """Image files of the size that the priors were trained on; larger ones are cut to their middle."""
    count: int = 3
    """Completions of each image."""

    def __post_init__(self):
        super().__post_init__()
        if not self.images:
            raise InputError(Field("images"), " names no image file")
        require(self, "count", self.count >= 1, "at least 1")
