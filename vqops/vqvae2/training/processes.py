"""The processes of one training: those of `torchrun -m vqops train` share the batch and keep equal weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from vqops.quantizers.codebook.ranks import num_ranks, rank, sum_over_ranks
from vqops.vqvae2.errors import Field, InputError


def pick_device(name: str) -> torch.device:
    """Under torchrun each process of a machine takes a GPU of its own. Raises InputError if there is no such device."""
    available = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        name = "cuda" if "cuda:0" in available else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in available:
        raise InputError(Field("device"), f" {name}: this torch ({torch.__version__}) has {', '.join(available)}")
    return torch.device(name)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did: over NCCL on GPUs, over gloo on CPUs."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or num_ranks() > 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes the files and speaks."""
    return rank() == 0


def agree(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if num_ranks() == 1:
        return flag
    (flags,) = sum_over_ranks(torch.tensor(flag, device=device), dtype=torch.float32)
    return bool(flags)
