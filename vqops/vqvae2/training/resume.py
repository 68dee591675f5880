"""What a step depends on, in one file: a run that was cut off goes on from it as if nothing had happened."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vqops import __version__
from vqops.vqvae2.errors import InputError
from vqops.vqvae2.files.run_folder import atomically
from vqops.vqvae2.training.optimization import WeightAverage


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
        with atomically(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Raises InputError if the file is damaged, or of another network, version or data."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
        for name, here in self.about.items():
            if (there := state["about"].get(name)) != here:
                raise InputError(f"{path} was written with {name} {there}, now it is {here}")
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = f"{state.get('vqops')}, this is {__version__}: {str(error).splitlines()[0]}"
            raise InputError(f"{path} was written by vqops {reason}") from error
        torch.set_rng_state(state["random"])
        if state["cuda_random"] and len(state["cuda_random"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_random"])
        self.step = state["step"]
