"""Paths through the levels: beam search, and codes that depend on those before."""

import copy
import itertools

import pytest
import torch
from promises import INDICES
from residual import CODES, DIM, LEVELS, SIZES, residual_vq
from torch.testing import assert_close

from vqops import ResidualVQ
from vqops.quantizers.codebook import moved


@pytest.mark.parametrize("implicit", [False, True])
def test_a_beam_of_all_paths_finds_the_best(implicit):
    options = {"codebook_size": 4, "implicit_neural_codebook": implicit}
    vq = ResidualVQ(**SIZES | options | {"beam_size": 16, "beam_score_quantizer_weights": [0.5, 1.0, 2.0]}).eval()
    x = torch.randn(1, 30, DIM)
    _, indices, losses = vq(x)
    paths = torch.tensor(list(itertools.product(range(4), repeat=LEVELS)))  # [64, Q]
    codes = vq.get_codes_from_indices(paths[None])[:, 0]  # [Q, 64, D]
    error = (x[0, :, None] - codes.cumsum(0)[:, None]).square().mean(-1)  # [Q, 30, 64]
    best = (error * torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1)).sum(0).argmin(-1)
    INDICES.same(indices[0], paths[best])
    assert_close(losses, error[:, torch.arange(30), best].mean(1))


def test_a_beam_is_at_least_as_good():
    vq = residual_vq("beam", beam_size=8, num_quantizers=6).eval()
    x = torch.randn(1, 500, DIM)
    greedy, found = ((vq(x, beam_size=size)[0] - x).square().sum(-1).mean() for size in (1, 8))
    assert found < 0.98 * greedy


def test_a_training_step_of_a_beam_learns_from_the_paths_it_took():
    vq = residual_vq("beam")
    twin, x = copy.deepcopy(vq), torch.randn(2, 20, DIM)
    mask = torch.rand(2, 20) < 0.8
    _, indices, _ = vq(x, mask=mask)
    residual = x
    for layer, other, chosen in zip(vq.layers, twin.layers, indices.unbind(-1), strict=True):
        codes = other.get_codes_from_indices(chosen)
        other.update_indices(residual, chosen)
        residual = residual - codes
        for name, value in layer.state_dict().items():
            assert_close(other.state_dict()[name], value)


def test_a_beam_passes_by_places_without_a_code():
    """Two finite codes for a beam of four, and a row without any."""
    vq = ResidualVQ(**SIZES | {"codebook_size": 5, "beam_size": 4}).eval()
    for layer in vq.layers:
        layer._codebook.embed[:, 2:] = torch.inf
    x = torch.randn(1, 8, DIM)
    x[0, 3, 2] = torch.nan
    quantized, indices, _ = vq(x)
    assert (indices[0, 3] == -1).all() and quantized[0, 3].isnan().all()
    others = torch.arange(8) != 3
    assert quantized[0, others].isfinite().all() and ((indices[0, others] >= 0) & (indices[0, others] < 2)).all()


def test_a_beam_of_losses_that_overflow_prefers_paths_to_places_without_a_code():
    vq = ResidualVQ(**SIZES | {"codebook_size": 5, "beam_size": 4}).eval()
    for layer in vq.layers:
        layer._codebook.embed[:, 2:] = torch.inf
        layer._codebook.embed[:, :2] *= 1e25
    _, indices, _ = vq(1e25 * torch.randn(1, 8, DIM))
    assert ((indices >= 0) & (indices < 2)).all()


def test_dead_codes_of_a_beam_of_implicit_codes_restart_from_what_was_left():
    options = {"implicit_neural_codebook": True, "threshold_ema_dead_code": 2, "num_quantizers": 2}
    vq = residual_vq("beam", **options)
    vq.layers[1]._codebook.cluster_size.zero_()
    x = torch.randn(1, 30, DIM)
    first = copy.deepcopy(vq)
    _, indices, _ = vq(x)
    rest = x[0] - first.get_codes_from_indices(indices)[0, 0]
    dead = vq.layers[1]._codebook.cluster_size[0] == 2
    assert dead.sum() > 5
    codes = vq.layers[1].codebook[dead].detach()
    assert torch.cdist(codes.double(), rest.detach().double()).amin(1).max() < 1e-5


# Implicit codes


@pytest.mark.parametrize("beam_size", [None, 3])
def test_blocks_of_implicit_codes_are_one(beam_size, monkeypatch):
    vq = residual_vq(implicit_neural_codebook=True, beam_size=beam_size)
    x, results = torch.randn(2, 10, DIM), []
    for values in (1 << 22, 7 * CODES * DIM):
        monkeypatch.setattr(moved, "BLOCK_VALUES", values)
        vq.zero_grad()
        given = x.clone().requires_grad_()
        quantized, indices, losses = vq(given, mask=torch.arange(10).expand(2, 10) < 8)
        (quantized.square().sum() + losses.sum()).backward()
        results.append((quantized, losses, given.grad, *(p.grad for p in vq.parameters())))
        results.append(indices)
    assert_close(results[2], results[0])
    INDICES.same(results[3], results[1])


def test_a_step_of_implicit_codes_holds_no_codes_of_each_row():
    """Of 4000 rows: 128 codes of 16 features for each would be 31 MB in one layer alone."""
    vq = ResidualVQ(dim=16, codebook_size=128, num_quantizers=2, implicit_neural_codebook=True)
    x = torch.randn(1, 4000, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        vq(x)
    assert max(kept) <= x.numel()
