"""Distances between sets of images: against hand-made sets, other ways to the same number, and their limits."""

import math

import numpy as np
import pytest
import torch
from promises import COPIES

pytest.importorskip("safetensors")

from scipy.linalg import sqrtm

from vqops.vqvae2.evaluation.classifier import network
from vqops.vqvae2.evaluation.set_metrics import (
    NEIGHBOUR,
    features,
    frechet_distance,
    nearest_images,
    precision_and_recall,
    share_near,
)


def normal(count: int, dims: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_by_hand():
    """Means 0 and 3, variances 2 and 8: 9 + 2 + 8 - 2 * 4."""
    x, y = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[1.0], [5.0]]).double()
    assert frechet_distance(x, y) == pytest.approx(11)


@pytest.mark.parametrize("count", [40, 6], ids=["full rank", "fewer rows than dimensions"])
def test_frechet_distance_is_that_of_the_matrix_root(count):
    x, y = normal(count, 9, 0) @ normal(9, 9, 1), normal(count, 9, 2) @ normal(9, 9, 3) + 1
    C, D = (np.cov(rows.T) for rows in (x, y))
    expected = ((x.mean(0) - y.mean(0)).square().sum() + np.trace(C + D - 2 * sqrtm(C @ D).real)).item()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = normal(50, 9, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(9 * 4, rel=1e-9)
    assert math.isnan(frechet_distance(x, x[:1]))


def share_by_hand(x: torch.Tensor, balls: torch.Tensor) -> float:
    within = 0
    for row in x:
        for number, middle in enumerate(balls):
            others = sorted((middle - other).norm().item() for n, other in enumerate(balls) if n != number)
            if (row - middle).norm().item() <= others[NEIGHBOUR - 1]:
                within += 1
                break
    return within / len(x)


def test_precision_and_recall_by_hand():
    real, other = normal(30, 2, 0), 0.5 * normal(25, 2, 1) + 1.5
    precision, recall = precision_and_recall(real, other)
    assert precision == pytest.approx(share_by_hand(other, real))
    assert recall == pytest.approx(share_by_hand(real, other))
    assert 0 < recall < precision < 1


def test_precision_and_recall_of_equal_sets_and_of_sets_apart():
    real = normal(1500, 3, 0)  # more than one block
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 100) == (0, 0)
    assert precision_and_recall(real, real[:2].repeat(10, 1))[0] == 1  # two images over and over: precise,
    assert precision_and_recall(real, real[:2].repeat(10, 1))[1] < 0.01  # and nothing of the rest
    assert all(map(math.isnan, precision_and_recall(real[:3], real[:3])))


def test_nearest_images_of_several_batches():
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(0, 256, (n, 3, 4, 5), generator=generator, dtype=torch.uint8) for n in (6, 50))
    others[41] = images[2]
    found = nearest_images(images, others.split(16))
    apart = torch.cdist(images.flatten(1).double() / 255, others.flatten(1).double() / 255)
    COPIES.same(found.images, others[apart.argmin(1)])
    torch.testing.assert_close(found.distances, apart.amin(1) / 60**0.5, rtol=1e-5, atol=1e-6)
    assert found.distances[2] == 0


def test_share_of_near_images():
    held_out = torch.arange(1, 101).double()
    assert share_near(torch.tensor([0.0, 1.5, 50.0, 300.0]).double(), held_out) == 0.5
    assert share_near(held_out, held_out) == 0.01


def test_features_are_those_before_the_last_layer():
    torch.manual_seed(0)
    classifier = network(3, 4).eval()
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    found = features(classifier, images, batch_size=3)
    assert found.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(classifier[-1](found.float()), classifier(images / 255 - 0.5))
