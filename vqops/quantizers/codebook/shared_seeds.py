"""Seeds of what training steps draw on the host, the same on all ranks."""

from contextlib import contextmanager

import torch
from torch import Tensor

from vqops.dispatch.calls import is_captured
from vqops.quantizers.codebook.ranks import num_ranks, sum_over_ranks


class SharedSeeds:
    """A seed for each training step, on the host, the same on all ranks.

    One process draws it from torch's generator of the CPU. Several agree on a first one, by one collective and the only
    wait for the device, and then each counts on by itself.
    """

    def __init__(self):
        self.last: Tensor | None = None  # int64 () on the CPU

    def draw(self, device: torch.device, sync: bool) -> Tensor:  # int64 () on the CPU
        if is_captured(device):
            raise RuntimeError(
                "dropout of levels draws on the host, and the CUDA graph that is being captured would repeat its draw: "
                "train without it, or with torch.compile instead of this graph"
            )
        if num_ranks(sync) == 1:
            return torch.randint(10_000, (), device="cpu")
        if self.last is None:
            (first,) = sum_over_ranks(torch.randint(2**31, (), device=device), dtype=torch.int64)
            self.last = first.cpu()
        else:
            self.last = self.last + 1
        return self.last.clone()

    @contextmanager
    def taken_back_on_failure(self):
        """A step that fails on one rank is no step: its next one draws the same seed again."""
        before = self.last
        try:
            yield
        except BaseException:
            if self.last is not before:
                self.last = self.last - 1  # not to None: the ranks have agreed
            raise
