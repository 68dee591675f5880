"""VectorQuantize under torch.compile and torch.export: one graph from the very first call, and the same results."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from vqops import VectorQuantize

OPTIONS = {
    "ema": {},
    "learnable": {"learnable_codebook": True},
    "cosine": {"use_cosine_sim": True},
    "k_means": {"kmeans_init": True, "kmeans_iters": 3},
    "dead_codes": {"threshold_ema_dead_code": 2},
    "all": {
        "codebook_dim": 3,
        "use_cosine_sim": True,
        "kmeans_init": True,
        "kmeans_iters": 3,
        "threshold_ema_dead_code": 2,
        "accept_image_fmap": True,
    },
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def batch(options) -> torch.Tensor:
    return torch.randn(2, 4, 5, 5) if options.get("accept_image_fmap") else torch.randn(2, 25, 4)


def step(vq, x):
    """Results and gradients of one training step; the seed makes eager and compiled draw the same rows."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    quantized, indices, loss = vq(x)
    (quantized.square().sum() + loss).backward()
    return [quantized, indices, loss, x.grad]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_is_one_graph_from_the_first_call(options, backend):
    eager = VectorQuantize(4, 16, **options)
    other = copy.deepcopy(eager)
    # Inductor's random numbers are others than eager's unless it is told.
    inductor = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    compiled = torch.compile(other, fullgraph=True, backend=backend, **inductor)
    for _ in range(4):
        x = batch(options)
        for expected, got in zip(step(eager, x), step(compiled, x), strict=True):
            assert_close(got, expected)
        for name, value in eager.state_dict().items():
            assert_close(other.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert counters["stats"]["unique_graphs"] == (2 if "kmeans_init" in options else 1)
    assert other._codebook.is_initted


@pytest.mark.slow
def test_inductor_with_its_own_random_numbers():
    torch.compile(vq := VectorQuantize(4, 16, **OPTIONS["all"]), fullgraph=True)(batch(OPTIONS["all"]))
    assert vq._codebook.initted and vq.codebook.isfinite().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_eval_is_one_graph_from_the_first_call(options):
    eager = VectorQuantize(4, 16, **options).eval()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = batch(options)
        torch.manual_seed(1)
        expected = eager(x)
        torch.manual_seed(1)
        for a, b in zip(compiled(x), expected, strict=True):
            assert_close(a, b)
    assert counters["stats"]["unique_graphs"] <= 2


def test_batch_sizes_recompile_once():
    compiled = torch.compile(VectorQuantize(4, 16, threshold_ema_dead_code=2), fullgraph=True, backend="aot_eager")
    for rows in (30, 40, 50, 7):
        step(compiled, torch.randn(rows, 4))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_fixed_update_does_not_change_the_gradient():
    """The backward uses the codes of the forward, although the update has moved them since."""
    vq = VectorQuantize(4, 16, decay=0.0)
    codes = vq.codebook.clone()
    for module in (copy.deepcopy(vq), torch.compile(copy.deepcopy(vq), fullgraph=True, backend="aot_eager")):
        x = torch.randn(50, 4, requires_grad=True)
        _, indices, loss = module(x)
        loss.backward()
        assert_close(x.grad, 2 * (x - codes[indices]).detach() / x.numel())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_export_in_eval(options):
    vq = VectorQuantize(4, 16, **options)
    x = batch(options)
    vq(x)
    vq.eval()
    axes = {0: torch.export.Dim("b", min=2, max=64)}
    program = torch.export.export(vq, (x,), dynamic_shapes=(axes,))
    x = torch.cat([x, x + 1])
    for a, b in zip(program.module()(x), vq(x), strict=True):
        assert_close(a, b)
