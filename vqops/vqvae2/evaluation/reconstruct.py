"""`vqops reconstruct`: images through the codes of a trained model."""

from pathlib import Path

import torch

from vqops.vqvae2.data.survey import of_files
from vqops.vqvae2.errors import InputError
from vqops.vqvae2.evaluation.options import ReconstructOptions
from vqops.vqvae2.files.run_folder import check_output, writing_in
from vqops.vqvae2.metrics import psnr
from vqops.vqvae2.networks.checkpoint import load_model, model_path, reading_of
from vqops.vqvae2.pictures.grids import write_png
from vqops.vqvae2.progress import Counting, say


def reconstruct(options: ReconstructOptions) -> None:
    """Write the reconstruction of each image, at its own size, as a PNG of the same name.

    Raises InputError, before anything is written, for a model or an image that cannot be read, for two images of one
    name, and for an output folder that cannot be used.
    """
    check_output(options.out)
    outputs = output_paths(options.images, options.out)
    model = load_model(options.run)
    images = of_files(options.images, reading_of(model_path(options.run), model))
    say(images.report)
    with writing_in(options.out), Counting("images", len(outputs)) as counting:
        options.out.mkdir(parents=True, exist_ok=True)
        for done, (image, output) in enumerate(zip(images, outputs, strict=True), start=1):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            reconstruction = model.reconstruct(pixels)
            write_png(output, reconstruction[0].permute(1, 2, 0).numpy())
            mse = (pixels.float() - reconstruction.float()).div(255).square().mean().item()
            say(f"{output}  mse {mse:.5f} ({psnr(mse):.1f} dB)", counting.console)
            counting.reach(done)
    following = "vqops extract RUN --data PATH --out CODES" if model.config.discrete else "vqops compare --out FOLDER"
    say(f"next: {following.replace('RUN', str(options.run))}")
    say(f"reconstructions: {options.out}")


def output_paths(images: tuple[Path, ...], folder: Path) -> list[Path]:
    sources = {}
    for image in images:
        output = folder / f"{image.stem}.png"
        if output in sources:
            raise InputError(f"{sources[output]} and {image} would both be written to {output}: rename one")
        sources[output] = image
    return list(sources)
