"""Count and add up the vectors of each code: the statistics of the EMA codebook update."""

import torch
from torch import Tensor

from vqops.dispatch.calls import call
from vqops.dispatch.library import Implementation, define, select, takes_cpu_kernel, without_gradient
from vqops.ops.checks import check_device, check_floating, check_indices, check_shape, check_weight
from vqops.ops.heads import one_head, one_row


def code_sums(
    x: Tensor,  # [..., D], or [H, N, D] with heads
    indices: Tensor,  # int64, shape of x without D; -1 leaves the row out
    num_codes: int,
    weight: Tensor | None = None,  # shape of x without D
    *,
    heads: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:  # counts [K] int64, or float32 if weighted; sums [K, D] float32; with heads [H, ...]
    """Number and sum of the vectors that have each code.

    counts[k] = sum_n w[n] [indices[n] = k],  sums[k] = sum_n w[n] [indices[n] = k] x[n]

    The order of addition is fixed: the rows of a code, ascending, in runs of 256 summed in order, then the runs in
    order, all in float32. On the CPU the result does not depend on threads. "pytorch" and the kernels for CUDA keep
    this order under `torch.use_deterministic_algorithms(True)`; else theirs is open. Rows with index -1 are left out.
    Detached: no gradient flows through the results. Source: van den Oord et al. 2017, appendix A.1.

    With `heads=True`, x is [H, N, D] and each head has codes of its own; otherwise all leading axes are rows.

    Raises ValueError where shapes or devices disagree, TypeError for dtypes, IndexError for an index that is no code.

    Equivalent to:
        one_hot = (indices[:, None] == torch.arange(num_codes)) * (1 if weight is None else weight[:, None])
        return one_hot.sum(0), one_hot.mT.float() @ x.float()
    """
    check_floating("code_sums", x=x)
    check_device("code_sums", x, indices=indices, weight=weight)
    check_shape("code_sums", "indices", indices, x.shape[:-1], "of x without D")
    check_weight("code_sums", weight, x.shape[:-1])
    if heads and x.dim() != 3:
        raise ValueError(f"code_sums: x must be [H, N, D] with heads=True, got {list(x.shape)}")
    if num_codes < 1:
        raise ValueError(f"code_sums: num_codes must be at least 1, got {num_codes}")
    checks_itself = indices.dtype == torch.int64 and takes_cpu_kernel(x, implementation)
    if not checks_itself:
        check_indices("code_sums", indices, num_codes)
    try:
        return call(in_heads, select("code_sums", implementation), x, indices, num_codes, weight, heads)
    except RuntimeError:
        if checks_itself:
            check_indices("code_sums", indices, num_codes)
        raise


def in_heads(op, x, indices, num_codes, weight, heads):
    if heads:
        return op(x, indices, num_codes, weight)
    counts, sums = op(one_head(x), one_row(indices), num_codes, one_row(weight))
    return counts.squeeze(0), sums.squeeze(0)


def fake_code_sums(x, indices, num_codes, weight=None):
    H, _, D = x.shape
    counted = torch.int64 if weight is None else torch.float32
    return x.new_empty((H, num_codes), dtype=counted), x.new_empty((H, num_codes, D), dtype=torch.float32)


define(
    "code_sums",
    "(Tensor x, Tensor indices, int num_codes, Tensor? weight=None) -> (Tensor, Tensor)",
    fake_code_sums,
    autograd=without_gradient(),
)
