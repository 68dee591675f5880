"""Sums of clusters."""

import pytest
import torch
from promises import WHOLE
from torch.testing import assert_close

from vqops.clustering.means import BLOCK, means_of, segment_sums, square_distances, sums_of, total_of


@pytest.mark.parametrize("N", [0, 1, 100, BLOCK + 1])
def test_sums(N):
    x, indices = torch.randint(-9, 9, (N, 3)).float(), torch.randint(5, (N,)) * 2  # odd clusters have no rows
    counts, sums = sums_of(x, indices, 9)
    one_hot = (indices[:, None] == torch.arange(9)).double()
    WHOLE.same(counts.double(), one_hot.sum(0))
    WHOLE.same(sums, one_hot.T @ x.double())
    WHOLE.same(segment_sums(x.double(), indices, 9), sums)
    WHOLE.same(total_of(x), x.double().sum(0))
    WHOLE.same(total_of(x[:, 0]), x[:, 0].double().sum())
    WHOLE.same(square_distances(x, x[:1].sum(0)), (x - x[:1].sum(0)).double().square().sum(1))


def test_means_far_from_the_origin():
    """float32 sums of 10000 such rows would be wrong by more than their spread."""
    x = 1e6 + torch.randn(10000, 2)
    _, means = means_of(x, torch.zeros(10000, dtype=torch.int64), torch.zeros(1, 2))
    assert_close(means[0].double(), x.double().mean(0), rtol=0, atol=0.04)  # half the spacing of float32 there


def test_a_cluster_without_rows_or_with_an_overflow_keeps_its_code():
    x = torch.tensor([[1e308], [1e308]], dtype=torch.float64)
    counts, means = means_of(x, torch.tensor([1, 1]), torch.tensor([[3.0], [4.0]], dtype=torch.float64))
    assert counts.tolist() == [0, 2] and means.tolist() == [[3.0], [4.0]]
