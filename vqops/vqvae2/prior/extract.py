"""`vqops extract`: the codes of images, for a prior to learn."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from vqops.vqvae2.data.batches import middles, spread, validation_batches, window_of
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.labels import load_labels
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files.lock import locked
from vqops.vqvae2.files.run_folder import IMAGES, check_output, remove_unfinished, write_names, writing_in
from vqops.vqvae2.networks.checkpoint import fingerprint, load_model, model_path, reading_of, training_options
from vqops.vqvae2.networks.vqvae2 import VQVAE2, as_float
from vqops.vqvae2.pictures.grids import save_rows
from vqops.vqvae2.prior.code_folder import META, Codes, CodesMeta, difference, read_meta
from vqops.vqvae2.prior.options import ExtractOptions
from vqops.vqvae2.progress import Counting, say
from vqops.vqvae2.training.processes import pick_device

DECODED = "decoded.png"
NAMED_CLASSES = 10  # on screen
SAME_CODES = 0.9
MARK_EVERY = 5.0  # seconds between two notes of the progress


def extract(options: ExtractOptions) -> Path:
    """Write the codes of all images, at the middle crop that the model was validated on, and check 16 of them.

    A folder with the beginning of the same extraction is completed. Raises InputError for anything that cannot be used,
    before anything is written; and if the codes in the files do not decode to what the model makes of the images.
    """
    device = pick_device(options.device)
    path = model_path(options.run)
    model = load_model(options.run, device)
    if not model.config.discrete:
        reason = f" {model.config.bottleneck} has no codes to extract"
        raise InputError(f"{options.run}: a model with ", Field("bottleneck"), reason)
    images = load_images(options.data, options.data_key, reading=reading_of(path, model, options.skip_bad_images))
    for line in images.lines:
        say(line)
    labels, classes = load_labels(options.data, images, options.labels, options.label_key)
    say(f"labels: {classes_in_words(classes)}")
    image_size = training_options(path)["image_size"] if options.image_size is None else options.image_size
    window = window_of(images, image_size)
    checked = spread(len(images))
    pixels = middles(images, window, checked)
    meta = CodesMeta(
        images=len(images),
        done=0,
        image_shape=(model.config.image_channels, *window),
        codebook_size=model.config.codebook_size,
        levels=model.config.level_names,
        sizes=model.config.code_sizes(*window),
        model=fingerprint(path),
        data=options.data,
        data_sample=hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest(),
        transform=f"middle crop {window[0]} x {window[1]}, uint8 / 255",
        classes=classes,
    )
    with begun(options.out, meta, labels, images.used_names) as codes:
        if 0 < codes.meta.done < len(images):
            say(f"{options.out}: {codes.meta.done} of {len(images)} images are there, going on")
        codes = write_codes(codes, model, images, window, options, device)
        mse = check(codes, model, checked, pixels, device)
    shapes = ", ".join(f"{name} {h} x {w}" for name, (h, w) in zip(meta.levels, meta.sizes, strict=True))
    megabytes = sum(array.nbytes for array in codes.levels) / 1e6
    say(f"{len(images)} images, codes {shapes} of {meta.codebook_size}: {megabytes:.1f} MB in {options.out}")
    say(f"{len(checked)} images decoded from the files: mse {mse:.5f} to the originals")
    for name in reversed(meta.levels):
        say(f"next: vqops train-prior {options.out} --level {name} --out FOLDER")
    say(f"images over what their codes decode to: {options.out / DECODED}")
    return options.out


def classes_in_words(classes: tuple[str, ...]) -> str:
    if not classes:
        return "none"
    more = f", and {len(classes) - NAMED_CLASSES} more" if len(classes) > NAMED_CLASSES else ""
    return f"{len(classes)} classes ({', '.join(classes[:NAMED_CLASSES])}{more})"


@contextmanager
def begun(
    folder: Path, meta: CodesMeta, labels: np.ndarray | None, names: list[str] | None
) -> Iterator[Codes]:
    """The codes in the folder, or none so far, with other processes kept out of it.

    Raises InputError if it holds anything else.
    """
    check_begun(folder, meta)
    with writing_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check_begun(folder, meta)  # once more: another process may have been faster
        if not (folder / META).exists():
            with writing_in(folder):
                remove_unfinished(folder)
                write_names(folder / IMAGES, names)
                Codes.create(folder, meta, labels)
        with writing_in(folder):
            codes = Codes.open(folder, "r+")
        if labels is not None and (labels != codes.labels).any():
            raise InputError(f"{folder} holds codes of images with other labels: name another folder")
        yield codes


def check_begun(folder: Path, meta: CodesMeta) -> None:
    if not (folder / META).exists():
        check_output(folder, overwrite=folder.is_dir() and only_begun(folder, meta))
    elif different := difference(read_meta(folder), meta):
        raise InputError(f"{folder} holds other codes ({different}): name another folder")


def only_begun(folder: Path, meta: CodesMeta) -> bool:
    """Whether an extraction was killed here before it could write its meta.json."""
    own = {f"{name}.npy" for name in meta.levels} | {"labels.npy", IMAGES}
    return all(path.name in own or path.name.startswith(".") for path in folder.iterdir())


def write_codes(
    codes: Codes,
    model: VQVAE2,
    images: Images,
    window: tuple[int, int],
    options: ExtractOptions,
    device: torch.device,
) -> Codes:
    done = codes.meta.done
    rest = images.take(range(done, len(images)))
    marked = time.monotonic()
    with Counting("images", len(images), done) as counting:
        for pixels in validation_batches(rest, window, options.batch_size, options.num_workers):
            with torch.no_grad():
                indices = model.encode(as_float(pixels.to(device)))
            if any(bool((index < 0).any()) for index in indices):
                raise InputError(f"the model finds no code for images {done} to {done + len(pixels) - 1}: not finite")
            with writing_in(codes.folder):
                codes.write(done, indices)
            done += len(pixels)
            counting.reach(done)
            if done == len(images) or time.monotonic() - marked > MARK_EVERY:
                with writing_in(codes.folder):
                    codes, marked = codes.mark(done), time.monotonic()
    return codes


@torch.no_grad()
def check(codes: Codes, model: VQVAE2, checked: np.ndarray, pixels: torch.Tensor, device: torch.device) -> float:
    """Decode these images from the files, and draw some of them: their mean squared error, on [0, 1].

    Raises InputError if more than a tenth of their codes are not what the model finds now. A few may differ: a vector
    between two codes can fall to either in a batch of another size.
    """
    height, width = pixels.shape[-2:]
    images = as_float(pixels.to(device))
    read = tuple(index.to(device) for index in codes.read(checked))
    for name, there, here in zip(codes.meta.levels, read, model.encode(images), strict=True):
        if (same := (there == here).float().mean().item()) < SAME_CODES:
            raise InputError(
                f"{codes.folder}: the codes in the files are not those of the images ({name} level: {same:.0%} are "
                f"what the model finds): the files are damaged, extract them anew"
            )
    decoded = model.decode(read)[..., :height, :width].clamp(0, 1)
    with writing_in(codes.folder):
        save_rows(codes.folder / DECODED, {"images": pixels, "decoded": (decoded * 255).round().to(torch.uint8)})
    return (decoded - images).square().mean().item()
