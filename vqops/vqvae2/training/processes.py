"""The processes of one training: those of `torchrun -m vqops train` share the batch and keep equal weights."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vqops.quantizers.codebook.ranks import num_ranks, rank, sum_over_ranks
from vqops.vqvae2.errors import Field, InputError, reason

Value = TypeVar("Value")

LOST = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)  # in the errors of a collective
SECONDS_BETWEEN, STEPS_BETWEEN = 2.0, 10  # two questions whether to stop; of a grace of 30 s much must be left


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
    # Processes that are started again would find the addresses of those before them in torchrun's store.
    store, number, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {restarts()}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=size)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
            raise
        ended = f"another process of the job has ended, so this one ends ({reason(error)}); go on with "
        raise InputError(ended, Field("resume")) from error
    finally:
        dist.destroy_process_group()


def with_shared_gradients(module: nn.Module) -> nn.Module:
    """The module, or what averages its gradients over the processes; its quantizers keep their buffers equal."""
    if num_ranks() == 1:
        return module
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # from torch 2.13 on
    return DistributedDataParallel(module, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


def is_first() -> bool:
    """Whether this process writes the files and speaks."""
    return rank() == 0


def of_first(value: Value) -> Value:
    """What the first process holds."""
    held = [value]
    if num_ranks() > 1:
        dist.broadcast_object_list(held)
    return held[0]


def check_first_step(step: int) -> None:
    """Raises InputError unless all processes go on from the same step."""
    if (first := of_first(step)) != step:
        steps = f"this process of the job would go on from step {step}, the first one from step {first}: "
        raise InputError(steps, "all machines need the same ", Field("out"), " and the same --rdzv-id of torchrun")


class Stopping:
    """The question to all processes whether one of them was asked to stop: they must do so at the same step.

    The answer costs a wait for the device, so it is asked about every two seconds, or where a wait is due anyway.
    """

    def __init__(self, step: int):
        self.asked, self.due, self.started = step, step + 1, time.perf_counter()

    def agreed(self, step: int, interrupted: bool, waits_anyway: bool, device: torch.device) -> bool:
        """Whether to stop after this step. All processes must ask at every step."""
        if num_ranks() == 1:
            return interrupted
        if step < self.due and not waits_anyway:
            return False
        seconds = (time.perf_counter() - self.started) / (step - self.asked)
        (answer,) = sum_over_ranks(torch.tensor([interrupted, seconds], device=device), dtype=torch.float32)
        stops, seconds = answer.tolist()  # the same in all processes, so that all ask at the same step again
        pause = int(SECONDS_BETWEEN * num_ranks() / max(seconds, 1e-6))
        self.asked, self.due, self.started = step, step + min(max(pause, 1), STEPS_BETWEEN), time.perf_counter()
        return stops > 0


def restarts() -> int:
    """How often torchrun started the processes again, after one of them had ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def may_be_restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
