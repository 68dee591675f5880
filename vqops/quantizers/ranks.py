"""What the quantizers exchange between the processes of `torch.distributed`: sums, over the default group."""

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Each tensor summed over all ranks, in `dtype`, with one collective for all of them."""
    if num_ranks() == 1:
        return [t.to(dtype) for t in tensors]
    packed = torch.cat([t.to(dtype).flatten() for t in tensors])
    dist.all_reduce(packed)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
