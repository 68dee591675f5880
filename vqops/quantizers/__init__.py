"""Quantizers as nn.Modules, built on `vqops.ops`."""

from vqops.quantizers.vector_quantize import LossBreakdown, VectorQuantize

__all__ = ["LossBreakdown", "VectorQuantize"]
