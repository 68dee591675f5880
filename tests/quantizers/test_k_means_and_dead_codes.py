"""Where codes come from: k-means on the first batch, and the rows that replace dead ones."""

import pytest
import torch
from promises import INDICES
from quantizers import quantizer
from torch.testing import assert_close

from vqops import VectorQuantize, code_sums, nearest

# Dead codes


def test_a_dead_code_restarts_from_a_row():
    vq = quantizer([[0.0], [10.0], [20.0]], decay=0.5, eps=0.0, threshold_ema_dead_code=0.75)
    vq(torch.tensor([[1.0], [1.0], [19.0]]))  # average counts 1.5, 0.5, 1: the second is dead
    assert vq._codebook.cluster_size.tolist() == [[1.5, 0.75, 1.0]]
    assert vq.codebook[0].item() == pytest.approx(1 / 1.5) and vq.codebook[2].item() == pytest.approx(19.5)
    assert vq.codebook[1].item() in (1.0, 19.0)
    assert vq._codebook.embed_avg[0, 1].item() == 0.75 * vq.codebook[1].item()


@pytest.mark.parametrize("rows", [16, 100])
def test_dead_codes_take_different_rows(rows):
    vq = VectorQuantize(2, 16, threshold_ema_dead_code=1000)
    x = torch.randn(rows, 2)
    vq(x)
    assert len(vq.codebook.unique(dim=0)) == 16
    assert torch.isin(vq.codebook, x).all()
    assert (vq._codebook.cluster_size == 1000).all()


def test_fewer_rows_than_dead_codes_serve_all_in_turn():
    vq = VectorQuantize(2, 16, threshold_ema_dead_code=1000, decay=1.0)
    served = torch.zeros(16, dtype=torch.bool)
    for _ in range(50):
        vq._codebook.cluster_size.zero_()
        vq(torch.randn(5, 2))
        now = vq._codebook.cluster_size[0] == 1000
        assert now.sum() == 5 and len(vq.codebook[now].unique(dim=0)) == 5
        served |= now
    assert served.all()


def test_every_row_can_replace_a_code():
    vq = VectorQuantize(1, 4, threshold_ema_dead_code=1000)
    x = torch.arange(10.0)[:, None] + 1
    seen = set()
    for _ in range(40):
        vq(x)
        seen.update(vq.codebook.flatten().tolist())
        vq.codebook = torch.zeros(4, 1)
    assert seen == set(x.flatten().tolist())


def test_replaced_cosine_codes_have_norm_one():
    vq = VectorQuantize(4, 16, use_cosine_sim=True, threshold_ema_dead_code=1000)
    vq(torch.randn(50, 4) * 7)
    assert_close(vq.codebook.norm(dim=-1), torch.ones(16))


# k-means


@pytest.mark.parametrize("training", [True, False])
def test_k_means_finds_separated_clusters(training):
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    x = (centres[:, None] + 0.1 * torch.randn(4, 50, 2)).flatten(0, 1)
    found = 0
    for _ in range(10):
        vq = VectorQuantize(2, 4, kmeans_init=True).train(training)
        vq(x)
        found += len(nearest(centres, vq.codebook).unique()) == 4
    assert found >= 3  # Lloyd's algorithm can end with two codes in one cluster
    assert vq._codebook.initted


def test_k_means_with_fewer_rows_than_codes():
    vq = VectorQuantize(2, 16, kmeans_init=True).eval()
    x = torch.randn(5, 2)
    quantized, _, _ = vq(x)
    assert_close(quantized, x)
    assert_close(nearest(vq.codebook, x).unique(), torch.arange(5))


@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_k_means_is_lloyds_algorithm(use_cosine_sim):
    x = torch.randn(200, 3)
    vq = VectorQuantize(3, 7, kmeans_init=True, kmeans_iters=50, use_cosine_sim=use_cosine_sim).eval()
    _, indices, _ = vq(x)
    points = torch.nn.functional.normalize(x, dim=-1) if use_cosine_sim else x
    counts, sums = code_sums(points, indices, 7)  # 50 iterations are enough to converge: the codes are their means
    means = sums / counts[:, None]
    means = torch.nn.functional.normalize(means, dim=-1) if use_cosine_sim else means
    assert_close(vq.codebook, means)
    INDICES.same(vq._codebook.cluster_size[0], counts.float())
    assert_close(vq._codebook.embed_avg[0], means * counts[:, None])


def test_a_code_without_rows_keeps_its_place():
    vq = VectorQuantize(1, 3, kmeans_init=True)
    x = torch.tensor([[5.0], [5.0], [5.0], [5.0]])
    vq(x)
    assert_close(vq.codebook, torch.full((3, 1), 5.0), rtol=1e-4, atol=0)


def test_k_means_waits_for_a_row():
    vq = VectorQuantize(2, 4, kmeans_init=True)
    vq(torch.zeros(1, 0, 2))
    assert not vq._codebook.initted
    vq(torch.ones(1, 8, 2))
    assert vq._codebook.initted
    assert_close(vq.codebook, torch.ones(4, 2), rtol=1e-4, atol=0)
