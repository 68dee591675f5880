"""`vqops train`: a VQ-VAE-2 from images to a run folder."""

import math
from dataclasses import fields, replace
from pathlib import Path
from threading import Event

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from vqops import VectorQuantize
from vqops.vqvae2.data.batches import hold_out, training_batches, validation_batches, window_of
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.photographs import held_out_photographs, training_photographs
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import TRANSIENT, read_options, written
from vqops.vqvae2.networks.bottlenecks import Gumbel
from vqops.vqvae2.networks.checkpoint import save_model
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config, as_float, level_strides
from vqops.vqvae2.pictures.grids import save_curves, save_reconstructions
from vqops.vqvae2.training.interruption import interruption
from vqops.vqvae2.training.optimization import WeightAverage, learning_rate, set_learning_rate
from vqops.vqvae2.training.options import TrainOptions
from vqops.vqvae2.training.processes import agree, is_first, num_ranks, pick_device, process_group, rank
from vqops.vqvae2.training.progress import Progress
from vqops.vqvae2.training.resume import TrainState
from vqops.vqvae2.training.tensorboard import TensorBoard
from vqops.vqvae2.training.training_meter import TrainingMeter, validate

ROW_EVERY = 10  # steps between two rows of metrics
# The error of images in [-1, 1], the scale on which the usual commitment of 0.25 is balanced: weighing it by the
# inverse of the data's variance, as Sonnet's example does, ended 16 % higher on CIFAR-10 (1500 steps, one level).
RECONSTRUCTION_WEIGHT = 4.0
# A code is restarted when it is chosen less than this often, as a share of N / K, what equal use would give it.
RESTART_BELOW = 0.1
# A level that still uses so few codes after so many steps seldom recovers without help.
COLLAPSED_PERPLEXITY, COLLAPSED_STEP = 2.0, 300
# Fields that may differ between a run and its continuation: how long, where and how often, not what.
MAY_CHANGE = ("steps", "eval_every", "checkpoint_every", "num_workers", "device", "out", *TRANSIENT)


def train(options: TrainOptions) -> Path:
    """Train a model as the options say and return its run folder.

    Writes metrics.jsonl while it runs, and train_state.pt and model.safetensors at every checkpoint; at the end, also
    when Ctrl-C ends it early, reconstructions.png and curves.png. On the CPU the same options give the same weights,
    whatever the number of workers and however often the run was cut off and resumed. In several processes of
    `torchrun` each takes its part of the batch.

    Raises InputError for anything that cannot be used, before the run folder is created or changed; and if the loss is
    no longer finite.
    """
    options = continued(options) if options.resume else options
    if is_first() and not options.resume:
        run_folder.check_output(options.out, options.overwrite)
    device = pick_device(options.device)
    with process_group(device):
        return train_here(options, device)


def train_here(options: TrainOptions, device: torch.device) -> Path:
    """What each process does."""
    if options.batch_size % num_ranks():
        raise InputError(
            Field("batch_size"), f" {options.batch_size} must be a multiple of the {num_ranks()} processes"
        )
    progress = Progress(options.steps, quiet=not is_first())
    images, held_out = load_data(options, progress)
    window = window_of(images, options.image_size)
    torch.manual_seed(options.seed)
    model = VQVAE2(network_of(options, images.channels, window))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    about = {"images": len(images), "image size": list(window)}
    state = TrainState(model, optimizer, WeightAverage(model, options.weight_ema), about)
    if options.resume and (checkpoint := options.resume / run_folder.TRAIN_STATE).exists():
        state.load(checkpoint)
        finished = (options.resume / run_folder.RECONSTRUCTIONS).exists()  # what a run writes last
        if state.step >= options.steps and finished:
            raise InputError(f"{options.resume} has done its {state.step} steps: name more with ", Field("steps"))
    part = rank(), num_ranks()
    batches = training_batches(
        images, window, options.batch_size, options.steps, options.seed, options.num_workers, state.step, part
    )
    validation = validation_batches(held_out, window, options.batch_size, options.num_workers, part)
    trained = model if num_ranks() == 1 else DistributedDataParallel(model, broadcast_buffers=False)

    folder = start_folder(options, state.step) if is_first() else Path()
    progress.say(f"{len(images)} images, {window[0]} x {window[1]} pixels a crop, on {device}; run folder {folder}")
    with progress, interruption() as interrupted:
        run_steps(trained, state, batches, validation, options, folder, progress, interrupted)
    if is_first():
        finish(state, held_out, window, options, folder, progress)
    return folder


