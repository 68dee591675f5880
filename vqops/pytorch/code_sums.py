"""Count and sum of each code's rows, in any order unless PyTorch is to be deterministic."""

import torch
from torch import Tensor

from vqops import reference
from vqops.reference.code_sums import CodeSlots, code_of_row, count_rows


class OneSlot:
    """The slots of a code, as CodeSlots says them: one, in which `index_add_` adds as it likes."""

    def __init__(self, indices: Tensor, K: int):  # [H, N]
        self.runs = indices.shape[0] * K
        self.of_row = code_of_row(indices, K)
        self.count = count_rows(self.of_row, self.runs)

    def fold(self, runs: Tensor) -> Tensor:  # [runs + 1, ...] -> [codes, ...]
        return runs[:-1]


def slots_of(indices: Tensor, K: int) -> CodeSlots | OneSlot:
    return (CodeSlots if torch.are_deterministic_algorithms_enabled() else OneSlot)(indices, K)


def code_sums(
    x: Tensor,  # [H, N, D]
    indices: Tensor,  # [H, N], -1 leaves the row out
    num_codes: int,
    weight: Tensor | None = None,  # [H, N]
) -> tuple[Tensor, Tensor]:  # counts [H, K] int64, or float32 if weighted; sums [H, K, D] float32
    return reference.code_sums(x, indices, num_codes, weight, slots_of=slots_of)
