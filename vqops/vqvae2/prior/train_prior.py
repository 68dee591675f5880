"""`vqops train-prior`: a transformer over the codes of one level."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vqops.vqvae2.data.batches import ShuffledBatches, hold_out
from vqops.vqvae2.errors import InputError
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import written
from vqops.vqvae2.options import values_for
from vqops.vqvae2.pictures.curves import Panel, save_curves
from vqops.vqvae2.prior.checkpoint import save_prior
from vqops.vqvae2.prior.code_folder import Codes
from vqops.vqvae2.prior.options import TrainPriorOptions
from vqops.vqvae2.prior.transformer import Prior, PriorConfig, nats_per_code
from vqops.vqvae2.progress import Progress
from vqops.vqvae2.training.loop import Training, run_steps
from vqops.vqvae2.training.meters import Meter
from vqops.vqvae2.training.processes import pick_device


def train_prior(options: TrainPriorOptions) -> Path:
    """Train a prior and return its folder, with the weights that were best on held-out codes.

    Stops early when the held-out likelihood gets no better. On the CPU the same options give the same weights. Raises
    InputError for anything that cannot be used, before the folder is created.
    """
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

    with run_folder.writing_in(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / run_folder.CONFIG).write_text(written(options))
        (options.out / run_folder.METRICS).touch()
    progress = Progress(options.steps)
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
    learning = PriorTraining(prior, codes, held_out, options, progress)
    batches = ShuffledBatches(len(training), options.batch_size, options.steps, options.seed)
    run_steps(learning, (training[[index for index, _ in batch]] for batch in batches))
    panel = Panel(
        {"nats_per_code": "training", "val_nats_per_code": "held out"},
        {"ylabel": "nats per code"},
        {"ln K": math.log(codes.meta.codebook_size), "entropy of the histogram": entropy},
    )
    save_curves(options.out / run_folder.CURVES, run_folder.read_rows(options.out), (panel,), (6, 4))
    bits = bits_per_dim(learning.best, prior.config, codes.meta.image_shape)
    progress.say(f"best held-out {learning.best:.4f} nats per code, {bits:.4f} bits per dimension of the image")
    progress.say(f"curves: {options.out / run_folder.CURVES}")
    others = [name for name in codes.meta.levels if name != options.level]
    if others:
        progress.say(f"next: vqops train-prior {options.codes} --level {' or '.join(others)} --out FOLDER, then")
    priors = " ".join(["FOLDER"] * len(others) + [str(options.out)])
    progress.say(f"next: vqops sample RUN --prior {priors} --out FOLDER")
    return options.out


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
    validates_when_interrupted, schedule = True, "cosine"

    def __post_init__(self):
        self.optimizer = adamw(self.module, self.options)
        self.device = next(self.module.parameters()).device
        self.hiding = torch.Generator().manual_seed(self.options.seed)
        self.meter = Meter("nats_per_code")
        self.best, self.since_best = math.inf, 0

    def loss(self, chosen: np.ndarray, step: int) -> Tensor:  # positions [B]; []
        own, above, labels = batch_of(self.codes, chosen, self.module, self.device)
        hidden = torch.rand(len(labels), generator=self.hiding) < self.options.class_dropout
        labels = labels.masked_fill(hidden.to(self.device), self.module.no_class)
        loss = nats_per_code(self.module, own, above, labels)
        self.meter.add(len(chosen), loss)
        return loss

    def validate(self, step: int) -> dict[str, float]:
        nats = held_out_nats(self.module, self.codes, self.held_out, self.options.batch_size)
        self.since_best += 1
        if nats < self.best:
            self.best, self.since_best = nats, 0
            save_prior(self.options.out, self.module, about(self.codes, self.options, step, nats))
        return {"val_nats_per_code": nats}

    def record(self, row: dict[str, float]) -> None:
        run_folder.append_row(self.options.out, row)
        figures = f"nats per code {row['nats_per_code']:.4f}  {row['images_per_second']:.0f} images/s"
        held_out = f"{row['val_nats_per_code']:.4f}" if "val_nats_per_code" in row else ""
        self.progress.row(row["step"], figures, held_out)
        if self.finished:
            self.progress.say(f"no better for {self.since_best} measurements: stopped after step {row['step']}")

    @property
    def finished(self) -> bool:
        return self.since_best == self.options.patience


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


@torch.no_grad()
def held_out_nats(prior: Prior, codes: Codes, held_out: np.ndarray, batch_size: int) -> float:
    """Mean over the held-out images, each with its class."""
    was_training = prior.training
    prior.eval()
    device = next(prior.parameters()).device
    total = 0.0
    for images in np.split(held_out, range(batch_size, len(held_out), batch_size)):
        total += nats_per_code(prior, *batch_of(codes, images, prior, device)).item() * len(images)
    prior.train(was_training)
    return total / len(held_out)


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
        "training": asdict(options),
        "step": step,
        "val_nats_per_code": best,
    }
