"""Sums over the processes of `torch.distributed`, all that quantizers exchange, over the default group.

`sync=False` stands for a process on its own: one rank, nothing exchanged.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks(sync: bool = True) -> int:
    return dist.get_world_size() if sync and dist.is_available() and dist.is_initialized() else 1


def rank(sync: bool = True) -> int:
    return dist.get_rank() if num_ranks(sync) > 1 else 0


def sum_over_ranks(*tensors: Tensor, dtype: torch.dtype, sync: bool = True) -> list[Tensor]:
    """Each tensor summed over all ranks, in `dtype`, with one collective for all of them; of one rank as they are."""
    if num_ranks(sync) == 1:
        return list(tensors)
    packed = torch.cat([t.to(dtype).flatten() for t in tensors])
    dist.all_reduce(packed)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def of_fullest_rank(total: Tensor, *tensors: Tensor) -> list[Tensor]:  # total [H], tensors [H, ...], all float32
    """The tensors of the rank whose total is largest, the first of equals, for each head. Two collectives."""
    totals = total.new_zeros(num_ranks(), *total.shape)
    totals[rank()] = total
    (totals,) = sum_over_ranks(totals, dtype=torch.float32)
    mine = totals.argmax(0) == rank()
    own = [t.masked_fill(~mine.view(-1, *[1] * (t.dim() - 1)), 0) for t in tensors]
    return sum_over_ranks(*own, dtype=torch.float32)
