"""A trained model in one file: weights and codebooks as safetensors, the whole configuration in its metadata."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vqops import __version__
from vqops.vqvae2.data.images import WHITE
from vqops.vqvae2.data.survey import Reading
from vqops.vqvae2.errors import InputError, reason
from vqops.vqvae2.files.descriptions import described, of_type, parsed, shortened
from vqops.vqvae2.files.run_folder import MODEL, atomically
from vqops.vqvae2.networks.vqvae2 import VQVAE2, VQVAE2Config
from vqops.vqvae2.options import Count, Level, refused

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
        config = description.get("model")
        if isinstance(config, dict):
            config = {"version": 1} | config  # where a file says none
        return VQVAE2(described(VQVAE2Config, config))

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


def read_file(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors; raises InputError if the file is damaged or its description of another kind."""
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return read_description(path, kind), tensors


def read_description(path: Path, kind: str) -> dict[str, Any]:
    with opened(path) as file:
        metadata = file.metadata() or {}
    try:
        description = parsed(metadata.get("vqops", "{}"))
    except InputError as error:
        raise InputError(f"{path}: its description is {error}") from error
    if description.get("kind") != kind:
        raise InputError(f"{path} holds another model than {kind}: its metadata is {shortened(metadata)}")
    return description


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that this torch has not
        raise InputError(f"{path}: not a readable safetensors file ({reason(error)})") from error


def read_network(
    path: Path, kind: str, network: Callable[[dict[str, Any]], nn.Module], device: torch.device | str
) -> tuple[Any, dict[str, Any]]:
    """The result of `network` for the description, with the tensors of the file, in eval mode; and the description.

    Raises InputError if the file is damaged, of another kind, or does not fit this version.
    """
    description, tensors = read_file(path, kind)
    try:
        with torch.device("meta"):  # a size that is not the file's is never allocated
            expected = network(description).state_dict()
        check_tensors(tensors, expected)
    except Exception as error:  # layers raise what they like on sizes that do not go together
        found = f"{path} was written by vqops {shortened(description.get('vqops'))}, this is {__version__}"
        raise InputError(f"{found}: {reason(error)}") from error
    module = network(description).to(device)
    module.load_state_dict(tensors)
    return module.eval(), description


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises InputError unless the tensors are finite and those of the network: by name, shape and dtype."""
    if different := sorted(tensors.keys() ^ expected.keys()):
        where = "not of the network" if different[0] in tensors else "missing"
        raise InputError(f"{len(different)} tensors are missing or not of the network: {different[0]} is {where}")
    for name, tensor in tensors.items():
        there, here = (f"{one.dtype} {list(one.shape)}" for one in (tensor, expected[name]))
        if there != here:
            raise InputError(f"{name} is {there}, of the network {here}")
        if not tensor.isfinite().all():
            raise InputError(f"{name} is not finite")


def training_options(path: Path) -> dict[str, Any]:
    """The options of `vqops train` that a model.safetensors was made with.

    Raises InputError if the file has none, or none with an image size.
    """
    training = read_description(path, KIND).get("training")
    if not isinstance(training, dict) or not of_type(training.get("image_size"), Count):
        raise InputError(f"{path}: its description does not say of which image size the training was")
    if refused(training["image_size"], Count):
        raise InputError(f"{path}: its description gives the image size as {training['image_size']}")
    return training


def reading_of(path: Path, model: VQVAE2, skip_bad: bool | None = None) -> Reading:
    """How images are read for a model: as they were for its training."""
    training = read_description(path, KIND).get("training")
    background = training.get("background", WHITE) if isinstance(training, dict) else WHITE
    if not of_type(background, Level) or refused(background, Level):
        raise InputError(f"{path}: its description gives the background as {shortened(background)}")
    return Reading(model.config.image_channels, background, skip_bad)
