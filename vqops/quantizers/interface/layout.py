"""From the caller's axes to the rows [H, N, D] of the ops, and back."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqops.dispatch.calls import runs_itself
from vqops.ops.checks import check_device, check_floating, check_indices

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


class Layout(NamedTuple):
    """Where the features are, how many axes of positions there are, and how the heads share the features.

    positions: the axes of x without its features, e.g. (b, n) or (b, h, w); masks have them, and indices before heads.
    Heads with a codebook each are the H of the ops; heads that share one are rows of H = 1, a position's in turn.
    """

    owner: str  # the class that the user called, for messages
    dim: int
    heads: int
    separate: bool  # a codebook per head
    features_second: bool
    spatial: int | None  # axes of positions besides the batch; None: any number

    @property
    def axes(self) -> str:
        names = {1: "n", 2: "h, w", 3: "d, h, w", None: "..."}[self.spatial]
        return f"[b, dim, {names}]" if self.features_second else f"[b, {names}, dim]"

    def check_input(self, x: Tensor) -> None:
        check_floating(self.owner, x=x)
        fits = x.dim() >= 2 if self.spatial is None else x.dim() == self.spatial + 2
        if not fits or self.features_last(x).shape[-1] != self.dim:
            raise ValueError(f"{self.owner}: x must be {self.axes} with dim={self.dim}, got {list(x.shape)}")

    def positions(self, x: Tensor) -> tuple[int, ...]:
        return tuple(self.features_last(x).shape[:-1])

    def mask(self, x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:  # bool [*positions]
        """Which positions to quantize, from the caller's mask or lens."""
        if mask is None and lens is None:
            return None
        positions = self.positions(x)
        check_device(self.owner, x, mask=mask, lens=lens)
        if lens is not None:
            if mask is not None:
                raise ValueError(f"{self.owner}: mask and lens can't both be given")
            if len(positions) != 2:
                raise ValueError(f"{self.owner}: lens needs [b, n] vectors, got {list(positions)}; use mask")
            if lens.dtype not in INTEGERS:
                raise TypeError(f"{self.owner}: lens must be integers, got {lens.dtype}")
            if tuple(lens.shape) != positions[:1]:
                raise ValueError(f"{self.owner}: lens must have shape {list(positions[:1])}, got {list(lens.shape)}")
            return torch.arange(positions[1], device=x.device) < lens.long().unsqueeze(-1)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"{self.owner}: mask must be bool, True for vectors to quantize, got {mask.dtype}")
            if tuple(mask.shape) != positions:
                raise ValueError(f"{self.owner}: mask must have shape {list(positions)}, got {list(mask.shape)}")
        return mask

    def indices(self, indices: Tensor, num_codes: int, positions: tuple[int, ...] | None = None) -> Tensor:
        """The caller's indices as int64, after all checks."""
        if indices.dtype in INTEGERS:
            indices = indices.long()
        check_indices(self.owner, indices, num_codes)
        heads, given = [self.heads] * (self.heads > 1), list(indices.shape)
        if positions is not None and given != [*positions, *heads]:
            raise ValueError(f"{self.owner}: indices must have shape {[*positions, *heads]}, got {given}")
        if heads and given[-1:] != heads:
            raise ValueError(f"{self.owner}: indices must end in an axis of heads={self.heads}, got {given}")
        return indices

    def features_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.features_second else x

    def features_back(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self.features_second else x

    def rows(
        self,
        x: Tensor,
        project: nn.Module,  # [*positions, dim] -> [*positions, heads * D]
        mask: Tensor | None = None,  # bool [*positions]
    ) -> Tensor:  # [H, N, D]
        """The rows to quantize, from the caller's x."""
        given = self.features_last(x)
        if mask is not None and not isinstance(project, nn.Identity):
            # Padding may hold anything, and 0 * NaN in the gradient of the projection's weights is NaN.
            given = given.masked_fill(~mask.unsqueeze(-1), 0)
        z = project(given)
        if self.heads > 1:
            return self.heads_first(z.reshape(-1, self.heads, z.shape[-1] // self.heads))
        if z.dim() == 3 and runs_itself() and len(z) == 1:
            return z
        return z.reshape(1, -1, z.shape[-1])

    def rows_back(self, rows: Tensor, positions: tuple[int, ...]) -> Tensor:  # [H, N, D] -> [*positions, heads * D]
        return reshaped(self.heads_last(rows), (*positions, self.heads * rows.shape[-1]))

    def output(
        self,
        quantized: Tensor,  # [*positions, dim] or [*positions, k, dim]
        mask: Tensor | None,  # bool [*positions]
        x: Tensor,
        zeros: bool,  # at masked positions; False: the input's values
    ) -> Tensor:
        """The output in the caller's axes."""
        if mask is not None:
            kept, original = mask.unsqueeze(-1), self.features_last(x)
            if quantized.dim() > original.dim():
                kept, original = kept.unsqueeze(-1), original.unsqueeze(-2)
            if zeros:
                quantized = quantized.masked_fill(~kept, 0)
            else:
                quantized = torch.where(kept, quantized, original.to(quantized.dtype))
        return self.features_back(quantized)

    def mask_rows(self, mask: Tensor | None) -> Tensor | None:  # [*positions] -> [H, N]
        return mask if mask is None else self.heads_first(mask.reshape(-1, 1).expand(-1, self.heads))

    def index_rows(self, indices: Tensor) -> Tensor:  # [*positions] with heads > 1 [*positions, heads] -> [H, N]
        return self.heads_first(indices.reshape(-1, self.heads))

    def indices_back(self, indices: Tensor, positions: tuple[int, ...]) -> Tensor:  # [H, N] -> [*positions(, heads)]
        return reshaped(self.heads_last(indices), (*positions, *[self.heads] * (self.heads > 1)))

    def grouped(self, rows: Tensor, positions: tuple[int, ...]) -> Tensor:  # [H, N, ...] -> [H, G, M, ...]
        """The rows of each of the G positions of a sample, from all M samples and the heads that share a codebook."""
        shared, batch = 1 if self.separate else self.heads, max(positions[0], 1)
        t = rows.reshape(len(rows), positions[0], rows.shape[1] // (batch * shared), shared, *rows.shape[2:])
        return t.movedim(1, 2).flatten(2, 3)

    def row_codes(self, codes: Tensor, positions: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Codes of each row [H, N, K, D] from what a codebook_transform_fn made of codes of `shape` [H, K, D].

        It gives [H, b, n, K, D], n the positions of a sample; heads that share a codebook are samples, as they are to
        vector-quantize-pytorch.
        """
        (H, K, D), batch, n = shape, positions[0], math.prod(positions[1:])
        shared = 1 if self.separate else self.heads
        expected = [H, batch * shared, n, K, D]
        if list(codes.shape) != expected:
            raise ValueError(f"{self.owner}: codebook_transform_fn must return {expected}, got {list(codes.shape)}")
        return codes.view(H, batch, shared, n, K, D).transpose(2, 3).reshape(H, -1, K, D)

    def heads_first(self, t: Tensor) -> Tensor:  # [n, heads, ...] -> [H, N, ...]
        return t.transpose(0, 1) if self.separate else t.reshape(1, -1, *t.shape[2:])

    def heads_last(self, t: Tensor) -> Tensor:  # [H, N, ...] -> [n, heads, ...], or the same values in this order
        return t.transpose(0, 1) if self.separate else t


def reshaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """t itself where it has the shape: a view with its gradient takes as long as a sum. A trace, which is for other
    shapes, too, always has the view."""
    return t if runs_itself() and t.shape == shape else t.reshape(shape)
