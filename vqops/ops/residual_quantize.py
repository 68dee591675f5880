"""Residual quantization in one op: all levels, each of which quantizes what the one before has left."""

from typing import NamedTuple

import torch
from torch import Tensor

from vqops import reference
from vqops.dispatch.calls import as_given, call
from vqops.dispatch.library import Autograd, Implementation, define, select, without_second_derivative
from vqops.ops.checks import GRADIENTS, Gradient, Metric, check_choice, check_device, check_search, check_shape
from vqops.ops.heads import with_heads
from vqops.ops.search import PreparedCodebook, unpack
from vqops.pytorch import decomposition

LARGEST_Q = 64


class ResidualQuantized(NamedTuple):
    """The result of `residual_quantize`. H is left out for codebooks [K, D]."""

    quantized: Tensor  # x's shape and dtype
    indices: Tensor  # int64, shape of x without D, and Q
    error: Tensor  # [H, Q] float32 (float64 for float64 x), summed over the rows
    counts: list[Tensor]  # of each level, [H, K] as code_sums gives them; empty if not asked for
    sums: list[Tensor]  # of each level, [H, K, D]; empty if not asked for


class ResidualRows(NamedTuple):
    """The same of [H, N, D], with the levels one behind the other."""

    quantized: Tensor  # [H, N, D]
    indices: Tensor  # [H, N, Q]
    error: Tensor  # [H, Q]
    counts: Tensor  # [H, sum K], or [0]
    sums: Tensor  # [H, sum K, D], or [0]


def residual_quantize(
    x: Tensor,  # [..., D], or [H, N, D] with codebooks of heads
    codebooks: Tensor | list[Tensor | PreparedCodebook],  # [Q, K, D], or Q of [K_q, D] or [H, K_q, D]
    mask: Tensor | None = None,  # bool, shape of x without D; False leaves the row out
    levels: Tensor | int | None = None,  # the levels that run, from the first; a 0-d tensor where it changes
    metric: Metric = "euclidean",
    gradient: Gradient = "straight_through",
    per_level: bool = True,
    code_sums: bool = False,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,  # for "cosine"
    *,
    implementation: Implementation | None = None,
) -> ResidualQuantized:
    """Replace each vector by a sum of codes, one of each codebook: the nearest to what those before have left.

    r_0 = x,  indices_l = nearest(r_l, codebooks[l]),  c_l = codebooks[l][indices_l],  r_{l+1} = r_l - c_l,
    quantized = c_0 + c_1 + ...,  error_l = the sum over all rows of |r_l - c_l|^2,  counts_l and sums_l as `code_sums`
    of r_l (only with code_sums=True). Source: Chen et al. 2010; Zeghidour et al. 2021 (SoundStream).

    Residuals are float32 (float64 for float64 x), whatever x is: float32(float64(r) - float64(c)). Each search is that
    of `nearest`. Codes are added in the residuals' dtype in the order of the levels, then rounded to x's. So indices
    and quantized are the same from every implementation.

    `levels` runs the first of them alone (quantizer dropout): the others have index -1 and error, counts and sums 0. As
    a tensor it changes without a new graph and without a wait.

    Gradients of level l are those of `quantize` for r_l, which depends on x with derivative 1. per_level=True:
    quantized sends its gradient to x once a level, turned as r_l onto c_l for "rotation", as in vector-quantize-pytorch
    and EnCodec. per_level=False: once, turned as x onto the sum of the codes. error sends 2 (r_l - c_l) to x and
    codebook_error_scale 2 (c_l - r_l) to the codebooks. The backward uses the codebooks as they were in the forward.
    Second derivatives raise NotImplementedError.

    "cosine" and normalize are as for `quantize`, with r_l in the place of x.

    Masked rows: quantized, error and gradients 0, indices -1. A row with a NaN or Inf, or whose residual overflows, has
    index -1 from that level on, and quantized and the errors from that level on are NaN; it is left out of their counts
    and sums.

    Raises ValueError or TypeError where shapes, dtypes or devices disagree, RuntimeError for a stale preparation.

    Equivalent to:
        rest, quantized, indices, error = x, 0, [], []
        for codebook in codebooks:
            indices.append(nearest(rest.detach(), codebook))
            code = codebook[indices[-1]].detach()
            quantized = quantized + rest + (code - rest).detach()
            rest = rest - code
            error.append(rest.square().sum())
        return quantized, torch.stack(indices, -1), torch.stack(error)
    """
    op = "residual_quantize"
    codebooks, packed = unpack_levels(op, codebooks, metric, implementation)
    check_levels(op, x, codebooks, mask, metric)
    check_choice(op, "gradient", gradient, GRADIENTS)
    levels = levels_of(op, levels, x, len(codebooks))
    heads = with_heads(x, codebooks[0])
    if heads.single:
        codebooks = [codebook.unsqueeze(0) for codebook in codebooks]
    how = metric, gradient, per_level, code_sums, codebook_error_scale, normalize, implementation
    found = residual_quantize_rows(heads.x, codebooks, packed, heads.row(mask), levels, *how)
    sizes, codes, rows = [codebook.shape[1] for codebook in codebooks], heads.codes_back, heads.rows_back
    counts, sums = ([*map(codes, t.split(sizes, 1))] if code_sums else [] for t in (found.counts, found.sums))
    return ResidualQuantized(rows(found.quantized), rows(found.indices), codes(found.error), counts, sums)


