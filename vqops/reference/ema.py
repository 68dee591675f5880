"""The moving averages of a codebook."""

import torch.nn.functional as F
from torch import Tensor

from vqops.reference.distance import TINY


def ema_update_(
    cluster_size: Tensor,  # [H, K] float32, changed in place
    embed_avg: Tensor,  # [H, K, D] float32, changed in place
    embed: Tensor | None,  # [H, K, D] float32, changed in place
    counts: Tensor,  # [H, K]
    sums: Tensor,  # [H, K, D]
    decay: Tensor,  # () float32
    eps: float = 1e-5,
    weight: Tensor | None = None,  # [H, K]
    metric: str = "euclidean",
) -> None:
    """A step s = (1 - decay) weight of the averages towards counts and sums, then embed = embed_avg / n.

    n_k = (cluster_size_k + eps) / (total + K eps) total,  total = sum_k cluster_size_k. Only finite values are taken.
    """
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
