"""`vqops sample` and `vqops complete`: images from the priors of all levels."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vqops.vqvae2.data.batches import middles
from vqops.vqvae2.data.images import EncodedImage, Images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files.run_folder import check_output, writing_in
from vqops.vqvae2.networks.checkpoint import fingerprint, load_model, model_path
from vqops.vqvae2.networks.vqvae2 import VQVAE2, as_float
from vqops.vqvae2.pictures.grids import save_grid, write_png
from vqops.vqvae2.prior.checkpoint import load_priors
from vqops.vqvae2.prior.options import CompleteOptions, DrawOptions, SampleOptions
from vqops.vqvae2.prior.sampling import draw_levels
from vqops.vqvae2.prior.transformer import Prior
from vqops.vqvae2.progress import say
from vqops.vqvae2.training.processes import pick_device

GRID, GRID_COLUMNS = "grid.png", 8


class Generation:
    """A model, its priors and a random generator: what draws images."""

    def __init__(self, options: DrawOptions):
        self.options = options
        self.device = pick_device(options.device)
        self.model = load_model(options.run, self.device)
        levels = self.model.config.level_names
        self.priors, about = load_priors(options.prior, fingerprint(model_path(options.run)), levels, self.device)
        self.image_size: tuple[int, int] = tuple(about["image_shape"][1:])
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.codes, self.seconds = 0, 0.0

    def labels(self, count: int) -> Tensor:  # [count]
        """The classes asked for, in turn; raises InputError for one that the priors do not know."""
        return torch.tensor(class_numbers(self.priors[0], self.options.classes, count), device=self.device)

    @torch.no_grad()
    def draw(self, labels: Tensor, given: tuple[Tensor, ...] | None = None) -> Tensor:
        """Images uint8 [B, C, H, W]; with `given`, the first rows of codes of each level are these."""
        started = time.perf_counter()
        codes = draw_levels(self.priors, labels, self.options, self.generator, given)
        self.codes += sum(level.numel() for level in codes)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started
        return decoded(self.model, codes, self.image_size)

    @property
    def speed(self) -> str:
        return f"{self.codes} codes in {self.seconds:.1f} s: {self.codes / self.seconds:.0f} codes/s"


def sample(options: SampleOptions) -> None:
    """Draw images and write each, and a grid of them, as PNG files.

    On the CPU the same options give the same images. Raises InputError for anything that cannot be used, before
    anything is written.
    """
    check_output(options.out)
    generation = Generation(options)
    labels = generation.labels(options.count)
    images = torch.cat([generation.draw(part) for part in labels.split(options.batch_size)]).cpu()
    names = [f"{number:05}{suffix(generation.priors[0], label)}" for number, label in enumerate(labels.tolist())]
    write_images(options.out, names, images)
    columns = max(GRID_COLUMNS, len(options.classes))
    save_grid(options.out / GRID, images[: columns * GRID_COLUMNS], columns)
    say(f"{len(images)} images and {options.out / GRID}; {generation.speed}")
    priors = " ".join(map(str, options.prior))
    say(f"next: vqops complete {options.run} --prior {priors} --images IMAGES... --out FOLDER")


def complete(options: CompleteOptions) -> None:
    """Draw the lower half of images, as often as asked, and write the completions and a grid of them.

    A row of the grid is the image, what is kept of it, and its completions. Raises InputError for anything that cannot
    be used, before anything is written.
    """
    check_output(options.out)
    if len(options.classes) > 1:
        reason = f" names {len(options.classes)} classes: the images are completed as one, or as none"
        raise InputError(Field("classes"), reason)
    names = [f"{path.stem}-{number}" for path in options.images for number in range(options.count)]
    if len(set(names)) < len(names):
        raise InputError(Field("images"), " names two files of one name: rename one")
    generation = Generation(options)
    pixels = read_images(options.images, generation.model.config.image_channels, generation.image_size)
    given = upper_codes(generation.model, pixels.to(generation.device))
    labels = generation.labels(1).expand(len(pixels) * options.count)
    given = tuple(codes.repeat_interleave(options.count, dim=0) for codes in given)
    parts = zip(labels.split(options.batch_size), *(codes.split(options.batch_size) for codes in given), strict=True)
    completions = torch.cat([generation.draw(part, tuple(codes)) for part, *codes in parts]).cpu()
    kept = pixels.clone()
    kept[:, :, kept_rows(generation.model, pixels) :] = 255
    rows = [
        torch.cat([pixels[number, None], kept[number, None], completions[number * options.count :][: options.count]])
        for number in range(len(pixels))
    ]
    write_images(options.out, names, completions)
    save_grid(options.out / GRID, torch.cat(rows), options.count + 2)
    say(f"{len(completions)} completions and {options.out / GRID}; {generation.speed}")
    say(f"next: vqops evaluate {options.run} --data PATH --out FOLDER")


def class_numbers(prior: Prior, classes: Sequence[str], count: int) -> list[int]:
    if not classes:
        return [prior.no_class] * count
    known = prior.config.classes
    for name in classes:
        if name not in known:
            allowed = f"only {', '.join(known)}" if known else "they were trained on codes without labels"
            raise InputError(Field("classes"), f" {name}: the priors do not know it, {allowed}")
    return [known.index(classes[number % len(classes)]) for number in range(count)]


def suffix(prior: Prior, label: int) -> str:
    if label == prior.no_class:
        return ""
    return "-" + "".join(letter if letter.isalnum() else "_" for letter in prior.config.classes[label])


def decoded(model: VQVAE2, codes: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:  # uint8 [B, C, *size]
    images = model.decode(codes)[..., : size[0], : size[1]]
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def read_images(paths: Sequence[Path], channels: int, size: tuple[int, int]) -> Tensor:  # uint8 [B, C, *size]
    images = Images.of_encoded([EncodedImage.of_file(path) for path in paths], channels)
    for path, number in zip(paths, range(len(images)), strict=True):
        if images[number].shape[0] < size[0] or images[number].shape[1] < size[1]:
            raise InputError(f"{path} is {images[number].shape[1]} x {images[number].shape[0]}, at least "
                             f"{size[1]} x {size[0]} is needed")  # fmt: skip
    return middles(images, size, range(len(images)))


def kept_rows(model: VQVAE2, pixels: Tensor) -> int:
    """Rows of pixels that whole rows of top codes cover, half of them; raises InputError if there is only one."""
    height, width = pixels.shape[-2:]
    rows, stride = model.config.code_sizes(height, width)[-1][0], model.config.pixels_per_code[-1]
    if rows == 1:
        raise InputError(
            Field("images"),
            f": the top level has one row of codes, each over {stride} rows of pixels, "
            f"for images of {height} x {width}: no half can be kept",
        )
    return rows // 2 * stride


@torch.no_grad()
def upper_codes(model: VQVAE2, pixels: Tensor) -> tuple[Tensor, ...]:  # uint8 [B, C, H, W]; per level [B, rows, w]
    """The codes of the upper half, of an image that holds nothing else: the lower half is its mirror image."""
    rows = kept_rows(model, pixels)
    height = pixels.shape[-2]
    mirrored = torch.cat([pixels[:, :, :rows], pixels[:, :, :rows].flip(2)], dim=2)
    while mirrored.shape[2] < height:
        mirrored = torch.cat([mirrored, mirrored.flip(2)], dim=2)
    codes = model.encode(as_float(mirrored[:, :, :height]))
    return tuple(index[:, : rows // pixels] for index, pixels in zip(codes, model.config.pixels_per_code, strict=True))


def write_images(folder: Path, names: list[str], images: Tensor) -> None:  # uint8 [B, C, H, W]
    with writing_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in zip(names, images, strict=True):
            write_png(folder / f"{name}.png", image.permute(1, 2, 0).numpy())
