"""The nearest codes: a product in float32 with bounds, and float64 for the rows that the bounds leave open."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqops.pytorch.codebook import Codes, pack, prepare_codes, unpack, with_repeats
from vqops.pytorch.decide import decide, scan
from vqops.pytorch.host import on_host
from vqops.pytorch.precision import full_precision
from vqops.pytorch.screen import screen
from vqops.reference.distance import asking_is_free, cost, has_float64, is_finite, squared_error
from vqops.reference.search import distances_of

CERTIFIED, DECIDED, SCANNED, WITHOUT = range(4)  # the tiers of search_statistics
SCANNED_UNASKED = 1 << 24  # elements of rows x codes that are compared in any case where the host may not ask


class Found(NamedTuple):
    indices: Tensor  # [H, N, k]
    tiers: Tensor  # [H, N]
    costs: Tensor | None = None  # [H, N, k] float64, for several codes


def nearest(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    prepared: Tensor | None = None,
) -> Tensor:  # [H, N] int64
    return search(x, codebook, mask, metric, prepared).indices.squeeze(-1)


def search(x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, prepared: Tensor | None) -> Found:
    """The nearest code of each row, and the tier that decided it."""
    usable, trivial, first, _ = certain_rows(x, codebook, 1, mask, metric)
    with full_precision(x.device):
        codes = prepare_codes(codebook, metric, torch.float32) if prepared is None else unpack(prepared, codebook.shape)
        index, is_open = screen(x, codes, metric)
        index, is_open = first.where(trivial, index), is_open & ~trivial
        tiers = torch.full_like(index, CERTIFIED).masked_fill_(~usable, WITHOUT)
        found = Found(index.masked_fill(~usable, -1).unsqueeze(-1), tiers)
        return resolve(x, codebook, codes, 1, metric, is_open & usable, found)


@on_host
def nearest_topk(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    mask: Tensor | None = None,  # [H, N] bool
    metric: str = "euclidean",
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # indices [H, N, k] int64, distances [H, N, k] float32 (float64 for float64 x)
    """Every row takes candidates."""
    usable, trivial, first, exact = certain_rows(x, codebook, k, mask, metric)
    with full_precision(x.device):
        codes = prepare_codes(codebook, metric, torch.float32) if prepared is None else unpack(prepared, codebook.shape)
        shape, others = (*usable.shape, k), ~trivial.unsqueeze(-1)
        indices = first.unsqueeze(1).expand(shape).masked_fill(others, -1)
        costs = exact.unsqueeze(1).expand(shape).masked_fill(others, math.nan)
        tiers = torch.full_like(indices[..., 0], DECIDED).masked_fill_(~usable, WITHOUT)
        found = Found(indices, tiers, costs)
        indices, _, costs = resolve(x, codebook, with_repeats(codes), k, metric, usable & ~trivial, found)
    return indices, distances_of(costs, indices, x, mask, metric)


def certain_rows(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    k: int,
    mask: Tensor | None,  # [H, N] bool
    metric: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # usable, trivial [H, N] bool; indices, costs [H, k]
    """Rows that have a code, and those of them that are 0 and so all take the same codes: padding, for example.

    To many such rows many codes are equally near. For "euclidean" they are found only where that may not cost a wait.
    """
    present = is_finite(codebook)
    usable = is_finite(x) & present.any(1, keepdim=True)
    usable = usable if mask is None else usable & mask
    if metric == "cosine":  # 0 costs 0 with every code
        exact = torch.zeros_like(present, dtype=torch.float64 if has_float64(x.device) else torch.float32)
    elif may_wait(x.device):
        nothing = torch.zeros_like(present[:, :k])
        return usable, torch.zeros_like(usable), nothing.long(), nothing.float()
    else:
        exact = cost(torch.zeros_like(codebook[:, :1]), codebook, metric, squared_error)
    costs, indices = exact.masked_fill(~present, math.nan).sort(dim=1, stable=True)
    costs, indices = costs[:, :k], indices[:, :k]
    return usable, usable & (x == 0).all(-1), indices.masked_fill(costs.isnan(), -1), costs


def resolve(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    codes: Codes,  # in float32
    k: int,
    metric: str,
    is_open: Tensor,  # [H, N] bool
    found: Found,
) -> Found:
    """`found` with the open rows decided: among the codes that float32 leaves, then that float64 leaves, then all.

    The host waits for the device to learn how many rows are open: once where they are few, since then they are compared
    with all codes at once, else again after each tier. Where it may not wait (a CUDA graph is captured, or
    torch.cuda.set_sync_debug_mode("error")), a tier takes a fixed number of rows, and an assertion on the device fails
    if the last one leaves any.
    """
    (H, N, D), K, waits = x.shape, codebook.shape[1], may_wait(x.device)
    there = x.device if has_float64(x.device) else torch.device("cpu")
    codebook = codebook.to(there)
    for tier, slots in enumerate(unasked_slots(H, N, K, D, k)):
        count = int(is_open.sum(1).max()) if waits and N > 0 else min(N, slots)
        if count == 0:
            return found
        slot, taken, given = slotted(x, is_open, count)
        given = given.to(there)
        few = waits and H * count * K * D <= at_once(x.device)
        if few or tier == 2:
            costs, indices, decided = scan(given, codebook, k, metric)
        else:
            if tier == 1:
                codes = prepare_codes(codebook, metric, torch.float64)
                codes = codes if k == 1 else with_repeats(codes)
            costs, indices, decided = decide(given, codebook, Codes(*(part.to(there) for part in codes)), k, metric)
        back = slot.clamp(0, count - 1)
        done = taken & decided.to(x.device).gather(1, back)
        is_open = is_open & ~done
        back, done = back.unsqueeze(-1).expand(H, N, k), done.unsqueeze(-1)
        found = Found(
            indices.to(x.device).gather(1, back).where(done, found.indices),
            found.tiers.masked_fill(done.squeeze(-1), SCANNED if tier == 2 else DECIDED),
            None if found.costs is None else costs.gather(1, back).where(done, found.costs),
        )
        if few:
            return found
    if not waits:
        torch._assert_async(
            ~is_open.any(),
            "vqops: a search that may not wait for the GPU (in a CUDA graph, or in sync debug mode) has no room for so "
            "many rows that float32 cannot decide",
        )
    return found


def unasked_slots(H: int, N: int, K: int, D: int, k: int) -> tuple[int, int, int]:
    """Rows that each tier takes where the host may not ask how many are open.

    The bound grows faster with D than the gaps between distances: of normal values and 1024 codes, float32 leaves 14 in
    1000 rows open at D = 512, 100 at D = 2048.
    """
    candidates = N if k > 1 else max(64, N // 8, N * D // 4096)
    return candidates, max(16, N // 64), max(1, SCANNED_UNASKED // (H * K * D))


def slotted(x: Tensor, is_open: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:  # [H, N, D], [H, N]
    """The slot [H, N] of each open row among `count`, whether [H, N] it has one, and the rows by slot [H, count, D]."""
    H, N, D = x.shape
    if count == N:
        return torch.arange(N, device=x.device).expand(H, N), is_open, x
    number = is_open.cumsum(1)
    wanted = torch.arange(1, count + 1, device=x.device).expand(H, count).contiguous()
    rows = torch.searchsorted(number, wanted).clamp_max_(N - 1)  # slots beyond the open rows take any row
    return number - 1, is_open & (number <= count), x.gather(1, rows.unsqueeze(-1).expand(H, count, D))


def at_once(device: torch.device) -> int:
    """Elements of rows x codes that are compared sooner than the host learns what a further tier would leave."""
    return 0 if asking_is_free(device) else 1 << 25


def may_wait(device: torch.device) -> bool:
    """Whether the host may wait for the device."""
    if device.type != "cuda":
        return True
    return not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() < 2


def prepare(
    codebook: Tensor,  # [H, K, D]
    metric: str = "euclidean",
) -> Tensor:  # [packed_bytes] uint8
    return pack(prepare_codes(codebook, metric, torch.float32))


def search_statistics(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    metric: str = "euclidean",
) -> Tensor:  # [4] int64
    indices, tiers, _ = search(x, codebook, None, metric, None)
    tiers = tiers.masked_fill(indices.squeeze(-1) < 0, WITHOUT)  # a scan can end so, too
    return torch.stack([(tiers == tier).sum() for tier in range(4)])