def unpack_levels(
    op: str,
    codebooks: Tensor | list[Tensor | PreparedCodebook],
    metric: Metric,
    implementation: Implementation | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """The codebooks, and their preparations if they have one that fits the call."""
    if isinstance(codebooks, PreparedCodebook):
        raise TypeError(f"{op}: codebooks must be a tensor [Q, K, D] or a list of codebooks, got PreparedCodebook")
    if isinstance(codebooks, Tensor) and codebooks.dim() not in (3, 4):
        raise ValueError(f"{op}: codebooks must be [Q, K, D] or a list of codebooks, got {list(codebooks.shape)}")
    given = list(codebooks.unbind(0) if isinstance(codebooks, Tensor) else codebooks)
    if not 1 <= len(given) <= LARGEST_Q:
        raise ValueError(f"{op}: codebooks must have from 1 to {LARGEST_Q} levels, got {len(given)}")
    levels = [unpack(op, codebook, metric, implementation) for codebook in given]
    packed = [each for _, each in levels if each is not None]
    if packed and len(packed) < len(levels):
        raise TypeError(f"{op}: all codebooks must be prepared or none, got {len(packed)} of {len(levels)}")
    return [codebook for codebook, _ in levels], packed or None


def check_levels(op: str, x: Tensor, codebooks: list[Tensor], mask: Tensor | None, metric: str) -> None:
    for level, codebook in enumerate(codebooks):
        check_search(op, x, codebook, mask, metric)
        first = codebooks[0]
        if codebook.dtype != first.dtype or codebook.dim() != first.dim():
            raise ValueError(
                f"{op}: codebooks must have one dtype and number of axes, got {first.dtype} {list(first.shape)} for "
                f"level 0, {codebook.dtype} {list(codebook.shape)} for level {level}"
            )


def levels_of(op: str, levels: Tensor | int | None, x: Tensor, Q: int) -> Tensor | None:
    """The levels that run as a tensor; None for all."""
    if isinstance(levels, Tensor):
        check_shape(op, "levels", levels, (), "()")
        check_device(op, x, levels=levels)
        if levels.dtype != torch.int64:
            raise TypeError(f"{op}: levels must be an int or an int64 tensor, got {levels.dtype}")
        return levels
    if levels is None:
        return None
    if not isinstance(levels, int | torch.SymInt) or isinstance(levels, bool):
        raise TypeError(f"{op}: levels must be an int or an int64 tensor, got {type(levels).__name__}")
    if not 0 <= levels <= Q:
        raise ValueError(f"{op}: levels must be from 0 to the number of codebooks, {Q}, got {levels}")
    return torch.full((), levels, dtype=torch.int64, device=x.device)


def residual_quantize_rows(
    x: Tensor,  # [H, N, D]
    codebooks: list[Tensor],  # Q of [H, K_q, D]
    packed: list[Tensor] | None,  # of their preparations
    mask: Tensor | None,  # [H, N] bool
    levels: Tensor | None,  # () int64
    metric: Metric,
    gradient: Gradient,
    per_level: bool,
    code_sums: bool,
    codebook_error_scale: float = 0.0,
    normalize: bool = True,
    implementation: Implementation | None = None,
) -> ResidualRows:
    """`residual_quantize` of arguments that are checked."""
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *codebooks))
    how = metric, gradient, per_level, code_sums, codebook_error_scale, normalize, needed, packed
    op = select("residual_quantize", implementation)
    return ResidualRows(*call(as_given, op, x, codebooks, mask, levels, *how, needed=needed)[:5])


