"""VectorQuantize: hand-computed steps first, then what must hold for any input."""

import copy
import math
from functools import partial

import pytest
import torch
from failures import PLACES, failing
from promises import COPIES, INDICES, ORDER, REPEATS, UNCHANGED
from quantizers import quantizer, state
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vqops import VectorQuantize

# By hand


def test_one_ema_step():
    vq = quantizer([[0.0, 0.0], [4.0, 0.0]], decay=0.5, eps=0.25, rotation_trick=False)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]], requires_grad=True)
    quantized, indices, loss = vq(x)
    assert indices.tolist() == [[0, 0, 1]]
    assert quantized.tolist() == [[[0.0, 0.0], [0.0, 0.0], [4.0, 0.0]]]
    assert loss.item() == 0.5  # three squared distances of 1 over 3 x 2 values

    (quantized * torch.tensor([10.0, 20.0])).sum().add(loss).backward()
    third = 1 / 3  # of 2 (x - q) / 6
    assert_close(x.grad, torch.tensor([[[10 + third, 20.0], [10.0, 20 + third], [10 - third, 20.0]]]))

    state = vq._codebook
    assert state.cluster_size.tolist() == [[1.5, 1.0]]  # halfway from 1, 1 to 2, 1
    assert state.embed_avg.tolist() == [[[0.5, 0.5], [3.5, 0.0]]]
    smoothed = [(1.5 + 0.25) / (2.5 + 0.5) * 2.5, (1.0 + 0.25) / (2.5 + 0.5) * 2.5]
    assert_close(vq.codebook, torch.tensor([[0.5 / smoothed[0]] * 2, [3.5 / smoothed[1], 0.0]]))


def test_one_cosine_step():
    vq = quantizer([[1.0, 0.0], [0.0, 1.0]], decay=0.0, eps=0.0, use_cosine_sim=True)
    quantized, indices, loss = vq(torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 4.0]]))
    assert indices.tolist() == [0, 1, 1]
    assert quantized.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    assert_close(loss, torch.tensor((0.6**2 + 0.2**2) / 6))  # only (.6, .8) is away from its code
    assert vq._codebook.cluster_size.tolist() == [[1.0, 2.0]]
    assert_close(vq._codebook.embed_avg, torch.tensor([[[1.0, 0.0], [0.6, 1.8]]]))
    assert_close(vq.codebook, torch.tensor([[1.0, 0.0], [0.6 / math.hypot(0.6, 1.8), 1.8 / math.hypot(0.6, 1.8)]]))


def test_rotation_turns_and_scales_the_gradient():
    vq = quantizer([[0.0, 2.0]])
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    vq(x)[0].backward(torch.tensor([[3.0, 5.0]]))
    assert_close(x.grad, torch.tensor([[10.0, -6.0]]))  # x is turned by 90 degrees and doubled, so g by -90


def test_a_learnable_codebook_gets_the_gradient_of_the_loss():
    vq = quantizer([[0.0, 0.0], [4.0, 0.0]], learnable_codebook=True, commitment_weight=0.5)
    before = state(vq)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    quantized, _, loss = vq(x)
    (loss + quantized.sum()).backward()
    assert_close(vq._codebook.embed.grad, torch.tensor([[[-1.0, -1.0], [1.0, 0.0]]]) * 2 / 6 * 0.5)
    UNCHANGED.same(vq.state_dict(), before)


# Degenerate sizes


@pytest.mark.parametrize("use_cosine_sim", [False, True])
@pytest.mark.parametrize("dim, codebook_size", [(4, 1), (1, 4), (1, 1)])
def test_smallest_codebooks(dim, codebook_size, use_cosine_sim):
    vq = VectorQuantize(
        dim, codebook_size, use_cosine_sim=use_cosine_sim, kmeans_init=True, threshold_ema_dead_code=1
    )
    x = torch.randn(2, 5, dim, requires_grad=True)
    for _ in range(3):
        quantized, indices, loss = vq(x)
        (quantized.sum() + loss).backward()
    assert indices.max() < codebook_size and x.grad.isfinite().all() and vq.codebook.isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"kmeans_init": True, "threshold_ema_dead_code": 2}, {"codebook_dim": 2}, {"heads": 2}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_changes_nothing(options, training):
    vq = VectorQuantize(3, 8, **options).train(training)
    vq(torch.randn(1, 20, 3))
    before = state(vq)
    x = torch.randn(2, 0, 3, requires_grad=True)
    quantized, indices, loss = vq(x)
    assert quantized.shape == (2, 0, 3) and indices.shape[:2] == (2, 0) and loss.item() == 0
    if training:
        (quantized.sum() + loss).backward()
    UNCHANGED.same(vq.state_dict(), before)


