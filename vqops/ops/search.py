"""Nearest-codebook search: the code of each vector, certified to be the nearest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqops import reference
from vqops.dispatch.calls import as_given, call
from vqops.dispatch.library import Implementation, define, is_compiled, kernels, resolve, select, without_gradient
from vqops.ops.checks import METRICS, Metric, check_choice, check_codebook, check_search
from vqops.ops.heads import with_heads
from vqops.pytorch import decomposition
from vqops.pytorch.codebook import packed_bytes as pytorch_bytes
from vqops.triton_kernels.layout import packed_bytes as triton_bytes

LARGEST_K = 32  # of nearest_topk: the list of candidates of a row stays in registers or cache


@dataclass(frozen=True, eq=False)
class PreparedCodebook:
    """A codebook with what the search derives from it: centre, norms, packed copy. Made by `prepare`."""

    codebook: Tensor  # [K, D] or [H, K, D], the caller's own tensor
    packed: Tensor  # uint8, in the layout of the implementation that made it
    metric: Metric
    implementation: Implementation | None
    version: int | None  # of the codebook, which must not change in place afterwards


def prepare(
    codebook: Tensor, metric: Metric = "euclidean", *, implementation: Implementation | None = None
) -> PreparedCodebook:
    """Prepare a codebook [K, D] or [H, K, D] once, for many searches in evaluation or with a frozen codebook.

    The result takes the codebook's place in `nearest`, `nearest_topk` and `quantize`. It is invalid as soon as the
    codebook changes in place; using it then raises RuntimeError (a compiled graph and inference mode don't see it). It
    holds a packed copy of the codebook, float32 or, where that is faster, bfloat16.

    Raises TypeError or ValueError for a codebook or metric that no search takes.
    """
    check_codebook("prepare", codebook)
    check_choice("prepare", "metric", metric, METRICS)
    heads = codebook if codebook.dim() == 3 else codebook.unsqueeze(0)
    packed = select("prepare", implementation)(heads.detach(), metric)
    return PreparedCodebook(codebook, packed, metric, resolve(implementation), version_of(codebook))


def version_of(codebook: Tensor) -> int | None:
    """None in inference mode, whose tensors count no versions."""
    return None if not torch.compiler.is_compiling() and codebook.is_inference() else codebook._version


def unpack(op: str, codebook: Tensor | PreparedCodebook, metric: Metric, implementation: Implementation | None):
    """The codebook, and its preparation if there is one that fits the call."""
    if not isinstance(codebook, PreparedCodebook):
        return codebook, None
    if not torch.compiler.is_compiling() and version_of(codebook.codebook) != codebook.version:
        raise RuntimeError(
            f"{op}: the codebook was changed in place after it was prepared "
            f"(version {codebook.version}, now {version_of(codebook.codebook)}); prepare it again"
        )
    for name, given, made in (
        ("metric", metric, codebook.metric),
        ("implementation", resolve(implementation), codebook.implementation),
    ):
        if given != made:
            raise ValueError(f"{op}: {name} is {given!r}, but the codebook was prepared with {made!r}")
    return codebook.codebook, codebook.packed


def nearest(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor | PreparedCodebook,  # [K, D] or [H, K, D]
    mask: Tensor | None = None,  # bool, shape of x without D; False leaves the row out
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # int64, shape of x without D
    """The index of the nearest code of each vector.

    euclidean: argmin_k |x - c_k|^2.  cosine: argmax_k x.c_k / |c_k|, where a zero code scores 0.

    Exact: distances are compared in float64 on the values given, in one fixed order of operations
    (`vqops.reference.distance.cost`), so every implementation returns the same index; ties go to the lowest.
    -1 for rows that are masked or hold a NaN or an Inf. A code that is not finite is never chosen; if none is finite,
    all indices are -1. x and codebook may differ in dtype (float32, float64, float16, bfloat16) and are not cast.
    No temporary is of size N x K. No gradient.

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, RuntimeError for a stale preparation.

    Equivalent to:
        distance = (x.double()[..., None, :] - codebook.double()).square().sum(-1)
        return distance.argmin(-1)
    """
    codebook, packed = unpack("nearest", codebook, metric, implementation)
    check_search("nearest", x, codebook, mask, metric)
    heads = with_heads(x, codebook)
    op = select("nearest", implementation)
    return heads.rows_back(op(heads.x, heads.codebook, heads.row(mask), metric, packed))


def nearest_topk(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor | PreparedCodebook,  # [K, D] or [H, K, D]
    k: int,
    mask: Tensor | None = None,  # bool, shape of x without D
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:  # indices [..., k] int64, distances [..., k] float32 (float64 for float64 x)
    """The k nearest codes of each vector, nearest first, equal distances by index. 1 <= k <= min(K, 32).

    Distances are |x - c|^2, for cosine 1 - x.c / (|x| |c|); they carry no gradient. Which code comes before which is
    decided as in `nearest`, in float64. Places that no finite code fills have index -1 and distance inf, as have
    masked rows; rows with a NaN or an Inf have index -1 and distance NaN.

    Raises as `nearest` does, and ValueError for k out of range.

    Equivalent to:
        distance = (x.double()[..., None, :] - codebook.double()).square().sum(-1)
        distances, indices = distance.topk(k, largest=False)
        return indices, distances.float()
    """
    codebook, packed = unpack("nearest_topk", codebook, metric, implementation)
    check_search("nearest_topk", x, codebook, mask, metric)
    if not 1 <= k <= min(codebook.shape[-2], LARGEST_K):
        raise ValueError(f"nearest_topk: k must be from 1 to min(K={codebook.shape[-2]}, {LARGEST_K}), got {k}")
    heads = with_heads(x, codebook)
    op = select("nearest_topk", implementation)
    indices, distances = call(as_given, op, heads.x, heads.codebook, k, heads.row(mask), metric, packed)
    return heads.rows_back(indices), heads.rows_back(distances)


def search_statistics(
    x: Tensor,  # [..., D], or [H, N, D] with one codebook per head
    codebook: Tensor,  # [K, D] or [H, K, D]
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> Tensor:  # [4] int64
    """How `nearest` decided the rows of x; the four numbers add up to the number of rows.

    [0] certified by the fast pass alone, [1] decided in float64 among the few codes its error bound left,
    [2] compared with every code once more, more precisely, [3] without a code (not finite, or no finite code).
    Many rows in [2] say why a search is slow: nearly identical codes, or values far apart in scale.
    The reference compares everything in float64.

    Raises as `nearest` does.
    """
    check_search("search_statistics", x, codebook, None, metric)
    heads = with_heads(x, codebook)
    return select("search_statistics", implementation)(heads.x, heads.codebook, metric)


def fake_nearest(x, codebook, mask=None, metric="euclidean", prepared=None):
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def fake_topk(x, codebook, k, mask=None, metric="euclidean", prepared=None):
    shape = (*x.shape[:2], k)
    real = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=real)


def fake_statistics(x, codebook, metric="euclidean"):
    return x.new_empty(4, dtype=torch.int64)


def fake_prepare(codebook, metric="euclidean"):
    if codebook.device.type == "cuda":  # the call chooses who prepares
        return of_unknown_size(codebook)
    compiled = codebook.device.type == "cpu" and is_compiled("prepare", "cpu")
    return (fake_prepare_compiled if compiled else fake_prepare_pytorch)(codebook)


def fake_prepare_pytorch(codebook, metric="euclidean"):
    if not all(isinstance(size, int) for size in codebook.shape):
        return of_unknown_size(codebook)
    return codebook.new_empty(pytorch_bytes(*codebook.shape), dtype=torch.uint8)


def fake_prepare_compiled(codebook, metric="euclidean"):
    if codebook.device.type not in ("cpu", "cuda"):
        return fake_prepare_pytorch(codebook)
    if not all(isinstance(size, int) for size in codebook.shape):
        return of_unknown_size(codebook)
    return codebook.new_empty(kernels.packed_bytes(codebook.device.type, *codebook.shape), dtype=torch.uint8)


def fake_prepare_triton(codebook, metric="euclidean"):
    size = 0 if codebook.dtype == torch.float64 else triton_bytes(*codebook.shape)
    return codebook.new_empty(size, dtype=torch.uint8)


def of_unknown_size(codebook):
    return codebook.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


SEARCH = "Tensor? mask=None, str metric='euclidean', Tensor? prepared=None"
define(
    "nearest",
    f"(Tensor x, Tensor codebook, {SEARCH}) -> Tensor",
    fake_nearest,
    decomposition=decomposition.nearest,
)
define(
    "nearest_topk",
    f"(Tensor x, Tensor codebook, int k, {SEARCH}) -> (Tensor, Tensor)",
    fake_topk,
    autograd=without_gradient(),
    decomposition=decomposition.nearest_topk,
)
define(
    "prepare",
    "(Tensor codebook, str metric='euclidean') -> Tensor",
    {
        None: fake_prepare,
        "reference": reference.prepare,
        "pytorch": fake_prepare_pytorch,
        "compiled": fake_prepare_compiled,
        "triton": fake_prepare_triton,
    },
)
define(
    "search_statistics",
    "(Tensor x, Tensor codebook, str metric='euclidean') -> Tensor",
    fake_statistics,
)
