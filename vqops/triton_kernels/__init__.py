"""The op families in Triton, for any CUDA device. Triton is imported when the first of them runs.

They are chosen with implementation="triton" and are not the default (docs/gpu.md).
"""

import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

MODULES = {
    "prepare": "codebook",
    "nearest": "search",
    "nearest_topk": "search",
    "search_statistics": "search",
    "code_sums": "code_sums",
    "ema_update_": "ema",
    "quantize": "quantize",
    "quantize_backward": "quantize_backward",
}


def has(op: str) -> bool:
    return op in MODULES and find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set before the first ran."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def runs_on(op: str, device: str) -> bool:
    return has(op) and (device == "cuda" or (device == "cpu" and interpreted()))


def implementation(op: str) -> Callable:
    def run(*arguments):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if not runs_on(op, device.type):
            raise RuntimeError(
                f"{op}: implementation 'triton' runs on CUDA, or on the CPU in Triton's interpreter "
                f"(TRITON_INTERPRET=1 in the environment); the input is on {device}"
            )
        module = importlib.import_module(f"vqops.triton_kernels.{MODULES[op]}")
        return getattr(module, op)(*arguments)

    return run
