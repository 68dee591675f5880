"""`vqops train`: a VQ-VAE-2 from images to a run folder."""

import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqops import VectorQuantize
from vqops.vqvae2.data.batches import Batches, training_batches, validation_batches, window_of
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import write_config
from vqops.vqvae2.files.lock import is_of_this_job, locked
from vqops.vqvae2.files.run_folder import NOT_LISTED
from vqops.vqvae2.metrics import psnr
from vqops.vqvae2.networks.bottlenecks import Gumbel
from vqops.vqvae2.networks.checkpoint import save_model
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config, as_float
from vqops.vqvae2.options import changed, values_for
from vqops.vqvae2.pictures.curves import save_curves, training_panels
from vqops.vqvae2.pictures.grids import save_rows
from vqops.vqvae2.progress import Progress
from vqops.vqvae2.training.images import Data, data_flags, identity, load_data
from vqops.vqvae2.training.loop import Training, run_steps
from vqops.vqvae2.training.meters import CodeMeter, validate
from vqops.vqvae2.training.optimization import WeightAverage
from vqops.vqvae2.training.options import TrainOptions
from vqops.vqvae2.training.processes import (
    check_first_step,
    is_first,
    may_be_restarted,
    num_ranks,
    of_first,
    pick_device,
    process_group,
    rank,
    restarts,
    with_shared_gradients,
)
from vqops.vqvae2.training.resume import NETWORK, TrainState, continued, with_strides
from vqops.vqvae2.training.tensorboard import TensorBoard

# The error of images in [-1, 1], the scale on which the usual commitment of 0.25 is balanced: weighing it by the
# inverse of the data's variance, as Sonnet's example does, ended 16 % higher on CIFAR-10 (1500 steps, one level).
RECONSTRUCTION_WEIGHT = 4.0
# A code is restarted when it is chosen less than this often, as a share of N / K, what equal use would give it.
RESTART_BELOW = 0.1
# A level that still uses so few codes after so many steps seldom recovers without help.
COLLAPSED_PERPLEXITY, COLLAPSED_STEP = 2.0, 300


def train(options: TrainOptions) -> Path:
    """Train a model as the options say and return its run folder.

    Writes metrics.jsonl while it runs, and train_state.pt and model.safetensors at every checkpoint; at the end, also
    when Ctrl-C ends it early, reconstructions.png and curves.png. SIGTERM and SIGUSR1 end it with a checkpoint, too. On
    the CPU the same options give the same weights, whatever the number of workers and however often the run was cut off
    and resumed. In several processes of `torchrun` each takes its part of the batch.

    Raises InputError for anything that cannot be used, before the run folder is created or changed; and if the loss is
    no longer finite, images cannot be loaded any more, or the folder cannot be written.
    """
    return train_run(options)


def train_run(options: TrainOptions, go_on: str | None = None, data: Data | None = None) -> Path:
    """The same as a part of something else.

    `go_on` is the command that goes on where it is cut off, `data` are the images that the options name.
    """
    options = of_this_attempt(options)
    if is_first() and not options.resume:
        run_folder.check_output(options.out, options.overwrite)
    device = pick_device(options.device)
    with process_group(device), locked(options.resume) if is_first() and options.resume else nullcontext():
        return train_here(options, device, go_on, data)


def of_this_attempt(options: TrainOptions) -> TrainOptions:
    """The options as given; as those of a continuation with --resume, and where torchrun starts a job again."""
    if options.resume is None and may_be_restarted():
        if options.out is None:
            raise InputError(Field("out"), " is needed with torchrun --max-restarts, to go on in that folder")
        if restarts() and is_of_this_job(options.out):
            begun = (options.out / run_folder.CONFIG).is_file()
            options = changed(options, resume=options.out) if begun else changed(options, overwrite=True)
    return continued(options, "train") if options.resume else options


