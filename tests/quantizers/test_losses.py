"""The terms of the loss: values by hand, weights of their own, gradients, and nothing of size K x K or N x K."""

import pytest
import torch
import torch.nn.functional as F
from memory import LargestTemporaries
from torch.testing import assert_close

from vqops import VectorQuantize
from vqops.quantizers.interface.losses import orthogonality

DIM, CODES = 6, 20


def test_orthogonality_by_hand():
    codes = torch.tensor([[[1.0, 0], [0, 2], [3, 0]]])  # two of three are parallel: five of nine products are 1
    assert_close(orthogonality(codes), torch.tensor(5 / 9 - 1 / 3))
    assert_close(orthogonality(codes, torch.tensor([[True, True, False]])), torch.tensor(0.0))
    assert_close(orthogonality(codes, torch.tensor([[True, False, True]])), torch.tensor(0.5))
    assert_close(orthogonality(codes, torch.tensor([[False, False, False]])), torch.tensor(0.0))


@pytest.mark.parametrize("K, D", [(40, 6), (6, 40), (1, 1), (7, 7)])
def test_both_gram_matrices_are_one(K, D):
    codes = torch.randn(2, K, D, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(codes, dim=-1)
    expected = ((unit @ unit.mT).square().sum((1, 2)) / K**2 - 1 / K).mean()
    assert_close(orthogonality(codes), expected)
    (found,), (wanted,) = (torch.autograd.grad(value, codes) for value in (orthogonality(codes), expected))
    assert_close(found, wanted)


def test_a_sample_of_the_active_codes_holds_no_other():
    codes = torch.zeros(1, 50, 4)
    codes[0, ::2] = torch.tensor([1.0, 0, 0, 0])
    codes[0, 1::2] = torch.tensor([0.0, 1, 0, 0])
    active = torch.arange(50)[None] % 2 == 0
    assert_close(orthogonality(codes, active, 8), torch.tensor(1 - 1 / 8))
    assert_close(orthogonality(codes, active & (torch.arange(50) < 6), 8), torch.tensor(1 - 1 / 3))


def test_orthogonality_needs_no_matrix_of_codes_by_codes():
    codes = torch.randn(1, 20_000, 8)
    with LargestTemporaries() as temporaries:
        orthogonality(codes)
    assert temporaries.most < 20_000 * 20_000 / 4  # a sixteenth of one in float32


def grad_of(t):
    return torch.zeros_like(t) if t.grad is None else t.grad


WEIGHTS = [(1.0, None), (0.25, 1.0), (0.0, 1.0), (0.25, 0.0), (0.25, 0.25)]


@pytest.mark.parametrize("commitment_weight, codebook_loss_weight", WEIGHTS)
@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("routed", [True, False])
def test_a_weight_for_each_of_the_two_losses(commitment_weight, codebook_loss_weight, topk, masked, routed):
    options = {"commitment_weight": commitment_weight, "codebook_loss_weight": codebook_loss_weight}
    options["route_gradients_to_input"] = routed
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True, **options)
    x = torch.randn(3, 10, DIM, requires_grad=True)
    mask = torch.rand(3, 10) < 0.6 if masked else torch.ones(3, 10, dtype=torch.bool)
    _, indices, loss, terms = vq(x, topk=topk, mask=mask if masked else None, return_loss_breakdown=True)
    loss.sum().backward()

    given, codes = x.detach().clone().requires_grad_(), vq.codebook.detach().clone().requires_grad_()
    q, start = codes[indices.clamp_min(0)], given if topk is None else given.unsqueeze(2)
    both = (start - q.detach()).square().mean(-1), (start.detach() - q).square().mean(-1)
    both = [t * (mask if topk is None else mask.unsqueeze(-1)) for t in both]
    if topk is None:
        both = [t.sum() / mask.sum() for t in both]
    if codebook_loss_weight is None:  # one term, for both
        one = (start - q).square().mean(-1) * (mask if topk is None else mask.unsqueeze(-1))
        expected = commitment_weight * (one.sum() / mask.sum() if topk is None else one)
    else:
        expected = commitment_weight * both[0] + codebook_loss_weight * both[1]
    expected.sum().backward()
    assert_close(loss, expected)
    assert_close(grad_of(x), grad_of(given))
    assert_close(grad_of(vq._codebook.embed)[0], grad_of(codes))
    if commitment_weight:
        assert_close(terms.commitment, both[0].detach())


