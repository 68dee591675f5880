"""Quantizers and their state."""

import torch

from vqops import VectorQuantize


def quantizer(codes, **options) -> VectorQuantize:
    """A quantizer with these codes, as it is after construction."""
    codes = torch.tensor(codes)
    vq = VectorQuantize(codes.shape[1], codes.shape[0], **options)
    vq.codebook = codes
    return vq


def state(vq) -> dict:
    return {name: value.clone() for name, value in vq.state_dict().items()}