def train_here(options: TrainOptions, device: torch.device, go_on: str | None, data: Data | None) -> Path:
    """The training of one process."""
    if options.batch_size % num_ranks():
        reason = f" {options.batch_size} must be a multiple of the {num_ranks()} processes"
        raise InputError(Field("batch_size"), reason)
    progress = Progress(options.steps, quiet=not is_first())
    listed = run_folder.read_listed(options.resume) if options.resume else NOT_LISTED
    data = data or load_data(options, progress, listed)
    images, held_out = data.training, data.held_out
    window = window_of(images, options.image_size)
    torch.manual_seed(options.seed)
    model = VQVAE2(network_of(options, images.channels, window))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    about = {NETWORK: model.config.version} | identity(data, window)
    state = TrainState(model, optimizer, WeightAverage(model, options.weight_ema), about)
    if options.resume and (done := load_checkpoint(state, options, progress)):
        return done
    check_first_step(state.step)
    part = rank(), num_ranks()
    batches = training_batches(
        images, window, options.batch_size, options.steps, options.seed, options.num_workers, state.step, part
    )
    validation = validation_batches(held_out, window, options.batch_size, options.num_workers, part)
    trained = with_shared_gradients(model)

    with started_folder(options, state.step) as folder:
        folder = of_first(folder)
        if is_first() and (not options.resume or listed == NOT_LISTED):
            run_folder.write_listed(folder, data.listed)
        crops = f"{window[0]} x {window[1]} pixels a crop"
        progress.say(f"{len(images)} images, {crops}, on {device}; run folder {folder}")
        go_on = go_on or f"vqops train --resume {shlex.quote(str(folder))}"
        training = VQVAE2Training(state, trained, validation, options, folder, progress, go_on)
        if state.step:
            training.validate_late()
        interrupted = run_steps(training, batches, state.step)
        if is_first():
            with run_folder.writing_in(folder):
                training.tensorboard.close()
            if interrupted.by_user or (state.step >= options.steps and not interrupted.is_set()):
                with run_folder.writing_in(folder):
                    finish(training, held_out, window)
    return folder


def load_checkpoint(state: TrainState, options: TrainOptions, progress: Progress) -> Path | None:
    """Take the state from the last checkpoint of the run, if it has one, and say so.

    Raises InputError if there is nothing left to do; in a job that is started again the folder is returned then.
    """
    folder = options.resume
    if not (folder / run_folder.TRAIN_STATE).exists():
        progress.say(f"{folder}: no checkpoint yet: starts anew")
        return None
    state.load(folder / run_folder.TRAIN_STATE)
    finished = (folder / run_folder.RECONSTRUCTIONS).exists()  # what a run writes last
    if state.step >= options.steps and finished:
        if restarts():
            return folder
        raise InputError(f"{folder} has done its {state.step} steps: name more with ", Field("steps"))
    progress.say(f"{folder}: resumed from step {state.step}")
    return None


@contextmanager
def started_folder(options: TrainOptions, step: int) -> Iterator[Path]:
    """The folder of the run, with the options in it: new, or as it was at the step to go on from."""
    if not is_first():
        yield Path()
    elif options.resume:
        run_folder.rewind(options.resume, step)
        write_config(options.resume, options)
        yield options.resume
    else:
        with run_folder.created(options.out, options.overwrite) as folder:
            write_config(folder, options)
            yield folder


