"""`vqops train`: a VQ-VAE-2 from images to a run folder."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from vqops.vqvae2 import run_folder
from vqops.vqvae2.batches import hold_out, training_batches, validation_batches, window_of
from vqops.vqvae2.checkpoint import save_model
from vqops.vqvae2.images import Images
from vqops.vqvae2.metrics import TrainingMeter, validate
from vqops.vqvae2.model import VQVAE2, VQVAE2Config, as_float
from vqops.vqvae2.photographs import held_out_photographs, training_photographs
from vqops.vqvae2.pictures import save_curves, save_reconstructions
from vqops.vqvae2.screen import Screen
from vqops.vqvae2.sources import load_images
from vqops_cli.options import InputError, TrainOptions

ROW_EVERY = 10  # steps between two rows of metrics
# The error of images in [-1, 1], the scale on which the usual commitment of 0.25 is balanced: weighing it by the inverse
# of the data's variance, as Sonnet's example does, ended 16 % higher on CIFAR-10 (1500 steps, one level).
RECONSTRUCTION_WEIGHT = 4.0
# A code is restarted when it is chosen less than this often, as a share of N / K, what equal use would give it.
RESTART_BELOW = 0.1


def train(options: TrainOptions) -> Path:
    """Train a model as the options say and return its run folder.

    Writes metrics.jsonl while it runs; model.safetensors, reconstructions.png and curves.png at the end, also when
    Ctrl-C ends it early. On the CPU the same options give the same weights, whatever the number of workers.

    Raises InputError for anything that cannot be used, before the run folder is created or changed; and if the loss is
    no longer finite.
    """
    run_folder.check_output(options.out, options.overwrite)
    device = pick_device(options.device)
    screen = Screen(options.steps)
    images, held_out = load_data(options, screen)
    window = window_of(images, options.image_size)
    torch.manual_seed(options.seed)
    model = VQVAE2(network_of(options, images.channels, window))
    model.to(device, memory_format=torch.channels_last)
    batches = training_batches(images, window, options.batch_size, options.steps, options.seed, options.num_workers)
    validation = validation_batches(held_out, window, options.batch_size, options.num_workers)

    folder = run_folder.create(options.out)
    screen.say(f"{len(images)} images, {window[0]} x {window[1]} pixels a crop, on {device}; run folder {folder}")
    with screen, interruption() as interrupted:
        step = run_steps(model, batches, validation, options, folder, screen, interrupted)
    save_model(folder / run_folder.MODEL, model, options, step)
    save_curves(folder / run_folder.CURVES, run_folder.read_rows(folder))
    shown = next(iter(validation))
    save_reconstructions(folder / run_folder.RECONSTRUCTIONS, shown, model.reconstruct(shown))
    if step < options.steps:
        screen.say(f"interrupted after step {step} of {options.steps}")
    screen.say(f"held-out images over their reconstructions: {folder / run_folder.RECONSTRUCTIONS}")
    screen.say(f"curves: {folder / run_folder.CURVES}")
    screen.say(f"next: vqops reconstruct {folder} IMAGES... --out FOLDER")
    return folder


def run_steps(
    model: VQVAE2,
    batches: DataLoader,
    validation: DataLoader,
    options: TrainOptions,
    folder: Path,
    screen: Screen,
    interrupted: Event,
) -> int:
    """Train until the batches end or `interrupted` is set; return the number of steps done."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    meter = TrainingMeter(model.config, device)
    step = 0
    for step, pixels in enumerate(batches, start=1):
        images = as_float(pixels.to(device))
        output = model(images)
        mse = F.mse_loss(output.reconstruction, images)
        loss = RECONSTRUCTION_WEIGHT * mse + output.codebook_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meter.add(loss.detach(), mse.detach(), output.indices)
        screen.step(step)
        validation_is_due = step % options.eval_every == 0 or step == options.steps
        if step % ROW_EVERY == 0 or validation_is_due or interrupted.is_set():
            row = {"step": step, **meter.row()}
            if not math.isfinite(row["loss"]):
                raise InputError(
                    f"the loss is {row['loss']} at step {step}: --lr {options.lr} is too high for this data"
                )
            if validation_is_due:
                row |= validate(model, validation)
                meter.restart()
            run_folder.append_row(folder, row)
            screen.row(row)
        if interrupted.is_set():
            break
    return step


def network_of(options: TrainOptions, image_channels: int, window: tuple[int, int]) -> VQVAE2Config:
    config = VQVAE2Config(
        image_channels=image_channels,
        levels=options.levels,
        channels=options.channels,
        codebook_size=options.codebook_size,
        code_dim=options.code_dim,
        codebook=options.codebook,
        decay=options.decay,
        commitment=options.commitment,
    )
    vectors = [options.batch_size * height * width for height, width in config.code_sizes(*window)]
    return replace(config, restart_below=tuple(RESTART_BELOW * N / options.codebook_size for N in vectors))


def load_data(options: TrainOptions, screen: Screen) -> tuple[Images, Images]:
    """Training and validation images; says on screen which are held out."""
    if options.data is None:
        if options.data_key or options.val_data or options.val_key:
            raise InputError("--data-key, --val-data and --val-key need --data")
        screen.say("no --data: photographs of scikit-image, chelsea (a cat) held out")
        return training_photographs(), held_out_photographs(options.image_size)
    images = load_images(options.data, options.data_key)
    if options.val_data is not None:
        return images, load_images(options.val_data, options.val_key, ("validation", "test"), images.channels)
    if options.val_key is not None:
        return images, load_images(options.data, options.val_key, channels=images.channels)
    if len(images) == 1:
        raise InputError(f"{options.data} holds one image: nothing can be held out, give --val-data")
    images, held_out = hold_out(images, options.seed)
    total = len(images) + len(held_out)
    screen.say(f"{options.data}: held out {len(held_out)} of {total} images (5 %, seed {options.seed}) for validation")
    return images, held_out


def pick_device(name: str) -> torch.device:
    """Raises InputError if there is no such device here."""
    available = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        name = "cuda" if "cuda:0" in available else "cpu"
    if ("cuda:0" if name == "cuda" else name) not in available:
        raise InputError(f"--device {name}: this torch ({torch.__version__}) has {', '.join(available)}")
    return torch.device(name)


@contextmanager
def interruption() -> Iterator[Event]:
    """An event that Ctrl-C sets, so that a step is never left half done; a second Ctrl-C interrupts at once."""
    interrupted = Event()
    if threading.current_thread() is not threading.main_thread():  # only that one gets Ctrl-C
        yield interrupted
        return
    previous = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
