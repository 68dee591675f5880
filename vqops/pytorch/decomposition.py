"""The searches in PyTorch's own operators, for those who have no kernel of an op of ours: what exports to ONNX.

Codes come in blocks, a step of one `scan` each, so that neither the graph nor any temporary grows with K; a temporary
is of size N x 8 x block. All values are those of `vqops.reference`, to the last bit if operators round as IEEE 754 says
and none is contracted into another. Nothing is changed in place, since exporters decompose what is functional already.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.reference.distance import TINY, root
from vqops.reference.quantize import to_codes
from vqops.reference.residual import codes_and_rest, rows_of_level
from vqops.reference.search import distances_of

CODES = 64  # of one step


def lanes(t: Tensor) -> list[Tensor]:  # [..., D] -> float64, each [8, ...]
    """Element i in lane i mod 8, padded with zeros. Lanes come first, so that codes meet rows along long axes.

    Cut without a view: within the scan the exporter may take a free size for a stride, for which ONNX has no word.
    """
    t = F.pad(t.double(), (0, -t.shape[-1] % 8))
    return [t[..., start : start + 8].movedim(-1, 0) for start in range(0, t.shape[-1], 8)]


def lane_sum(steps: Iterable[Tensor]) -> Tensor:  # each [8, ...] -> [...]
    """Eight partial sums over the steps in order, then their sum in a fixed tree."""
    p = None
    for step in steps:
        p = step if p is None else p + step
    p = p[:4] + p[4:]
    p = p[:2] + p[2:]
    return p[0] + p[1]


def squared_distance(x: Tensor, c: Tensor) -> Tensor:  # [..., D], [..., D] -> float64 [...]
    differences = (a - b for a, b in zip(lanes(x), lanes(c), strict=True))
    return lane_sum(e * e for e in differences)


def dot(x: Tensor, c: Tensor) -> Tensor:  # [..., D], [..., D] -> float64 [...]
    return lane_sum(a * b for a, b in zip(lanes(x), lanes(c), strict=True))


def norm(x: Tensor) -> Tensor:  # [..., D] -> float64 [...]
    return root(dot(x, x))


def largest(like: Tensor) -> Tensor:  # float64 []
    """The largest finite value, from factors that are exact in float32, in which Python's numbers may reach ONNX."""
    value = like.new_full((), 2**53 - 1, dtype=torch.int64).double()
    for _ in range(10):
        value = value * 2.0**97
    return value * 2


def merge(
    costs: Tensor,  # [H, N, k], of the codes before, ascending; inf without a code
    indices: Tensor,  # [H, N, k]
    new: Tensor,  # [H, N, block]
    first: Tensor,  # [], the index of the first of them
) -> tuple[Tensor, Tensor]:  # costs, indices [H, N, k]
    """The k least of both, ascending, equal ones by index; a cost of inf has index -1."""
    k, both, least, found = costs.shape[-1], torch.cat([costs, new], -1), [], []
    place = torch.arange(both.shape[-1], device=costs.device)
    for _ in range(k):  # since the exporter knows no stable sort
        at = both.argmin(-1, keepdim=True)
        least.append(both.gather(-1, at))
        found.append(torch.where(at < k, indices.gather(-1, at.clamp_max(k - 1)), first + at - k))
        both = both.masked_fill(place == at, math.inf)
    costs, indices = torch.cat(least, -1), torch.cat(found, -1)
    return costs, indices.masked_fill(costs == math.inf, -1)


