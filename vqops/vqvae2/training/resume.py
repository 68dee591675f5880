"""`--resume`: all that a step depends on, in one file, so that a run goes on as if it had not been cut off.

train.py begins with it; run_folder.rewind cuts the metrics back to the checkpoint.
"""

import operator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vqops import __version__
from vqops.vqvae2.errors import Field, InputError, reason
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import TRANSIENT, read_options
from vqops.vqvae2.networks.vqvae2 import level_strides
from vqops.vqvae2.training.optimization import WeightAverage
from vqops.vqvae2.training.options import TrainOptions

# Fields that may differ between a run and its continuation: how long, where and how often, not what.
MAY_CHANGE = ("steps", "eval_every", "checkpoint_every", "num_workers", "device", "out", *TRANSIENT)


class TrainState:
    """A module with codebooks in it, its optimizer, the average of its weights, and the number of steps done.

    The order of the data needs no place here: it is a function of the seed and the step. `about` is what must not
    change between saving and loading, such as the number of images.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, about: dict[str, Any]
    ):
        self.module, self.optimizer, self.average, self.about = module, optimizer, average, about
        self.step = 0

    def save(self, path: Path) -> None:
        """Write the file: whole, or not at all."""
        state = {
            "vqops": __version__,
            "about": self.about,
            "step": self.step,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with run_folder.atomically(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Raises InputError if the file is damaged, or of another network, version or data."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle fails in as many ways as there are
            raise InputError(f"{path}: not a readable checkpoint ({reason(error)})") from error
        if not isinstance(state, dict) or not isinstance(state.get("about"), dict):
            raise InputError(f"{path}: not a checkpoint of vqops")
        for name, here in self.about.items():
            if (there := state["about"].get(name)) != here:
                raise InputError(f"{path} was written with {name} {there}, now it is {here}")
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            torch.set_rng_state(state["random"])
            if state["cuda_random"] and len(state["cuda_random"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda_random"])
            self.step = operator.index(state["step"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            found = f"{state.get('vqops')}, this is {__version__}: {reason(error)}"
            raise InputError(f"{path} was written by vqops {found}") from error


def continued(options: TrainOptions) -> TrainOptions:
    """The options as those of a continuation; raises InputError where they do not fit the run."""
    folder = options.resume
    if not (folder / run_folder.CONFIG).is_file():
        raise InputError(Field("resume"), f" {folder}: no run of vqops train is there (no {run_folder.CONFIG})")
    if options.out not in (None, folder):
        place = f" {folder} goes on in that folder, "
        raise InputError(Field("resume"), place, Field("out"), f" {options.out} is another")
    before = with_strides(read_options(folder / run_folder.CONFIG, TrainOptions))
    now = with_strides(options)
    for name in (field.name for field in fields(TrainOptions) if field.name not in MAY_CHANGE):
        there, here = getattr(before, name), getattr(now, name)
        if there != here:
            reason = f" is {there} there and cannot change, got {here}"
            raise InputError(Field("resume"), f" {folder}: ", Field(name), reason)
    return replace(options, out=folder)


def with_strides(options: TrainOptions) -> TrainOptions:
    """The same options with the default strides written out."""
    return replace(options, strides=level_strides(options.strides, options.levels))
