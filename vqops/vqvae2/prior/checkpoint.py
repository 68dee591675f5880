"""A trained prior in one file, and the set of priors that samples are drawn from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vqops import __version__
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.networks.checkpoint import read_network, write_file
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
    return read_network(path, KIND, lambda description: Prior(PriorConfig(**description["prior"])), device)


def load_priors(
    folders: tuple[Path, ...], model: str, levels: tuple[str, ...], device: torch.device
) -> tuple[list[Prior], dict[str, Any]]:
    """The priors from bottom to top and the description of one of them.

    Raises InputError unless there is exactly one for each level, all of codes of this model (its SHA-256).
    """
    priors = {}
    for folder in folders:
        prior, description = load_prior(folder, device)
        if description["model"] != model:
            raise InputError(f"{folder}: this prior learned the codes of another model than this run's")
        if prior.config.level in priors:
            raise InputError(Field("prior"), f" names two priors of level {prior.config.level}")
        priors[prior.config.level] = prior
    if missing := [level for level in levels if level not in priors]:
        raise InputError(Field("prior"), f" names none of level {' and '.join(missing)}: one for each level is needed")
    ordered = [priors[level] for level in levels]
    for prior in ordered:
        if (prior.config.sizes, prior.config.classes) != (ordered[0].config.sizes, ordered[0].config.classes):
            reason = " names priors of other image sizes or classes: train them on the same codes"
            raise InputError(Field("prior"), reason)
    return ordered, description
