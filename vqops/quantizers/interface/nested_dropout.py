"""Nested dropout: how many levels of a hierarchy a training step keeps."""

import random

import torch
from torch import Tensor


# An op, so that a compiled graph draws at every step; on the host alone, so that it is none of those that select.
@torch.library.custom_op("vqops::nested_cutoff", mutates_args=())
def nested_cutoff(seed: Tensor, probability: float, lowest: int, highest: int) -> Tensor:  # int64 () on the CPU
    """The last level that is kept: with `probability` one of lowest .. highest - 1, else highest."""
    draws = random.Random(int(seed))
    cutoff = draws.randrange(lowest, highest) if draws.random() < probability else highest
    return torch.tensor(cutoff)


@nested_cutoff.register_fake
def fake_nested_cutoff(seed, probability, lowest, highest):
    return torch.empty_like(seed)
