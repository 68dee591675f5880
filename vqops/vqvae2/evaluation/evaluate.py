"""`vqops evaluate`: the figures of a model, each with its scale, range and split."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqops.vqvae2.data.batches import middles, validation_batches, window_of
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.labels import load_labels
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.evaluation.options import EvaluateOptions
from vqops.vqvae2.evaluation.reconstruction_metrics import measure
from vqops.vqvae2.evaluation.sets import ImageSets
from vqops.vqvae2.files.run_folder import check_output, write_text, writing_in
from vqops.vqvae2.networks.checkpoint import fingerprint, load_model, model_path, reading_of, training_options
from vqops.vqvae2.networks.vqvae2 import as_float
from vqops.vqvae2.pictures.latents import Seen, save_codes, save_index_maps, save_latents
from vqops.vqvae2.prior.checkpoint import load_priors
from vqops.vqvae2.prior.sample import decoded
from vqops.vqvae2.prior.sampling import draw_levels
from vqops.vqvae2.prior.train_prior import bits_per_dim
from vqops.vqvae2.prior.transformer import Prior, nats_per_code
from vqops.vqvae2.progress import counted, say
from vqops.vqvae2.training.processes import pick_device

TRAINING_IMAGES_AT_ONCE = 4096
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
    "frechet": "from 0, Frechet distance of Gaussians in the features of the classifier of real images: no FID, whose "
    "features are Inception's, and to be compared within this table only; lower is better",
    "precision": "0 to 1, share of these images that lie among the held-out ones, in the same features",
    "recall": "0 to 1, share of the held-out images that lie among these, in the same features",
    "near": "share of the samples that are nearer to a training image than a hundredth of the reconstructions of "
    "held-out images are: 0.01 where they are no nearer than those, 1 where all are copies",
    "distance": "median distance to the nearest training image: root mean squared difference of values in [0, 1]",
}


def evaluate(options: EvaluateOptions) -> Path:
    """Measure and write evaluation.json, evaluation.md and pictures. Raises InputError for what cannot be used."""
    check_output(options.out)
    evaluation = Evaluation(options)
    model, batches = evaluation.model, evaluation.batches
    measured = {name: value for name, value in measure(model, batches).items() if not math.isnan(value)}
    rows = [row(name, value, evaluation.split) for name, value in measured.items() if name != "images"]
    if evaluation.priors:
        rows += evaluation.likelihoods()
    sets = evaluation.sets() if options.classifier_data is not None else None
    if sets is not None:
        rows += evaluation.set_rows(sets)
    with writing_in(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "evaluation.json", json.dumps(rows, indent=2) + "\n")
        write_text(options.out / "evaluation.md", markdown(rows))
    seen = Seen(model, batches)
    main = "mean latent of each image", "latents.png"
    save_latents(options.out / "latents.png", seen, evaluation.labels, evaluation.classes)
    if model.config.bottleneck == "vq":
        main = "images, reconstructions and codes", "index_maps.png"
        save_codes(options.out / "codes.png", seen)
        save_index_maps(options.out / "index_maps.png", model, next(iter(batches)))
    if sets is not None and sets.drawn:
        main = "samples, a column a class", "samples.png"
        sets.save_samples(options.out / "samples.png")
        sets.save_copies(options.out / "copies.png")
    say(markdown(rows))
    say(f"written, with pictures, to {options.out}")
    following = "sample RUN --prior FOLDER... --out FOLDER" if options.prior else "extract RUN --data PATH --out CODES"
    say(f"next: vqops {following.replace('RUN', str(options.run))}")
    what, picture = main
    say(f"{what}: {options.out / picture}")
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


def prior_labels(prior: Prior, labels: np.ndarray | None, classes: tuple[str, ...]) -> np.ndarray | None:
    """The labels in the priors' numbers; raises InputError for a class that they do not know."""
    if labels is None or not prior.config.classes:
        return None
    if unknown := [name for name in classes if name not in prior.config.classes]:
        raise InputError(f"the priors do not know the classes {', '.join(unknown)}")
    return np.array([prior.config.classes.index(name) for name in classes])[labels]


