"""What residual k-means finds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqops.clustering.rows import BLOCK
from vqops.ops.checks import check_device, check_floating, check_shape
from vqops.ops.residual_quantize import residual_quantize
from vqops.ops.search import prepare


@dataclass(frozen=True, eq=False)
class ResidualKMeans:
    """Codes of Q levels, the IDs of the rows they were learned from, and how good these are, level by level.

    The codes are on the device of the fit, the indices on that of x, the figures on the CPU.
    """

    codebooks: list[Tensor]  # [K_l, D] each, float32 (float64 for float64 x)
    indices: Tensor  # [N, Q] int64; -1 for rows that took no part
    collision_rate: Tensor  # [Q] float64, share of rows whose indices up to the level another row has, too
    num_unique: Tensor  # [Q] int64, distinct IDs up to the level
    usage: Tensor  # [Q] float64, share of the codes that have rows
    error: Tensor  # [Q] float64, mean of |x - c_1 - ... - c_l|^2
    variance_explained: Tensor  # [Q] float64, 1 - error / mean of |x - mean of x|^2
    iterations: list[int]  # of each level

    def encode(self, x: Tensor, mask: Tensor | None = None, batch_size: int = BLOCK) -> Tensor:
        """IDs [N, Q] of rows [N, D]: level by level the nearest code to what the levels before have left.

        r_1 = x,  i_l = nearest(r_l, codebooks[l]),  r_{l+1} = r_l - codebooks[l][i_l]

        The residuals are float32, for float64 x float64. The rows of a fit that is not balanced get their `indices`. -1
        for rows that are masked or hold a NaN or Inf, and from the level on at which one overflows. x may be on another
        device than the codes, to which `batch_size` rows are brought at a time.

        Raises TypeError or ValueError where shapes, dtypes or devices disagree.
        """
        check_floating("encode", x=x)
        D = self.codebooks[0].shape[1]
        if x.dim() != 2 or x.shape[1] != D:
            raise ValueError(f"encode: x must be [N, D] with D={D}, got {list(x.shape)}")
        check_mask("encode", x, mask)
        check_count("encode", "batch_size", batch_size, 1)
        device, levels = self.codebooks[0].device, [prepare(codes) for codes in self.codebooks]
        blocks = [torch.empty(0, len(levels), dtype=torch.int64, device=x.device)]
        for start in range(0, len(x), batch_size):
            rows = x[start : start + batch_size].detach().to(device)
            of = None if mask is None else mask[start : start + batch_size].to(device)
            blocks.append(residual_quantize(rows, levels, of, gradient="none").indices.to(x.device))
        return torch.cat(blocks)


def check_mask(op: str, x: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor, True for the rows that take part, got {given}")
    check_device(op, x, mask=mask)
    check_shape(op, "mask", mask, x.shape[:-1], "[N]")


def check_count(op: str, name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
