"""`vqops evaluate`: the figures of a model, each with its scale, range and split."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from vqops.vqvae2.data.batches import Crops, stack, validation_batches, window_of
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.labels import load_labels
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.evaluation.classifier import accuracy, trained
from vqops.vqvae2.evaluation.options import EvaluateOptions
from vqops.vqvae2.evaluation.reconstruction_metrics import measure
from vqops.vqvae2.files.run_folder import atomically, check_output, writing_in
from vqops.vqvae2.networks.checkpoint import fingerprint, load_model, model_path, training_options
from vqops.vqvae2.networks.vqvae2 import VQVAE2, as_float
from vqops.vqvae2.pictures.latents import Seen, save_codes, save_index_maps, save_latents
from vqops.vqvae2.prior.checkpoint import load_priors
from vqops.vqvae2.prior.options import DrawOptions
from vqops.vqvae2.prior.sample import decoded
from vqops.vqvae2.prior.sampling import draw_levels
from vqops.vqvae2.prior.train_prior import bits_per_dim
from vqops.vqvae2.prior.transformer import Prior, nats_per_code
from vqops.vqvae2.training.processes import pick_device

SCALES = {
    "mse": "squared error per value, values in [0, 1], clamped; lower is better",
    "psnr": "dB, -10 log10 of the mse of all values; higher is better",
    "ssim": "-1 to 1, scikit-image, uniform 7 x 7 window, mean over channels and images; higher is better",
    "bits_per_dim": "bits per value of the image, log2 K a code (KL for gaussian), without a prior",
    "perplexity": "1 to K, exp of the entropy of the use of the codes over all images",
    "codes_used": "0 to K, codes used at least once",
    "nats_per_code": "nats, -ln p(code) of the prior, 0 to about ln K; lower is better",
    "prior_bits_per_dim": "bits per value of the image, codes of all levels with their priors; lower is better",
    "accuracy": "share of real images named rightly, 0 to 1, by a small classifier trained on other images",
}


def evaluate(options: EvaluateOptions) -> Path:
    """Measure and write evaluation.json, evaluation.md and pictures. Raises InputError for what cannot be used."""
    check_output(options.out)
    device = pick_device(options.device)
    path = model_path(options.run)
    model = load_model(options.run, device)
    channels = model.config.image_channels
    images = load_images(options.data, options.data_key, channels=channels)
    labels, classes = load_labels(options.data, options.label_key, len(images))
    image_size = training_options(path)["image_size"] if options.image_size is None else options.image_size
    window = window_of(images, image_size)
    priors = []
    if options.prior:
        priors, about = load_priors(options.prior, fingerprint(path), model.config.level_names, device)
        check_size(tuple(about["image_shape"][1:]), window)
    split = f"{len(images)} images of {options.data}" + (f"[{options.data_key}]" if options.data_key else "")

    batches = validation_batches(images, window, options.batch_size, num_workers=0)
    measured = {name: value for name, value in measure(model, batches).items() if not math.isnan(value)}
    rows = [row(name, value, split) for name, value in measured.items() if name != "images"]
    if priors:
        rows += likelihoods(model, priors, batches, prior_labels(priors[0], labels, classes), split, device)
    if options.classifier_data is not None:
        if labels is None:
            raise InputError(
                Field("classifier_data"), f" needs labels of {options.data}, too: give ", Field("label_key")
            )
        rows += scores(model, priors, images, labels, classes, window, options, split, device)
    with writing_in(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        with atomically(options.out / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(rows, indent=2) + "\n")
        with atomically(options.out / "evaluation.md") as temporary:
            temporary.write_text(markdown(rows))
    seen = Seen(model, batches)
    save_latents(options.out / "latents.png", seen, labels, classes)
    if model.config.bottleneck == "vq":
        save_codes(options.out / "codes.png", seen)
        save_index_maps(options.out / "index_maps.png", model, next(iter(batches)))
    console = Console(highlight=False)
    console.print(markdown(rows), soft_wrap=True, markup=False)
    console.print(f"written, with pictures, to {options.out}", soft_wrap=True, markup=False)
    following = "sample RUN --prior FOLDER... --out FOLDER" if priors else "extract RUN --data PATH --out CODES"
    console.print(f"next: vqops {following.replace('RUN', str(options.run))}", soft_wrap=True, markup=False)
    return options.out


def row(name: str, value: float, split: str) -> dict[str, object]:
    scale = next(text for key, text in SCALES.items() if name.startswith(key))
    return {"name": name, "value": value, "scale": scale, "split": split}


def markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| figure | value | scale | measured on |", "| --- | ---: | --- | --- |"]
    for one in rows:
        value = one["value"] if isinstance(one["value"], int) else f"{one['value']:.4g}"
        lines.append(f"| {one['name']} | {value} | {one['scale']} | {one['split']} |")
    return "\n".join(lines) + "\n"


def check_size(learned: tuple[int, int], window: tuple[int, int]) -> None:
    if learned != window:
        there, here = (f"{height} x {width}" for height, width in (learned, window))
        raise InputError(f"the priors learned the codes of images of {there}, these are {here}")


def prior_labels(prior: Prior, labels: np.ndarray | None, classes: tuple[str, ...]) -> np.ndarray | None:
    """The labels in the priors' numbers; raises InputError for a class that they do not know."""
    if labels is None or not prior.config.classes:
        return None
    if unknown := [name for name in classes if name not in prior.config.classes]:
        raise InputError(f"the priors do not know the classes {', '.join(unknown)}")
    return np.array([prior.config.classes.index(name) for name in classes])[labels]


