"""Products in the precision of their operands, whatever the caller allows for his own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

LOCK = threading.Lock()
inside = 0  # threads that are in `full_precision` now
before: tuple[str, str, str] | None = None  # the settings to give back, if any had to change


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products, and no autocast.

    PyTorch keeps the first per process, not per thread: whoever enters sees to it, the last to leave sets it back. A
    thread that changes PyTorch's settings while another is inside can still spoil that one's product.
    """
    global inside, before
    with LOCK:
        before = raise_precision() or before
        inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with LOCK:
            inside -= 1
            if inside == 0:
                restore_precision(before)
                before = None


def in_full_precision(function: Callable) -> Callable:
    """The function, whose first argument is a tensor."""

    @wraps(function)
    def run(*arguments, **named):
        with full_precision(arguments[0].device):
            return function(*arguments, **named)

    return run


def raise_precision() -> tuple[str, str, str] | None:
    """Returns what `restore_precision` needs, or None where nothing had to change."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    if {cuda.fp32_precision, cpu.fp32_precision} <= {"none", "ieee"}:
        return None
    # What equals the value above it is set back to inherit it: "none" asks the backend, or torch.backends.
    found = [
        "none" if matmul.fp32_precision == backend.fp32_precision else matmul.fp32_precision
        for matmul, backend in ((cuda, torch.backends.cudnn), (cpu, torch.backends.mkldnn))
    ]
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    old = torch.get_float32_matmul_precision()  # the older setting, which raises where the two disagree
    torch.set_float32_matmul_precision("highest")
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    return old, *found


def restore_precision(settings: tuple[str, str, str] | None) -> None:
    if settings is not None:
        old, cuda, cpu = settings
        torch.set_float32_matmul_precision(old)
        torch.backends.cuda.matmul.fp32_precision = cuda
        torch.backends.mkldnn.matmul.fp32_precision = cpu
