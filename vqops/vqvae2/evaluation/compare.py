"""`vqops compare`: one model a bottleneck, on the same images and budget."""

import json
import math
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from vqops.vqvae2.data.batches import Batches, validation_batches, window_of
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.labels import load_labels
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.evaluation.options import CompareOptions
from vqops.vqvae2.evaluation.reconstruction_metrics import measure
from vqops.vqvae2.files.config_file import PLACES, TRANSIENT, write_config
from vqops.vqvae2.files.descriptions import of_type, parsed, shortened
from vqops.vqvae2.files.lock import locked
from vqops.vqvae2.files.run_folder import (
    CONFIG,
    NOT_LISTED,
    RECONSTRUCTIONS,
    TRAIN_STATE,
    check_output,
    read_listed,
    read_rows,
    write_listed,
    write_text,
    writing_in,
)
from vqops.vqvae2.networks.checkpoint import load_model
from vqops.vqvae2.networks.vqvae2 import VQVAE2
from vqops.vqvae2.options import values_for
from vqops.vqvae2.pictures.grids import SHOWN_IMAGES, save_rows
from vqops.vqvae2.pictures.latents import Seen, save_codes, save_index_maps, save_latents
from vqops.vqvae2.progress import Progress, say
from vqops.vqvae2.training.images import Data, data_flags, identity, load_data
from vqops.vqvae2.training.interruption import interruption
from vqops.vqvae2.training.options import TrainOptions
from vqops.vqvae2.training.resume import continued, read_state
from vqops.vqvae2.training.train import train_run

MAY_CHANGE = ("skip_bad_images", "device", "out", *PLACES, *TRANSIENT)
SECONDS = "seconds.json"

NAMES = {
    "none": "autoencoder",
    "gaussian": "VAE",
    "gumbel": "discrete VAE (Gumbel)",
    "vq": "VQ-VAE",
}


