"""The gradients of `quantize`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.reference.blocks import row_blocks
from vqops.reference.code_sums import CodeSlots, add_rows
from vqops.reference.distance import TINY
from vqops.reference.quantize import gather, lost_rows

LARGEST_SCALE = 1e3  # of a gradient that is turned, so that of a short row stays in the range of float16


def quantize_backward(
    grad_quantized: Tensor | None,  # [H, N, D]
    grad_error: Tensor | None,  # [H, N]
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D], as it was in the forward
    indices: Tensor,  # [H, N]
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    gradient: str = "straight_through",
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    x_needed: bool = True,
    codebook_needed: bool = False,
    *,
    slots_of: Callable[[Tensor, int], CodeSlots] = CodeSlots,
) -> tuple[Tensor, Tensor]:  # grad_x [H, N, D] and grad_codebook [H, K, D], or [0]
    """grad_x = R^T g + 2 (x - q) e, grad_codebook[k] = codebook_error_scale sum over rows of code k of 2 (q - x) e.

    g and e are the gradients of quantized and error; R is the identity for "straight_through", the turn and scaling of
    x onto q for "rotation" (`rotate_back`), and 0 for "none". For "cosine", unless normalize=False, x stands for
    x / max(|x|, 1e-6), and the gradient goes through the division. The codebook's rows are added in the order of
    `code_sums`.
    """
    units = metric == "cosine" and normalize
    real = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    grad_x = x.new_empty(x.shape) if x_needed else x.new_empty(0)
    slots = slots_of(indices, codebook.shape[1]) if codebook_needed else None
    runs = codebook.new_zeros(slots.runs + 1, x.shape[-1], dtype=real) if codebook_needed else None
    for rows in row_blocks(x):
        chosen = indices[:, rows]
        q = gather(codebook, chosen).to(real)
        q = q.masked_fill_(lost_rows(chosen, None if mask is None else mask[:, rows]), math.nan)
        given = x[:, rows].to(real)
        norm = given.norm(dim=-1, keepdim=True) if units or gradient == "rotation" else None
        start = given / norm.clamp_min(TINY) if units else given
        if grad_quantized is None or gradient == "none":
            g = torch.zeros_like(start)
        else:
            g = grad_quantized[:, rows].to(real)
            g = g if gradient == "straight_through" else rotate_back(g, start, q, norm)
        difference = None
        if grad_error is not None:
            difference = 2 * (start - q) * grad_error[:, rows].to(real).unsqueeze(-1)
            g = g + difference
        if x_needed:
            if units:  # through x / max(|x|, 1e-6)
                along = (start * g).sum(-1, keepdim=True) * start
                g = torch.where(norm > TINY, g - along, g) / norm.clamp_min(TINY)
            g = g if mask is None else g.masked_fill(~mask[:, rows, None], 0)
            grad_x[:, rows] = g.to(x.dtype)
        if codebook_needed and difference is not None:
            pull = (-codebook_error_scale * difference).masked_fill_((chosen < 0).unsqueeze(-1), 0)
            add_rows(runs, slots.of_row[:, rows].flatten(), pull.flatten(0, 1))
    if not codebook_needed:
        return grad_x, codebook.new_empty(0)
    return grad_x, slots.fold(runs).view(codebook.shape).to(codebook.dtype)


def rotate_back(
    g: Tensor,  # [..., D], as x and q are
    x: Tensor,
    q: Tensor,
    given: Tensor,  # [..., 1], |x| before x was divided by it
) -> Tensor:
    """The transpose of the rotation and scaling that takes x to q (arXiv 2410.06424, section 4.2), applied to g.

    A vector of length 0 has no direction: where `given` or |q| is at most 1e-6, g itself. |q| / |x| is at most 1000.
    """
    x_norm, q_norm = x.norm(dim=-1, keepdim=True).clamp_min_(TINY), q.norm(dim=-1, keepdim=True)
    u, v = x / x_norm, q / q_norm.clamp_min(TINY)
    w = F.normalize(u + v, dim=-1, eps=TINY)
    back = g - 2 * w * (w * g).sum(-1, keepdim=True) + 2 * u * (v * g).sum(-1, keepdim=True)
    turned = back * (q_norm / x_norm).clamp_max_(LARGEST_SCALE)
    return g.where((given <= TINY) | (q_norm <= TINY), turned)
