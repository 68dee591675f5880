"""The op families in Triton, for any CUDA device. Triton is imported when the first of them runs.

They are chosen with implementation="triton", or by a record of the GPU (docs/gpu.md).
"""

import importlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

OLDEST = 8  # major compute capability: of cp.async, and of the products that the bounds were proved for
SHARED = 99 * 1024  # bytes a block, of sm_89 and sm_120
COMPILERS = ("gcc", "clang")  # of which Triton takes one

MODULES = {
    "prepare": "codebook",
    "nearest": "search",
    "nearest_topk": "search",
    "search_statistics": "search",
    "sample": "sample",
    "code_sums": "code_sums",
    "ema_update_": "ema",
    "quantize": "quantize",
    "quantize_backward": "quantize_backward",
    "residual_quantize": "residual",
    "residual_quantize_backward": "residual_backward",
}

MOST_HEADS = 65535  # programs of a grid in its second dimension, where the search's kernels have H
MOST_CODES = 2**29  # of a head, whose bounds are four words each: offsets of 32 bits
SEARCHING = ("prepare", "nearest", "nearest_topk", "search_statistics", "sample", "quantize", "residual_quantize")


def installed() -> bool:
    return find_spec("triton") is not None


def has(op: str) -> bool:
    return op in MODULES and installed()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set before the first ran."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def runs_on(op: str, device: str) -> bool:
    """Whether there is a device of this type on which the op may run."""
    return has(op) and (device == "cuda" or (device == "cpu" and interpreted()))


@cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels can't run on a device, or None. A GPU's reason is one that its user can read in `vqops info`."""
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return (
            "it runs on CUDA, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1 in the environment); "
            f"the input is on {device}"
        )
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < OLDEST:
        return f"its kernels need sm_{OLDEST}0 or newer, {gpu.name} is sm_{gpu.major}{gpu.minor}"
    if gpu.shared_memory_per_block_optin < SHARED:
        has = gpu.shared_memory_per_block_optin
        return f"its kernels need {SHARED} bytes of shared memory a block, {gpu.name} has {has}"
    if not any(map(shutil.which, [os.environ["CC"]] if os.environ.get("CC") else COMPILERS)):
        return "Triton needs a C compiler (Debian, Ubuntu: `apt install gcc`), or its name in the variable CC"
    return None


def takes(op: str, H: int, K: int | None = None) -> bool:
    """Whether an op takes so many heads, and codes of a head."""
    return op not in SEARCHING or (H <= MOST_HEADS and (K is None or K <= MOST_CODES))


@cache
def module_of(op: str) -> ModuleType:
    return importlib.import_module(f"vqops.triton_kernels.{MODULES[op]}")


def implementation(op: str) -> Callable:
    def run(*arguments):
        first = next(argument for argument in arguments if isinstance(argument, Tensor))
        if reason := why_not(first.device):
            raise RuntimeError(f"{op}: implementation 'triton' can't run: {reason}")
        if not takes(op, len(first)):
            name = "codebook" if op == "prepare" else "x"
            raise ValueError(f"{op}: implementation 'triton' takes H <= {MOST_HEADS}, {name} has H={len(first)}")
        return getattr(module_of(op), op)(*arguments)

    return run
