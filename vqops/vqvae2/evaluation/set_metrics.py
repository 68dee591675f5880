"""How far a set of images is from another, in the features of a classifier, and which are near to training images."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqops import nearest
from vqops.vqvae2.networks.vqvae2 import as_float
from vqops.vqvae2.progress import counted

NEIGHBOUR = 3  # whose distance is the radius of a feature's ball, as in the paper
ROWS_AT_ONCE = 1000
NEAR_SHARE = 0.01


@torch.no_grad()
def features(classifier: nn.Sequential, images: Tensor, batch_size: int) -> Tensor:  # uint8 [N, C, H, W]; [N, F]
    """What the last layer of the classifier sees of each image, float64."""
    batches = counted("batches of features", images.split(batch_size))
    return torch.cat([classifier[:-1](as_float(batch) - 0.5).double() for batch in batches])


def frechet_distance(x: Tensor, y: Tensor) -> float:  # [N, F], [M, F] float64
    """The squared Frechet distance of two Gaussians with the means and covariances of two sets of features.

    |m - n|^2 + tr(C + D - 2 (C D)^(1/2)); NaN for a single feature, which has no covariance. Sources: Dowson and Landau
    1982; Heusel et al. 2017 (arXiv:1706.08500), whose FID is this in the features of Inception v3.
    """
    if min(len(x), len(y)) < 2:
        return torch.nan
    (m, C), (n, D) = ((rows.mean(0), torch.cov(rows.T).view(rows.shape[1], -1)) for rows in (x, y))
    values, vectors = torch.linalg.eigh(C)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ D @ root).clamp_min(0).sqrt().sum()  # of (C D)^(1/2), which has the same trace
    return max(((m - n).square().sum() + C.trace() + D.trace() - 2 * both).item(), 0.0)


def precision_and_recall(real: Tensor, other: Tensor) -> tuple[float, float]:  # [N, F], [M, F] float64
    """The share of `other` within the balls of `real`, and of `real` within those of `other`.

    A ball reaches from a feature to its third nearest neighbour in its own set. Source: Kynkaanniemi et al. 2019
    (arXiv:1904.06991).
    """
    return share_within(other, real), share_within(real, other)


def share_within(x: Tensor, balls: Tensor) -> float:  # [N, F], [M, F]
    """The share of x that lies within a ball; NaN if there are too few features for one."""
    if len(balls) <= NEIGHBOUR:
        return torch.nan
    parts = balls.split(ROWS_AT_ONCE)
    radii = torch.cat([apart(part, balls).kthvalue(NEIGHBOUR + 1).values for part in parts])  # each is its own nearest
    within = [(apart(part, balls) <= radii).any(1) for part in x.split(ROWS_AT_ONCE)]
    return torch.cat(within).double().mean().item()


def apart(x: Tensor, y: Tensor) -> Tensor:  # [N, F], [M, F]; [N, M], and 0 exactly where two are equal
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class Nearest(NamedTuple):
    """Of each image of a set the nearest of others."""

    images: Tensor  # uint8 [N, C, H, W], the others
    distances: Tensor  # [N] float64: root of the mean squared difference of their values, in [0, 1]


def nearest_images(images: Tensor, others: Iterable[Tensor]) -> Nearest:  # uint8 [N, C, H, W]; [B, C, H, W] each
    found = Nearest(images.clone(), torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device))
    rows = as_float(images).flatten(1)
    for batch in others:
        candidates = batch.to(images.device)
        candidates = candidates[nearest(rows, as_float(candidates).flatten(1))]
        distances = (as_float(candidates).flatten(1).double() - rows).square().mean(1).sqrt()
        nearer = distances < found.distances
        found.images[nearer], found.distances[nearer] = candidates[nearer], distances[nearer]
    return found


def share_near(distances: Tensor, of_held_out: Tensor) -> float:  # [N], [M]
    """The share of the distances below that which a hundredth of the held-out images fall below.

    Near 0.01 where images are no nearer to training images than unseen ones are; far above it, some are copies.
    """
    return (distances < torch.quantile(of_held_out, NEAR_SHARE)).double().mean().item()
