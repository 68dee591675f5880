"""What is known of a GPU: JSON files that say which implementation was right and fastest there, and for which calls.

A record speaks for one GPU (name and compute capability) and for kernels as they were: a hash of their sources, and the
version of Triton or of the CUDA toolkit. Of a kernel that has changed since, its rows do not count.
"""

import hashlib
import json
import os
import re
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

import torch
from platformdirs import user_cache_path

from vqops import triton_kernels
from vqops.dispatch.regimes import Regime, regime_of

FORMAT = 1
VARIABLE = "VQOPS_GPU_RECORD"
SHIPPED = Path(__file__).parent / "shipped"


class Gpu(NamedTuple):
    name: str
    capability: str  # "9.0"


class Record(NamedTuple):
    rows: tuple[Regime, ...]
    ignored: list[str]


class Ignored(Exception):
    """Why a file says nothing of this machine."""


def gpu_of(device: torch.device) -> Gpu:
    facts = torch.cuda.get_device_properties(device)
    return Gpu(facts.name, f"{facts.major}.{facts.minor}")


def candidates(gpu: Gpu) -> list[Path]:
    """Where a record of the GPU may be, the first that counts first: the user's own, then the one that ships."""
    own = os.environ.get(VARIABLE)
    name = file_name(gpu)
    return [Path(own) if own else user_cache_path("vqops") / name, SHIPPED / name]


def file_name(gpu: Gpu) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{gpu.name} sm {gpu.capability}".lower()) + ".json"


def read(path: Path, gpu: Gpu) -> Record:
    """Raises Ignored."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise Ignored("there is no such file") from None
    except (OSError, ValueError) as error:
        raise Ignored(f"it cannot be read ({error})") from None
    try:
        if content["format"] != FORMAT:
            raise Ignored(f"it is of format {content['format']}, this version of vqops reads {FORMAT}")
        of = Gpu(**content["gpu"])
        if of != gpu:
            raise Ignored(f"it is of {of.name} ({of.capability}), this is {gpu.name} ({gpu.capability})")
        kernels, rows = content["kernels"], tuple(map(regime_of, content["rows"]))
        changed = [name for name in kernels if kernels[name] != kernels_here().get(name)]
        if unknown := {row.implementation for row in rows} - set(kernels):
            raise Ignored(f"it does not say with which kernels {sorted(unknown)} ran")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Ignored(f"it is not a record: {type(error).__name__} {error}") from None
    reasons = [f"{name} was {kernels[name]}, here it is {kernels_here().get(name)}" for name in changed]
    kept = tuple(row for row in rows if row.implementation not in changed)
    if changed and not kept:
        raise Ignored("; ".join(reasons))
    return Record(kept, reasons)


@cache
def kernels_here() -> dict[str, dict[str, str]]:
    """The kernels for GPUs of this installation: a hash of their sources, and what compiles or has compiled them."""
    found, binary = {}, import_module("vqops._C")
    if triton_kernels.has("nearest"):
        sources = sorted(Path(triton_kernels.__file__).parent.glob("*.py"))
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        found["triton"] = {"sources": digest[:16], "version": triton_version()}
    if binary.cuda_sources:
        found["compiled"] = {"sources": binary.cuda_sources, "version": binary.cuda.partition(" ")[0]}
    return found


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a distribution of another name
        return import_module("triton").__version__
