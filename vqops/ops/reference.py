"""Every op in plain PyTorch: the specification, the oracle of the tests, and the fallback on any device with float64.

Nothing here is of size N x K: rows and codes are walked in blocks, with temporaries of at most 64 MB.

Axis letters: H codebooks (heads), N vectors, D dimensions, K codes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 256  # rows of a code that are summed in order before the runs are (see `code_sums`)
TINY = 1e-6  # smallest norm that a vector is divided by; the value of vector-quantize-pytorch
BLOCK = 1 << 20  # float64 values in one temporary: 8 MB


# The distance, to the last bit. All that decides between codes goes through these functions.


def lanes(t: Tensor) -> Tensor:
    """[..., D] as float64 [ceil(D / 8), ..., 8], padded with zeros: element i is in lane i mod 8."""
    if t.device.type == "mps":
        raise RuntimeError("vqops: device mps has no float64, in which the nearest code is decided; move x to the CPU")
    return F.pad(t.double(), (0, -t.shape[-1] % 8)).unflatten(-1, (-1, 8)).movedim(-2, 0)


def lane_sum(steps) -> Tensor:
    """Eight partial sums over the steps in order, then their sum in a fixed tree. Multiply and add round separately."""
    p = None
    for step in steps:
        p = step if p is None else p.add_(step)
    p0, p1, p2, p3, p4, p5, p6, p7 = p.unbind(-1)
    return ((p0 + p4) + (p2 + p6)) + ((p1 + p5) + (p3 + p7))


def squared_distance(x: Tensor, c: Tensor) -> Tensor:
    """sum_i (x_i - c_i)^2 in float64, broadcast over the leading axes. Inputs [..., D], result [...]."""
    return lane_sum((a - b).square_() for a, b in zip(lanes(x), lanes(c), strict=True))


def dot(x: Tensor, c: Tensor) -> Tensor:
    """sum_i x_i c_i in float64, in the same order."""
    return lane_sum(a * b for a, b in zip(lanes(x), lanes(c), strict=True))


def root(square: Tensor) -> Tensor:
    """The square root in float64, correctly rounded.

    torch.sqrt is an ulp off for one value in a hundred where a vector library computes it; one Newton step with an
    exact residual (Dekker 1971) rounds it correctly. Powers of two keep the residual in range.
    """
    large, small = square > 2.0**500, square < 2.0**-500
    v = torch.where(large, square * 2.0**-500, torch.where(small, square * 2.0**500, square))
    s = v.sqrt()
    high = s * (2.0**27 + 1)
    high = high - (high - s)
    low = s - high
    residual = ((v - high * high) - 2 * high * low) - low * low
    s = torch.where((v > 0) & v.isfinite(), s + residual / (2 * s), s)
    return torch.where(large, s * 2.0**250, torch.where(small, s * 2.0**-250, s))


def cost(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """What the nearest code minimises: x [n, D] against codebook [k, D] gives float64 [n, k].

    euclidean: |x - c|^2. cosine: -x.c / |c| on x as given, 0 for a zero code. NaN marks a code that can't be chosen.
    """
    x, c = x[:, None], codebook[None]
    if metric == "euclidean":
        result = squared_distance(x, c)
    else:
        norm = root(dot(c, c))
        result = torch.where(norm > 0, -dot(x, c) / norm, 0.0)
        result = torch.where(result.isnan(), math.inf, result)  # float64 overflow: a value, the worst one
    return result.masked_fill_(~codebook.isfinite().all(-1), math.nan)


def blocks(size: int, step: int):
    """Slices of `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def search(x: Tensor, codebook: Tensor, k: int, mask: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    """Costs (float64) and indices [H, N, k] of the k codes of least cost, ascending, ties to the lowest index.

    Places that no code fills hold index -1 and cost NaN.
    """
    H, N, D = x.shape
    K = codebook.shape[1]
    costs = x.new_full((H, N, k), math.nan, dtype=torch.float64)
    indices = x.new_full((H, N, k), -1, dtype=torch.int64)
    codes_a_block = max(1, min(512, K, BLOCK // max(D, 1)))
    rows_a_block = max(1, min(BLOCK // 4 // (codes_a_block + k), BLOCK // max(D, 1)))
    for h in range(H):
        for rows in blocks(N, rows_a_block):
            for codes in blocks(K, codes_a_block):
                new = cost(x[h, rows], codebook[h, codes], metric)
                number = torch.arange(codes.start, codes.stop, device=x.device).expand_as(new)
                # Stable, so that equal costs keep the order of the indices; NaN sorts behind infinity.
                both, order = torch.cat([costs[h, rows], new], 1).sort(dim=1, stable=True)
                costs[h, rows] = both[:, :k]
                indices[h, rows] = torch.cat([indices[h, rows], number], 1).gather(1, order[:, :k])
    usable = x.isfinite().all(-1) if mask is None else x.isfinite().all(-1) & mask
    indices = indices.where(usable[..., None] & ~costs.isnan(), -1)
    return costs.where(indices >= 0, math.nan), indices


# Search


def nearest(x, codebook, mask=None, metric="euclidean", prepared=None):
    return search(x, codebook, 1, mask, metric)[1].squeeze(-1)


def nearest_topk(x, codebook, k, mask=None, metric="euclidean", prepared=None):
    costs, indices = search(x, codebook, k, mask, metric)
    if metric == "cosine":
        norm = root(dot(x, x)).unsqueeze(-1)
        costs = 1 + torch.where(norm > 0, costs / norm, 0.0).where(indices >= 0, math.nan)
    missing = (
        x.isfinite().all(-1, keepdim=True) if mask is None else x.isfinite().all(-1, keepdim=True) | ~mask[..., None]
    )
    distances = torch.where(missing & (indices < 0), math.inf, costs)
    return indices, distances.to(torch.promote_types(x.dtype, torch.float32))


def prepare(codebook, metric="euclidean"):
    return codebook.new_empty(0, dtype=torch.uint8)


def search_statistics(x, codebook, metric="euclidean"):
    decided = (nearest(x, codebook, metric=metric) >= 0).sum()
    return torch.stack([torch.zeros_like(decided)] * 2 + [decided, x[..., 0].numel() - decided])


# Quantization


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-6) in float64."""
    return x.double() / root(dot(x, x)).clamp_min_(TINY).unsqueeze(-1)


def gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[h, indices[h, n]] as [H, N, D]; index -1 reads code 0, for the caller to overwrite."""
    return codebook.gather(1, indices.clamp_min(0).unsqueeze(-1).expand(*indices.shape, codebook.shape[-1]))


def lost_rows(indices: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that should have a code and have none: they are not finite, or no code is. [H, N, 1] bool."""
    lost = indices < 0 if mask is None else (indices < 0) & mask
    return lost.unsqueeze(-1)


def quantize(
    x,
    codebook,
    mask=None,
    weight=None,
    metric="euclidean",
    gradient="straight_through",
    code_sums=False,
    codebook_error_scale=0.0,
    snapshot=True,
    prepared=None,
    *,
    nearest=nearest,
    sum_codes=None,
):
    H, N, D = x.shape
    indices = nearest(x, codebook, mask, metric, prepared)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    error = torch.empty(indices.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for rows in blocks(N, max(1, BLOCK // max(H * D, 1))):
        chosen, q = indices[:, rows], gather(codebook, indices[:, rows])
        lost = lost_rows(chosen, None if mask is None else mask[:, rows])
        start = x[:, rows] if metric == "euclidean" else unit(x[:, rows])
        absent = torch.where(lost, math.nan, 0.0)
        quantized[:, rows] = q.to(x.dtype).where(chosen.unsqueeze(-1) >= 0, absent.to(x.dtype))
        error[:, rows] = squared_distance(start, q).where(chosen >= 0, absent.squeeze(-1)).to(error.dtype)
    counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    if code_sums:
        rows = x if metric == "euclidean" else unit(x).float()
        counts, sums = (sum_codes or globals()["code_sums"])(rows, indices, codebook.shape[1], weight)
    old = codebook.clone(memory_format=torch.contiguous_format) if snapshot else codebook.new_empty(0)
    return quantized, indices, error, counts, sums, old


def quantize_backward(
    grad_quantized,
    grad_error,
    x,
    codebook,
    indices,
    mask=None,
    metric="euclidean",
    gradient="straight_through",
    codebook_error_scale=0.0,
    x_needed=True,
    codebook_needed=False,
):
    H, N, D = x.shape
    real = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    grad_x = x.new_empty(x.shape) if x_needed else x.new_empty(0)
    slots = code_slots(indices, codebook.shape[1]) if codebook_needed else None
    runs = codebook.new_zeros(slots.runs + 1, D, dtype=real) if codebook_needed else None
    for rows in blocks(N, max(1, BLOCK // max(H * D, 1))):
        chosen = indices[:, rows]
        q = gather(codebook, chosen).to(real)
        q = q.masked_fill_(lost_rows(chosen, None if mask is None else mask[:, rows]), math.nan)
        given = x[:, rows].to(real)
        norm = given.norm(dim=-1, keepdim=True).clamp_min_(TINY)
        start = given if metric == "euclidean" else given / norm
        g = torch.zeros_like(start)
        if grad_quantized is not None and gradient != "none":
            g = grad_quantized[:, rows].to(real)
            g = g if gradient == "straight_through" else rotate_back(g, start, q)
        difference = None
        if grad_error is not None:
            difference = 2 * (start - q) * grad_error[:, rows].to(real).unsqueeze(-1)
            g = g + difference
        if x_needed:
            if metric == "cosine":  # through x / max(|x|, 1e-6)
                along = (start * g).sum(-1, keepdim=True) * start
                g = torch.where(norm > TINY, g - along, g) / norm
            off = torch.zeros_like(chosen, dtype=torch.bool) if mask is None else ~mask[:, rows]
            grad_x[:, rows] = g.masked_fill(off.unsqueeze(-1), 0).to(x.dtype)
        if codebook_needed and difference is not None:
            pull = (-codebook_error_scale * difference).masked_fill_((chosen < 0).unsqueeze(-1), 0)
            runs.index_add_(0, slots.of_row[:, rows].flatten(), pull.flatten(0, 1))
    if not codebook_needed:
        return grad_x, codebook.new_empty(0)
    return grad_x, slots.fold(runs).view(codebook.shape).to(codebook.dtype)


def rotate_back(g: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """The transpose of the rotation and scaling that takes x to q (arXiv 2410.06424, section 4.2), applied to g."""
    x_norm, q_norm = x.norm(dim=-1, keepdim=True).clamp_min_(TINY), q.norm(dim=-1, keepdim=True)
    u, v = x / x_norm, q / q_norm.clamp_min(TINY)
    w = F.normalize(u + v, dim=-1, eps=TINY)
    back = g - 2 * w * (w * g).sum(-1, keepdim=True) + 2 * u * (v * g).sum(-1, keepdim=True)
    return back * (q_norm / x_norm)


# Statistics of the codebook


class code_slots:
    """Which partial sum each row is added to, so that the order of addition is fixed.

    A code's rows, ascending in n, are cut in runs of 256; a run is summed in order, then the runs in order.
    """

    def __init__(self, indices: Tensor, K: int):  # [H, N]
        H, N = indices.shape
        codes = H * K
        code = torch.where(indices >= 0, indices + K * torch.arange(H, device=indices.device)[:, None], codes).flatten()
        count = torch.zeros(codes + 1, dtype=torch.int64, device=indices.device)
        count.scatter_add_(0, code, torch.ones_like(code))
        order = code.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(H * N, device=indices.device) - (count.cumsum(0) - count)[code[order]]
        runs_of_code = (count[:-1] + RUN - 1) // RUN
        first = F.pad(runs_of_code.cumsum(0) - runs_of_code, (0, 1))
        self.codes, self.runs = codes, codes + H * N // RUN
        self.count = count[:-1]
        self.of_row = torch.where(code < codes, first[code] + rank // RUN, self.runs).view(H, N)
        ends = runs_of_code.cumsum(0)
        self.code_of_run = torch.searchsorted(ends, torch.arange(self.runs, device=indices.device), right=True)

    def fold(self, runs: Tensor) -> Tensor:  # [runs + 1, ...] -> [codes, ...]
        sums = runs.new_zeros(self.codes + 1, *runs.shape[1:])
        return sums.index_add_(0, self.code_of_run, runs[:-1])[:-1]


def code_sums(x, indices, num_codes, weight=None):
    H, N, D = x.shape
    slots = code_slots(indices, num_codes)
    runs = x.new_zeros(slots.runs + 1, D, dtype=torch.float32)
    for rows in blocks(N, max(1, BLOCK // max(H * D, 1))):
        values = x[:, rows].float()
        if weight is not None:
            values = values * weight[:, rows].float().unsqueeze(-1)
        runs.index_add_(0, slots.of_row[:, rows].flatten(), values.flatten(0, 1))
    sums = slots.fold(runs).view(H, num_codes, D)
    if weight is None:
        return slots.count.view(H, num_codes), sums
    weights = runs.new_zeros(slots.runs + 1).index_add_(0, slots.of_row.flatten(), weight.float().flatten())
    return slots.fold(weights).view(H, num_codes), sums


def ema_update_(cluster_size, embed_avg, embed, counts, sums, decay, eps=1e-5, weight=None, metric="euclidean"):
    step = 1 - decay if weight is None else (1 - decay) * weight
    size = cluster_size.lerp(counts.to(cluster_size.dtype), step)
    average = embed_avg.lerp(sums.to(embed_avg.dtype), step if weight is None else step.unsqueeze(-1))
    finite = size.isfinite() & average.isfinite().all(-1)
    cluster_size.copy_(size.where(finite, cluster_size))
    embed_avg.copy_(average.where(finite.unsqueeze(-1), embed_avg))
    if embed is None:
        return
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = ((cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total).unsqueeze(-1)
    codes = embed_avg / smoothed
    if metric == "cosine":
        codes = F.normalize(codes.double(), dim=-1, eps=TINY).float()
    embed.copy_(codes.where(codes.isfinite().all(-1, keepdim=True), embed))
