"""What the screen knows of a codebook: its codes around a centre and scaled, with the bounds of their error."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.pytorch import bound
from vqops.reference.distance import asking_is_free, has_float64, is_finite

GROUP = 16  # codes of which the screen first takes the least
SAMPLE = 32  # codes whose middle is the centre
MOST_K = 32  # of nearest_topk


class Codes(NamedTuple):
    """In the dtype of the product, where a code is (-C', -radius, start, zeros) and a row (X', A, 1, zeros)."""

    matrix: Tensor  # [H, padded(K), columns(D)]; the start of repeats and of padding is ABSENT
    start: Tensor  # [H, K], of repeats too
    centre: Tensor  # [H, 1, D], exact in float32
    scale: Tensor  # [H, 1, 1], a power of two
    radii: Tensor  # [H, min(K, MOST_K)], the least, ascending
    fits: Tensor  # [H], 0 where no row may be screened


def padded(K: int) -> int:
    return -(-K // GROUP) * GROUP


def columns(D: int) -> int:
    """D + 2, and zeros, so that every row of the matrix starts at a multiple of 16 bytes."""
    return -(-(D + 2) // 4) * 4


def prepare_codes(codebook: Tensor, metric: str, dtype: torch.dtype) -> Codes:  # [H, K, D]
    """For products in `dtype`. On the CPU where the device has no float64; no host synchronisation elsewhere."""
    device, dtypes = codebook.device, (codebook.dtype, dtype)
    codebook = codebook if has_float64(device) else codebook.cpu()
    (H, K, D), finite = codebook.shape, is_finite(codebook)
    if metric == "euclidean":
        wide = torch.float64 if torch.float64 in dtypes else torch.float32  # one rounding: the centre has no more bits
        centre = middle(codebook)
        codes = codebook.to(wide) - centre.to(wide)
        radius = torch.linalg.vector_norm(codes, dim=-1, dtype=torch.float64)  # [H, K]
        scale = 1 / power_of_two(typical(radius.masked_fill(~finite, 0)).clamp_(2.0**-120, 2.0**120)).view(H, 1, 1)
        codes, radius = codes.mul_(scale.to(wide)), radius.mul_(scale.squeeze(-1))
        start = radius.square() * (0.5 - 0.5 * bound.start_error(D, dtype))
        fits, out = radius.new_ones(H), ~(finite & (radius <= bound.FAR[dtype]))
    else:
        values, fit = codebook.double(), bound.FIT[torch.float64]
        largest = values.abs().amax(-1)
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        codes = (values / norm).masked_fill_(~(norm > 0), 0)
        centre, scale = values.new_zeros(H, 1, D), values.new_ones(H, 1, 1)
        radius, start, out = torch.ones_like(largest), torch.zeros_like(largest), ~finite
        fits = (out | (largest == 0) | ((largest < fit) & (largest > 1 / fit))).all(-1)
    radius = radius * (1 + 2.0**-20) + bound.SMALLEST_RADIUS
    start = start.masked_fill(out, bound.ABSENT[dtype])
    matrix = codebook.new_zeros((H, padded(K), columns(D)), dtype=dtype)
    matrix[:, :K, :D] = codes.masked_fill_(out.unsqueeze(-1), 0).neg_()
    matrix[:, :K, D] = -radius.masked_fill(out, bound.SMALLEST_RADIUS)
    matrix[:, :K, D + 1] = start.masked_fill(repeats(codebook), bound.ABSENT[dtype])
    matrix[:, K:, D + 1] = bound.ABSENT[dtype]
    radii = radius.masked_fill(out, bound.ABSENT[dtype]).topk(min(K, MOST_K), largest=False).values
    return Codes(*(part.to(device, dtype) for part in (matrix, start, centre, scale, radii, fits)))


def middle(codebook: Tensor) -> Tensor:  # [H, K, D] -> [H, 1, D] float64, exact in float32
    """The median of some codes, coordinate by coordinate: one huge code does not move it. Any finite value is right."""
    sample = codebook[:, :: -(-codebook.shape[1] // SAMPLE)]
    centre = sample.sort(1).values[:, sample.shape[1] // 2].unsqueeze(1).double()
    return centre.nan_to_num_(0).clamp_(-(2.0**100), 2.0**100).float().double()


def typical(radius: Tensor) -> Tensor:  # [H, K] -> [H, 1]
    """The median of those that are not 0, or 1."""
    K, more = radius.shape[1], (radius > 0).sum(1, keepdim=True)
    found = radius.sort(1).values.gather(1, (K - more + more // 2).clamp_max_(K - 1))
    return found.masked_fill_(found <= 0, 1)


def power_of_two(value: Tensor) -> Tensor:
    """The largest up to a value, which is normal and positive: its exponent alone. Infinity for NaN."""
    bits, exponent = (torch.int64, 0x7FF << 52) if value.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    return (value.contiguous().view(bits) & exponent).view(value.dtype)


def repeats(codebook: Tensor) -> Tensor:  # [H, K, D] -> [H, K] bool
    """Codes equal to one of lower index, which are never the nearest: many would fill every list of candidates.

    Codes are sorted by a hash and compared with the one before. A repeat that a collision hides is one more candidate.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[codebook.element_size()]
    weights = torch.arange(1, codebook.shape[-1] + 1, device=codebook.device)
    for factor in (-7046029254386353131, -4417276706812531889):  # odd and large
        weights = weights * factor
        weights = weights ^ (weights >> 31)
    weights = weights if bits == torch.int64 else (weights >> 32).int()
    key = ((codebook + 0.0).contiguous().view(bits) * weights).sum(-1)  # whole numbers, in any order; -0 is 0
    order = key.argsort(dim=1, stable=True)
    found, key = torch.zeros_like(key, dtype=torch.bool), key.gather(1, order)
    if asking_is_free(codebook.device) and not (key[:, 1:] == key[:, :-1]).any():
        return found
    ordered = codebook[torch.arange(len(codebook), device=codebook.device).unsqueeze(1), order]
    found[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]).all(-1)
    return found.gather(1, order.argsort(1))


def with_repeats(codes: Codes) -> Codes:
    """For several codes of a row, among which repeats count."""
    matrix = codes.matrix.clone()
    matrix[:, : codes.start.shape[1], codes.centre.shape[-1] + 1] = codes.start
    return codes._replace(matrix=matrix)


def shapes(H: int, K: int, D: int) -> Codes:
    return Codes((H, padded(K), columns(D)), (H, K), (H, 1, D), (H, 1, 1), (H, min(K, MOST_K)), (H,))


def packed_bytes(H: int, K: int, D: int) -> int:
    return 4 * sum(map(math.prod, shapes(H, K, D)))


def pack(codes: Codes) -> Tensor:  # float32 -> [packed_bytes] uint8
    return torch.cat([part.flatten() for part in codes]).view(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Codes:  # of the codebook
    parts = shapes(*shape)
    flat = packed.view(torch.float32).split([math.prod(part) for part in parts])
    return Codes(*(values.view(part) for values, part in zip(flat, parts, strict=True)))
