"""Between the grids of a hierarchy: masked means to a coarser one, interpolation to a finer one, a convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
INTERPOLATION = ("linear", "bilinear", "trilinear")
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pooled(
    t: Tensor,  # [b, dim, *positions]
    shape: tuple[int, ...],
    mask: Tensor | None = None,  # [b, *positions] bool
) -> tuple[Tensor, Tensor | None]:  # [b, dim, *shape], [b, *shape] bool
    """The mean of each cell of a grid of this shape over the positions that are kept, and which cells have any.

    A cell without one is 0. Masked positions may hold anything.
    """
    pool = POOL[len(shape) - 1]
    if mask is None:
        return pool(t, shape), None
    real = torch.promote_types(t.dtype, torch.float32)
    kept = mask.unsqueeze(1)
    share = pool(kept.to(real), shape)
    mean = pool(t.masked_fill(~kept, 0).to(real), shape) / share.masked_fill(share == 0, 1)
    return mean.to(t.dtype), share.squeeze(1) > 0


def upsampled(t: Tensor, shape: tuple[int, ...]) -> Tensor:  # [b, dim, *positions] -> [b, dim, *shape]
    if tuple(t.shape[2:]) == shape:
        return t
    return F.interpolate(t, shape, mode=INTERPOLATION[len(shape) - 1], align_corners=False)


class Phi(nn.Module):
    """(1 - ratio) x + ratio conv(x), x without the convolution where the ratio is 0."""

    def __init__(self, dim: int, axes: int, ratio: float):
        super().__init__()
        self.conv = CONVOLUTION[axes - 1](dim, dim, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, x: Tensor) -> Tensor:  # [b, dim, *positions]
        # A convolution under autocast has another dtype than x.
        return x if self.ratio == 0 else torch.lerp(x, self.conv(x).to(x.dtype), self.ratio)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}"
