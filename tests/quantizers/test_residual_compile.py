"""Residual quantizers under torch.compile and torch.export: one graph, the same results, and no wait for the device."""

import copy
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close
from waiting import NoSynchronisation

from vqops import GroupedResidualVQ, ResidualVQ
from vqops.quantizers.interface import layout as layout_module

DIM, CODES, LEVELS = 4, 16, 3
FIRST = {"kmeans_init": True, "kmeans_iters": 3, "threshold_ema_dead_code": 2}
MASK = torch.tensor([True, False, True, True, True]).repeat(2, 5)
INDICES = torch.arange(-1, 14).repeat(10)[:150].view(2, 25, 3)

# name: options, arguments of forward
CASES = {
    "together": ({"threshold_ema_dead_code": 2}, {"mask": MASK}),
    "in turn": ({"quant_grad_frac": 0.5}, {}),
    "k-means": (FIRST, {}),
    "shared": ({"shared_codebook": True, "threshold_ema_dead_code": 2}, {}),
    "learnable": ({"learnable_codebook": True, "ema_update": False, "codebook_dim": 3}, {"return_all_codes": True}),
    "once": ({"gradient_per_level": False, "use_cosine_sim": True}, {}),
    "beam": ({"beam_size": 3}, {"mask": MASK}),
    "implicit": ({"implicit_neural_codebook": True}, {}),
    "diveq": ({"diveq": True}, {}),
    "groups": ({"groups": 2, "threshold_ema_dead_code": 2}, {"mask": MASK}),
    "indices": ({}, {"indices": INDICES}),
}
SLOW = ("k-means", "learnable", "once", "diveq", "indices", "in turn", "shared")
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def quantizer(name: str):
    options, arguments = CASES[name]
    sizes = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS}
    return (GroupedResidualVQ if "groups" in options else ResidualVQ)(**sizes | options), arguments


def step(vq, x, **arguments):
    """Results and gradients of a step; the seed makes eager and compiled draw the same rows."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    results = vq(x, **arguments)
    loss = results[-1] if "indices" in arguments else results[2]
    if results[0].requires_grad or loss.requires_grad:
        (results[0].square().sum() + loss.sum()).backward()
    return [*results, x.grad]


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_from_the_first_call(name, training):
    eager, arguments = quantizer(name)
    eager.train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 25, DIM)
        for expected, got in zip(step(eager, x, **arguments), step(compiled, x, **arguments), strict=True):
            assert_close(got, expected)
        for key, value in eager.state_dict().items():
            assert_close(other.state_dict()[key], value, msg=lambda text, key=key: f"{key}: {text}")
    # With k-means the first is another, and in eval the one that finds no kept preparation.
    assert counters["stats"]["unique_graphs"] <= (2 if name == "k-means" or not training else 1)


@pytest.mark.parametrize("options", [{}, {"quant_grad_frac": 0.5}, {"groups": 2}], ids=str)
def test_the_number_of_levels_is_no_part_of_the_graph(options):
    make = GroupedResidualVQ if "groups" in options else ResidualVQ
    vq = make(dim=DIM, codebook_size=CODES, num_quantizers=8, quantize_dropout=True, **options)
    other = copy.deepcopy(vq)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    seen = set()
    for seed in range(20):
        x = torch.randn(2, 25, DIM)
        results = []
        for module in (vq, compiled):
            torch.manual_seed(seed)
            results.append(module(x))
        assert_close(*results)
        seen.add(int((results[0][1] >= 0).sum()))
        assert_close(other.state_dict(), vq.state_dict())
    assert len(seen) > 4 and counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["together", "groups", "beam"])
def test_inductor(name):
    eager, arguments = quantizer(name)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, options={"fallback_random": True})
    for _ in range(2):
        x = torch.randn(2, 25, DIM)
        for expected, got in zip(step(eager, x, **arguments), step(compiled, x, **arguments), strict=True):
            assert_close(got, expected)


def test_the_backward_takes_the_codes_of_its_forward():
    """Although the update has moved them since."""
    vq = ResidualVQ(dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, decay=0.0, rotation_trick=False)
    for run in (lambda module: module, lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")):
        module = copy.deepcopy(vq)
        x = torch.randn(50, DIM, requires_grad=True)
        _, indices, losses = run(module)(x)
        losses.sum().backward()
        residual, expected = x.detach(), 0
        for layer, chosen in zip(vq.layers, indices.unbind(-1), strict=True):
            residual = residual - layer.codebook[chosen]
            expected = expected + 2 * residual / x.numel()
        assert_close(x.grad, expected)


@pytest.mark.parametrize("name", ["together", "beam", "groups", pytest.param("implicit", marks=pytest.mark.slow)])
def test_export_in_eval(name):
    vq, arguments = quantizer(name)
    vq.eval()
    x, b = torch.randn(2, 25, DIM), torch.export.Dim("b", min=2, max=64)
    axes = {"x": {0: b}} | {key: {0: b} for key in arguments}
    program = torch.export.export(vq, (x,), arguments, dynamic_shapes=axes)
    x = torch.cat([x, x + 1])
    arguments = {key: torch.cat([value, value]) for key, value in arguments.items()}
    for a, b in zip(program.module()(x, **arguments), vq(x, **arguments), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits(name, training, monkeypatch):
    # On the CPU it reads the values; elsewhere it is an assertion on the device.
    for module in (layout_module, *(sys.modules[f"vqops.ops.{op}"] for op in ("code_sums", "cross_entropy"))):
        monkeypatch.setattr(module, "check_indices", lambda *_: None)
    vq, arguments = quantizer(name)
    x = torch.randn(2, 25, DIM)
    vq(x)  # k-means, before which it asks whether others have done it
    vq.train(training)
    with NoSynchronisation():
        for _ in range(2):
            step(vq, x, **arguments)