@torch.no_grad()
def likelihoods(
    model: VQVAE2, priors: list[Prior], batches, labels: np.ndarray | None, split: str, device: torch.device
) -> list[dict[str, object]]:
    nats, start = torch.zeros(len(priors), dtype=torch.float64), 0
    for pixels in batches:
        codes = model.encode(as_float(pixels.to(device)))
        count = len(pixels)
        for level, prior in enumerate(priors):
            if labels is None:
                given = torch.full((count,), prior.no_class, device=device)
            else:
                given = torch.from_numpy(labels[start : start + count]).to(device)
            nats[level] += nats_per_code(prior, codes[level], codes[level + 1 :], given).item() * count
        start += count
    nats = (nats / start).tolist()
    shape = (model.config.image_channels, *pixels.shape[-2:])
    bits = sum(bits_per_dim(value, prior.config, shape) for value, prior in zip(nats, priors, strict=True))
    rows = [row(f"nats_per_code_{prior.config.level}", n, split) for n, prior in zip(nats, priors, strict=True)]
    return [*rows, row("prior_bits_per_dim", bits, split)]


def scores(
    model: VQVAE2,
    priors: list[Prior],
    images: Images,
    labels: np.ndarray,
    classes: tuple[str, ...],
    window: tuple[int, int],
    options: EvaluateOptions,
    split: str,
    device: torch.device,
) -> list[dict[str, object]]:
    """Accuracy on these images of classifiers that learned from real images, reconstructions and samples."""
    source = load_images(options.classifier_data, options.classifier_key, channels=model.config.image_channels)
    learned, names = load_labels(options.classifier_data, options.classifier_label_key, len(source))
    if learned is None or names != classes:
        raise InputError(
            Field("classifier_data"), f": its classes are {', '.join(names) or 'none'}, not {', '.join(classes)}"
        )
    order = np.random.default_rng(options.seed).permutation(len(source))[: options.classifier_images]
    real, targets = cropped(source, window, order).to(device), torch.from_numpy(learned[order]).to(device)
    sets = {"real": (real, targets), "reconstructions": (reconstructed(model, real, options.batch_size), targets)}
    if priors:
        sets["samples"] = (drawn(model, priors, targets, classes, window, options, device), targets)
    tested, truth = cropped(images, window, np.arange(len(images))).to(device), torch.from_numpy(labels).to(device)
    rows = []
    for name, (pixels, given) in sets.items():
        classifier = trained(pixels, given, len(classes), options.classifier_steps, options.seed)
        where = f"tested on {split}; trained on {len(pixels)} {name}, {options.classifier_steps} steps"
        rows.append(row(f"accuracy_{name}", accuracy(classifier, tested, truth), where))
    return rows


def cropped(images: Images, window: tuple[int, int], positions: np.ndarray) -> Tensor:
    crops = Crops(images, window)
    return stack([crops[(int(position), None)] for position in positions]).contiguous()


def reconstructed(model: VQVAE2, pixels: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model.reconstruct(part) for part in pixels.split(batch_size)])


def drawn(
    model: VQVAE2,
    priors: list[Prior],
    targets: Tensor,
    classes: tuple[str, ...],
    window: tuple[int, int],
    options: EvaluateOptions,
    device: torch.device,
) -> Tensor:
    """A sample for each label, as the priors learned: temperature 1, no guidance."""
    numbers = prior_labels(priors[0], np.arange(len(classes)), classes)
    if numbers is None:
        raise InputError(Field("prior"), ": these priors learned no classes, samples of a class cannot be drawn")
    labels = torch.from_numpy(numbers).to(device)[targets]
    draw = DrawOptions(options.run, options.prior, options.out)
    generator = torch.Generator(device).manual_seed(options.seed)
    with torch.no_grad():
        parts = labels.split(options.batch_size)
        return torch.cat([decoded(model, draw_levels(priors, part, draw, generator), window) for part in parts])
