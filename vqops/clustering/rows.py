"""What a level clusters: the rows of x that take part, less their codes of the levels before."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vqops.clustering.means import square_distances, total_of
from vqops.ops.search import nearest, prepare

BLOCK = 1 << 16  # rows that are searched at a time where no batch size is given


def without(residual: Tensor, codes: Tensor) -> Tensor:  # [B, D], [B, D]
    """What the next level searches: r - c, rounded once to the dtype of r."""
    return (residual - codes).to(residual.dtype)


class Rows:
    """Rows of x, on its device, and the levels found so far. A batch of them is on the device of the codes."""

    def __init__(self, x: Tensor, mask: Tensor | None, device: torch.device, batch_size: int | None):
        self.x, self.device, self.block = x, device, batch_size or BLOCK
        valid = torch.cat([rows.isfinite().all(-1) for rows in x.split(self.block)])
        self.places = (valid if mask is None else valid & mask).nonzero().squeeze(-1)  # in x
        self.real = torch.promote_types(x.dtype, torch.float32)
        self.codebooks: list[Tensor] = []
        self.indices: list[Tensor] = []  # of each level, [n] on the device of x

    def __len__(self) -> int:
        return len(self.places)

    def given(self, numbers: Tensor) -> Tensor:  # [B] -> [B, D]
        return self.x[self.places[numbers]].to(self.device, self.real)

    def residual(self, numbers: Tensor) -> Tensor:  # [B], which of the rows that take part -> [B, D]
        """A row that overflowed is not finite from then on."""
        rows = self.given(numbers)
        for codes, indices in zip(self.codebooks, self.indices, strict=True):
            rows = without(rows, codes[indices[numbers].to(self.device)])
        return rows

    def finite(self, numbers: Tensor) -> Tensor:
        rows = self.residual(numbers)
        finite = rows.isfinite().all(-1)
        return rows if finite.all() else rows[finite]

    def all(self) -> Tensor:
        return torch.arange(len(self), device=self.x.device)

    def passes(self, generator: torch.Generator) -> Iterator[Tensor]:
        """The batches of one pass over the rows, in a random order."""
        for numbers in torch.randperm(len(self), generator=generator, device=self.x.device).split(self.block):
            yield self.finite(numbers)

    def variance(self) -> Tensor:  # float64
        """Mean of |x - mean of x|^2."""
        blocks = self.all().split(self.block)
        mean = sum(total_of(self.given(numbers)) for numbers in blocks) / len(self)
        return sum(total_of(square_distances(self.given(numbers), mean)) for numbers in blocks) / len(self)

    def add_level(self, codes: Tensor, assigned: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take the codes as the next level, with the indices of the finite rows if a search is not to find them.

        Returns the mean of |residual|^2 after it, float64, NaN without a row, and which codes have rows [K].
        """
        prepared, found = prepare(codes), []
        total, used = 0, torch.zeros(len(codes), dtype=torch.bool, device=self.device)
        before = 0
        for numbers in self.all().split(self.block):
            rows = self.residual(numbers)
            finite = rows.isfinite().all(-1)
            if assigned is None:
                indices = nearest(rows, prepared)
            else:
                indices = torch.full((len(rows),), -1, device=self.device)
                count = int(finite.sum())
                indices[finite] = assigned[before : before + count]
                before += count
            total = total + total_of(square_distances(rows[finite], codes[indices[finite]]))
            used[indices[finite]] = True
            found.append(indices.to(self.x.device))
        self.codebooks.append(codes)
        self.indices.append(torch.cat(found))
        return total / (self.indices[-1] >= 0).sum().to(self.device), used

    def all_indices(self) -> Tensor:  # [N, Q], -1 for the rows that take no part
        indices = torch.full((len(self.x), len(self.indices)), -1, device=self.x.device)
        indices[self.places] = torch.stack(self.indices, -1)
        return indices
