"""The gradient of the sum of the codes, taken once."""

from torch import Tensor

from vqops.quantizers.codebook.chosen import rotated


def with_gradient_once(
    quantized: Tensor,  # [1, N, D]
    rows: Tensor,  # [1, N, D]
    mask: Tensor | None,  # [1, N] bool
    rotates: bool,
) -> Tensor:
    """The sum with the gradient of the input turned and scaled onto it, or of the input as it is."""
    q, start = quantized.detach(), rows.to(quantized.dtype)
    if mask is not None:
        start = start.masked_fill(~mask.unsqueeze(-1), 0)
    moved = rotated(start, q, start.detach().norm(dim=-1, keepdim=True)) if rotates else start
    return q + (moved - moved.detach())  # adds zero
