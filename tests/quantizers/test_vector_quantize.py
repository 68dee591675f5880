"""VectorQuantize: hand-computed steps first, then what must hold for any input."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from promises import COPIES, INDICES, ORDER, REPEATS, UNCHANGED
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vqops import VectorQuantize, code_sums, nearest
from vqops.quantizers.codebook import codebook as codebook_module

FLOAT_BUFFERS = ("cluster_size", "embed_avg", "embed")


def quantizer(codes, **options) -> VectorQuantize:
    """A quantizer with these codes, as it is after construction."""
    codes = torch.tensor(codes)
    vq = VectorQuantize(codes.shape[1], codes.shape[0], **options)
    vq.codebook = codes
    return vq


def state(vq) -> dict:
    return {name: value.clone() for name, value in vq.state_dict().items()}


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


def test_a_dead_code_restarts_from_a_row():
    vq = quantizer([[0.0], [10.0], [20.0]], decay=0.5, eps=0.0, threshold_ema_dead_code=0.75)
    vq(torch.tensor([[1.0], [1.0], [19.0]]))  # average counts 1.5, 0.5, 1: the second is dead
    assert vq._codebook.cluster_size.tolist() == [[1.5, 0.75, 1.0]]
    assert vq.codebook[0].item() == pytest.approx(1 / 1.5) and vq.codebook[2].item() == pytest.approx(19.5)
    assert vq.codebook[1].item() in (1.0, 19.0)
    assert vq._codebook.embed_avg[0, 1].item() == 0.75 * vq.codebook[1].item()


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


def test_k_means_waits_for_a_row():
    vq = VectorQuantize(2, 4, kmeans_init=True)
    vq(torch.zeros(1, 0, 2))
    assert not vq._codebook.initted
    vq(torch.ones(1, 8, 2))
    assert vq._codebook.initted
    assert_close(vq.codebook, torch.ones(4, 2), rtol=1e-4, atol=0)


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


# Dead codes


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


# The state


def test_loading_decides_about_k_means():
    trained, fresh = (VectorQuantize(2, 4, kmeans_init=True) for _ in range(2))
    untouched = state(fresh)
    trained(torch.randn(30, 2))
    for assign in (False, True):
        vq = VectorQuantize(2, 4, kmeans_init=True)
        vq.load_state_dict(state(trained), assign=assign)
        codes = vq.codebook.clone()
        vq.eval()(torch.randn(30, 2) + 50)
        UNCHANGED.same(vq.codebook, codes)
        vq.load_state_dict(untouched, assign=assign)
        vq(torch.randn(30, 2) + 50)
        assert vq.codebook.min() > 40


def test_buffers_copied_by_hand_are_not_initialised_over():
    model = VectorQuantize(2, 4, kmeans_init=True)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(torch.randn(30, 2))
    average.update_parameters(model)
    average.eval()(torch.randn(30, 2) + 50)
    COPIES.same(average.module.codebook, model.codebook)


def test_meta_device_then_assign():
    with torch.device("meta"):
        vq = VectorQuantize(2, 4, kmeans_init=True)
    source = VectorQuantize(2, 4)
    vq.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(9, 2)
    INDICES.same(vq.eval()(x)[1], source.eval()(x)[1])


def test_copies_and_pickles():
    vq = VectorQuantize(2, 4, kmeans_init=True)
    vq(torch.randn(30, 2))
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        COPIES.same(twin.state_dict(), vq.state_dict())
        twin(torch.randn(30, 2))


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16),
    "to_device": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_the_buffers(cast):
    vq = VectorQuantize(3, 8, codebook_dim=2)
    before = state(vq)
    cast(vq)
    assert vq.project_in.weight.dtype != torch.float32
    for name in FLOAT_BUFFERS:
        UNCHANGED.same(getattr(vq._codebook, name), before[f"_codebook.{name}"], where=name)
    quantized, _, loss = vq(torch.randn(5, 3).to(vq.project_in.weight.dtype))
    assert quantized.dtype == vq.project_in.weight.dtype
    assert loss.dtype == torch.promote_types(quantized.dtype, torch.float32)
    assert vq.get_output_from_indices(torch.tensor([0, -1])).dtype == quantized.dtype


def test_casts_move_a_learnable_codebook_but_not_its_averages():
    vq = VectorQuantize(3, 8, learnable_codebook=True, threshold_ema_dead_code=1).bfloat16()
    assert isinstance(vq._codebook.embed, torch.nn.Parameter) and vq._codebook.embed.dtype == torch.bfloat16
    vq(torch.randn(50, 3, dtype=torch.bfloat16))[2].backward()
    assert vq._codebook.embed.grad.dtype == torch.bfloat16
    assert vq._codebook.embed_avg.dtype == vq._codebook.cluster_size.dtype == torch.float32


def test_casts_behind_the_modules_back_are_undone():
    vq = VectorQuantize(3, 8)
    for buffer in vq.buffers():
        buffer.data = buffer.data.to(torch.bfloat16 if buffer.is_floating_point() else torch.bool)
    vq(torch.randn(5, 3))
    assert {getattr(vq._codebook, name).dtype for name in FLOAT_BUFFERS} == {torch.float32}
    vq.load_state_dict({k: v.bfloat16() if v.is_floating_point() else v for k, v in state(vq).items()}, assign=True)
    assert {getattr(vq._codebook, name).dtype for name in FLOAT_BUFFERS} == {torch.float32}


def test_averages_do_not_drift_in_bfloat16():
    vq = quantizer([[3.0, 3.0]], decay=0.99).bfloat16()
    x = torch.full((64, 2), 3.0, dtype=torch.bfloat16)
    for _ in range(400):
        vq(x)
    assert_close(vq.codebook, torch.full((1, 2), 3.0), rtol=1e-4, atol=0)
    assert_close(vq._codebook.cluster_size, torch.full((1, 1), 64 - 63 * 0.99**400), rtol=1e-4, atol=0)


def test_setting_the_codebook_sets_the_averages():
    vq = VectorQuantize(3, 8, kmeans_init=True, decay=0.8)
    codes = torch.randn(8, 3) * 5
    vq.codebook = codes
    vq(codes)  # each code sees itself once, so nothing pulls
    assert_close(vq.codebook, codes, rtol=1e-4, atol=1e-4)
    learnable = VectorQuantize(3, 8, learnable_codebook=True)
    learnable.codebook = codes
    COPIES.same(learnable.codebook, codes)
    with pytest.raises(ValueError, match=r"codebook must have shape \[8, 3\], got \[7, 3\]"):
        vq.codebook = codes[:7]


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


def fail(*_, **__):
    raise RuntimeError("lost rank")


@pytest.mark.parametrize("lost", ["sum_over_ranks", "ema_update_", "random_rows", "project_out"])
def test_a_failed_call_leaves_the_state(lost, monkeypatch):
    vq = VectorQuantize(3, 8, codebook_dim=2, threshold_ema_dead_code=2)
    vq(torch.randn(9, 3))
    before = state(vq)
    with monkeypatch.context() as patch:
        if lost == "project_out":
            patch.setattr(vq.project_out, "forward", fail)
        else:
            patch.setattr(codebook_module, lost, fail)
        with pytest.raises(RuntimeError, match="lost rank"):
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


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"dim": 2.5}, "dim must be an integer of at least 1, got 2.5"),
        ({"codebook_size": 0}, "codebook_size must be an integer of at least 1, got 0"),
        ({"codebook_dim": -1}, "codebook_dim must be an integer of at least 1, got -1"),
        ({"kmeans_iters": 0}, "kmeans_iters must be an integer of at least 1, got 0"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": math.nan}, r"decay must be in \[0, 1\], got nan"),
        ({"eps": -1.0}, "eps must be finite and at least 0, got -1.0"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must be finite and at least 0, got -1"),
        ({"commitment_weight": math.inf}, "commitment_weight must be finite and at least 0, got inf"),
        ({"use_cosine_sim": True, "learnable_codebook": True}, "use_cosine_sim and learnable_codebook"),
        ({"ema_update": True, "learnable_codebook": True}, "ema_update and learnable_codebook can't both be True"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "accept_image_fmap and accept_3d_fmap"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantize(**({"dim": 4, "codebook_size": 8} | options))


class Named(VectorQuantize):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda: Named(0, 8),
        lambda: Named(4, 8, decay=2),
        lambda: Named(4, 8)(torch.zeros(2, 3)),
        lambda: Named(4, 8)(torch.zeros(2, 4), mask=torch.zeros(2)),
        lambda: Named(4, 8)(torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool)),
        lambda: Named(4, 8)(torch.zeros(2, 4), ema_update_weight=torch.zeros(3)),
        lambda: Named(4, 8, straight_through=True, rotation_trick=True),
        lambda: Named(4, 8)(torch.zeros(2, 4), sample_codebook_temp=-1.0),
        lambda: Named(4, 8, learnable_codebook=True)._codebook.update_ema(),
        lambda: setattr(Named(4, 8), "codebook", torch.zeros(3)),
    ],
)
def test_messages_name_the_class_that_was_called(call):
    with pytest.raises(Exception, match=r"^Named[:.]"):
        call()


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'codebook_dims'"):
        VectorQuantize(4, 8, codebook_dims=3)


@pytest.mark.parametrize(
    "options, x, error, message",
    [
        ({}, torch.zeros(2, 3, 5), ValueError, r"x must be \[b, ..., dim\] with dim=4, got \[2, 3, 5\]"),
        ({}, torch.zeros(4), ValueError, r"x must be \[b, ..., dim\] with dim=4, got \[4\]"),
        ({"channel_last": False}, torch.zeros(2, 3, 4), ValueError, r"\[b, dim, ...\] with dim=4, got \[2, 3, 4\]"),
        ({"accept_image_fmap": True}, torch.zeros(2, 4, 3), ValueError, r"\[b, dim, h, w\] with dim=4, got"),
        ({}, torch.zeros(2, 4, dtype=torch.int64), TypeError, "x must be float32, .*got torch.int64"),
        ({}, [[0.0] * 4], TypeError, "x must be a tensor, got list"),
        ({}, torch.zeros(2, 4, device="meta"), ValueError, "codebook is on cpu, x is on meta"),
    ],
)
def test_wrong_inputs(options, x, error, message):
    vq = VectorQuantize(4, 8, kmeans_init=True, **options)
    before = state(vq)
    with pytest.raises(error, match=message):
        vq(x)
    UNCHANGED.same(vq.state_dict(), before)
