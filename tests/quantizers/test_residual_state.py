"""The state of ResidualVQ: after failures, rows without a number, casts and copies."""

import copy
import pickle
from functools import partial

import pytest
import torch
from failures import PLACES, fail, failing
from promises import COPIES, INDICES, UNCHANGED
from quantizers import state
from residual import DIM, LEVELS, every_way, residual_vq
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vqops
from vqops.quantizers.codebook import codebook as codebook_module


def test_a_failure_of_the_last_level_takes_the_others_back(monkeypatch):
    vq = residual_vq(threshold_ema_dead_code=2)
    vq(torch.randn(2, 9, DIM))
    before, real, calls = state(vq), codebook_module.move_averages_, []

    def fail_later(*arguments, **keywords):
        calls.append(1)
        return (fail if len(calls) == LEVELS else real)(*arguments, **keywords)

    monkeypatch.setattr(codebook_module, "move_averages_", fail_later)
    # The compiled op needs no memory that it could not get.
    with vqops.use_implementation("pytorch"), pytest.raises(RuntimeError, match="lost rank"):
        vq(torch.randn(2, 9, DIM))
    assert len(calls) == LEVELS
    UNCHANGED.same(vq.state_dict(), before)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("shared", [True, False])
def test_a_failed_step_of_an_optimizer_in_place_is_none(shared, make, monkeypatch):
    options = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": partial(make, lr=0.1)}
    vq = residual_vq(shared_codebook=shared, **options)
    twin, x = residual_vq(shared_codebook=shared, **options), torch.randn(1, 20, DIM)
    twin.load_state_dict(vq.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(vq.layers[1], "_searched", fail)
        with pytest.raises(RuntimeError, match="lost rank"):
            vq(x)
    UNCHANGED.same(vq.state_dict(), twin.state_dict())
    vq(x), twin(x)
    UNCHANGED.same(vq.state_dict(), twin.state_dict())


@pytest.mark.parametrize("lost", PLACES)
@every_way
def test_a_failed_call_leaves_every_level(way, lost):
    if lost == "move_averages_" and way in ("learnable", "implicit"):
        lost = "sum_over_ranks"
    vq = residual_vq(way, codebook_dim=4, threshold_ema_dead_code=2, kmeans_init=True)
    for first in (True, False):
        before = state(vq)
        with failing(vq, lost):
            vq(torch.randn(2, 9, DIM))
        UNCHANGED.same(vq.state_dict(), before, equal_nan=True)
        if first:
            vq(torch.randn(2, 9, DIM))
            assert all(layer._codebook.is_initted for layer in vq.layers)


@every_way
def test_rows_that_are_not_finite_teach_nothing(way):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    twin = copy.deepcopy(vq)
    x = torch.randn(1, 20, DIM)
    x[0, 3, 1], x[0, 7] = torch.nan, torch.inf
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 7]] = True
    torch.manual_seed(1)
    quantized, indices, losses = vq(x)
    assert losses.isnan().all() and quantized[0, bad].isnan().all() and (indices[0, bad] == -1).all()
    torch.manual_seed(1)
    others, chosen, _ = twin(x[:, ~bad])
    assert_close(quantized[:, ~bad], others)
    INDICES.same(indices[:, ~bad], chosen)
    for name, value in vq.state_dict().items():
        assert value.isfinite().all()
        assert_close(twin.state_dict()[name], value)


@every_way
@pytest.mark.parametrize("rows", ["masked", "none", "nan"])
def test_a_batch_of_nothing_changes_nothing(way, rows):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    before = state(vq)
    x = torch.randn(2, 0 if rows == "none" else 5, DIM)
    mask = torch.zeros(2, 5, dtype=torch.bool) if rows == "masked" else None
    if rows == "nan":
        x[:] = torch.nan
    quantized, indices, losses = vq(x, mask=mask)
    for name, value in vq.state_dict().items():
        if way == "cosine" and name.endswith("embed"):
            assert_close(value, before[name])  # divided by its norm once more
        else:
            UNCHANGED.same(value, before[name], where=name)
    assert indices.shape == (*x.shape[:2], LEVELS) and quantized.shape == x.shape
    assert (indices == -1).all() and (losses.isnan().all() if rows == "nan" else (losses == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["together", "in turn", "shared", "cosine"])
def test_casts_leave_the_averages_in_float32(way, dtype):
    vq = residual_vq(way).to(dtype)
    x = torch.randn(2, 10, DIM).to(dtype)
    quantized, _, losses = vq(x)
    assert quantized.dtype == dtype and losses.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in vq.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("way", ["together", "in turn"])
def test_residuals_are_float32_whatever_the_input(way):
    """So the same values in another dtype get the same codes."""
    vq = residual_vq(way, num_quantizers=8).eval()
    x = torch.randn(2, 50, DIM).bfloat16()
    INDICES.same(vq(x)[1], vq(x.float())[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        INDICES.same(vq(x)[1], vq(x.float())[1])


def test_copies():
    vq = residual_vq(quantize_dropout=True, threshold_ema_dead_code=2)
    vq(torch.randn(2, 10, DIM))
    x = torch.randn(2, 10, DIM)
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        expected = copy.deepcopy(vq)
        torch.manual_seed(3)
        found = twin(x)
        torch.manual_seed(3)
        for a, b in zip(found, expected(x), strict=True):
            COPIES.same(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_way
def test_activation_checkpointing_is_refused_before_any_change(way, use_reentrant):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    x = torch.randn(2, 10, DIM, requires_grad=True)
    quantized, _, _ = checkpoint(vq, x, use_reentrant=use_reentrant)
    before = state(vq)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        quantized.sum().backward()
    UNCHANGED.same(vq.state_dict(), before)


def test_a_frozen_constructor_stays_frozen():
    vq = residual_vq(freeze_codebook=True)
    before = state(vq)
    vq(torch.randn(2, 10, DIM))
    UNCHANGED.same(vq.state_dict(), before)
    vq(torch.randn(2, 10, DIM), freeze_codebook=False)
    assert any((value != before[name]).any() for name, value in vq.state_dict().items())


def test_a_module_made_without_memory():
    """Whatever of it is in no state_dict."""
    options = {"beam_size": 3, "beam_score_quantizer_weights": [1.0, 2.0, 0.3]}
    vq, x = residual_vq(**options).eval(), torch.randn(1, 20, DIM)
    expected = vq(x)
    for assign in (True, False):
        with torch.device("meta"):
            twin = residual_vq(**options).eval()
        if not assign:
            twin.to_empty(device="cpu")
        twin.load_state_dict(vq.state_dict(), assign=assign)
        for a, b in zip(twin(x), expected, strict=True):
            COPIES.same(a, b)


def test_vmap():
    vq, x = residual_vq().eval(), torch.randn(3, 2, 10, DIM)
    found = torch.vmap(vq)(x)
    for i in range(3):
        for a, b in zip(found, vq(x[i]), strict=True):
            assert_close(a[i], b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32])
@pytest.mark.parametrize("codebook_dim", [DIM, 4])
def test_indices_of_any_integer_dtype_decode(codebook_dim, dtype):
    vq = residual_vq(codebook_dim=codebook_dim).eval()
    quantized, indices, _ = vq(torch.randn(2, 10, DIM))
    assert_close(vq.get_output_from_indices(indices.to(dtype)), quantized)
