"""Count and sum of each code's rows, added in a fixed order."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.reference.blocks import row_blocks

RUN = 256  # rows of a code that are summed in order, before the runs are


def code_of_row(indices: Tensor, K: int) -> Tensor:  # [H, N] -> [H, N]
    """The number of each row's code among those of all heads, H K for a row without one."""
    H = len(indices)
    return (indices + K * torch.arange(H, device=indices.device)[:, None]).masked_fill_(indices < 0, H * K)


def count_rows(code: Tensor, codes: int) -> Tensor:  # -> [codes]
    code = code.flatten()
    return code.new_zeros(codes + 1).scatter_add_(0, code, torch.ones_like(code))[:-1]


def add_rows(sums: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """sums.index_add_(0, index, values), in the order of the rows where PyTorch is to be deterministic. A GPU adds rows
    of one element in another order, so they are made two."""
    if sums[:1].numel() != 1:
        return sums.index_add_(0, index, values)
    twice = sums.view(-1, 1).repeat(1, 2).index_add_(0, index, values.reshape(-1, 1).expand(-1, 2))
    return sums.copy_(twice[:, 0].view_as(sums))


class CodeSlots:
    """The partial sum that each row is added to, so that the order of addition is fixed.

    A code's rows, ascending in n, are cut in runs of 256; a run is summed in order, then the runs in order.
    """

    def __init__(self, indices: Tensor, K: int):  # [H, N]
        H, N = indices.shape
        code = code_of_row(indices, K).flatten()
        self.codes, self.runs = H * K, H * K + H * N // RUN
        self.count = count_rows(code, self.codes)
        order = code.argsort(stable=True)
        rank = torch.empty_like(order)
        start = F.pad(self.count.cumsum(0), (1, 0))  # of each code's rows, and of those without a code
        rank[order] = torch.arange(H * N, device=indices.device) - start[code[order]]
        runs_of_code = (self.count + RUN - 1) // RUN
        first = F.pad(runs_of_code.cumsum(0) - runs_of_code, (0, 1))
        self.of_row = (first[code] + rank // RUN).masked_fill_(code == self.codes, self.runs).view(H, N)
        ends = runs_of_code.cumsum(0)
        self.code_of_run = torch.searchsorted(ends, torch.arange(self.runs, device=indices.device), right=True)

    def fold(self, runs: Tensor) -> Tensor:  # [runs + 1, ...] -> [codes, ...]
        sums = runs.new_zeros(self.codes + 1, *runs.shape[1:])
        return add_rows(sums, self.code_of_run, runs[:-1])[:-1]


def code_sums(
    x: Tensor,  # [H, N, D]
    indices: Tensor,  # [H, N], -1 leaves the row out
    num_codes: int,
    weight: Tensor | None = None,  # [H, N]
    *,
    slots_of: Callable[[Tensor, int], CodeSlots] = CodeSlots,
) -> tuple[Tensor, Tensor]:  # counts [H, K] int64, or float32 if weighted; sums [H, K, D] float32
    """counts[k] = sum_n w[n] [indices[n] = k],  sums[k] = sum_n w[n] [indices[n] = k] x[n], in float32."""
    H, _, D = x.shape
    slots = slots_of(indices, num_codes)
    runs = x.new_zeros(slots.runs + 1, D, dtype=torch.float32)
    for rows in row_blocks(x):
        values = x[:, rows].float()
        if weight is not None:
            values = values * weight[:, rows].float().unsqueeze(-1)
        add_rows(runs, slots.of_row[:, rows].flatten(), values.flatten(0, 1))
    sums = slots.fold(runs).view(H, num_codes, D)
    if weight is None:
        return slots.count.view(H, num_codes), sums
    weights = add_rows(runs.new_zeros(slots.runs + 1), slots.of_row.flatten(), weight.float().flatten())
    return slots.fold(weights).view(H, num_codes), sums
