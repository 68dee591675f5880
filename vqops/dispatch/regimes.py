"""Calls of an op that take an implementation on a GPU: the rows of its record."""

import sys
from typing import NamedTuple

import torch

ANY = (0, sys.maxsize)


class Call(NamedTuple):
    """The facts by which a regime tells calls apart."""

    D: int
    K: int | None  # codes of a head; None for an op without codes
    N: int | None  # rows of all heads; None for an op without rows
    dtypes: tuple[torch.dtype, ...]  # of x and the codebook, where the op has them
    H: int = 1  # heads


class Regime(NamedTuple):
    """Bounds are inclusive; those of N and K are for ops that have them."""

    op: str
    implementation: str
    D: tuple[int, int] = ANY
    K: tuple[int, int] = ANY
    N: tuple[int, int] = ANY
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def holds(self, call: Call) -> bool:
        inside = (
            bounds == ANY or size is None or bounds[0] <= size <= bounds[1]
            for size, bounds in ((call.D, self.D), (call.K, self.K), (call.N, self.N))
        )
        return all(inside) and all(dtype in self.dtypes for dtype in call.dtypes)


def regime_of(row: dict) -> Regime:
    """From JSON: op and implementation, dtypes, and D, K and N as [least, most], null for no bound.

    Raises ValueError for what is no row.
    """
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("op", "implementation")):
        raise ValueError(f"a row must have an op and an implementation, got {row!r}")
    dtypes = row.get("dtypes")
    known = [getattr(torch, name, None) for name in dtypes if isinstance(name, str)] if isinstance(dtypes, list) else []
    if not known or not all(isinstance(dtype, torch.dtype) for dtype in known) or len(known) != len(dtypes):
        raise ValueError(f"dtypes must be a list of names of torch's dtypes, got {dtypes!r}")
    return Regime(row["op"], row["implementation"], *(bounds_of(axis, row.get(axis)) for axis in "DKN"), tuple(known))


def bounds_of(axis: str, given) -> tuple[int, int]:
    if given is None:
        return ANY
    if not isinstance(given, list) or len(given) != 2 or not all(end is None or type(end) is int for end in given):
        raise ValueError(f"{axis} must be null or two whole numbers, null for no bound, got {given!r}")
    least, most = given
    return ANY[0] if least is None else least, ANY[1] if most is None else most
