"""The build, what this machine uses of it, and the implementation that each op takes: `vqops info`."""

import platform
import re
import warnings
from importlib import metadata
from pathlib import Path

import torch

import vqops
import vqops._C as _C
from vqops import triton_kernels
from vqops.dispatch import choice, regimes


def report() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a GPU has no record is said below
        return described(cuda_devices())


def described(devices: list["Device"]) -> str:
    facts = {
        "vqops": f"{vqops.__version__} in {Path(vqops.__file__).parent}",
        "torch": f"{torch.__version__} (built with {_C.torch}, runs with {_C.oldest_torch} and newer)",
        "numpy": installed("numpy"),
        "Triton": installed("triton"),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": _C.compiler,
        "CPU kernels": f"{', '.join(_C.instruction_sets.split())}; in use: {_C.instruction_set()}",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": cuda_kernels(_C.cuda, devices),
        "CUDA devices": ", ".join(map(device_name, devices)) or "none found",
    }
    implementations = vqops.implementations()
    kinds = list(next(iter(implementations.values())))
    ops = [["op", *(f"on {kind}" for kind in kinds)]]
    ops += [[op, *(", ".join(by_kind[kind]) for kind in kinds)] for op, by_kind in implementations.items()]
    parts = [table([[f"{name}:", fact] for name, fact in facts.items()]), table(ops), order()]
    for number, device in enumerate(devices):
        gpu = torch.device("cuda", number)
        parts.append(of_gpu(device_name(device), choice.table(gpu), triton_kernels.why_not(gpu)))
    return "\n\n".join(parts)


def order() -> str:
    named = f"use_implementation or {choice.VARIABLE} names {choice.named!r}. " if choice.named else ""
    return (
        f"{named}Each op takes the first that runs on its device; on a GPU what its record names goes before that.\n"
        "Others by implementation= or vqops.use_implementation."
    )


def of_gpu(name: str, known: choice.Table, why_no_triton: str | None = None) -> str:
    """What a record says of a GPU, which records say nothing, and what keeps Triton's kernels from it."""
    nothing = 'no record, which `vqops check` would make, so every op takes "pytorch"'
    lines = [f"{name}: " + (f"record {known.source}" if known.source else nothing)]
    lines += [f"  triton: {why_no_triton}"] if why_no_triton else []
    lines += [f"  not counted: {reason}" for reason in known.ignored]
    if known.rows:
        rows = [["op", "takes", "D", "K", "N", "x and codes"]]
        for row in known.rows:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
            rows.append([row.op, row.implementation, *map(bounds, (row.D, row.K, row.N)), dtypes])
        lines.append('The first row that holds a call decides, "pytorch" takes the rest; N counts rows of all heads.')
        lines.append(table(rows))
    return "\n".join(lines)


def bounds(given: tuple[int, int]) -> str:
    least, most = given
    if given == regimes.ANY:
        return "any"
    if most == regimes.ANY[1]:
        return f"{least} and more"
    return str(least) if least == most else f"{least} to {most}"


def main() -> None:
    print(report())


def installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not found"


Device = tuple[str, tuple[int, int]]  # its name and compute capability


def cuda_devices() -> list[Device]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(device.name, (device.major, device.minor)) for device in devices]


def device_name(device: Device) -> str:
    name, (major, minor) = device
    return f"{name} (sm_{major}{minor})"


def cuda_kernels(built: str, devices: list[Device]) -> str:
    """What is built, and the devices that it has no code for."""
    codes = re.findall(r"(sm|compute)_(\d+)(\d)(a?)", built)
    bare = [device for device in devices if codes and not any(runs_on(code, device[1]) for code in codes)]
    if not bare:
        return built
    return (
        f"{built}; no code for {', '.join(map(device_name, bare))}. In the source folder, with VQOPS_CUDA_ARCHS and "
        "TORCH_CUDA_ARCH_LIST unset: pip install --force-reinstall --no-deps ."
    )


def runs_on(code: tuple[str, str, str, str], capability: tuple[int, int]) -> bool:
    """sm_80 runs on 8.x, sm_90a on 9.0 alone, and compute_80, which is PTX, on 8.0 and all that came later."""
    kind, major, minor, exact = code
    least = int(major), int(minor)
    if exact:
        return capability == least
    return capability >= least and (kind == "compute" or capability[0] == least[0])


def table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
