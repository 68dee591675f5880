"""The options of the commands that follow training: codes, priors, samples, completions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.options import (
    Check,
    Count,
    CountOrZero,
    Device,
    NotNegative,
    Options,
    Positive,
    Run,
    Seed,
    Share,
    needed,
)
from vqops.vqvae2.prior.transformer import TransformerOptions


@dataclass(frozen=True)
class ExtractOptions(Options):
    """Write the codes of images to memory-mapped arrays, for `vqops train-prior`. Cut off, it goes on where it was."""

    run: Run
    data: str
    """Images, as of `vqops train`. The labels of a folder's images are its subfolders, if each is in one."""
    out: Path
    """Folder for the codes: new, or with the beginning of the same extraction."""
    data_key: str | None = None
    """Array or column of the images."""
    label_key: str | None = None
    """What the labels, integers or names, are called in --data: an array of the .npz, a column of the table, of the
    labels.csv or metadata.csv in the folder, a field of the .tar, a key of CIFAR; or a column of --labels."""
    labels: Path | None = None
    """A file of labels: a .csv with a column of file names, an IDX file, a .npy, or a .npz with --label-key."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, count and name them."""
    image_size: Count | None = None
    """Take the middle of each image, of this size (default: the crop size of the training)."""
    batch_size: Count = 64
    """Images at a time."""
    num_workers: CountOrZero = 0
    """Processes that load images; 0 loads them in this one."""
    device: Device = "auto"


@dataclass(frozen=True)
class TrainPriorOptions(TransformerOptions):
    """Train a transformer on the codes of one level, which `vqops sample` then draws from.

    The top level's sees the class, if there are labels; those below it also see all levels above.
    """

    codes: Path
    """The folder of `vqops extract`."""
    level: Literal["top", "middle", "bottom"] | None = None
    """The level to learn, needed without --resume. Each has a prior of its own; with one level it is the bottom."""
    out: Path | None = None
    """Folder for the prior, needed without --resume. It must be empty or new."""
    steps: Count = 2000
    """Training steps at most."""
    batch_size: Count = 32
    """Images per step."""
    lr: Positive = 1e-3
    """Peak of the learning rate of AdamW, which then falls to 0 at the last step along half a cosine."""
    warmup: CountOrZero = 50
    """Steps over which the learning rate grows from 0."""
    weight_decay: NotNegative = 0.01
    """Of AdamW, for the matrices."""
    class_dropout: Share = 0.1
    """Share of the training images whose class is hidden, so that --guidance can compare with and without."""
    grad_clip: NotNegative = 1.0
    """Scale the gradient down to this norm where it is longer; 0 for never."""
    weight_ema: Share = 0.0
    """Decay of a moving average of the weights, which is then measured and kept in their place; 0 for none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrices in training."""
    eval_every: Count = 100
    """Steps between two measurements on the held-out codes. The best prior so far is what is kept."""
    patience: Count = 5
    """Stop after so many measurements in a row without a better one."""
    seed: Seed = 0
    """Seed of the weights, the order of the codes and the held-out part (5 %)."""
    device: Device = "auto"
    resume: Path | None = None
    """Go on with the prior in this folder, with its options and from its last measurement. --steps and --patience may
    be given to lengthen it; what decides the weights cannot change. The codes may lie elsewhere by now."""

    def __post_init__(self):
        super().__post_init__()
        needed(self, "level", "out")


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(Options):
    """How codes are drawn from a prior."""

    temperature: NotNegative = 1.0
    """Divides the logits: below 1 the likely codes become likelier. 0 takes the likeliest."""
    top_k: CountOrZero = 0
    """Draw from the k likeliest codes only; 0 for all."""
    top_p: Annotated[float, Check("above 0 and at most 1", lambda share: 0 < share <= 1)] = 1.0
    """Draw from the likeliest codes that together have at least this probability."""
    guidance: NotNegative = 1.0
    """How far the class moves the logits: 1 as learned, more for clearer and less varied images, 0 not at all."""

    @property
    def drawing(self) -> str:
        """In words, for figures that depend on it."""
        cut = f"{f'top-k {self.top_k}, ' if self.top_k else ''}top-p {self.top_p:g}"
        return f"temperature {self.temperature:g}, {cut}, guidance {self.guidance:g}"


@dataclass(frozen=True)
class DrawOptions(DrawingOptions):
    """Which images are drawn, and where they go."""

    run: Run
    prior: tuple[Path, ...]
    """The folders of `vqops train-prior`, one a level, in any order."""
    out: Path
    """Folder for the pictures. It must be empty or new."""
    classes: tuple[str, ...] = ()
    """Draw images of these classes, in turn; without it, of the classes as the priors learned them without one."""
    seed: Seed = 0
    """Seed of the draws."""
    batch_size: Count = 64
    """Images drawn at a time; it changes which images a seed gives."""
    device: Device = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not self.prior:
            raise InputError(Field("prior"), " names no folder: one of vqops train-prior for each level is needed")


@dataclass(frozen=True)
class SampleOptions(DrawOptions):
    """Draw codes from the priors, level after level, and decode them to images."""

    count: Count = 16
    """Images to draw."""


@dataclass(frozen=True)
class CompleteOptions(DrawOptions):
    """Keep the upper half of images and draw the codes of the lower half.

    The lower half is hidden from the encoder, too: it sees the upper half mirrored in its place.
    """

    images: tuple[Path, ...] = ()
    """Image files of the size that the priors were trained on; larger ones are cut to their middle."""
    count: Count = 3
    """Completions of each image."""

    def __post_init__(self):
        super().__post_init__()
        if not self.images:
            raise InputError(Field("images"), " names no image file")
