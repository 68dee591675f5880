"""Every implementation of the ops, each on every device, as a test is given them."""

import os

import pytest
import torch

import vqops

REQUIRED = {name for name in os.environ.get("VQOPS_REQUIRE", "").split(",") if name}  # "triton,aarch64": do not skip
INTERPRETED = ("triton", "cpu")
NAMES = {
    "cpu": ("reference", "pytorch", "compiled", "triton"),
    "cuda": ("pytorch", "compiled", "triton"),  # the reference on a GPU is slow, and one test of tests/cuda
}
IMPLEMENTATIONS = [
    pytest.param((name, device), id=f"{name}-{device}", marks=[pytest.mark.slow] * ((name, device) == INTERPRETED))
    for device, names in NAMES.items()
    for name in names
]


class Implementation:
    """The ops as one implementation runs them, on its device."""

    def __init__(self, name: str, device: str):
        self.name, self.device = name, torch.device(device)

    def __getattr__(self, op):
        def call(*args, **options):
            moved = [self.put(a) for a in args]
            options = {key: self.put(value) for key, value in options.items()}
            return getattr(vqops, op)(*moved, **options, implementation=self.name)

        return call

    def put(self, value):
        if isinstance(value, list):
            return [self.put(each) for each in value]
        return value.to(self.device) if isinstance(value, torch.Tensor) else value


def missing(name: str, device: str) -> str | None:
    """Why this process can't run the implementation, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if name not in vqops.implementations()["nearest"][device]:
        return "Triton is not installed, or not in its interpreter" if (name, device) == INTERPRETED else "not built"
    return None


def available(name: str, device: str) -> Implementation:
    reason = missing(name, device)
    if reason and device == ("cuda" if "cuda" in REQUIRED else "cpu") and name in {"compiled", *REQUIRED}:
        pytest.fail(f"VQOPS_REQUIRE: {name} on {device}: {reason}")
    if reason:
        pytest.skip(reason)
    return Implementation(name, device)
