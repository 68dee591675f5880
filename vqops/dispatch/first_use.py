"""VQOPS_CHECK=auto: a GPU without a record is checked when it is first used, by `vqops check` in another process."""

import multiprocessing
import os
import subprocess
import sys
import threading

import torch

VARIABLE = "VQOPS_CHECK"
RANKS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE")  # of torchrun, mpirun, srun
LOCK = threading.Lock()  # of the threads that use a GPU first
SECONDS = 600.0  # after which a check that does not end is given up
IMPORTED_IN = os.getpid()  # another one is that of a forked child


def check_value() -> None:
    if os.environ.get(VARIABLE, "") not in ("", "auto"):
        raise ValueError(f'{VARIABLE} must be "auto" or not set, got {os.environ[VARIABLE]!r}')


check_value()


def wanted() -> bool:
    return os.environ.get(VARIABLE) == "auto"


def why_not() -> str | None:
    """Why this process starts no check, or None. Ranks would each wait for one, and time the others' noise."""
    if os.getpid() != IMPORTED_IN or multiprocessing.parent_process() is not None:
        return "this is a child process"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed or any(os.environ.get(name, "1") not in ("", "1") for name in RANKS):
        return "this is a rank of several"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def check(device: torch.device) -> str | None:
    """Checks the GPU. Why there is no result, or None."""
    if reason := why_not():
        return reason
    command = [sys.executable, "-m", "vqops", "check", "--device", f"cuda:{device.index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"it did not end in {SECONDS:.0f} s"
    except OSError as error:
        return str(error)
    # 1: something was wrong; the record says what, and names nothing that was.
    return None if done.returncode in (0, 1) else (done.stderr.strip() or f"it ended with {done.returncode}")[-500:]