def fake_residual_quantize(
    x,
    codebooks,
    mask=None,
    levels=None,
    metric="euclidean",
    gradient="straight_through",
    per_level=True,
    code_sums=False,
    codebook_error_scale=0.0,
    normalize=True,
    snapshot=True,
    prepared=None,
):
    (H, N, D), Q, K = x.shape, len(codebooks), sum(codebook.shape[1] for codebook in codebooks)
    return (
        x.new_empty(x.shape),
        x.new_empty((H, N, Q), dtype=torch.int64),
        x.new_empty((H, Q), dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty((H, K) if code_sums else 0, dtype=torch.int64),
        x.new_empty((H, K, D) if code_sums else 0, dtype=torch.float32),
        codebooks[0].new_empty((H, K, D) if snapshot else 0),
    )


def save_for_backward(ctx, inputs, output):
    x, codebooks, mask, levels, ctx.metric, ctx.gradient, ctx.per_level, _, scale, ctx.normalize, snapshot, _ = inputs
    _, indices, _, counts, sums, old = output
    if not snapshot:
        raise RuntimeError("residual_quantize: a gradient is needed, so call it with snapshot=True")
    ctx.codebook_error_scale, ctx.sizes = scale, [codebook.shape[1] for codebook in codebooks]
    ctx.mark_non_differentiable(indices, counts, sums, old)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, old, indices, mask, levels)


def backward(ctx, grad_quantized, _indices, grad_error, *_unused, op):
    x, old, indices, mask, levels = ctx.saved_tensors
    needed = ctx.needs_input_grad
    # Registered: of the arguments that did not have their default, a list for each list of tensors.
    wanted = needed[1] if isinstance(needed[1], list) else needed[1 : 1 + len(ctx.sizes)]
    x_needed, codebooks_needed = needed[0], any(wanted) and ctx.codebook_error_scale != 0
    grad_x, grad_codebooks = op(
        grad_quantized,
        grad_error,
        x,
        old,
        ctx.sizes,
        indices,
        mask,
        levels,
        ctx.metric,
        ctx.gradient,
        ctx.per_level,
        ctx.codebook_error_scale,
        ctx.normalize,
        x_needed,
        codebooks_needed,
    )
    by_level = grad_codebooks.split(ctx.sizes, 1) if codebooks_needed else [None] * len(ctx.sizes)
    by_level = [grad if one else None for grad, one in zip(by_level, wanted, strict=True)]
    rest = ([None] * len(each) if isinstance(each, list) else None for each in needed[2:])
    return grad_x if x_needed else None, by_level, *rest


def fake_backward(
    grad_quantized,
    grad_error,
    x,
    codebooks,
    sizes,
    indices,
    mask=None,
    levels=None,
    metric="euclidean",
    gradient="straight_through",
    per_level=True,
    codebook_error_scale=0.0,
    normalize=True,
    x_needed=True,
    codebooks_needed=False,
):
    grad_x = x.new_empty(x.shape if x_needed else 0)
    return grad_x, codebooks.new_empty(codebooks.shape if codebooks_needed else 0)


def one_by_one(*arguments):
    ops = torch.ops.vqops
    return reference.residual_quantize(*arguments, find_nearest=ops.nearest, sum_codes=ops.code_sums)


def backward_one_by_one(*arguments):
    ops = torch.ops.vqops
    return reference.residual_quantize_backward(*arguments, backward_of_level=ops.quantize_backward)


define(
    "residual_quantize_backward",
    "(Tensor? grad_quantized, Tensor? grad_error, Tensor x, Tensor codebooks, int[] sizes, Tensor indices, "
    "Tensor? mask=None, Tensor? levels=None, str metric='euclidean', str gradient='straight_through', "
    "bool per_level=True, float codebook_error_scale=0.0, bool normalize=True, bool x_needed=True, "
    "bool codebooks_needed=False) -> (Tensor, Tensor)",
    fake_backward,
    fallback=backward_one_by_one,
    autograd=without_second_derivative("residual_quantize_backward"),
)
define(
    "residual_quantize",
    "(Tensor x, Tensor[] codebooks, Tensor? mask=None, Tensor? levels=None, str metric='euclidean', "
    "str gradient='straight_through', bool per_level=True, bool code_sums=False, float codebook_error_scale=0.0, "
    "bool normalize=True, bool snapshot=True, Tensor[]? prepared=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake_residual_quantize,
    fallback=one_by_one,
    autograd=Autograd(save_for_backward, backward, "residual_quantize_backward"),
    decomposition=decomposition.residual_quantize,
)