def search(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    mask: Tensor | None,  # [H, N] bool
    metric: str,
) -> tuple[Tensor, Tensor]:  # costs [H, N, k] float64, indices [H, N, k]
    """The k codes of least cost, ascending, ties to the lowest index.

    Places that no code fills hold index -1 and cost NaN.
    """
    (H, N, _), K = x.shape, codebook.shape[1]
    x, codes, block = x.double(), codebook.double(), min(CODES, K)
    usable = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
    x = x.masked_fill(~usable.unsqueeze(-1), 0)
    codes = F.pad(codes, (0, 0, 0, -K % block), value=math.nan).unflatten(1, (-1, block)).movedim(1, 0)
    finite = codes.isfinite().all(-1)
    codes = codes.masked_fill(~finite.unsqueeze(-1), 0)
    first = torch.arange(codes.shape[0], device=x.device) * block
    limit = largest(x)

    def step(costs, indices, codes, finite, first, x, limit):
        rows, codes = x.unsqueeze(-2), codes.unsqueeze(-3)
        if metric == "euclidean":
            new = squared_distance(rows, codes)
        else:
            length = norm(codes)
            new = (-dot(rows, codes) / length).masked_fill(~(length > 0), 0)
            new = new.masked_fill(new.isnan(), math.inf)
        # A code that can't be chosen costs inf, as a place without a code does; one whose cost overflows comes before.
        new = new.minimum(limit).masked_fill(~finite.unsqueeze(-2), math.inf)
        return merge(costs, indices, new, first)

    start = x.new_full((H, N, k), math.inf), x.new_full((H, N, k), -1, dtype=torch.int64)
    costs, indices = torch.ops.higher_order.scan(step, start, (codes, finite, first), (x, limit))
    indices = indices.masked_fill(~usable.unsqueeze(-1), -1)
    costs = costs.masked_fill(costs == limit, math.inf)
    return costs.masked_fill(indices < 0, math.nan), indices


def nearest(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    prepared: Tensor | None = None,
) -> Tensor:  # [H, N] int64
    return search(x, codebook, 1, mask, metric)[1].squeeze(-1)


def nearest_topk(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # indices [H, N, k] int64, distances [H, N, k] float32 (float64 for float64 x)
    costs, indices = search(x, codebook, k, mask, metric)
    return indices, distances_of(costs, indices, x, mask, metric, norm)


def quantize(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    mask: Tensor | None = None,  # [H, N] bool
    weight: Tensor | None = None,  # [H, N], for the sums
    metric: str = "euclidean",
    gradient: str = "straight_through",
    with_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    snapshot: bool = True,
    prepared: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`vqops.reference.quantize`, with all rows at once. The sums, which only training needs, stay an op."""
    indices = nearest(x, codebook, mask, metric)
    start = x if metric == "euclidean" or not normalize else x.double() / norm(x).clamp_min(TINY).unsqueeze(-1)
    quantized, error = to_codes(x, start, codebook, indices, mask, squared_distance)
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    if with_sums:
        counts, sums = torch.ops.vqops.code_sums(start.to(sums.dtype), indices, codebook.shape[1], weight)
    old = codebook.clone() if snapshot else codebook.new_empty(0)
    return quantized, indices, error.to(torch.promote_types(x.dtype, torch.float32)), counts, sums, old


def residual_quantize(
    x: Tensor,  # [H, N, D]
    codebooks: list[Tensor],  # Q of [H, K_q, D]
    mask: Tensor | None = None,  # [H, N] bool
    levels: Tensor | None = None,  # () int64
    metric: str = "euclidean",
    gradient: str = "straight_through",
    per_level: bool = True,
    with_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    snapshot: bool = True,
    prepared: list[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """`vqops.reference.residual_quantize`, with all rows at once, whose errors add up in float64 in any order."""
    real = torch.promote_types(x.dtype, torch.float32)
    rest, total, indices, errors, counted = x.to(real), torch.zeros_like(x, dtype=real), [], [], []
    for level, codebook in enumerate(codebooks):
        kept = rows_of_level(mask, levels, level, x)
        chosen = nearest(rest, codebook, kept, metric)
        units = metric == "cosine" and normalize
        start = rest.double() / norm(rest).clamp_min(TINY).unsqueeze(-1) if units else rest
        if with_sums:
            counted.append(torch.ops.vqops.code_sums(start.to(torch.float32), chosen, codebook.shape[1]))
        codes, rest, error = codes_and_rest(rest, start, codebook, chosen, kept, squared_distance)
        total = total + codes
        indices.append(chosen)
        errors.append(error.sum(-1).to(real))
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    if with_sums:
        counts, sums = (torch.cat(parts, 1) for parts in zip(*counted, strict=True))
    old = torch.cat(codebooks, 1) if snapshot else codebooks[0].new_empty(0)
    return total.to(x.dtype), torch.stack(indices, -1), torch.stack(errors, -1), counts, sums, old