def compare(options: CompareOptions) -> Path:
    """Train a model for each bottleneck and write a Markdown table and pictures of all of them.

    Ctrl-C, SIGTERM and SIGUSR1 end it with a checkpoint of the training at hand. Raises InputError for anything that
    cannot be used.
    """
    options = continued(options, "compare", MAY_CHANGE) if options.resume else options
    if not options.resume:
        check_output(options.out)
    base = training_options(options)
    listed = read_listed(options.out) if options.resume else NOT_LISTED
    data = load_data(base, Progress(0), listed)
    labels, classes = labels_of(data.held_out, options)
    window = window_of(data.training, base.image_size)
    batches = validation_batches(data.held_out, window, base.batch_size, num_workers=0)
    with writing_in(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    with locked(options.out):
        if not options.resume:
            check_output(options.out)  # once more: another process may have been faster
        for run in [options.out / bottleneck for bottleneck in options.bottleneck]:
            if is_done(run, options):
                read_state(run / TRAIN_STATE, identity(data, window))  # raises for other data
        if listed == NOT_LISTED:
            write_listed(options.out, data.listed)
        write_config(options.out, options)
        if train_all(options, base, data):
            lay_side_by_side(options, batches, labels, classes)
    return options.out


def labels_of(held_out: Images, options: CompareOptions) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Those that the options ask for."""
    if options.label_key is None and options.labels is None:
        return None, ()
    if options.data is None:
        raise InputError(Field("label_key"), " and ", Field("labels"), " need ", Field("data"))
    return load_labels(options.val_data or options.data, held_out, options.labels, options.label_key)


def train_all(options: CompareOptions, base: TrainOptions, data: Data) -> bool:
    """Train the models that are not there yet, and note the seconds of each; False if a signal ended it."""
    go_on = f"vqops compare --resume {shlex.quote(str(options.out))}"
    with interruption() as interrupted:
        for bottleneck in options.bottleneck:
            run = options.out / bottleneck
            if is_done(run, options):
                continue
            there = {"resume": run, "out": None} if (run / CONFIG).is_file() else {"out": run, "overwrite": True}
            started = time.perf_counter()
            train_run(replace(base, bottleneck=bottleneck, **there), go_on, data)
            with writing_in(options.out):
                add_seconds(options.out, bottleneck, time.perf_counter() - started)
            if interrupted.is_set():
                if is_done(run, options):  # then it has not said so
                    say(f"interrupted by {interrupted.cause}; go on: {go_on}")
                return False
    return True


def is_done(run: Path, options: CompareOptions) -> bool:
    rows = read_rows(run)
    return bool(rows) and rows[-1]["step"] >= options.steps and (run / RECONSTRUCTIONS).exists()


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds of training by bottleneck, without those of processes that were killed."""
    path = folder / SECONDS
    try:
        seconds = parsed(path.read_text()) if path.exists() else {}
    except (InputError, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as seconds of training ({error})") from error
    if not all(of_type(value, float) for value in seconds.values()):
        raise InputError(f"{path} must hold seconds of training, got {shortened(seconds)}")
    return seconds


def add_seconds(folder: Path, bottleneck: str, seconds: float) -> None:
    before = seconds_of(folder)
    write_text(folder / SECONDS, json.dumps(before | {bottleneck: before.get(bottleneck, 0) + seconds}) + "\n")


def lay_side_by_side(
    options: CompareOptions, batches: Batches, labels: np.ndarray | None, classes: tuple[str, ...]
) -> None:
    """Measure all models and write the table and the pictures."""
    rows, models, seconds = {}, {}, seconds_of(options.out)
    for bottleneck in options.bottleneck:
        models[bottleneck] = load_model(options.out / bottleneck)
        rows[bottleneck] = measure(models[bottleneck], batches) | {"seconds": seconds.get(bottleneck, math.nan)}
        seen = Seen(models[bottleneck], batches)
        with writing_in(options.out):
            save_latents(options.out / f"latents_{bottleneck}.png", seen, labels, classes)
            if bottleneck == "vq":
                save_codes(options.out / "codes.png", seen)
                save_index_maps(options.out / "index_maps.png", models["vq"], next(iter(batches)))
    shown = next(iter(batches))[:SHOWN_IMAGES]
    table = markdown(rows, options)
    with writing_in(options.out):
        save_rows(options.out / RECONSTRUCTIONS, rows_of(shown, models))
        write_text(options.out / "comparison.md", table)
    say(table)
    for name in sorted(path.name for path in options.out.glob("*.png") if path.name != RECONSTRUCTIONS):
        say(str(options.out / name))
    if "vq" in options.bottleneck:
        say(f"next: vqops extract {options.out / 'vq'} {data_flags(options)} --out CODES")
    say(f"held-out images through each: {options.out / RECONSTRUCTIONS}")


def rows_of(images: Tensor, models: dict[str, VQVAE2]) -> dict[str, Tensor]:
    """The held-out images, and what each model makes of them."""
    return {"held out": images} | {NAMES[name]: model.reconstruct(images) for name, model in models.items()}


def training_options(options: CompareOptions) -> TrainOptions:
    of_each_run = {"bottleneck": "vq", "out": None, "resume": None}
    values = values_for(TrainOptions, options) | of_each_run
    return TrainOptions(**values, eval_every=max(options.steps // 5, 1))


def markdown(rows: dict[str, dict[str, float]], options: CompareOptions) -> str:
    levels = [key.removeprefix("perplexity_") for row in rows.values() for key in row if key.startswith("perplexity_")]
    levels = list(dict.fromkeys(levels))
    heads = ["bottleneck", "MSE", "PSNR (dB)", "SSIM", "bits/dim"]
    heads += [f"{what}, {level}" for level in levels for what in ("perplexity", "codes used")] + ["seconds"]
    lines = [" | ".join(heads), " | ".join(["---"] + ["---:"] * (len(heads) - 1))]
    for bottleneck, row in rows.items():
        cells = [NAMES[bottleneck], f"{row['mse']:.5f}", f"{row['psnr']:.2f}", f"{row['ssim']:.4f}"]
        cells.append("-" if math.isnan(row["bits_per_dim"]) else f"{row['bits_per_dim']:.4f}")
        for level in levels:
            used = row.get(f"codes_used_{level}")
            cells += ["-", "-"] if used is None else [f"{row[f'perplexity_{level}']:.1f}", str(used)]
        lines.append(" | ".join([*cells, "-" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f}"]))
    images = next(iter(rows.values()))["images"]
    note = (
        f"{options.steps} steps of {options.batch_size} images, {options.levels} level(s), seed {options.seed}; "
        f"measured on {images} held-out images, values in [0, 1], clamped. Bits/dim: KL of the VAE, log2 K a code "
        f"without a prior."
    )
    if options.resume:
        note += " Seconds: of training, without those of processes that were killed."
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{note}\n"
