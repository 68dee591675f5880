"""The exponential moving average of a codebook: one pass over its buffers."""

import torch
from torch import Tensor

from vqops.dispatch.library import Implementation, define, select
from vqops.ops.checks import METRICS, Metric, check_choice, check_device, check_shape


def ema_update_(
    cluster_size: Tensor,  # [H, K] float32, changed in place
    embed_avg: Tensor,  # [H, K, D] float32, changed in place
    embed: Tensor | None,  # [H, K, D] float32, changed in place; None leaves the codebook for later
    counts: Tensor,  # [H, K], from code_sums or quantize
    sums: Tensor,  # [H, K, D]
    decay: Tensor | float,  # a 0-d float32 tensor where it changes from step to step
    eps: float = 1e-5,
    weight: Tensor | None = None,  # [H, K], scales the step of each code
    metric: Metric = "euclidean",
    *,
    implementation: Implementation | None = None,
) -> None:
    """Move the averages towards a step's statistics and the codebook to their ratio, with Laplace smoothing.

        cluster_size += s (counts - cluster_size),  embed_avg += s (sums - embed_avg),  s = (1 - decay) weight
        embed = embed_avg / n,  n_k = (cluster_size_k + eps) / (total + K eps) total,  total = sum_k cluster_size_k

    For "cosine", embed is then divided by max(|embed|, 1e-6). A code whose averages would not be finite keeps them, and
    one whose ratio is not finite keeps its vector: no input can poison the codebook.
    decay=1 leaves the averages and only recomputes embed. Source: van den Oord et al. 2017, appendix A.1.

    Raises ValueError where shapes or devices disagree, TypeError for dtypes, before anything is changed.

    Equivalent to:
        cluster_size.lerp_(counts, 1 - decay)
        embed_avg.lerp_(sums, 1 - decay)
        total = cluster_size.sum(-1, keepdim=True)
        smoothed = (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total
        embed.copy_(embed_avg / smoothed[..., None])
    """
    op = "ema_update_"
    for name, tensor in (("cluster_size", cluster_size), ("embed_avg", embed_avg), ("embed", embed)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")
    if embed_avg.dim() != 3:
        raise ValueError(f"{op}: embed_avg must be [H, K, D], got {list(embed_avg.shape)}")
    shape = tuple(embed_avg.shape)
    for name, tensor in (("embed", embed), ("sums", sums)):
        check_shape(op, name, tensor, shape, "[H, K, D] of embed_avg")
    for name, tensor in (("cluster_size", cluster_size), ("counts", counts), ("weight", weight)):
        check_shape(op, name, tensor, shape[:2], "[H, K] of embed_avg")
    check_choice(op, "metric", metric, METRICS)
    if not isinstance(decay, Tensor):
        if not 0 <= decay <= 1:
            raise ValueError(f"{op}: decay must be in [0, 1], got {decay}")
        decay = torch.full((), decay, dtype=torch.float32, device=cluster_size.device)
    elif decay.dtype != torch.float32 or decay.dim() > 0:
        raise TypeError(f"{op}: decay must be a number or a 0-d float32 tensor, got {decay.dtype} {list(decay.shape)}")
    move_averages_(cluster_size, embed_avg, embed, counts, sums, decay, eps, weight, metric, implementation)


def move_averages_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor | None,
    counts: Tensor,
    sums: Tensor,
    decay: Tensor,  # () float32
    eps: float,
    weight: Tensor | None,
    metric: Metric,
    implementation: Implementation | None = None,
) -> None:
    """`ema_update_` of arguments that are checked, but for where they are and how the buffers lie in memory."""
    op = select("ema_update_", implementation)
    buffers = {"cluster_size": cluster_size, "embed_avg": embed_avg, "embed": embed}
    check_device("ema_update_", cluster_size, **buffers, counts=counts, sums=sums, weight=weight, decay=decay)
    spread = {name: t for name, t in buffers.items() if t is not None and not t.is_contiguous()}
    for name, tensor in spread.items():
        if any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"ema_update_: {name} is expanded, so its elements share memory; give a copy")
    # The kernels want the buffers contiguous.
    dense = buffers | {name: tensor.contiguous() for name, tensor in spread.items()}
    op(*dense.values(), counts, sums, decay, eps, weight, metric)
    for name, tensor in spread.items():
        tensor.copy_(dense[name])


def fake_ema_update_(cluster_size, embed_avg, embed, counts, sums, decay, eps=1e-5, weight=None, metric="euclidean"):
    return None


define(
    "ema_update_",
    "(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!)? embed, Tensor counts, Tensor sums, Tensor decay, "
    "float eps=1e-5, Tensor? weight=None, str metric='euclidean') -> ()",
    fake_ema_update_,
)
