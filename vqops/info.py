"""The build, what this machine uses of it, and the implementation that each op takes: `vqops info`."""

import platform
from importlib import metadata
from pathlib import Path

import torch

import vqops
import vqops._C as _C
from vqops.dispatch import choice


def report() -> str:
    facts = {
        "vqops": f"{vqops.__version__} in {Path(vqops.__file__).parent}",
        "torch": f"{torch.__version__} (built with {_C.torch}, runs with {_C.oldest_torch} and newer)",
        "numpy": installed("numpy"),
        "Triton": installed("triton"),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": _C.compiler,
        "CPU kernels": f"{', '.join(_C.instruction_sets.split())}; in use: {_C.instruction_set()}",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": _C.cuda,
        "CUDA devices": ", ".join(cuda_devices()) or "none found",
    }
    implementations = vqops.implementations()
    devices = list(next(iter(implementations.values())))
    ops = [["op", *(f"on {device}" for device in devices)]]
    ops += [[op, *(", ".join(by_device[device]) for device in devices)] for op, by_device in implementations.items()]
    return "\n\n".join([table([[f"{name}:", fact] for name, fact in facts.items()]), table(ops), defaults()])


def defaults() -> str:
    if not choice.ON_CUDA:
        return (
            "Each op takes the first. "
            "No kernel has been confirmed on a GPU yet: on CUDA the others are chosen with implementation=."
        )
    rows = [["op", "takes", "GPU", "D", "K", "N", "x and codes", "shown by benchmarks/results/"]]
    for row in choice.ON_CUDA:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        gpu = row.device or "any"
        rows.append([row.op, row.implementation, gpu, *map(bounds, (row.D, row.K, row.N)), dtypes, row.results])
    return (
        "On the CPU each op takes the first. On CUDA the first of these rows that holds a call and is built decides, "
        "and the reference\ntakes the rest. N counts the rows of all heads.\n\n" + table(rows)
    )


def bounds(given: tuple[int, int]) -> str:
    least, most = given
    if given == choice.ANY:
        return "any"
    if most == choice.ANY[1]:
        return f"{least} and more"
    return str(least) if least == most else f"{least} to {most}"


def main() -> None:
    print(report())


def installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not found"


def cuda_devices() -> list[str]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{device.name} (sm_{device.major}{device.minor})" for device in devices]


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
