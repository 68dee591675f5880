"""Ways to double the maps of a decoder: the error after equal time, and the spectrum of what is left of it.

    python -m benchmarks.upsampling CIFAR10.npz    train with each way on CIFAR-10 and on the photographs, record, draw
    python -m benchmarks.upsampling                draw what is recorded

The .npz holds x_train and x_val, uint8 [N, 32, 32, 3]. A record is JSON lines: what was run where, then a row a way.
The seconds of a step are measured first, in turns; each way then takes as many steps as fit the time of the first.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.rows import environment
from vqops.vqvae2 import VQVAE2, TrainOptions, VQVAE2Config, load_model, train
from vqops.vqvae2.data.batches import middles
from vqops.vqvae2.networks.vqvae2 import DOUBLED, UpsampledConv, as_float, transposed_conv
from vqops.vqvae2.options import changed
from vqops.vqvae2.pictures.grids import SHOWN_IMAGES, save_rows
from vqops.vqvae2.progress import Progress
from vqops.vqvae2.training.images import load_data

RESULTS = Path(__file__).parent / "results" / "upsampling"
FIGURES = Path(__file__).parents[1] / "docs" / "figures" / "vqvae2"
SPECTRUM, PICTURE = FIGURES / "spectrum.png", FIGURES / "upsampling.png"
ROUNDS = 12


class Bilinear(nn.Conv2d):
    """A convolution of the map enlarged by bilinear interpolation."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="bilinear"))


def sub_pixel(in_channels: int, out_channels: int) -> nn.Module:
    """A convolution to four times the channels, laid out as squares; at the start the four are equal.

    Sources: Shi et al. 2016 (arXiv:1609.05158); Aitken et al. 2017 (arXiv:1707.02937) for the start.
    """
    conv = nn.Conv2d(in_channels, 4 * out_channels, kernel_size=3, padding=1)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))
    return nn.Sequential(conv, nn.PixelShuffle(2))


WAYS: dict[str, Callable[[int, int], nn.Module]] = {
    "transposed": transposed_conv,
    "nearest": UpsampledConv,
    "bilinear": Bilinear,
    "sub-pixel": sub_pixel,
}


def options_of(data: str, cifar10: str) -> TrainOptions:
    if data == "photographs":
        return TrainOptions()
    return TrainOptions(data=cifar10, data_key="x_train", val_key="x_val", image_size=32, steps=1500)


def seconds_per_step(size: int) -> dict[str, float]:
    """Processor time of a training step with 32 images; the median of some rounds, the ways in turns."""
    images = torch.rand(32, 3, size, size).contiguous(memory_format=torch.channels_last)
    trained, seconds = {}, {way: [] for way in WAYS}
    for way, doubled in WAYS.items():
        with patch.dict(DOUBLED, {2: doubled}):
            model = VQVAE2(VQVAE2Config()).to(memory_format=torch.channels_last)
        trained[way] = model, torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(ROUNDS):
        for way, (model, optimizer) in trained.items():
            started = time.process_time()
            output = model(images)
            optimizer.zero_grad()
            ((output.reconstruction - images).square().mean() + output.codebook_loss).backward()
            optimizer.step()
            seconds[way].append(time.process_time() - started)
    return {way: median(times[2:]) for way, times in seconds.items()}


def record(data: str, cifar10: str) -> None:
    options = options_of(data, cifar10)
    seconds = seconds_per_step(options.image_size)
    loaded = load_data(options, Progress(0)).held_out
    held_out = middles(loaded, (options.image_size, options.image_size), range(len(loaded)))
    path = RESULTS / f"{data}.jsonl"
    threads = torch.get_num_threads()
    about = {"data": data, "batch_size": options.batch_size, "levels": options.levels, "threads": threads}
    about |= {"images": spectrum(as_float(held_out).double()), **environment()}
    path.write_text(json.dumps(about) + "\n")
    shown = {"held out": held_out}
    for way, doubled in WAYS.items():
        steps = round(options.steps * seconds["transposed"] / seconds[way])
        with TemporaryDirectory() as folder, patch.dict(DOUBLED, {2: doubled}):
            model = load_model(train(changed(options, steps=steps, out=Path(folder) / "run")))
        error = torch.cat([residual(model, part) for part in held_out.split(64)])
        row = {"way": way, "milliseconds_per_step": 1000 * seconds[way], "steps": steps}
        row |= {"mse": error.square().mean().item(), **spectrum(error)}
        shown[way] = model.reconstruct(held_out[:SHOWN_IMAGES])
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if data == "photographs":
        save_rows(PICTURE, shown)


@torch.no_grad()
def residual(model: VQVAE2, pixels: Tensor) -> Tensor:  # uint8 [B, C, H, W]; float64
    images = as_float(pixels)
    return (model(images).reconstruction.clamp(0, 1) - images).double()


def spectrum(images: Tensor) -> dict[str, list[float]]:  # float64 [N, C, S, S]
    """Mean power at the frequencies 0, 1, ... S / 2 an image: along rows and columns, and on the diagonal.

    Under a Hann window in both directions, since the edges of an image would be seen at all frequencies.
    """
    size = images.shape[-1]
    window = torch.hann_window(size, dtype=torch.float64)
    window = torch.outer(window, window)
    power = torch.fft.fft2(images * window).abs().square().mean((0, 1)) / window.square().sum()  # [S, S]
    half = torch.arange(size // 2 + 1)
    return {"straight": ((power[0] + power[:, 0]) / 2)[half].tolist(), "diagonal": power[half, half].tolist()}


def excess(error: list[float], images: list[float]) -> float:
    """Power of the error at the highest frequency, a pattern of single pixels, over that of the images.

    1 where nothing is drawn at this frequency, more where something is that the images have not.
    """
    return error[-1] / images[-1]


def draw() -> None:
    paths = sorted(RESULTS.glob("*.jsonl"))
    figure = Figure(figsize=(11, 4.2 * len(paths)), layout="constrained")
    for plots, path in zip(figure.subplots(len(paths), 2, squeeze=False), paths, strict=True):
        about, *rows = map(json.loads, path.read_text().splitlines())
        for axes, direction in zip(plots, ("straight", "diagonal"), strict=True):
            frequencies = np.linspace(0, 0.5, len(about["images"][direction]))[1:]
            axes.plot(frequencies, about["images"][direction][1:], ":", color="grey", label="the images themselves")
            for row in rows:
                label = f"{row['way']}: {excess(row[direction], about['images'][direction]):.1f}"
                axes.plot(frequencies, row[direction][1:], label=label)
            which = "rows and columns" if direction == "straight" else "diagonal"
            axes.set(title=f"{path.stem}, {which}", yscale="log")
            axes.set(xlabel="cycles per pixel", ylabel="power of the held-out error")
            axes.grid(alpha=0.3)
            axes.legend(title="way: power at 1/2 over that of the images", fontsize=8)
        for row in rows:
            cells = [path.stem, row["way"], f"{row['milliseconds_per_step']:.0f}", row["steps"], f"{row['mse']:.5f}"]
            cells += [f"{excess(row[which], about['images'][which]):.1f}" for which in ("straight", "diagonal")]
            print("|", " | ".join(map(str, cells)), "|")
    figure.savefig(SPECTRUM, dpi=100)


if __name__ == "__main__":
    RESULTS.mkdir(parents=True, exist_ok=True)
    for data in ("cifar10", "photographs") if len(sys.argv) > 1 else ():
        record(data, sys.argv[1])
    draw()
