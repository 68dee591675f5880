"""Numbers that change from step to step: the ops take them as tensors, so a compiled step stays one graph."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from vqops import VectorQuantize

LEARNABLE = {"learnable_codebook": True, "threshold_ema_dead_code": 1.0, "orthogonal_reg_weight": 0.1}
# name: options of the quantizer, and the attributes that take another value at each of 20 steps.
SCHEDULES = {
    "ema": (
        {"threshold_ema_dead_code": 1.0, "codebook_diversity_loss_weight": 0.1},
        ("decay", "commitment_weight", "codebook_diversity_loss_weight", "codebook_diversity_temperature"),
    ),
    "learnable": (
        LEARNABLE | {"sync_update_v": 0.1, "codebook_loss_weight": 0.5},
        ("commitment_weight", "codebook_loss_weight", "orthogonal_reg_weight", "sync_update_v"),
    ),
    "directional": (LEARNABLE | {"directional_reparam": True}, ("directional_reparam_variance",)),
    "drawn": ({"stochastic_sample_codes": True}, ("sample_codebook_temp", "decay")),
    "affine": ({"affine_param": True}, ("decay", "commitment_weight")),
}


def set_numbers(vq: VectorQuantize, names: tuple[str, ...], step: int) -> None:
    for place, name in enumerate(names):
        setattr(vq, name, (0.5 + 0.4 * torch.sin(torch.tensor(float(step + place)))).item())
    vq._codebook.threshold_ema_dead_code = 0.5 + 0.01 * step


def run(vq, forward, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    quantized, indices, loss = forward(x)
    (quantized.square().sum() + loss).backward()
    return [quantized, indices, loss, x.grad, vq._codebook.embed.detach().clone()]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_twenty_steps_are_one_graph(name, backend):
    options, names = SCHEDULES[name]
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    eager = VectorQuantize(4, 16, **options)
    other = copy.deepcopy(eager)
    inductor = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    compiled = torch.compile(other, fullgraph=True, backend=backend, **inductor)
    for step in range(20):
        for vq in (eager, other):
            set_numbers(vq, names, step)
        x = torch.randn(60, 4)
        for expected, got in zip(run(eager, eager, x), run(other, compiled, x), strict=True):
            assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_temperature_of_each_call_is_one_graph():
    torch._dynamo.reset()
    counters.clear()
    vq = VectorQuantize(4, 16, stochastic_sample_codes=True)
    compiled = torch.compile(vq, fullgraph=True, backend="aot_eager")
    for step in range(10):
        compiled(torch.randn(60, 4), sample_codebook_temp=torch.tensor(0.1 * step))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_number_counts_from_the_next_step():
    vq = VectorQuantize(4, 16, commitment_weight=0.5)
    vq.freeze_codebook = True
    x = torch.randn(60, 4)
    loss = vq(x)[2]
    vq.commitment_weight = 2
    assert vq.commitment_weight == 2.0 and type(vq.commitment_weight) is float
    assert_close(vq(x)[2], 4 * loss)


@pytest.mark.parametrize("change", ["bfloat16", "half", "double", "to_empty", "cast past the module"])
def test_casts_and_new_memory_leave_the_numbers(change):
    vq = VectorQuantize(4, 16, decay=0.9, commitment_weight=0.3)
    if change == "to_empty":
        with torch.device("meta"):
            vq = VectorQuantize(4, 16, decay=0.9, commitment_weight=0.3)
        vq.to_empty(device="cpu")
    elif change == "cast past the module":
        for module in (vq.numbers, vq._codebook.numbers):
            for name, value in module._buffers.items():
                module._buffers[name] = value.bfloat16()
        vq(torch.randn(5, 4))
    else:
        getattr(vq, change)()
    for module in (vq.numbers, vq._codebook.numbers):
        for name, value in module.values.items():
            assert module[name].dtype == torch.float32
            assert_close(module[name].item(), value)


def test_a_state_assigned_to_a_module_without_memory():
    for options in ({}, {"affine_param": True}):
        with torch.device("meta"):
            vq = VectorQuantize(4, 16, decay=0.9, **options)
        vq.load_state_dict(VectorQuantize(4, 16, **options).state_dict(), assign=True)
        twin = VectorQuantize(4, 16, decay=0.9, **options)
        twin.load_state_dict(vq.state_dict())
        x = torch.randn(60, 4)
        assert_close(vq(x)[2], twin(x)[2])
        assert_close(vq.codebook, twin.codebook)


@pytest.mark.parametrize("name", ["commitment_weight", "sync_update_v", "codebook_diversity_loss_weight"])
def test_a_number_may_change_before_the_backward(name):
    vq = VectorQuantize(4, 16, learnable_codebook=True, sync_update_v=0.1, codebook_diversity_loss_weight=0.1)
    twin = copy.deepcopy(vq)
    grads = []
    for module in (vq, twin):
        x = torch.ones(60, 4).cumsum(0).div(60).requires_grad_()
        quantized, _, loss = module(x)
        if module is vq:
            setattr(vq, name, 0.9)
        (quantized.sum() + loss).backward()
        grads.append(x.grad)
    assert_close(*grads)


def test_numbers_are_in_no_state_dict():
    assert not [name for name in VectorQuantize(4, 16).state_dict() if "numbers" in name]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("decay", 1.5, r"decay must be in \[0, 1\], got 1.5"),
        ("commitment_weight", -1.0, "commitment_weight must be finite and at least 0, got -1.0"),
        ("sample_codebook_temp", float("nan"), "sample_codebook_temp must be finite and at least 0, got nan"),
        ("sync_update_v", 2.0, r"sync_update_v must be in \[0, 1\], got 2.0"),
        ("sync_update_v", 0.5, "sync_update_v needs learnable_codebook=True"),
        ("orthogonal_reg_weight", 0.5, "orthogonal_reg_weight needs codes that are a Parameter"),
    ],
)
def test_a_wrong_number_is_refused(name, value, message):
    vq = VectorQuantize(4, 16)
    before = getattr(vq, name)
    with pytest.raises(ValueError, match=f"^VectorQuantize: {message}"):
        setattr(vq, name, value)
    assert getattr(vq, name) == before
    with pytest.raises(TypeError, match=f"VectorQuantize: {name} must be a number, got str"):
        setattr(vq, name, "a")
    with pytest.raises(TypeError, match=f"VectorQuantize: {name} must be a number, got NoneType"):
        VectorQuantize(4, 16, **{name: None})