@dataclass
class VQVAE2Training(Training):
    state: TrainState
    trained: nn.Module  # the state's module, or what stands for it in several processes
    validation: Batches
    options: TrainOptions
    folder: Path
    progress: Progress
    go_on: str

    def __post_init__(self):
        self.module, self.optimizer, self.schedule = self.state.module, self.state.optimizer, self.options.schedule
        self.device = next(self.module.parameters()).device
        self.meter = CodeMeter(self.module.config, "loss", "mse")
        # Without the place of the run: the SHA-256 of the model's file is what codes and priors know it by.
        self.placeless = changed(self.options, preset=None, config=None, out=None, overwrite=False, resume=None)
        if is_first():
            with run_folder.writing_in(self.folder):
                self.tensorboard = TensorBoard(self.folder / run_folder.TENSORBOARD, self.state.step)
        self.collapsed = set()

    def loss(self, pixels: Tensor, step: int) -> Tensor:  # uint8 [B, C, H, W]; []
        set_bottlenecks(self.module, step, self.options.steps)
        images = as_float(pixels.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            output = self.trained(images)
        mse = F.mse_loss(output.reconstruction.float(), images)
        loss = RECONSTRUCTION_WEIGHT * mse + output.codebook_loss
        self.meter.add(len(images), loss, mse)
        self.meter.add_codes(output.indices)
        return loss

    def after_step(self, step: int) -> None:
        self.state.average.update(step)
        self.state.step = step

    def validate(self, step: int) -> dict[str, float]:
        alone = num_ranks() == 1  # several must all end it or none
        batches = self.interrupted.until_set(self.validation) if alone else self.validation
        with self.state.average.in_place():
            return validate(self.module, batches)

    def validate_late(self) -> None:
        """Validate at the step to go on from, where it was due and a signal came in between."""
        step, options = self.state.step, self.options
        rows = of_first([row for row in run_folder.read_rows(self.folder) if row["step"] == step])
        if not rows or "val_mse" in rows[-1] or (step % options.eval_every and step != options.steps):
            return
        row = rows[-1] | self.validate(step)
        if is_first():
            run_folder.rewind(self.folder, step - 1)
            self.record(row)

    def record(self, row: dict[str, float]) -> None:
        with run_folder.writing_in(self.folder):
            run_folder.append_row(self.folder, row)
            self.tensorboard.row(row)
        self.progress.row(row["step"], summary(row), held_out_summary(row))
        warn_of_collapse(row, self.module.config, self.collapsed, self.progress)

    def save(self, step: int, last: bool) -> None:
        """The state first: whatever happens in between, the run can go on from it."""
        if last or step % self.options.checkpoint_every == 0:
            with run_folder.writing_in(self.folder):
                self.state.save(self.folder / run_folder.TRAIN_STATE)
                with self.state.average.in_place():
                    save_model(self.folder / run_folder.MODEL, self.module, self.placeless, step)


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


def summary(row: dict[str, float]) -> str:
    levels = [key.removeprefix("used_") for key in row if key.startswith("used_")]
    codes = "  ".join(f"{name} {row[f'perplexity_{name}']:.0f} ({row[f'used_{name}']:.0%} used)" for name in levels)
    codes = f"perplexity {codes}  " if codes else ""
    return f"loss {row['loss']:.4f}  mse {row['mse']:.5f}  {codes}{row['images_per_second']:.0f} images/s"


def held_out_summary(row: dict[str, float]) -> str:
    return f"mse {row['val_mse']:.5f} ({psnr(row['val_mse']):.1f} dB)" if "val_mse" in row else ""


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


def finish(training: VQVAE2Training, held_out: Images, window: tuple[int, int]) -> None:
    """Draw the pictures and say where they are and what comes next."""
    state, options, folder, progress = training.state, training.options, training.folder, training.progress
    rows = run_folder.read_rows(folder)
    save_curves(folder / run_folder.CURVES, rows, training_panels(rows))
    shown = next(iter(validation_batches(held_out, window, options.batch_size, num_workers=0)))
    with state.average.in_place():
        reconstructions = state.module.eval().reconstruct(shown)
    save_rows(folder / run_folder.RECONSTRUCTIONS, {"held out": shown, "reconstruction": reconstructions})
    progress.say(f"curves: {folder / run_folder.CURVES}")
    following = f"next: vqops reconstruct {folder} IMAGES... --out FOLDER"
    if state.module.config.discrete:
        progress.say(f"{following}, or, on the way to samples,")
        progress.say(f"next: vqops extract {folder} {data_flags(options)} --out CODES")
    else:
        progress.say(following)
    progress.say(f"held-out images over their reconstructions: {folder / run_folder.RECONSTRUCTIONS}")


def network_of(options: TrainOptions, image_channels: int, window: tuple[int, int]) -> VQVAE2Config:
    config = VQVAE2Config(
        **values_for(VQVAE2Config, with_strides(options)),
        image_channels=image_channels,
        image_values=image_channels * math.prod(window),
    )
    if options.bottleneck != "vq":
        return config
    vectors = [options.batch_size * height * width for height, width in config.code_sizes(*window)]
    return replace(config, restart_below=tuple(RESTART_BELOW * N / options.codebook_size for N in vectors))
