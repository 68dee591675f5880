"""Peak extra memory of a call: what a user must have free to make it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak resident set (VmHWM) to the current one


def peak_extra_mb(call: Callable[[], object], device: str = "cpu") -> float | None:
    """Megabytes (2^20 bytes) that one call adds at its peak, its results included; None where it can't be measured.

    CPU: the peak resident set over the resident set before, after freed memory is given back to the system, so that
    the call has to take its own. What a library keeps between calls is warm already. CUDA: the allocator's peak.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    if not CLEAR_REFS.exists():
        return None
    give_back_freed()
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:  # some containers forbid it
        return None
    before = status("VmRSS")
    call()
    return round(max(status("VmHWM") - before, 0) / 1024, 2)


def give_back_freed() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def status(name: str) -> int:
    """In KiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
