"""A model, codes and priors as files, as if they had been trained: their weights are random."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vqops.vqvae2 import VQVAE2, Codes, CodesMeta, Prior, PriorConfig, TrainOptions, VQVAE2Config, save_model
from vqops.vqvae2.networks.checkpoint import fingerprint
from vqops.vqvae2.prior.checkpoint import save_prior

CONFIG = VQVAE2Config(channels=8, codebook_size=8, code_dim=4, image_channels=1, strides=(2, 2))
CLASSES = ("cat", "dog")


def write_chain(folder: Path, size: int = 16, images: int = 20, config: VQVAE2Config = CONFIG) -> None:
    """images.npy [N, size, size], run, codes, and a folder of the name of each level with its prior."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, size, size), dtype=np.uint8)
    np.save(folder / "images.npy", pixels)
    model = VQVAE2(config)
    model(torch.from_numpy(pixels[:20, None]) / 255)  # the codebooks start with what they see first
    (folder / "run").mkdir()
    save_model(folder / "run" / "model.safetensors", model, TrainOptions(image_size=size), step=1)
    sizes, shape = config.code_sizes(size, size), (1, size, size)
    sha = fingerprint(folder / "run" / "model.safetensors")
    meta = CodesMeta(images, 0, shape, config.codebook_size, config.level_names, sizes, sha, "data", "", "", CLASSES)
    (folder / "codes").mkdir()
    codes = Codes.create(folder / "codes", meta, random.integers(0, len(CLASSES), images))
    codes.write(0, tuple(torch.from_numpy(random.integers(0, config.codebook_size, (images, *size))) for size in sizes))
    codes.mark(images)
    first = PriorConfig("bottom", config.level_names, sizes, config.codebook_size, CLASSES, width=8, layers=1, heads=2)
    for level in config.level_names:
        (folder / level).mkdir()
        save_prior(folder / level, Prior(replace(first, level=level)), {"model": sha, "image_shape": shape})
