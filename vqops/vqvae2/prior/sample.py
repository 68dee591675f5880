"""`vqops sample` and `vqops complete`: images from the priors of all levels."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vqops.vqvae2.data.batches import middles
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.survey import of_files
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files.run_folder import check_output, writing_in
from vqops.vqvae2.networks.checkpoint import fingerprint, load_model, model_path, reading_of
from vqops.vqvae2.networks.vqvae2 import VQVAE2, as_float
from vqops.vqvae2.pictures.grids import save_grid, write_png
from vqops.vqvae2.prior.checkpoint import load_priors
from vqops.vqvae2.prior.options import CompleteOptions, DrawOptions, SampleOptions
from vqops.vqvae2.prior.sampling import draw_levels
from vqops.vqvae2.prior.transformer import Prior
from vqops.vqvae2.progress import Counting, say
from vqops.vqvae2.training.processes import pick_device

GRID, GRID_ROWS, GRID_COLUMNS = "grid.png", 8, 8


class Generation:
    """A model, its priors and a random generator: what draws images."""

    def __init__(self, options: DrawOptions):
        self.options = options
        self.device = pick_device(options.device)
        self.model = load_model(options.run, self.device)
        model = fingerprint(model_path(options.run))
        self.priors, self.image_size = load_priors(options.prior, model, self.model.config, self.device)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.codes, self.seconds = 0, 0.0

    def labels(self, count: int) -> Tensor:  # [count]
        """The classes asked for, in turn; raises InputError for one that the priors do not know."""
        return torch.tensor(class_numbers(self.priors[0], self.options.classes, count), device=self.device)

    @torch.no_grad()
    def draw(self, labels: Tensor, given: tuple[Tensor, ...] | None = None) -> Tensor:
        """Images uint8 [B, C, H, W], on the CPU; with `given`, the first rows of codes of each level are these."""
        started = time.perf_counter()
        codes = draw_levels(self.priors, labels, self.options, self.generator, given)
        self.codes += sum(level.numel() for level in codes)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started
        return decoded(self.model, codes, self.image_size).cpu()

    @property
    def speed(self) -> str:
        return f"{self.codes} codes in {self.seconds:.1f} s: {self.codes / self.seconds:.0f} codes/s"


def sample(options: SampleOptions) -> None:
    """Draw images and write each, and a grid of the first 8 rows of them, as PNG files.

    On the CPU the same options give the same images. Raises InputError for anything that cannot be used, before
    anything is written.
    """
    check_output(options.out)
    generation = Generation(options)
    labels = generation.labels(options.count)
    columns = columns_for(options.classes)
    done, shown = 0, []
    with Counting("images", options.count) as counting:
        for part in labels.split(options.batch_size):
            images = generation.draw(part)
            names = [f"{done + n:05}{suffix(generation.priors[0], label)}" for n, label in enumerate(part.tolist())]
            write_images(options.out, names, images)
            shown.append(images[: max(columns * GRID_ROWS - done, 0)].clone())  # no view, which would keep them all
            done += len(part)
            counting.reach(done)
    heads = [options.classes[column % len(options.classes)] for column in range(columns)] if options.classes else []
    write_grid(options.out, torch.cat(shown), columns, heads)
    say(f"{done} images in {options.out}; {generation.speed}")
    priors = " ".join(map(str, options.prior))
    say(f"next: vqops complete {options.run} --prior {priors} --images IMAGES... --out FOLDER")
    say(f"{'a column a class' if options.classes else 'the images'}: {options.out / GRID}")


def complete(options: CompleteOptions) -> None:
    """Draw the lower half of images, as often as asked, and write the completions and a grid of them.

    A row of the grid is the image, what is kept of it, and its completions, 8 at most of the first 8 images. Raises
    InputError for anything that cannot be used, before anything is written.
    """
    check_output(options.out)
    if len(options.classes) > 1:
        reason = f" names {len(options.classes)} classes: the images are completed as one, or as none"
        raise InputError(Field("classes"), reason)
    names = [f"{path.stem}-{number}" for path in options.images for number in range(options.count)]
    if len(set(names)) < len(names):
        raise InputError(Field("images"), " names two files of one name: rename one")
    generation = Generation(options)
    images = read_images(options, generation)
    label, shown = generation.labels(1), []
    with Counting("completions", len(names)) as counting:
        for part in batched(range(len(names)), options.batch_size):
            first = part[0] // options.count
            pixels = middles(images, generation.image_size, range(first, part[-1] // options.count + 1))
            of = torch.tensor(part) // options.count - first  # the image that each of them completes
            given = upper_codes(generation.model, pixels.to(generation.device))
            given = tuple(codes[of.to(codes.device)] for codes in given)
            completions = generation.draw(label.expand(len(part)), given)
            write_images(options.out, [names[number] for number in part], completions)
            kept = pixels.clone()
            kept[:, :, kept_rows(generation.model, pixels) :] = 255
            for number, place, completion in zip(part, of.tolist(), completions, strict=True):
                row, column = divmod(number, options.count)
                if row < GRID_ROWS and column < GRID_COLUMNS:
                    shown += [pixels[place], kept[place]] if column == 0 else []
                    shown.append(completion.clone())  # no view, which would keep them all
            counting.reach(part[-1] + 1)
    heads = ["image", "kept", *["completion"] * min(options.count, GRID_COLUMNS)]
    write_grid(options.out, torch.stack(shown), len(heads), heads)
    say(f"{len(names)} completions in {options.out}; {generation.speed}")
    say(f"next: vqops evaluate {options.run} --data PATH --out FOLDER")
    say(f"images, what is kept of them, completions: {options.out / GRID}")


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


def read_images(options: CompleteOptions, generation: Generation) -> Images:
    """Raises InputError for one that cannot be read or is smaller than the images that the priors draw."""
    size = generation.image_size
    images = of_files(options.images, reading_of(model_path(options.run), generation.model))
    say(images.report)
    for path, image in zip(options.images, images, strict=True):
        height, width = image.shape[:2]
        if height < size[0] or width < size[1]:
            raise InputError(f"{path} is {width} x {height}, at least {size[1]} x {size[0]} is needed")
    return images


def batched(numbers: range, size: int) -> list[range]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


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


def columns_for(classes: tuple[str, ...]) -> int:
    """8 or fewer, or as many as there are classes: a column is of one class."""
    return GRID_COLUMNS if not classes else len(classes) * max(GRID_COLUMNS // len(classes), 1)


def write_grid(folder: Path, images: Tensor, columns: int, heads: list[str]) -> None:  # uint8 [B, C, H, W]
    with writing_in(folder):
        save_grid(folder / GRID, images, columns, heads)
