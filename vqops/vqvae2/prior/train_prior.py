"""`vqops train-prior`: a transformer over the codes of one level."""

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vqops.vqvae2.data.batches import ShuffledBatches, hold_out
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import TRANSIENT, write_config
from vqops.vqvae2.files.lock import locked
from vqops.vqvae2.options import values_for
from vqops.vqvae2.pictures.curves import Panel, save_curves
from vqops.vqvae2.prior.checkpoint import save_prior
from vqops.vqvae2.prior.code_folder import Codes
from vqops.vqvae2.prior.options import TrainPriorOptions
from vqops.vqvae2.prior.transformer import Prior, PriorConfig, nats_per_code
from vqops.vqvae2.progress import Progress
from vqops.vqvae2.training.interruption import Interruption
from vqops.vqvae2.training.loop import Training, run_steps
from vqops.vqvae2.training.meters import Meter, evaluating
from vqops.vqvae2.training.optimization import WeightAverage
from vqops.vqvae2.training.processes import pick_device
from vqops.vqvae2.training.resume import NETWORK, TrainState, continued

MAY_CHANGE = ("steps", "patience", "device", "codes", "out", *TRANSIENT)  # how long and where, not what
MEASURED = ("best", "since_best", "measured_at")


def train_prior(options: TrainPriorOptions) -> Path:
    """Train a prior and return its folder, with the weights that were best on held-out codes.

    Stops early when the held-out likelihood gets no better; Ctrl-C, SIGTERM and SIGUSR1 end it with a checkpoint. On
    the CPU the same options give the same weights, however often it was cut off and resumed. Raises InputError for
    anything that cannot be used, before the folder is created or changed.
    """
    options = continued(options, "train-prior", MAY_CHANGE) if options.resume else options
    if not options.resume:
        run_folder.check_output(options.out)
    device = pick_device(options.device)
    codes = Codes.open(options.codes)
    level = codes.level(options.level)
    if not codes.meta.complete:
        raise InputError(f"{options.codes}: {codes.meta.done} of {codes.meta.images} images are done, extract the rest")
    if codes.meta.images < 2:
        raise InputError(f"{codes.meta.images} image: nothing can be held out")
    training, held_out = hold_out(codes.meta.images, options.seed)  # the same for the priors of all levels
    entropy = histogram_entropy(codes.counts(level, training))
    torch.manual_seed(options.seed)
    prior = Prior(config_of(codes, options)).to(device)
    progress = Progress(options.steps)
    learning = PriorTraining(prior, codes, held_out, options, progress)
    with locked(options.resume) if options.resume else run_folder.created(options.out):
        if options.resume:
            learning.load_checkpoint()
        write_config(options.out, options)
        parameters = sum(weight.numel() for weight in prior.parameters())
        height, width = codes.meta.sizes[level]
        progress.say(
            f"{options.level} level: {len(training)} images of {height} x {width} codes, {len(held_out)} held out; "
            f"{parameters:,} parameters, on {device}"
        )
        progress.say(
            f"nats per code of no prior: {math.log(codes.meta.codebook_size):.3f} (ln K), "
            f"{entropy:.3f} (entropy of the histogram)"
        )
        first = learning.state.step
        batches = ShuffledBatches(len(training), options.batch_size, options.steps, options.seed, first)
        interrupted = run_steps(learning, (training[[index for index, _ in batch]] for batch in batches), first)
        if interrupted.by_user or (learning.ended and not interrupted.is_set()):
            finish(learning, entropy)
    return options.out


