"""`--resume`: all that a step depends on, in one file, so that a run goes on as if it had not been cut off.

train.py begins with it; run_folder.rewind cuts the metrics back to the checkpoint.
"""

import operator
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vqops import __version__
from vqops.vqvae2.errors import Field, InputError, reason
from vqops.vqvae2.files import run_folder
from vqops.vqvae2.files.config_file import PLACES, TRANSIENT, read_options
from vqops.vqvae2.networks.vqvae2 import level_strides
from vqops.vqvae2.options import Kind, changed, made, types_of
from vqops.vqvae2.training.optimization import WeightAverage

# Fields that may differ between a run and its continuation: how long, where and how often, not what.
HOW_OFTEN = "steps", "eval_every", "checkpoint_every"
MAY_CHANGE = (*HOW_OFTEN, "num_workers", "skip_bad_images", "device", "out", *PLACES, *TRANSIENT)
NETWORK = "version of the network"
UNSAID = {NETWORK: 1}  # of checkpoints that say nothing of it


class Stateful(Protocol):
    """What a training remembers beside module and optimizer, as numbers, texts and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState:
    """A module with codebooks in it, its optimizer, the average of its weights, and the number of steps done.

    The order of the data needs no place here: it is a function of the seed and the step. `about` is what must not
    change between saving and loading, such as the number of images; `more` is remembered too.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage,
        about: dict[str, Any],
        more: Stateful | None = None,
    ):
        self.module, self.optimizer, self.average, self.about, self.more = module, optimizer, average, about, more
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
            "more": self.more.state_dict() if self.more else {},
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with run_folder.atomically(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Raises InputError if the file is damaged, or of another network, version or data."""
        state = read_state(path, self.about)
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            if self.more:
                self.more.load_state_dict(state["more"])
            torch.set_rng_state(state["random"])
            if state["cuda_random"] and len(state["cuda_random"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(state["cuda_random"])
            self.step = operator.index(state["step"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            found = f"{state.get('vqops')}, this is {__version__}: {reason(error)}"
            raise InputError(f"{path} was written by vqops {found}") from error


def read_state(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What `save` wrote. Raises InputError if the file is damaged, or is about anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in as many ways as there are
        raise InputError(f"{path}: not a readable checkpoint ({reason(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("about"), dict):
        raise InputError(f"{path}: not a checkpoint of vqops")
    for name, here in about.items():
        if not same(there := state["about"].get(name, UNSAID.get(name, here)), here):
            raise InputError(f"{path} was written with {differing(name, there, here)}")
    return state


def same(there: Any, here: Any) -> bool:
    """Whether two descriptions are equal; of fingerprints, at those images that could be read both times."""
    if isinstance(there, dict) and isinstance(here, dict):
        return all(here[key] == value for key, value in there.items() if key in here)
    return there == here


def differing(name: str, there: Any, here: Any) -> str:
    return f"other {name}" if isinstance(here, dict) else f"{name} {there}, now it is {here}"


def continued(options: Kind, command: str, may_change: tuple[str, ...] = MAY_CHANGE) -> Kind:
    """The options as those of a continuation: what nobody says is as it was.

    Raises InputError where they do not fit the run.
    """
    folder = options.resume
    if not (folder / run_folder.CONFIG).is_file():
        raise InputError(Field("resume"), f" {folder}: no run of vqops {command} is there (no {run_folder.CONFIG})")
    if options.out is not None and os.path.realpath(options.out) != os.path.realpath(folder):
        place = f" {folder} goes on in that folder, "
        raise InputError(Field("resume"), place, Field("out"), f" {options.out} is another")
    try:
        before = read_options(folder / run_folder.CONFIG, type(options), out=folder)
    except InputError as error:
        raise InputError(Field("resume"), f" {folder}: vqops {command} cannot go on there: ", *error.args) from error
    said = {name for name in options.said if getattr(options, name) is not None}  # None says nothing
    values = {name: getattr(options if name in said else before, name) for name in types_of(type(options))}
    now = made(type(options), values | {"out": folder}, said | before.said)
    for name in types_of(type(options)):
        there, here = getattr(with_strides(before), name), getattr(with_strides(now), name)
        if there != here and name not in may_change:
            reason = f" is {there} there and cannot change, got {here}"
            raise InputError(Field("resume"), f" {folder}: ", Field(name), reason)
    for name in PLACES:
        place = values.get(name)
        if name not in said and place is not None and os.path.isabs(place) and not os.path.exists(place):
            reason = f" {place} is no longer there: name its place with "
            raise InputError(Field("resume"), f" {folder}: its ", Field(name), reason, Field(name))
    return now


def with_strides(options: Kind) -> Kind:
    """The same options with the default strides written out, if they have any."""
    if not hasattr(options, "strides"):
        return options
    return changed(options, strides=level_strides(options.strides, options.levels))
