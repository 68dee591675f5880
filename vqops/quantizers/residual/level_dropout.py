"""How many levels a training step uses: at random, the same on all ranks, without waiting for the device."""

import random

import torch
from torch import Tensor

from vqops.quantizers.codebook.shared_seeds import SharedSeeds


def draw_levels(
    seeds: SharedSeeds,
    x: Tensor,
    seed: int | None,  # None: the next of seeds
    cutoff_index: int,
    num_quantizers: int,
    multiple_of: int,
    sync: bool,
) -> int | Tensor:
    """From cutoff_index + 1 to num_quantizers, rounded up to a multiple; in a compiled graph a tensor () beside x."""
    drawn = seeds.draw(x.device, sync) if seed is None else torch.tensor(seed, device="cpu")
    if not torch.compiler.is_compiling():
        return levels_of(int(drawn), cutoff_index, num_quantizers, multiple_of)
    return used_levels(drawn, cutoff_index, num_quantizers, multiple_of).to(x.device, non_blocking=True)


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
