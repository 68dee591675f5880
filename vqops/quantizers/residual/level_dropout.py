"""How many levels a training step uses: at random, the same on all ranks, without waiting for the device."""

import random

import torch
from torch import Tensor

from vqops.dispatch.library import define
from vqops.quantizers.codebook.ranks import num_ranks, rank, sum_over_ranks

SEEDS = 10_000


class LevelDropout:
    """From cutoff_index + 1 to num_quantizers levels, rounded up to a multiple of multiple_of.

    One process draws a seed a step from the generator of the CPU, as vector-quantize-pytorch does. Ranks agree once, in
    the first step, on a key, and count steps from there.
    """

    def __init__(self, num_quantizers: int, cutoff_index: int, multiple_of: int, sync: bool):
        self.range = cutoff_index, num_quantizers, multiple_of
        self.sync = sync
        self.state = torch.zeros(2, dtype=torch.int64, device="cpu")  # key + 1, or 0 before there is one; steps

    def draw(self, x: Tensor, seed: int | None = None) -> int | Tensor:
        """The number of levels; in a compiled graph as a tensor () on the device of x."""
        if seed is not None:
            return levels_of(seed, *self.range)
        if not torch.compiler.is_compiling():
            return drawn(self.state, x, *self.range, self.sync)
        levels = torch.ops.vqops.draw_levels_(self.state, x.detach(), *self.range, self.sync)
        return levels.to(x.device, non_blocking=True)


def levels_of(seed: int, cutoff_index: int, num_quantizers: int, multiple_of: int) -> int:
    last = random.Random(seed).randrange(cutoff_index, num_quantizers)
    return min(-(-(last + 1) // multiple_of) * multiple_of, num_quantizers)


def drawn(state: Tensor, x: Tensor, cutoff_index: int, num_quantizers: int, multiple_of: int, sync: bool) -> int:
    seed = torch.randint(0, SEEDS, (), device="cpu") if num_ranks(sync) == 1 or state[0] == 0 else None
    if num_ranks(sync) > 1:
        if seed is not None:
            mine = (seed * (rank() == 0)).to(x.device)
            state[0] = sum_over_ranks(mine, dtype=torch.float64)[0].cpu().long() + 1
        seed = state[0] * SEEDS + state[1]
        state[1] += 1
    return levels_of(int(seed), cutoff_index, num_quantizers, multiple_of)


def draw_levels_(
    state: Tensor, x: Tensor, cutoff_index: int, num_quantizers: int, multiple_of: int, sync: bool
) -> Tensor:
    levels = drawn(state, x, cutoff_index, num_quantizers, multiple_of, sync)
    return torch.tensor(levels, dtype=torch.int64, device="cpu")


def fake_draw_levels_(state, x, cutoff_index, num_quantizers, multiple_of, sync):
    return torch.empty((), dtype=torch.int64, device="cpu")


define(
    "draw_levels_",
    "(Tensor(a!) state, Tensor x, int cutoff_index, int num_quantizers, int multiple_of, bool sync) -> Tensor",
    fake_draw_levels_,
    everywhere=draw_levels_,
)
