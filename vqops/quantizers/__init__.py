"""Quantizers as nn.Modules, built on `vqops.ops`."""

from vqops.quantizers.vector_quantize import VectorQuantize

__all__ = ["VectorQuantize"]
