"""Rows that a gradient can't be turned for: too short for a direction, or not finite; and one that it can."""

import math

import torch


def short_rows() -> torch.Tensor:  # [1, 5, 3]
    return torch.tensor([[[0.0, 0, 0], [1e-7, 0, 0], [1, 2, 0.5], [1, 2, math.inf], [math.nan, 0, 0]]])