# Values that are no numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_a_row_that_is_not_finite_is_seen_and_left_out(bad, use_cosine_sim):
    options = {"use_cosine_sim": use_cosine_sim, "threshold_ema_dead_code": 1, "kmeans_init": True}
    vq = VectorQuantize(3, 8, **options)
    twin = copy.deepcopy(vq)
    x = torch.randn(40, 3)
    spoiled = torch.cat([x[:20], torch.tensor([[1.0, bad, 0.0]]), x[20:]])
    for _ in range(3):
        torch.manual_seed(1)
        quantized, indices, loss = vq(spoiled)
        torch.manual_seed(1)
        twin(x)
        assert indices[20] == -1 and quantized[20].isnan().all() and loss.isnan()
    ORDER.same(vq.state_dict(), twin.state_dict())


def test_a_batch_of_nan_moves_no_average():
    vq = VectorQuantize(3, 8, threshold_ema_dead_code=2)
    vq(torch.randn(50, 3))
    before = state(vq)
    vq(torch.full((50, 3), math.nan))
    assert_close(vq.state_dict(), before, rtol=1e-5, atol=0)
    UNCHANGED.same(vq._codebook.cluster_size, before["_codebook.cluster_size"])


def test_a_first_batch_of_nan_leaves_the_random_codes():
    vq = VectorQuantize(3, 8, kmeans_init=True).eval()
    before = vq.codebook.clone()
    vq(torch.full((50, 3), math.nan))
    UNCHANGED.same(vq.codebook, before)
    assert before.isfinite().all()


def test_float64_values_beyond_float32_never_enter_the_state():
    vq = VectorQuantize(2, 4, kmeans_init=True, threshold_ema_dead_code=5)
    x = torch.randn(30, 2, dtype=torch.float64)
    x[::2] *= 1e300
    for _ in range(3):
        vq(x)
    assert all(buffer.isfinite().all() for buffer in vq.buffers())


# What changes the state, and what does not


def test_freezing():
    vq = VectorQuantize(3, 8, freeze_codebook=True, threshold_ema_dead_code=2)
    before = state(vq)
    x = torch.randn(50, 3, requires_grad=True)
    loss = vq(x)[2]
    assert loss > 0 and loss.requires_grad
    UNCHANGED.same(vq.state_dict(), before)
    vq(x, freeze_codebook=False)
    assert (vq.codebook != before["_codebook.embed"][0]).any()
    before = state(vq)
    vq.eval()(x, freeze_codebook=False)
    UNCHANGED.same(vq.state_dict(), before)


def test_freezing_a_learnable_codebook_stops_its_gradient():
    vq = VectorQuantize(3, 8, learnable_codebook=True)
    vq(torch.randn(50, 3, requires_grad=True), freeze_codebook=True)[2].backward()
    assert vq._codebook.embed.grad is None


@pytest.mark.parametrize("lost", PLACES)
def test_a_failed_call_leaves_the_state(lost):
    vq = VectorQuantize(3, 8, codebook_dim=2, threshold_ema_dead_code=2)
    vq(torch.randn(9, 3))
    before = state(vq)
    with failing(vq, lost):
        vq(torch.randn(9, 3))
    UNCHANGED.same(vq.state_dict(), before)
    with pytest.raises(ValueError):
        vq(torch.randn(9, 4))
    UNCHANGED.same(vq.state_dict(), before)


# Layouts


@pytest.mark.parametrize("codebook_dim", [4, 3])
def test_layouts_agree(codebook_dim):
    """To the bit without projections, which PyTorch rounds by the shape of its input."""
    compare = COPIES.same if codebook_dim == 4 else assert_close
    rows = torch.randn(2, 6, 4)
    vq = VectorQuantize(4, 8, codebook_dim=codebook_dim).eval()
    quantized, indices, _ = vq(rows)
    first = copy.deepcopy(vq)
    first.channel_last = False
    other, same, _ = first(rows.mT)
    compare(other.mT, quantized)
    INDICES.same(same, indices)
    image = copy.deepcopy(vq)
    image.accept_image_fmap = True
    other, same, _ = image(rows.mT.reshape(2, 4, 2, 3))
    compare(other.flatten(2).mT, quantized)
    INDICES.same(same.flatten(1), indices)
    assert same.shape == (2, 2, 3)
    other, same, _ = vq(rows.view(2, 2, 3, 4))
    compare(other.view_as(quantized), quantized)
    INDICES.same(same.flatten(1), indices)
    assert same.shape == (2, 2, 3)
    one, index, _ = vq(rows[:, 0])
    compare(one, quantized[:, 0])
    INDICES.same(index, indices[:, 0])


