"""From indices back to codes and outputs."""

from torch import Tensor, nn

from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.interface.layout import Layout


class Decoding(nn.Module):
    """What a quantizer with one codebook does with indices."""

    _codebook: Codebook
    _layout: Layout
    codebook_size: int
    heads: int
    has_projections: bool
    project_out: nn.Module

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [b, ...]: [b, ..., D], or [b, D, ...] if the input is [b, dim, ...]. -1 gives zeros.

        With heads, indices are [b, ..., heads], and their codes stand one behind the other in the features.
        """
        return self._layout.features_back(self._joined_codes(self._layout.indices(indices, self.codebook_size)))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized vectors that forward returned with these indices, if the codes are the same. -1 gives zeros."""
        indices = self._layout.indices(indices, self.codebook_size)
        codes = self._joined_codes(indices)
        if self.has_projections:
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
            missing = (indices < 0).all(-1) if self.heads > 1 else indices < 0
            codes = codes.masked_fill(missing.unsqueeze(-1), 0)
        return self._layout.features_back(codes)

    def _joined_codes(self, indices: Tensor) -> Tensor:  # [*positions(, heads)] -> [*positions, heads * D]
        layout = self._layout
        positions = tuple(indices.shape[:-1] if self.heads > 1 else indices.shape)
        return layout.rows_back(self._codebook.codes_at(layout.index_rows(indices)), positions)
