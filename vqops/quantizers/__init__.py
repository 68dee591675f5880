"""Quantizers as nn.Modules, built on `vqops.ops`."""
