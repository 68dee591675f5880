"""Pictures of what a model makes of images: latents by class, use of the codes, codes among vectors, index maps."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from vqops.vqvae2.metrics import count_codes
from vqops.vqvae2.networks.vqvae2 import VQVAE2, as_float
from vqops.vqvae2.pictures.curves import save_figure
from vqops.vqvae2.pictures.grids import SHOWN_IMAGES, save_rows
from vqops.vqvae2.progress import counted

SHOWN_VECTORS, SHOWN_MEANS = 4000, 20_000


class Some:
    """At most `most` of all rows it is given, in their order: any as likely as any other, and always the same."""

    def __init__(self, most: int):
        self.most, self.seen = most, 0
        self.random = np.random.default_rng(0)
        self.keys = np.empty(0)  # [n], uniform in [0, 1): the rows with the smallest are kept
        self.positions = np.empty(0, np.int64)  # [n], of the kept rows among all
        self.rows: Tensor | None = None  # [n, D]

    def add(self, rows: Tensor) -> None:  # [N, D]
        keys = self.random.random(len(rows))
        chosen = np.flatnonzero(keys < (self.keys.max() if len(self.keys) == self.most else 1))
        chosen_rows = rows[torch.from_numpy(chosen).to(rows.device)].cpu()
        keys = np.concatenate([self.keys, keys[chosen]])
        kept = np.sort(np.argsort(keys)[: self.most])
        self.keys, self.positions = keys[kept], np.concatenate([self.positions, self.seen + chosen])[kept]
        self.rows = (chosen_rows if self.rows is None else torch.cat([self.rows, chosen_rows]))[torch.from_numpy(kept)]
        self.seen += len(rows)


class Seen:
    """Images as a model sees them: mean latents of some, vectors of the encoder of some, all codes counted by level."""

    @torch.no_grad()
    def __init__(self, model: VQVAE2, batches: Collection[Tensor]):
        config, device = model.eval().config, next(model.parameters()).device
        self.model = model
        self.counts = torch.zeros(config.levels, config.codebook_size, dtype=torch.int64, device=device)
        self.means, self.vectors = Some(SHOWN_MEANS), [Some(SHOWN_VECTORS) for _ in range(config.levels)]
        hooks = [
            layer.register_forward_hook(lambda _, inputs, out, some=some: some.add(out.movedim(1, -1).flatten(0, 2)))
            for layer, some in zip(model.to_codes, self.vectors, strict=True)
        ]
        try:
            for pixels in counted("batches for the pictures", batches):
                codes, indices, _ = model.quantize(as_float(pixels.to(device)))
                self.means.add(codes.mean((2, 3)))
                for level, index in enumerate(indices):
                    self.counts[level] += count_codes(index, config.codebook_size)
        finally:
            for hook in hooks:
                hook.remove()


def plane(vectors: Tensor) -> tuple[Tensor, Tensor]:  # [N, D]; mean [D], axes [D, 2]
    """The two principal axes; zeros for one that a single vector, or a single dimension, does not have."""
    mean = vectors.mean(0)
    axes = torch.linalg.svd((vectors - mean).double(), full_matrices=False).Vh[:2].T.float()
    return mean, F.pad(axes, (0, 2 - axes.shape[1]))


def save_latents(path: Path, seen: Seen, labels: np.ndarray | None, classes: tuple[str, ...]) -> None:
    """A PNG of the images' mean latents along their two principal axes, coloured by class."""
    means, positions = seen.means.rows, seen.means.positions
    mean, axes = plane(means)
    points = ((means - mean) @ axes).numpy()
    figure = Figure(figsize=(6, 5), layout="constrained")
    plot = figure.subplots()
    if labels is None:
        plot.scatter(*points.T, s=5)
    for number, name in enumerate(classes):
        plot.scatter(*points[labels[positions] == number].T, s=5, label=name, color=colormaps["tab10"](number % 10))
    if classes:
        plot.legend(fontsize=7, markerscale=2)
    shown = "each image" if len(means) == seen.means.seen else f"{len(means)} of {seen.means.seen} images"
    plot.set(title=f"mean latent of {shown}", xlabel="first principal axis", ylabel="second")
    save_figure(path, figure, dpi=90)


def save_codes(path: Path, seen: Seen) -> None:
    """A PNG with, for each level of a VQ model, how often codes are used and where they lie among the vectors."""
    model = seen.model
    names = model.config.level_names
    figure = Figure(figsize=(11, 3.6 * len(names)), layout="constrained")
    for row, (name, counts, vectors) in enumerate(zip(names, seen.counts.cpu(), seen.vectors, strict=True)):
        usage, scatter = (figure.add_subplot(len(names), 2, 2 * row + column) for column in (1, 2))
        shares = (counts / counts.sum()).sort(descending=True).values.numpy()
        usage.bar(range(len(shares)), shares, width=1)
        usage.axhline(1 / len(shares), color="grey", linestyle="--", label="equal use")
        usage.set(title=f"{name}: {int((counts > 0).sum())} of {len(counts)} codes used", xlabel="codes by use")
        usage.set_ylabel("share")
        usage.legend()
        mean, axes = plane(vectors.rows)
        codes = model.quantizers[row].codebook.detach().cpu()  # [K, D]
        shown = f"{len(vectors.rows)} of {vectors.seen} vectors of the encoder"
        scatter.scatter(*((vectors.rows - mean) @ axes).T.numpy(), s=2, alpha=0.3, label=shown)
        scatter.scatter(*((codes - mean) @ axes).T.numpy(), s=5, color="black", label="codes")
        scatter.set(title=f"{name}: along the two principal axes of the vectors")
        scatter.legend()
    save_figure(path, figure, dpi=90)


@torch.no_grad()
def save_index_maps(path: Path, model: VQVAE2, pixels: Tensor) -> None:  # uint8 [B, C, H, W]
    """A PNG with a row of images, of their reconstructions and of the codes of each level, a colour a code."""
    pixels = pixels[:SHOWN_IMAGES]
    config, device = model.eval().config, next(model.parameters()).device
    indices = model.encode(as_float(pixels.to(device)))
    random = np.random.default_rng(0).permutation(config.codebook_size)  # neighbours in number look different
    rows = {"images": pixels, "reconstructions": model.reconstruct(pixels)}
    levels = list(zip(config.level_names, indices, config.pixels_per_code, strict=True))
    for name, index, factor in reversed(levels):  # top first
        shades = colormaps["nipy_spectral"](random[index.cpu().numpy()] / max(config.codebook_size - 1, 1))
        maps = torch.from_numpy((shades[..., :3] * 255).astype(np.uint8)).permute(0, 3, 1, 2)
        maps = maps.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        rows[f"{name} codes"] = maps[:, :, : pixels.shape[-2], : pixels.shape[-1]]
    save_rows(path, rows)
