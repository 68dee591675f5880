"""What a quantizer keeps, through loading, copies, casts and assignment."""

import copy
import pickle

import pytest
import torch
from promises import COPIES, INDICES, UNCHANGED
from quantizers import quantizer, state
from torch.testing import assert_close

from vqops import VectorQuantize

FLOAT_BUFFERS = ("cluster_size", "embed_avg", "embed")


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
