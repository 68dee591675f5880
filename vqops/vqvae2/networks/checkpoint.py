"""A trained model in one file: weights and codebooks as safetensors, the whole configuration in its metadata."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vqops import __version__
from vqops.vqvae2.errors import InputError
from vqops.vqvae2.files.run_folder import MODEL, atomically
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config

KIND = "vqops.vqvae2"


def save_model(path: Path, model: VQVAE2, options: object, step: int) -> None:
    """Write weights, network configuration, the options of the training (a dataclass) and the step."""
    description = {
        "kind": KIND,
        "vqops": __version__,
        "torch": str(torch.__version__),
        "model": asdict(model.config),
        "training": asdict(options),
        "step": step,
    }
    write_file(path, model.state_dict(), description)


def load_model(run: Path, device: torch.device | str = "cpu") -> VQVAE2:
    """The model of a run folder, or of a model.safetensors, in eval mode.

    Raises InputError if there is none, if the file is damaged, or if it holds another model.
    """

    def network(description: dict[str, Any]) -> VQVAE2:  # a file without strides has those of the default
        return VQVAE2(VQVAE2Config(**description["model"]))

    return read_network(model_path(run), KIND, network, device)[0]


def model_path(run: Path) -> Path:
    """Raises InputError if there is no such file."""
    path = run / MODEL if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a vqops train run, or its {MODEL}")
    return path


def fingerprint(path: Path) -> str:
    """SHA-256 of a file: codes and priors remember the model they belong to by it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write a safetensors file with its description as JSON in the metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"vqops": json.dumps(description, default=str)}))


def read_file(path: Path, kind: str, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors; raises InputError if the file is damaged or its description of another kind."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        description = json.loads(metadata.get("vqops", "{}"))
    except ValueError:
        description = {}
    if description.get("kind") != kind:
        raise InputError(f"{path} holds another model than {kind}: its metadata is {metadata}")
    return description, tensors


def read_network(
    path: Path, kind: str, network: Callable[[dict[str, Any]], nn.Module], device: torch.device | str
) -> tuple[Any, dict[str, Any]]:
    """The result of `network` for the description, with the tensors of the file, in eval mode; and the description.

    Raises InputError if the file is damaged, of another kind, or does not fit this version.
    """
    description, tensors = read_file(path, kind, device)
    try:
        module = network(as_tuples(description)).to(device)
        module.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, InputError) as error:
        found = f"{path} was written by vqops {description.get('vqops')}, this is {__version__}"
        raise InputError(f"{found}: {str(error).splitlines()[0]}") from error
    return module.eval(), description


def as_tuples(value: object) -> object:
    """The values of a JSON text, with tuples for its lists."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def training_options(path: Path) -> dict[str, Any]:
    """The options of `vqops train` that a model.safetensors was made with."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["vqops"])["training"]
