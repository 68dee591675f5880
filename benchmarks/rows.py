"""A row of results: what was measured, on what, with which versions, as one JSON object a line."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles

import torch

from benchmarks import processor

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("vqops", "numpy", "faiss-cpu", "scikit-learn", "vector-quantize-pytorch", "flash-kmeans", "transformers")
PACKAGES += ("triton",)
LABEL = ("op", "shape", "axis", "N", "D", "K", "dtype", "direction", "gradient", "indices", "offset", "spread")
LABEL += ("data", "levels", "sums", "model", "method", "threads")


def label(row: dict) -> str:
    """Which measurement a row is, apart from when, where and what came out."""
    return " ".join(str(row[key]) for key in LABEL if key in row)


def environment(device: str = "cpu") -> dict:
    """Device, versions and commit, the same for all rows of a run."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        versions["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    about = {"processor": processor.facts()} if device == "cpu" else {}
    return {"device": name_of(device), **about, "versions": versions, **revision()}


def instructions(device: str) -> str:
    """The set of kernels that runs: by instruction set on a CPU, by architecture on a GPU."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    from vqops import _C

    return _C.instruction_set()


def name_of(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def folder_of(device: str) -> Path:
    """Of the committed rows of this machine. Processors of several generations share a name, not their instructions."""
    name = folder_named(name_of(device))
    return RESULTS / (name if device == "cuda" else f"{name}_{instructions(device)}")


def folder_named(device: str) -> str:
    return re.sub(r"\W+", "-", processor.plain(device).lower()).strip("-")


def revision() -> dict:
    """Commit of the sources measured, which ends in + where they differ from it, and its date.

    A tree that came without its repository is told them by VQOPS_COMMIT and VQOPS_COMMITTED.
    """

    def git(*command: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(RESULTS.parent), *command], capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    commit = os.environ.get("VQOPS_COMMIT") or git("describe", "--always", "--dirty=+", "--exclude", "*")
    committed = os.environ.get("VQOPS_COMMITTED") or git("show", "-s", "--format=%cI")
    return {"commit": commit or "unknown", "committed": committed}


def summary(seconds: list[float]) -> dict:
    """p20, p50 and p80 in milliseconds."""
    cuts = quantiles(seconds, n=10, method="inclusive")
    return {name: round(1e3 * cuts[i], 4) for name, i in (("p20_ms", 1), ("p50_ms", 4), ("p80_ms", 7))}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Writer:
    """Appends rows to a file, each flushed when it is measured, with what all rows of the run share."""

    def __init__(self, path: Path, common: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.common = path, common

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row | self.common | row) + "\n")