def start_folder(options: TrainOptions, step: int) -> Path:
    """The folder of the run: new, or as it was at the step to go on from; with the options in it."""
    if options.resume:
        folder = options.resume
        run_folder.rewind(folder, step)
    else:
        folder = run_folder.create(options.out)
    with run_folder.writing_in(folder), run_folder.atomically(folder / run_folder.CONFIG) as temporary:
        temporary.write_text(written(options))
    return folder


def run_steps(
    trained: nn.Module,
    state: TrainState,
    batches: DataLoader,
    validation: DataLoader,
    options: TrainOptions,
    folder: Path,
    progress: Progress,
    interrupted: Event,
) -> None:
    """Train until the batches end or `interrupted` is set; `trained` is the state's module, or stands for it."""
    model, optimizer = state.module, state.optimizer
    device = next(model.parameters()).device
    meter = TrainingMeter(model.config, device)
    tensorboard = TensorBoard(folder / run_folder.TENSORBOARD, state.step) if is_first() else None
    collapsed = set()
    for pixels in batches:
        step = state.step + 1
        set_learning_rate(optimizer, learning_rate(options.lr, options.schedule, step, options.steps, options.warmup))
        set_bottlenecks(model, step, options.steps)
        images = as_float(pixels.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            output = trained(images)
        mse = F.mse_loss(output.reconstruction.float(), images)
        loss = RECONSTRUCTION_WEIGHT * mse + output.codebook_loss
        optimizer.zero_grad()
        loss.backward()
        if options.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        optimizer.step()
        state.average.update(step)
        state.step = step
        meter.add(loss.detach(), mse.detach(), output.indices, len(images))
        progress.step(step)
        validation_is_due = step % options.eval_every == 0 or step == options.steps
        row_is_due = step % ROW_EVERY == 0 or validation_is_due
        # Several processes must stop at the same step; asking costs a wait, so only where a row costs it too.
        stop = agree(interrupted.is_set(), device) if row_is_due or num_ranks() == 1 else False
        if row_is_due or stop:
            row = {"step": step, **meter.row()}
            if not math.isfinite(row["loss"]):
                raise InputError(
                    f"the loss is {row['loss']} at step {step}: ",
                    Field("lr"),
                    f" {options.lr} is too high for this data",
                )
            if validation_is_due:
                with state.average.in_place():
                    row |= validate(model, validation)
                meter.restart()
            if tensorboard is not None:
                run_folder.append_row(folder, row)
                tensorboard.row(row)
            progress.row(row)
            warn_of_collapse(row, model.config, collapsed, progress)
        if is_first() and (step % options.checkpoint_every == 0 or step == options.steps or stop):
            save_checkpoint(state, options, folder)
        if stop:
            break
    if tensorboard is not None:
        tensorboard.close()


def set_bottlenecks(model: VQVAE2, step: int, steps: int) -> None:
    """Let the codes follow an encoder that moves fast at first: a decay of (1 + step) / (10 + step) until it is larger.

    The averages of the first batch would otherwise keep codes alive, for hundreds of steps, that the encoder has left
    behind: on CIFAR-10 the top level passed nothing on between steps 20 and 240.
    """
    for bottleneck in model.quantizers:
        if isinstance(bottleneck, VectorQuantize):
            bottleneck.decay = min(model.config.decay, (1 + step) / (10 + step))
        elif isinstance(bottleneck, Gumbel):
            bottleneck.anneal(step / steps)


def warn_of_collapse(row: dict[str, float], config: VQVAE2Config, collapsed: set[str], progress: Progress) -> None:
    """Say it once when a level uses next to none of its codes, and what helps."""
    for level in config.level_names if config.discrete else ():
        perplexity = row[f"perplexity_{level}"]
        if row["step"] > COLLAPSED_STEP and perplexity < COLLAPSED_PERPLEXITY < config.codebook_size:
            if level not in collapsed:
                progress.say(
                    f"warning: the codes of level {level} have collapsed (perplexity {perplexity:.1f} of "
                    f"{config.codebook_size}): it passes next to nothing on. A lower --lr, a --warmup, a larger "
                    f"--batch-size or a smaller --codebook-size can help, and fewer --levels if the images are small."
                )
            collapsed.add(level)


def save_checkpoint(state: TrainState, options: TrainOptions, folder: Path) -> None:
    """The state first: whatever happens in between, the run can go on from it."""
    state.save(folder / run_folder.TRAIN_STATE)
    with state.average.in_place():
        save_model(folder / run_folder.MODEL, state.module, options, state.step)


def finish(
    state: TrainState,
    held_out: Images,
    window: tuple[int, int],
    options: TrainOptions,
    folder: Path,
    progress: Progress,
) -> None:
    """Draw the pictures and say where they are and what comes next."""
    save_curves(folder / run_folder.CURVES, run_folder.read_rows(folder))
    shown = next(iter(validation_batches(held_out, window, options.batch_size, num_workers=0)))
    with state.average.in_place():
        reconstructions = state.module.eval().reconstruct(shown)
    save_reconstructions(folder / run_folder.RECONSTRUCTIONS, shown, reconstructions)
    if state.step < options.steps:
        progress.say(f"interrupted after step {state.step} of {options.steps}; go on: vqops train --resume {folder}")
    progress.say(f"held-out images over their reconstructions: {folder / run_folder.RECONSTRUCTIONS}")
    progress.say(f"curves: {folder / run_folder.CURVES}")
    progress.say(f"next: vqops reconstruct {folder} IMAGES... --out FOLDER, or, on the way to samples,")
    if not state.module.config.discrete:
        return
    key = f" --data-key {options.data_key}" if options.data_key else ""
    progress.say(f"next: vqops extract {folder} --data {options.data or 'PATH'}{key} --out CODES")


def continued(options: TrainOptions) -> TrainOptions:
    """The options as those of a continuation; raises InputError where they do not fit the run."""
    folder = options.resume
    if not (folder / run_folder.CONFIG).is_file():
        raise InputError(Field("resume"), f" {folder}: no run of vqops train is there (no {run_folder.CONFIG})")
    if options.out not in (None, folder):
        raise InputError(
            Field("resume"), f" {folder} goes on in that folder, ", Field("out"), f" {options.out} is another"
        )
    before = with_strides(read_options(folder / run_folder.CONFIG, TrainOptions))
    now = with_strides(options)
    for name in (field.name for field in fields(TrainOptions) if field.name not in MAY_CHANGE):
        there, here = getattr(before, name), getattr(now, name)
        if there != here:
            raise InputError(
                Field("resume"), f" {folder}: ", Field(name), f" is {there} there and cannot change, got {here}"
            )
    return replace(options, out=folder)


def with_strides(options: TrainOptions) -> TrainOptions:
    """The same options with the default strides written out."""
    return replace(options, strides=level_strides(options.strides, options.levels))


def network_of(options: TrainOptions, image_channels: int, window: tuple[int, int]) -> VQVAE2Config:
    config = VQVAE2Config(
        image_channels=image_channels,
        levels=options.levels,
        strides=level_strides(options.strides, options.levels),
        channels=options.channels,
        codebook_size=options.codebook_size,
        code_dim=options.code_dim,
        codebook=options.codebook,
        decay=options.decay,
        commitment=options.commitment,
        bottleneck=options.bottleneck,
        image_values=image_channels * math.prod(window),
    )
    if options.bottleneck != "vq":
        return config
    vectors = [options.batch_size * height * width for height, width in config.code_sizes(*window)]
    return replace(config, restart_below=tuple(RESTART_BELOW * N / options.codebook_size for N in vectors))


def load_data(options: TrainOptions, progress: Progress) -> tuple[Images, Images]:
    """Training and validation images; says on screen which are held out."""
    if options.data is None:
        if options.data_key or options.val_data or options.val_key:
            raise InputError(
                Field("data_key"), ", ", Field("val_data"), " and ", Field("val_key"), " need ", Field("data")
            )
        progress.say("no --data: photographs of scikit-image, chelsea (a cat) held out")
        return training_photographs(), held_out_photographs(options.image_size)
    images = load_images(options.data, options.data_key)
    if options.val_data is not None:
        return images, load_images(options.val_data, options.val_key, ("validation", "test"), images.channels)
    if options.val_key is not None:
        return images, load_images(options.data, options.val_key, channels=images.channels)
    if len(images) == 1:
        raise InputError(f"{options.data} holds one image: nothing can be held out, give ", Field("val_data"))
    images, held_out = hold_out(images, options.seed)
    total = len(images) + len(held_out)
    seed = options.seed
    progress.say(f"{options.data}: held out {len(held_out)} of {total} images (5 %, seed {seed}) for validation")
    return images, held_out
