"""Which implementation each op takes on CUDA: one table, each row shown by a committed run on a GPU.

The device, shapes and dtypes alone decide. So nothing waits for the device, and a CUDA graph, a forward that is
computed again and a search with a prepared codebook meet the same choice each time.
"""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ANY = (0, sys.maxsize)


class Call(NamedTuple):
    """The facts by which a regime tells calls apart."""

    D: int
    K: int | None  # codes of a head; None for an op without codes
    N: int | None  # rows of all heads; None for an op without rows
    dtypes: tuple[torch.dtype, ...]  # of x and the codebook, where the op has them
    device: str  # the GPU's name


class Regime(NamedTuple):
    """Calls of an op that take an implementation. Bounds are inclusive; those of N and K are for ops that have them."""

    op: str
    implementation: str
    results: str  # the run that showed it to be correct and the fastest there: a folder in benchmarks/results
    D: tuple[int, int] = ANY
    K: tuple[int, int] = ANY
    N: tuple[int, int] = ANY
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    device: str | None = None  # the GPU's name; None: any

    def holds(self, call: Call) -> bool:
        inside = (
            bounds == ANY or size is None or bounds[0] <= size <= bounds[1]
            for size, bounds in ((call.D, self.D), (call.K, self.K), (call.N, self.N))
        )
        return self.device in (None, call.device) and all(inside) and all(dtype in self.dtypes for dtype in call.dtypes)


# The first row that holds a call decides, where the implementation is built; the reference takes the calls of no row.
ON_CUDA: tuple[Regime, ...] = ()


def choose(table: Iterable[Regime], op: str, call: Call, built: Callable[[str], bool]) -> str:
    """The implementation of a call on CUDA."""
    rows = (row for row in table if row.op == op and row.holds(call) and built(row.implementation))
    return next((row.implementation for row in rows), "reference")


def call_of(arguments: dict) -> Call:
    """The call of an op, from its arguments by name."""
    x, codes = arguments.get("x"), arguments.get("codebook", arguments.get("embed_avg"))
    D = (codes if x is None else x).shape[-1]
    K = arguments.get("num_codes") if codes is None else codes.shape[-2]
    N = None if x is None else x.shape[0] * x.shape[1]
    given = [tensor for tensor in (x, codes) if isinstance(tensor, Tensor)]
    return Call(D, K, N, tuple(tensor.dtype for tensor in given), gpu_name(given[0].device))


@cache
def gpu_name(device: torch.device) -> str:
    """The GPU's name, which torch keeps: reading it does not wait for the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
