"""From the indices of levels back to codes and outputs."""

import torch
from torch import Tensor, nn

from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.residual.implicit_codebook import moved_codes
from vqops.quantizers.residual.levels import Way


class LevelDecoding(nn.Module):
    """What a residual quantizer does with indices."""

    _layout: Layout
    _way: Way
    owner: str
    layers: nn.ModuleList
    num_quantizers: int
    uniform_codebook_size: bool
    has_projections: bool
    project_out: nn.Module

    @property
    def codebook_size(self) -> int:
        return self.layers[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:  # [Q, K, D], or Q of [K, D] if the sizes differ
        codebooks = tuple(layer.codebook for layer in self.layers)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [b, ..., q], q at most Q: [Q, b, ..., D], zeros for -1 and for levels from q on."""
        return self._codes_of(self._checked_indices(indices))

    def _codes_of(self, indices: list[Tensor]) -> Tensor:  # of levels -> [Q, b, ..., D]
        codes: list[Tensor] = []
        condition = None
        for layer, network, level in zip(self.layers, self._way.networks, indices, strict=False):
            rows = layer._codebook.codes_at(level.reshape(1, -1))
            rows = moved_codes(rows, condition, network).masked_fill((level < 0).view(1, -1, 1), 0)
            condition = rows if condition is None else condition + rows
            codes.append(rows.view(*level.shape, rows.shape[-1]))
        codes += [torch.zeros_like(codes[0])] * (self.num_quantizers - len(indices))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized vectors that forward returned with these indices, if the codes are the same.

        Fewer levels give a coarser output; -1 adds nothing, and vectors of nothing but -1 are zeros.
        """
        levels = self._checked_indices(indices)
        total, *others = self._codes_of(levels)
        for codes in others:
            total = total + codes
        if self.has_projections:
            total = self.project_out(total.to(self.project_out.weight.dtype))
            missing = (torch.stack(levels) < 0).all(0)
            total = total.masked_fill(missing.unsqueeze(-1), 0)
        return self._layout.features_back(total)

    def _checked_indices(self, indices: Tensor) -> list[Tensor]:  # [b, ..., q] -> q of [b, ...] int64
        given = indices.shape[-1] if indices.dim() else 0
        if not 1 <= given <= self.num_quantizers:
            raise ValueError(
                f"{self.owner}: indices must end in an axis of 1 to num_quantizers={self.num_quantizers} levels, "
                f"got {list(indices.shape)}"
            )
        every = zip(indices.unbind(-1), self.layers, strict=False)
        return [self._layout.indices(level, layer.codebook_size) for level, layer in every]
