"""Each row's nearest code, its error and the sums by code."""

from functools import partial

from torch import Tensor

from vqops import reference
from vqops.pytorch.code_sums import code_sums
from vqops.pytorch.host import on_host
from vqops.pytorch.search import nearest
from vqops.reference.distance import has_float64


def quantize(
    x: Tensor,  # [H, N, D]
    codebook: Tensor,  # [H, K, D]
    mask: Tensor | None = None,  # [H, N] bool
    weight: Tensor | None = None,  # [H, N], for the sums
    metric: str = "euclidean",
    gradient: str = "straight_through",  # for the backward, as codebook_error_scale is
    with_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    snapshot: bool = True,  # of the codebook, for the backward
    prepared: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The search runs on the device. Errors need float64, on the CPU if the device has none."""
    find = nearest
    if not has_float64(x.device):
        indices = nearest(x, codebook, mask, metric, prepared).cpu()
        find = lambda *_: indices  # noqa: E731
    rest = on_host(partial(reference.quantize, find_nearest=find, sum_codes=code_sums))
    scale = codebook_error_scale
    return rest(x, codebook, mask, weight, metric, gradient, with_sums, scale, normalize, snapshot, prepared)