def finish(learning: "PriorTraining", entropy: float) -> None:
    """Draw the curves and say what was reached and what comes next."""
    codes, options, progress, out = learning.codes, learning.options, learning.progress, learning.options.out
    best = learning.result()
    panel = Panel(
        {"nats_per_code": "training", "val_nats_per_code": "held out"},
        {"ylabel": "nats per code"},
        {"ln K": math.log(codes.meta.codebook_size), "entropy of the histogram": entropy},
    )
    with run_folder.writing_in(out):
        save_curves(out / run_folder.CURVES, run_folder.read_rows(out), (panel,), (6, 4))
    bits = bits_per_dim(best, learning.module.config, codes.meta.image_shape)
    progress.say(f"best held-out {best:.4f} nats per code, {bits:.4f} bits per dimension of the image")
    others = [name for name in codes.meta.levels if name != options.level]
    if others:
        progress.say(f"next: vqops train-prior {options.codes} --level {' or '.join(others)} --out FOLDER, then")
    priors = " ".join(["FOLDER"] * len(others) + [str(out)])
    progress.say(f"next: vqops sample RUN --prior {priors} --out FOLDER")
    progress.say(f"curves: {out / run_folder.CURVES}")


def config_of(codes: Codes, options: TrainPriorOptions) -> PriorConfig:
    return PriorConfig(
        **values_for(PriorConfig, options),
        level_names=codes.meta.levels,
        sizes=codes.meta.sizes,
        codebook_size=codes.meta.codebook_size,
        classes=codes.meta.classes,
    )


