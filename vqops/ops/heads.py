"""Between the callers' shapes and the ops' [H, N, D]: a codebook [K, D] is one head, and x may then be [..., D]."""

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """Arguments in the ops' shapes, and the way back for results."""

    x: Tensor  # [H, N, D]
    codebook: Tensor  # [H, K, D]
    rows: tuple[int, ...]  # shape of x without D, as the caller gave it
    single: bool  # the caller's codebook was [K, D]

    def row(self, t: Tensor | None) -> Tensor | None:
        """Per-row values in the caller's shape, as [H, N]."""
        return one_row(t) if self.single else t

    def rows_back(self, t: Tensor) -> Tensor:
        """[H, N, ...] in the caller's shape."""
        if not self.single:
            return t
        return t.squeeze(0) if len(self.rows) == 1 else t.reshape((*self.rows, *t.shape[2:]))

    def codes_back(self, t: Tensor) -> Tensor:
        """[H, K, ...] in the caller's shape; an unused output [0] stays."""
        return t.squeeze(0) if self.single and t.dim() > 1 else t


def with_heads(x: Tensor, codebook: Tensor) -> Heads:
    single = codebook.dim() == 2
    if not single:
        return Heads(x, codebook, tuple(x.shape[:-1]), single)
    return Heads(one_head(x), codebook.unsqueeze(0), tuple(x.shape[:-1]), single)


def one_head(t: Tensor | None) -> Tensor | None:  # [..., D] -> [1, N, D]
    return t if t is None else t.unsqueeze(0) if t.dim() == 2 else t.reshape(1, -1, t.shape[-1])


def one_row(t: Tensor | None) -> Tensor | None:  # [...] -> [1, N]
    return t if t is None else t.unsqueeze(0) if t.dim() == 1 else t.reshape(1, -1)
