"""How weights move: the learning rate of each step, and a moving average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def learning_rate(peak: float, schedule: str, step: int, steps: int, warmup: int) -> float:
    """The rate of step 1, 2, ..., steps: linear up to the peak over `warmup` steps, then constant or half a cosine."""
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (1 + math.cos(math.pi * min(progress, 1))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class WeightAverage:
    """Exponential moving average of a module's parameters; with decay 0 it is the parameters themselves.

    Buffers are not averaged: the codebooks are averages already. The first steps weigh more, (1 + step) / (10 + step),
    so that the average does not remember the random start.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.parameters = list(module.parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.decay:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module holds the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=bool(self.decay)):
            parameter.data, value.data = value.data, parameter.data

    def state_dict(self) -> list[Tensor]:
        return self.values

    @torch.no_grad()
    def load_state_dict(self, values: list[Tensor]) -> None:
        for value, saved in zip(self.values, values, strict=True):
            value.copy_(saved)
