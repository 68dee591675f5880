"""Which implementation a call takes: the one that is named, or on a GPU what a record shows to be right and fast.

The device, shapes and dtypes alone decide, by a table that is read once a process. So nothing waits for the device, and
a CUDA graph, a forward that is computed again and a search with a prepared codebook meet the same choice each time.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from vqops import triton_kernels
from vqops.dispatch import first_use, records
from vqops.dispatch.regimes import Call, Regime

Implementation = Literal["compiled", "pytorch", "reference", "triton"]
IMPLEMENTATIONS = get_args(Implementation)
VARIABLE = "VQOPS_IMPLEMENTATION"


# The one that is named


def check_name(name: str | None, by: str) -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"{by} must be one of {IMPLEMENTATIONS}, got {name!r}")


named: Implementation | None = os.environ.get(VARIABLE) or None
check_name(named, VARIABLE)


class use_implementation:
    """Take one implementation for every op that has it, in all threads: until the next call, or within `with`.

        vqops.use_implementation("pytorch")
        with vqops.use_implementation("reference"): ...

    None leaves the choice to the device, as at first. `implementation=` of a call goes before it; the environment
    variable VQOPS_IMPLEMENTATION is its value at the start. Ops that do not have the implementation take what they took
    before. A compiled graph keeps the choice that was made when it was traced.

    Raises ValueError for a name that there is not. An implementation that cannot run on a call's device raises
    RuntimeError there.
    """

    def __init__(self, name: Implementation | None):
        global named
        check_name(name, "use_implementation: name")
        self.before, named = named, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception) -> None:
        global named
        named = self.before


# The one of a GPU's record


@dataclass(frozen=True, eq=False)
class Table:
    """What a GPU takes. The first row that holds a call decides, where the implementation is there; else "pytorch"."""

    rows: tuple[Regime, ...]
    source: str | None  # the record
    ignored: tuple[str, ...] = ()  # records that do not count here, each with its reason


@cache
def table(device: torch.device) -> Table:
    """Of a device, for the rest of the process. Warns if no record names a kernel for a GPU."""
    if device.type != "cuda":
        return Table((), None)
    gpu = records.gpu_of(device)
    found, checked = recorded(gpu), ""
    if found.source is None and first_use.wanted():
        with first_use.LOCK:  # another thread may have checked meanwhile
            reason = first_use.check(device) if recorded(gpu).source is None else None
        found = recorded(gpu)
        checked = f" {first_use.VARIABLE}=auto brought no record: {reason or 'its folder cannot be written'}."
    if found.source is None:
        warnings.warn(
            f"vqops: no record shows a kernel to be right and fast on {gpu.name} "
            f"(sm_{gpu.capability.replace('.', '')}), so its ops take \"pytorch\": exact, without a kernel. "
            f"`vqops check` tests and times the kernels there, once; `vqops info` says more.{checked}",
            stacklevel=2,
        )
    return found


def recorded(gpu: records.Gpu) -> Table:
    """By the first record of the GPU that counts."""
    ignored = []
    for path in records.candidates(gpu):
        try:
            found = records.read(path, gpu)
        except records.Ignored as reason:
            ignored.append(f"{path}: {reason}")
            continue
        return Table(found.rows, str(path), (*ignored, *(f"{path}: {reason}" for reason in found.ignored)))
    return Table((), None, tuple(ignored))


def choose(rows: Iterable[Regime], op: str, call: Call, built: Callable[[str], bool]) -> str:
    found = (row for row in rows if row.op == op and row.holds(call) and built(row.implementation))
    names = (row.implementation for row in found)
    return next((name for name in names if name != "triton" or triton_kernels.takes(op, call.H, call.K)), "pytorch")


def codes_of(arguments: dict) -> Tensor | None:
    """The codebook of an op, the first one of those of levels."""
    given = (arguments[name] for name in ("codebook", "codebooks", "embed_avg") if name in arguments)
    codes = next(given, None)
    return codes[0] if isinstance(codes, list | tuple) else codes


def tensors_of(arguments: dict) -> list[Tensor]:
    return [tensor for tensor in (arguments.get("x"), codes_of(arguments)) if isinstance(tensor, Tensor)]


def call_of(arguments: dict) -> Call:
    """The call of an op, from its arguments by name."""
    x, codes = arguments.get("x"), codes_of(arguments)
    D = (codes if x is None else x).shape[-1]
    K = arguments.get("num_codes") if codes is None else codes.shape[-2]
    N = None if x is None else x.shape[0] * x.shape[1]
    H = (codes if x is None else x).shape[0]
    return Call(D, K, N, tuple(tensor.dtype for tensor in tensors_of(arguments)), H)