def test_the_cross_entropy_moves_no_codes_that_have_a_loss_of_their_own():
    options = {"commitment_use_cross_entropy_loss": True, "codebook_loss_weight": 0.0}
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True, **options)
    vq(torch.randn(30, DIM, requires_grad=True))[2].backward()
    assert grad_of(vq._codebook.embed).abs().max() == 0


def test_nothing_is_moved_by_the_losses_of_frozen_codes():
    options = {"orthogonal_reg_weight": 1.0, "codebook_loss_weight": 1.0, "codebook_diversity_loss_weight": 1.0}
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True, freeze_codebook=True, **options)
    vq(torch.randn(30, DIM, requires_grad=True))[2].backward()
    assert vq._codebook.embed.grad is None


def test_losses_of_an_empty_batch():
    options = {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}
    vq = VectorQuantize(DIM, CODES, codebook_diversity_loss_weight=1.0, learnable_codebook=True, **options)
    assert vq(torch.randn(0, DIM))[2] == 0
    assert vq(torch.randn(2, 0, DIM))[2] == 0
    assert vq(torch.randn(2, 4, DIM), mask=torch.zeros(2, 4, dtype=torch.bool))[2] == 0


def test_lost_vectors_take_no_part_in_the_loss_of_the_codes():
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True, codebook_loss_weight=1.0)
    x = torch.randn(30, DIM)
    x[3, 2] = torch.nan
    loss = vq(x)[2]
    loss.backward()
    assert loss.isnan() and vq._codebook.embed.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"heads": 2, "codebook_dim": 3}, {"use_cosine_sim": True}], ids=str)
@pytest.mark.parametrize("name", ["commitment_use_cross_entropy_loss", "codebook_diversity_loss_weight"])
def test_masked_vectors_take_no_part(name, options):
    """As if they were not there, which theirs only has for some of its terms."""
    value = True if name == "commitment_use_cross_entropy_loss" else 1.0
    vq = VectorQuantize(DIM, CODES, freeze_codebook=True, **{name: value}, **options)
    x = torch.randn(5, 8, DIM)
    kept = torch.ones(5, 8, dtype=torch.bool)
    kept[1], kept[4] = False, False
    assert_close(vq(x, mask=kept)[2], vq(x[[0, 2, 3]])[2])


def test_a_lost_vector_makes_the_cross_entropy_nan():
    vq = VectorQuantize(DIM, CODES, commitment_use_cross_entropy_loss=True)
    x = torch.randn(30, DIM, requires_grad=True)
    with torch.no_grad():
        x[3, 2] = torch.inf
    loss = vq(x)[2]
    loss.backward()
    assert loss.isnan() and x.grad[:3].isfinite().all() and x.grad[:3].abs().max() > 0


def test_the_losses_need_no_matrix_of_vectors_by_codes():
    N, K = 4000, 4000
    options = {"commitment_use_cross_entropy_loss": True, "codebook_diversity_loss_weight": 1.0}
    vq = VectorQuantize(8, K, stochastic_sample_codes=True, **options)
    x = torch.randn(2, N // 2, 8, requires_grad=True)
    with LargestTemporaries() as temporaries:
        vq(x)[2].backward()
    assert temporaries.most < N * K * 4


def test_options_that_need_learnable_codes_say_so():
    for options in (
        {"codebook_loss_weight": 1.0},
        {"sync_update_v": 0.5},
        {"in_place_codebook_optimizer": torch.optim.SGD},
        {"vq_bridge": torch.nn.Identity(), "learnable_codebook": False},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} needs learnable_codebook=True"):
            VectorQuantize(DIM, CODES, **options)
    with pytest.raises(ValueError, match="directional_reparam needs threshold_ema_dead_code above 0"):
        VectorQuantize(DIM, CODES, directional_reparam=True)


def test_the_weight_of_the_codes_can_change_if_there_is_one():
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True)
    assert vq.codebook_loss_weight is None
    with pytest.raises(ValueError, match="codebook_loss_weight is None: the codes share commitment_weight"):
        vq.codebook_loss_weight = 0.5
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True, codebook_loss_weight=1.0, commitment_weight=0.0)
    x = torch.randn(30, DIM)
    loss = vq(x)[2]
    vq.codebook_loss_weight = 0.5
    assert vq.codebook_loss_weight == 0.5
    assert_close(vq(x)[2], loss / 2)
