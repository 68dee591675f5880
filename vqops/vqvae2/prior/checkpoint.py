"""A trained prior in one file, and the set of priors that samples are drawn from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vqops import __version__
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files.descriptions import as_tuples, described, of_type, shortened
from vqops.vqvae2.networks.checkpoint import read_network, write_file
from vqops.vqvae2.networks.vqvae2 import VQVAE2Config
from vqops.vqvae2.prior.transformer import Prior, PriorConfig

PRIOR, KIND = "prior.safetensors", "vqops.prior"


def save_prior(folder: Path, prior: Prior, about: dict[str, Any]) -> None:
    """Write the weights with their configuration; `about` says of which model, data and training."""
    description = {"kind": KIND, "vqops": __version__, "prior": asdict(prior.config), **about}
    write_file(folder / PRIOR, prior.state_dict(), description)


def load_prior(folder: Path, device: torch.device | str = "cpu") -> tuple[Prior, dict[str, Any]]:
    """The prior of a folder, in eval mode, and its description; raises InputError if there is none."""
    path = folder / PRIOR
    if not path.is_file():
        raise InputError(f"{folder}: no prior is there (no {PRIOR}); vqops train-prior writes it")

    def network(description: dict[str, Any]) -> Prior:
        config = description.get("prior")
        if isinstance(config, dict) and "version" not in config:
            raise InputError("a prior of the first version, which this one cannot draw from: train it anew")
        return Prior(described(PriorConfig, config))

    return read_network(path, KIND, network, device)


def load_priors(
    folders: tuple[Path, ...], model: str, config: VQVAE2Config, device: torch.device
) -> tuple[list[Prior], tuple[int, int]]:
    """The priors from bottom to top, and height and width of the images that they learned.

    Raises InputError unless there is exactly one for each level, all of codes of this model (its SHA-256).
    """
    priors, sizes, levels = {}, {}, config.level_names
    for folder in folders:
        prior, description = load_prior(folder, device)
        if description.get("model") != model:
            raise InputError(f"{folder}: this prior learned the codes of another model than this run's")
        sizes[folder] = image_size(folder, description, config)
        check_fits(folder, prior.config, config, sizes[folder])
        if prior.config.level in priors:
            raise InputError(Field("prior"), f" names two priors of level {prior.config.level}")
        priors[prior.config.level] = prior
    if missing := [level for level in levels if level not in priors]:
        raise InputError(Field("prior"), f" names none of level {' and '.join(missing)}: one for each level is needed")
    ordered = [priors[level] for level in levels]
    if len(set(sizes.values())) > 1 or len({prior.config.classes for prior in ordered}) > 1:
        reason = " names priors of other image sizes or classes: train them on the same codes"
        raise InputError(Field("prior"), reason)
    return ordered, sizes[folders[0]]


def image_size(folder: Path, description: dict[str, Any], config: VQVAE2Config) -> tuple[int, int]:
    shape = as_tuples(description.get("image_shape"))
    if not of_type(shape, tuple[int, int, int]) or shape[0] != config.image_channels or min(shape) < 1:
        found = f"image_shape is {shortened(shape)}"
        raise InputError(f"{folder / PRIOR} describes no images of {config.image_channels} channels: {found}")
    return shape[1:]


def check_fits(folder: Path, prior: PriorConfig, config: VQVAE2Config, size: tuple[int, int]) -> None:
    """Raises InputError unless the codes that the prior draws are those of the model, for images of this size."""
    there = prior.level_names, prior.codebook_size, prior.sizes
    here = config.level_names, config.codebook_size, config.code_sizes(*size)
    for what, found, expected in zip(("levels", "codes a level", "sizes"), there, here, strict=True):
        if found != expected:
            raise InputError(f"{folder / PRIOR}: its {what} are {shortened(found)}, of the model {expected}")
