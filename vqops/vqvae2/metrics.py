"""How well codes are used, and how far images are from each other."""

import math

import torch
from torch import Tensor


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:  # int64 of any shape, -1 is left out; [K] int64
    slots = indices.flatten() + 1
    counts = slots.new_zeros(codebook_size + 1)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:]  # unlike bincount, without waiting for the GPU


def perplexity(counts: Tensor) -> Tensor:  # [K]; []
    """exp(entropy) of how often each code is used: 1 if one code is used, K if all are used alike."""
    share = counts / counts.sum()
    return torch.exp(-torch.xlogy(share, share).sum())


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-10))
