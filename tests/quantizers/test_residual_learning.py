"""What the codes of ResidualVQ learn, and from which levels."""

import copy
from functools import partial

import pytest
import torch
from promises import COPIES, UNCHANGED
from quantizers import state
from residual import DIM, LEVELS, SIZES, residual_vq
from torch.testing import assert_close

import vqops
from vqops import GroupedResidualVQ
from vqops.quantizers.residual import level_dropout


def test_k_means_level_by_level():
    """Each level's first codes are means of what the levels before have left."""
    vq = residual_vq(kmeans_init=True, kmeans_iters=20, codebook_size=8)
    x = torch.randn(1, 400, DIM)
    vq(x, freeze_codebook=True)
    residual = x[0]
    for layer in vq.layers:
        nearest = vqops.nearest(residual, layer.codebook)
        counts, sums = vqops.code_sums(residual, nearest, 8)
        assert layer._codebook.initted and (counts > 0).all()
        assert_close(sums / counts.unsqueeze(-1), layer.codebook, rtol=0, atol=0.1)
        residual = residual - layer.codebook[nearest]


@pytest.mark.parametrize("way", ["together", "in turn", "beam", "cosine"])
def test_dead_codes_restart_from_rows_of_their_level(way):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    for layer in vq.layers:
        layer._codebook.cluster_size[0, :4] = 0
        layer._codebook.embed[0, :4] = 1000 * (1 + torch.arange(4).unsqueeze(-1))  # that no row is near to
        layer._codebook.embed[0, :4, 0] = 0
    if way == "cosine":
        for layer in vq.layers:
            layer._codebook.embed[0, :4] = torch.eye(DIM)[0]
    before = copy.deepcopy(vq)
    x = torch.randn(1, 30, DIM)
    _, indices, _ = vq(x)
    residual = x[0]
    for layer, old, chosen in zip(vq.layers, before.layers, indices[0].unbind(-1), strict=True):
        new = layer.codebook[:4]
        rows = residual / residual.norm(dim=-1, keepdim=True) if way == "cosine" else residual
        assert torch.cdist(new.double(), rows.double()).amin(1).max() < 1e-5
        residual = residual - old.codebook[chosen]


@pytest.mark.parametrize("way", ["shared", "beam"])
def test_dead_codes_of_a_shared_codebook_restart_from_rows_of_any_level(way):
    vq = residual_vq(way, threshold_ema_dead_code=2, shared_codebook=True, codebook_size=64)
    book = vq.layers[0]._codebook
    book.cluster_size.zero_()
    book.embed.mul_(100)
    codes, x = book.embed[0].clone(), torch.randn(1, 40, DIM)
    _, indices, _ = vq(x)
    levels = [x[0]]
    for chosen in indices[0].unbind(-1):
        levels.append(levels[-1] - codes[chosen])
    distance = torch.cdist(book.embed[0].double(), torch.cat(levels[:-1]).double())
    dead = book.cluster_size[0] == 2
    assert dead.sum() > 10 and (distance[dead].amin(1) < 1e-4).all()
    assert {int(row) // 40 for row in distance[dead].argmin(1)} == {0, 1, 2}


def test_a_shared_codebook_is_one():
    vq = residual_vq("shared")
    vq(torch.randn(2, 10, DIM))
    first, *others = (layer._codebook for layer in vq.layers)
    assert all(book is first for book in others)
    books = vq.codebooks
    COPIES.same(books[1:], books[:1].expand(LEVELS - 1, -1, -1))
    twin = residual_vq("shared")
    twin.load_state_dict(vq.state_dict())
    COPIES.same(twin.codebooks, books)


def test_an_optimizer_in_place_moves_a_shared_codebook_once():
    """By the gradient of all levels."""
    rate = partial(torch.optim.SGD, lr=0.5)
    options = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": rate}
    vq = residual_vq("shared", **options)
    codes, x = vq.layers[0].codebook.detach().clone(), torch.randn(1, 20, DIM)
    _, indices, _ = vq(x)
    expected, residual = codes.clone().requires_grad_(), x[0]
    for chosen in indices[0].unbind(-1):
        (residual - expected[chosen]).square().mean().backward()
        residual = residual - codes[chosen]
    assert_close(vq.layers[0].codebook, codes - 0.5 * expected.grad)


    codes = vq.layers[0].codebook.detach().clone()
    vq(x, freeze_codebook=True)
    COPIES.same(vq.layers[0].codebook.detach(), codes)


# Dropout of levels


def test_dropout_uses_every_number_of_levels():
    vq = residual_vq(quantize_dropout=True, num_quantizers=8, quantize_dropout_cutoff_index=2)
    seen, x = set(), torch.randn(1, 5, DIM)
    for _ in range(200):
        before = state(vq)
        _, indices, losses = vq(x)
        used = int((indices[0, 0] >= 0).sum())
        assert ((indices >= 0).sum(-1) == used).all() and (losses[used:] == 0).all() and (losses[:used] > 0).all()
        for level, layer in enumerate(vq.layers):
            now = layer.state_dict().items()
            assert any((value != before[f"layers.{level}.{name}"]).any() for name, value in now) == (level < used)
        seen.add(used)
    assert seen == set(range(3, 9))
    vq.quantize_dropout_multiple_of = 4
    assert {int((vq(x)[1][0, 0] >= 0).sum()) for _ in range(60)} == {4, 8}
    assert (vq.eval()(x)[1] >= 0).all()


@pytest.mark.parametrize("way", ["together", "in turn"])
def test_levels_that_are_dropped_keep_what_waits(way):
    """Codes that were set in place, and sums that wait for the next update."""
    vq = residual_vq(way, quantize_dropout=True, num_quantizers=4)
    seed = next(s for s in range(99) if level_dropout.levels_of(s, 0, 4, 1) == 2)
    vq.layers[3](torch.randn(1, 10, DIM), accum_ema_update=True)
    vq.layers[3]._codebook.embed += 1
    before = state(vq.layers[3])
    vq(torch.randn(1, 10, DIM), rand_quantize_dropout_fixed_seed=seed)
    UNCHANGED.same(vq.layers[3].state_dict(), before)
    assert vq.layers[3]._codebook.pending is not None


def test_the_first_step_with_k_means_uses_all_levels():
    vq = residual_vq(quantize_dropout=True, kmeans_init=True)
    assert (vq(torch.randn(1, 50, DIM))[1] >= 0).all()
    assert len({int((vq(torch.randn(1, 50, DIM))[1] >= 0).sum()) for _ in range(30)}) == LEVELS


def test_groups_drop_the_same_levels():
    vq = GroupedResidualVQ(**SIZES, groups=3, quantize_dropout=True)
    for _ in range(10):
        used = (vq(torch.randn(1, 5, DIM))[1] >= 0).sum(-1)
        assert (used == used.flatten()[0]).all()
