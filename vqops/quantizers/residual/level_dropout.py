"""How many levels a training step uses: at random, the same on all ranks, without waiting for the device."""

import random

import torch
from torch import Tensor

from vqops.quantizers.codebook.shared_seeds import SharedSeeds


class LevelDropout:
    """From cutoff_index + 1 to num_quantizers levels, rounded up to a multiple of multiple_of."""

    def __init__(self, num_quantizers: int, cutoff_index: int, multiple_of: int, sync: bool):
        self.range = cutoff_index, num_quantizers, multiple_of
        self.sync = sync
        self.seeds = SharedSeeds()

    def draw(self, x: Tensor, seed: int | None = None) -> int | Tensor:
        """The number of levels; in a compiled graph as a tensor () on the device of x."""
        if seed is not None:
            return levels_of(seed, *self.range)
        drawn = self.seeds.draw(x.device, self.sync)
        if not torch.compiler.is_compiling():
            return levels_of(int(drawn), *self.range)
        return used_levels(drawn, *self.range).to(x.device, non_blocking=True)


def levels_of(seed: int, cutoff_index: int, num_quantizers: int, multiple_of: int) -> int:
    last = random.Random(seed).randrange(cutoff_index, num_quantizers)
    return min(-(-(last + 1) // multiple_of) * multiple_of, num_quantizers)


# An op, so that a compiled graph draws at every step; on the host alone, so that it is none of those that select.
@torch.library.custom_op("vqops::used_levels", mutates_args=())
def used_levels(seed: Tensor, cutoff_index: int, num_quantizers: int, multiple_of: int) -> Tensor:  # int64 ()
    return torch.tensor(levels_of(int(seed), cutoff_index, num_quantizers, multiple_of))


@used_levels.register_fake
def fake_used_levels(seed, cutoff_index, num_quantizers, multiple_of):
    return torch.empty_like(seed)
