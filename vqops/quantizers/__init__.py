"""Quantizers as nn.Modules, built on `vqops.ops`."""

from vqops.quantizers.interface.losses import LossBreakdown
from vqops.quantizers.vector_quantize import VectorQuantize

__all__ = ["LossBreakdown", "VectorQuantize"]