@pytest.mark.parametrize("options", [{}, {"channel_last": False}, {"accept_image_fmap": True}], ids=str)
@pytest.mark.parametrize("codebook_dim", [None, 2])
def test_indices_give_the_output_back(options, codebook_dim):
    vq = VectorQuantize(4, 8, codebook_dim=codebook_dim, **options).eval()
    shape = {"channel_last": (2, 4, 6), "accept_image_fmap": (2, 4, 2, 3)}.get(next(iter(options), None), (2, 6, 4))
    quantized, indices, _ = vq(torch.randn(shape))
    assert_close(vq.get_output_from_indices(indices), quantized)
    axis = -1 if not options else 1
    assert vq.get_codes_from_indices(indices).shape[axis] == (codebook_dim or 4)
    missing = torch.full_like(indices, -1)
    assert not vq.get_codes_from_indices(missing).any() and not vq.get_output_from_indices(missing).any()
    with pytest.raises(IndexError, match=r"-1 or a code in \[0, 8\).* 0 to 8"):
        vq.get_codes_from_indices(torch.tensor([[0, 8]]))


# Gradients, autocast, dispatch


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"use_cosine_sim": True}], ids=str)
def test_eval_has_no_loss_and_no_gradient_to_the_input(options):
    vq = VectorQuantize(4, 8, **options).eval()
    before = state(vq)
    quantized, _, loss = vq(torch.randn(5, 4, requires_grad=True))
    assert not quantized.requires_grad and not loss.requires_grad and loss.item() == 0
    UNCHANGED.same(vq.state_dict(), before)


def test_the_projection_learns_from_the_output_when_the_input_is_data():
    vq = VectorQuantize(4, 8, codebook_dim=2, commitment_weight=0.0)
    vq(torch.randn(5, 4))[0].sum().backward()
    assert vq.project_in.weight.grad.any()


@pytest.mark.parametrize("commitment_weight", [0.0, 1.0])
def test_the_loss_can_go_backward_without_an_encoder(commitment_weight):
    VectorQuantize(4, 8, commitment_weight=commitment_weight)(torch.randn(5, 4))[2].backward()


def test_autocast_does_not_change_indices():
    vq = VectorQuantize(16, 256).eval()
    x = torch.randn(1000, 16) * 0.2
    quantized, indices, _ = vq(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other, same, _ = vq(x)
        loss = vq.train()(x)[2]
    INDICES.same(same, indices)
    COPIES.same(other, quantized)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "options, arguments",
    [
        ({}, {}),
        ({"heads": 2}, {"accum_ema_update": True}),
        ({"learnable_codebook": True, "threshold_ema_dead_code": 1}, {}),
        ({"ema_update": False}, {"ema_update": True}),
        ({"kmeans_init": True}, {}),
    ],
    ids=str,
)
def test_activation_checkpointing_of_an_update_is_an_error(options, arguments, use_reentrant):
    """The repeated forward would search another codebook than the first, and update it again."""
    vq = VectorQuantize(4, 8, **options)
    x = torch.randn(5, 4, requires_grad=True)
    loss = checkpoint(partial(vq, **arguments), x, use_reentrant=use_reentrant)[2]
    before = state(vq)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        loss.backward()
    UNCHANGED.same(vq.state_dict(), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "options, arguments",
    [
        ({"freeze_codebook": True}, {}),
        ({"learnable_codebook": True, "kmeans_init": True, "heads": 2}, {}),
        ({"ema_update": False}, {}),
        ({}, {"topk": 2}),
    ],
    ids=str,
)
def test_activation_checkpointing_without_an_update(options, arguments, use_reentrant):
    vq = VectorQuantize(4, 8, **options)
    twin = copy.deepcopy(vq)
    x = torch.randn(5, 4)
    grads = []
    for module, run in ((vq, partial(checkpoint, partial(vq, **arguments), use_reentrant=use_reentrant)), (twin, twin)):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        quantized, _, loss = run(given) if module is vq else run(given, **arguments)
        (quantized.square().sum() + loss.sum()).backward()
        grads.append([given.grad, *(p.grad for p in module.parameters())])
    assert_close(*grads)
    REPEATS.same(vq.state_dict(), twin.state_dict())
