"""A row of results: what was measured, on what, with which versions, as one JSON object a line."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles

import torch

import vqops
from vqops import _C

PEERS = ("vqops", "numpy", "faiss-cpu", "scikit-learn", "vector-quantize-pytorch", "flash-kmeans", "triton")


def environment() -> dict:
    """Device, versions and commit, the same for all rows of a run."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for package in PEERS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": processor(),
        "instructions": _C.instruction_set(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Of the sources measured; ends in + where they differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude", "*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or vqops.__version__


def summary(seconds: list[float]) -> dict:
    """p20, p50 and p80 in milliseconds."""
    cuts = quantiles(seconds, n=10, method="inclusive")
    return {name: round(1e3 * cuts[i], 4) for name, i in (("p20_ms", 1), ("p50_ms", 4), ("p80_ms", 7))}


class Writer:
    """Appends rows to a file, each flushed when it is measured."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.common = path, environment()

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**row, **self.common}) + "\n")
