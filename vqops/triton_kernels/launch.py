"""Launches. For each call Triton works out which compiled kernel its arguments want, in several times the time of the
launch itself. What it found is kept here for calls whose arguments want the same.
"""

from functools import partial
from typing import ClassVar

MOST = 1024  # calls that are kept, each of other sizes
NUMBERS = frozenset({int, bool, float, type(None)})  # and what stands for no tensor


def cdiv(a: int, b: int) -> int:
    """As triton.cdiv, which on the host takes as long as an allocation."""
    return -(-a // b)


class Kept:
    """A kernel that is launched as `kernel[grid](*arguments, **options)`, like the one of `triton.jit` below it."""

    found: ClassVar[dict] = {}  # of all kernels: arguments -> compiled kernel

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments, **options) -> None:
        """The first argument that is given is a tensor, whose device is the current one."""
        # Of a tensor, Triton looks at the dtype and at whether it begins at a multiple of 16 bytes.
        wants = [a if type(a) in NUMBERS else (a.dtype, a.data_ptr() % 16) for a in arguments]
        device = next(a for a in arguments if a is not None).get_device()
        key = (self.kernel.fn, device, *wants, *options.values())
        compiled = self.found.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*arguments, **options)
            if compiled is not None:  # as it is in the interpreter
                if len(self.found) == MOST:
                    self.found.clear()
                self.found[key] = compiled
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments)