@dataclass
class PriorTraining(Training):
    """Keeps the weights that were best on held-out codes, and ends when they get no better."""

    module: Prior
    codes: Codes
    held_out: np.ndarray  # positions
    options: TrainPriorOptions
    progress: Progress
    schedule = "cosine"

    def __post_init__(self):
        self.optimizer = adamw(self.module, self.options)
        self.device = next(self.module.parameters()).device
        self.hiding = torch.Generator().manual_seed(self.options.seed)
        self.meter = Meter("nats_per_code")
        self.best, self.since_best, self.measured_at = math.inf, 0, 0
        meta = self.codes.meta
        of = {NETWORK: self.module.config.version, "model": meta.model}
        of |= {"data sample": meta.data_sample, "images": meta.images}
        average = WeightAverage(self.module, self.options.weight_ema)
        self.state = TrainState(self.module, self.optimizer, average, of, more=self)
        folder = self.options.out
        self.go_on = f"vqops train-prior {shlex.quote(str(self.options.codes))} --resume {shlex.quote(str(folder))}"

    def loss(self, chosen: np.ndarray, step: int) -> Tensor:  # positions [B]; []
        own, above, labels = batch_of(self.codes, chosen, self.module, self.device)
        hidden = torch.rand(len(labels), generator=self.hiding) < self.options.class_dropout
        labels = labels.masked_fill(hidden.to(self.device), self.module.no_class)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            loss = nats_per_code(self.module, own, above, labels)
        self.meter.add(len(chosen), loss)
        return loss

    def after_step(self, step: int) -> None:
        self.state.average.update(step)
        self.state.step = step

    def validate(self, step: int) -> dict[str, float]:
        with self.state.average.in_place():
            nats = self.held_out_nats(self.interrupted)
            self.since_best, self.measured_at = self.since_best + 1, step
            if nats < self.best:
                self.best, self.since_best = nats, 0
                self.save_prior(nats)
        return {"val_nats_per_code": nats}

    def held_out_nats(self, interrupted: Interruption) -> float:
        """Mean over the held-out images, each with its class."""
        size, total = self.options.batch_size, 0.0
        batches = np.split(self.held_out, range(size, len(self.held_out), size))
        with evaluating(self.module), torch.no_grad():
            for images in interrupted.until_set(batches):
                own, above, labels = batch_of(self.codes, images, self.module, self.device)
                total += nats_per_code(self.module, own, above, labels).item() * len(images)
        return total / len(self.held_out)

    def save_prior(self, nats: float) -> None:
        with run_folder.writing_in(self.options.out):
            save_prior(self.options.out, self.module, about(self.codes, self.options, self.state.step, nats))

    def result(self) -> float:
        """The best nats per code; where no measurement was due yet, those of the weights as they are."""
        if self.measured_at:
            return self.best
        with self.state.average.in_place():
            nats = self.held_out_nats(Interruption())
            self.save_prior(nats)
        return nats

    def record(self, row: dict[str, float]) -> None:
        with run_folder.writing_in(self.options.out):
            run_folder.append_row(self.options.out, row)
        figures = f"nats per code {row['nats_per_code']:.4f}  {row['images_per_second']:.0f} images/s"
        held_out = f"{row['val_nats_per_code']:.4f}" if "val_nats_per_code" in row else ""
        self.progress.row(row["step"], figures, held_out)
        if self.finished:
            self.progress.say(f"no better for {self.since_best} measurements: stopped after step {row['step']}")

    def save(self, step: int, last: bool) -> None:
        if last or self.measured_at == step:
            with run_folder.writing_in(self.options.out):
                self.state.save(self.options.out / run_folder.TRAIN_STATE)

    def load_checkpoint(self) -> None:
        """Go on from the last checkpoint of the folder. Raises InputError if there is nothing left to do."""
        out, options, state = self.options.out, self.options, self.state
        if (out / run_folder.TRAIN_STATE).exists():
            state.load(out / run_folder.TRAIN_STATE)
            if self.ended and (out / run_folder.CURVES).exists():
                done = f"got no better in {self.since_best} measurements" if self.finished else "has done its steps"
                more = Field("patience" if self.finished else "steps")
                raise InputError(f"{out} {done}, after step {state.step}: name more with ", more)
            self.progress.say(f"{out}: resumed from step {state.step}")
        else:
            self.progress.say(f"{out}: no checkpoint yet: starts anew")
        run_folder.rewind(out, state.step)
        measured_there = state.step % options.eval_every == 0 or state.step == options.steps
        if state.step and measured_there and self.measured_at < state.step:  # a signal came in between
            row = {"step": state.step} | (run_folder.read_rows(out) or [{}])[-1] | self.validate(state.step)
            run_folder.rewind(out, state.step - 1)
            run_folder.append_row(out, row)

    @property
    def finished(self) -> bool:
        return self.since_best >= self.options.patience

    @property
    def ended(self) -> bool:
        return self.finished or self.state.step >= self.options.steps

    def state_dict(self) -> dict[str, object]:
        here = self.best, self.since_best, self.measured_at
        return dict(zip(MEASURED, here, strict=True)) | {"hiding": self.hiding.get_state()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.best, self.since_best, self.measured_at = (state[name] for name in MEASURED)
        self.hiding.set_state(state["hiding"])


def adamw(prior: Prior, options: TrainPriorOptions) -> torch.optim.Optimizer:
    """Weight decay for what multiplies; none for biases, norms and embeddings."""
    decayed = {id(module.weight) for module in prior.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": [p for p in prior.parameters() if id(p) in decayed], "weight_decay": options.weight_decay},
        {"params": [p for p in prior.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))


def batch_of(
    codes: Codes, images: np.ndarray, prior: Prior, device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Codes [B, h, w] of the prior's level, those of the levels above, labels [B]."""
    level = prior.config.position
    own, *above = (index.to(device) for index in codes.read(images, level))
    if codes.labels is None:
        return own, tuple(above), torch.full((len(images),), prior.no_class, device=device)
    return own, tuple(above), torch.from_numpy(codes.labels[images]).to(device)


def histogram_entropy(counts: np.ndarray) -> float:  # [K]
    """Nats per code of the best prior that knows neither place nor neighbours."""
    share = counts / counts.sum()
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def bits_per_dim(nats: float, config: PriorConfig, image_shape: tuple[int, int, int]) -> float:
    """Bits that the codes of this level take, over the C x H x W values of the image."""
    return nats * config.length / math.log(2) / math.prod(image_shape)


def about(codes: Codes, options: TrainPriorOptions, step: int, best: float) -> dict[str, object]:
    return {
        "model": codes.meta.model,
        "image_shape": codes.meta.image_shape,
        "training": {name: value for name, value in asdict(options).items() if name not in ("codes", "out", "resume")},
        "step": step,
        "val_nats_per_code": best,
    }