class Evaluation:
    """A model, the images to measure it on, and its priors, if they are given."""

    def __init__(self, options: EvaluateOptions):
        self.options, self.device = options, pick_device(options.device)
        path = model_path(options.run)
        self.model = load_model(options.run, self.device)
        self.reading = reading_of(path, self.model, options.skip_bad_images)
        self.images = load_images(options.data, options.data_key, reading=self.reading)
        for line in self.images.lines:
            say(line)
        self.labels, self.classes = load_labels(options.data, self.images, options.labels, options.label_key)
        image_size = training_options(path)["image_size"] if options.image_size is None else options.image_size
        self.window = window_of(self.images, image_size)
        self.batches = validation_batches(self.images, self.window, options.batch_size, num_workers=0)
        key = f"[{options.data_key}]" if options.data_key else ""
        self.split = f"{len(self.images)} images of {options.data}{key}"
        self.priors: list[Prior] = []
        if options.prior:
            self.priors, learned = load_priors(options.prior, fingerprint(path), self.model.config, self.device)
            if learned != self.window:
                there, here = (f"{height} x {width}" for height, width in (learned, self.window))
                raise InputError(f"the priors learned the codes of images of {there}, these are {here}")

    @torch.no_grad()
    def likelihoods(self) -> list[dict[str, object]]:
        priors, labels = self.priors, prior_labels(self.priors[0], self.labels, self.classes)
        nats, start = torch.zeros(len(priors), dtype=torch.float64), 0
        for pixels in counted("batches under the priors", self.batches):
            codes = self.model.encode(as_float(pixels.to(self.device)))
            count = len(pixels)
            for level, prior in enumerate(priors):
                if labels is None:
                    given = torch.full((count,), prior.no_class, device=self.device)
                else:
                    given = torch.from_numpy(labels[start : start + count]).to(self.device)
                nats[level] += nats_per_code(prior, codes[level], codes[level + 1 :], given).item() * count
            start += count
        nats = (nats / start).tolist()
        shape = (self.model.config.image_channels, *pixels.shape[-2:])
        bits = sum(bits_per_dim(value, prior.config, shape) for value, prior in zip(nats, priors, strict=True))
        names = [f"nats_per_code_{prior.config.level}" for prior in priors]
        return [row(name, n, self.split) for name, n in zip([*names, "prior_bits_per_dim"], [*nats, bits], strict=True)]

    def sets(self) -> ImageSets:
        """Real images that classifiers learn from, their reconstructions, and samples of their classes."""
        options, classes = self.options, self.classes
        if self.labels is None:
            needed = f" also needs labels of {options.data}: give "
            raise InputError(Field("classifier_data"), needed, Field("label_key"))
        source = load_images(options.classifier_data, options.classifier_key, reading=self.reading)
        for line in source.lines:
            say(line)
        labels = options.classifier_labels, options.classifier_label_key
        learned, names = load_labels(options.classifier_data, source, *labels)
        if learned is None or names != classes:
            found = f": its classes are {', '.join(names) or 'none'}, not {', '.join(classes)}"
            raise InputError(Field("classifier_data"), found)
        order, others = (self.some(images, options.classifier_images) for images in (source, self.images))
        targets = torch.from_numpy(learned[order]).to(self.device)
        real, held_out = self.middles(source, order), self.middles(self.images, others[: len(order)])
        sets = {"real": real, "reconstructions": self.reconstructed(real)}
        if self.priors:
            sets["samples"] = self.drawn(targets)
        return ImageSets(
            sets,
            targets,
            classes,
            training=validation_batches(source, self.window, TRAINING_IMAGES_AT_ONCE, num_workers=0),
            tested=self.batches,
            tested_labels=torch.from_numpy(self.labels).to(self.device),
            held_out=held_out,
            held_out_reconstructions=self.reconstructed(held_out),
            batch_size=options.batch_size,
            steps=options.classifier_steps,
            seed=options.seed,
        )

    def some(self, images: Images, most: int) -> np.ndarray:
        """Positions of so many at most, drawn from all."""
        return np.random.default_rng(self.options.seed).permutation(len(images))[:most]

    def reconstructed(self, images: Tensor) -> Tensor:  # uint8 [N, C, H, W]; the same
        batches = counted("batches reconstructed", images.split(self.options.batch_size))
        return torch.cat([self.model.reconstruct(batch) for batch in batches])

    def set_rows(self, sets: ImageSets) -> list[dict[str, object]]:
        """The rows of their figures, each with how it came about; says which are left out."""
        some = len(sets.held_out)
        held_out = f"{some} of {self.split}" if some < len(self.images) else self.split
        rows = []
        for name, value in sets.figures().items():
            if math.isnan(value):
                say(f"{name}: left out, too few images ({some})")
                continue
            kind, _, of = name.partition("_")
            what = of + (f" ({self.options.drawing})" if of == "samples" else "")
            if kind == "accuracy":
                learned = f"trained on {len(sets.labels)} {what}, {sets.steps} steps"
                rows.append(row(name, value, f"tested on {self.split}; {learned}"))
            elif kind in ("near", "distance"):
                what = f"reconstructions of {held_out}" if of == "held_out" else f"{len(sets.labels)} {what}"
                rows.append(row(name, value, what))
            else:
                rows.append(row(name, value, f"{len(sets.held_out)} {what}, against {held_out}"))
        return rows

    def middles(self, images: Images, positions: Sequence[int]) -> Tensor:
        return middles(images, self.window, positions).contiguous().to(self.device)

    def drawn(self, targets: Tensor) -> Tensor:
        """A sample for each label."""
        numbers = prior_labels(self.priors[0], np.arange(len(self.classes)), self.classes)
        if numbers is None:
            raise InputError(Field("prior"), ": these priors learned no classes, samples of a class cannot be drawn")
        options = self.options
        generator = torch.Generator(self.device).manual_seed(options.seed)
        with torch.no_grad():
            parts = torch.from_numpy(numbers).to(self.device)[targets].split(options.batch_size)
            drawn = counted("batches drawn", parts)
            codes = (draw_levels(self.priors, part, options, generator) for part in drawn)
            return torch.cat([decoded(self.model, levels, self.window) for levels in codes])
