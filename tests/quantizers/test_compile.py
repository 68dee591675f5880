"""VectorQuantize under torch.compile and torch.export: one graph from the very first call, and the same results."""

import copy
from functools import partial

import pytest
import torch
from promises import UNCHANGED
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vqops import VectorQuantize
from vqops.dispatch.library import OPS

FIRST = {"kmeans_init": True, "kmeans_iters": 3, "threshold_ema_dead_code": 2}
IMAGE = {"accept_image_fmap": True}
MASK = torch.tensor([True, False, True, True, True]).repeat(2, 5)
CODES = torch.arange(-1, 14).repeat(7)[:100].view(2, 25, 2)

# name: options, arguments of forward
CASES = {
    "ema": ({}, {}),
    "learnable": ({"learnable_codebook": True}, {}),
    "cosine": ({"use_cosine_sim": True}, {}),
    "k_means": ({"kmeans_init": True, "kmeans_iters": 3}, {}),
    "dead_codes": ({"threshold_ema_dead_code": 2}, {}),
    "heads": (FIRST | {"heads": 2, "codebook_dim": 2}, {}),
    "separate_heads": ({"heads": 2, "separate_codebook_per_head": True, "rotation_trick": False}, {}),
    "mask": (FIRST | {"heads": 2, "layernorm_after_project_in": True}, {"mask": MASK, "return_loss_breakdown": True}),
    "lens": (
        {"learnable_codebook": True, "route_gradients_to_input": False, "return_zeros_for_masked_padding": False},
        {"lens": torch.tensor([25, 7])},
    ),
    "topk": ({"codebook_dim": 3}, {"topk": 3, "mask": MASK}),
    "indices": (FIRST | {"heads": 2, "codebook_dim": 3}, {"indices": CODES}),
    "manual": ({"manual_ema_update": True}, {"ema_update_weight": torch.linspace(0, 1, 16)}),
    "everything": (
        FIRST | IMAGE | {"use_cosine_sim": True, "heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
        {"mask": MASK.view(2, 5, 5)},
    ),
}


def cases(*fast: str):
    """All cases; those that are not `fast` are slow."""
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in CASES]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def quantizer(name: str) -> tuple[VectorQuantize, dict]:
    options, arguments = CASES[name]
    return VectorQuantize(4, 16, **options), arguments


def batch(vq: VectorQuantize) -> torch.Tensor:
    return torch.randn(2, 4, 5, 5) if vq.accept_image_fmap else torch.randn(2, 25, 4)


def flat(results) -> list[torch.Tensor]:
    return [t for result in results for t in (result if isinstance(result, tuple) else (result,))]


def step(vq, x, **arguments):
    """Results and gradients of one training step; the seed makes eager and compiled draw the same rows."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    results = vq(x, **arguments)
    loss = results[-1] if "indices" in arguments else results[2]
    (results[0].square().sum() + loss.sum()).backward()
    return [*flat(results), x.grad]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", cases("ema", "mask", "indices", "everything"))
def test_training_is_one_graph_from_the_first_call(name, backend):
    eager, arguments = quantizer(name)
    other = copy.deepcopy(eager)
    # Inductor's random numbers are others than eager's unless it is told.
    inductor = {"options": {"fallback_random": True}} if backend == "inductor" else {}
    compiled = torch.compile(other, fullgraph=True, backend=backend, **inductor)
    for _ in range(3):
        x = batch(eager)
        for expected, got in zip(step(eager, x, **arguments), step(compiled, x, **arguments), strict=True):
            assert_close(got, expected)
        for key, value in eager.state_dict().items():
            assert_close(other.state_dict()[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert counters["stats"]["unique_graphs"] == (2 if "kmeans_init" in CASES[name][0] else 1)
    assert other._codebook.is_initted


@pytest.mark.slow
def test_inductor_with_its_own_random_numbers():
    vq, arguments = quantizer("everything")
    torch.compile(vq, fullgraph=True)(batch(vq), **arguments)
    assert vq._codebook.initted and vq.codebook.isfinite().all()


def test_no_op_has_a_decomposition_that_inductor_would_want_instead():
    """Where the variable CI is set it refuses such an op when it first meets it."""
    ops = [getattr(torch.ops.vqops, name).default for name in OPS]
    assert ops and not torch._decomp.get_decompositions(ops)


@pytest.mark.parametrize("name", cases("topk", "everything"))
def test_eval_is_one_graph_from_the_first_call(name):
    eager, arguments = quantizer(name)
    other = copy.deepcopy(eager.eval())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = batch(eager)
        torch.manual_seed(1)
        expected = flat(eager(x, **arguments))
        torch.manual_seed(1)
        for a, b in zip(flat(compiled(x, **arguments)), expected, strict=True):
            assert_close(a, b)
    assert counters["stats"]["unique_graphs"] <= 2


def test_batch_sizes_recompile_once():
    compiled = torch.compile(VectorQuantize(4, 16, threshold_ema_dead_code=2), fullgraph=True, backend="aot_eager")
    for rows in (30, 40, 50, 7):
        step(compiled, torch.randn(rows, 4))
    assert counters["stats"]["unique_graphs"] == 2


def test_accumulation_compiles():
    eager = VectorQuantize(4, 16)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for i in range(6):
        x = torch.randn(30, 4)
        for vq in (eager, compiled):
            vq(x, accum_ema_update=i % 3 < 2)
        assert_close(other.state_dict(), eager.state_dict())
    assert counters["stats"]["unique_graphs"] == 3  # the first of a series, one more of it, and the update


def test_a_fixed_update_does_not_change_the_gradient():
    """The backward uses the codes of the forward, although the update has moved them since."""
    vq = VectorQuantize(4, 16, decay=0.0)
    codes = vq.codebook.clone()
    for module in (copy.deepcopy(vq), torch.compile(copy.deepcopy(vq), fullgraph=True, backend="aot_eager")):
        x = torch.randn(50, 4, requires_grad=True)
        _, indices, loss = module(x)
        loss.backward()
        assert_close(x.grad, 2 * (x - codes[indices]).detach() / x.numel())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("within", ["checkpoint", "compiled"])
def test_activation_checkpointing_of_an_update_is_an_error(within, backend):
    """A compiled quantizer in a checkpointed part, and a checkpointed part that is compiled as a whole."""
    vq = VectorQuantize(4, 16, decay=0.1)
    compiled = torch.compile(vq, fullgraph=True, backend=backend)
    if within == "checkpoint":
        compiled(torch.randn(25, 4))
        run = partial(checkpoint, compiled, use_reentrant=False)
    else:
        run = torch.compile(partial(checkpoint, vq, use_reentrant=False), backend=backend)
    loss = run(torch.randn(25, 4, requires_grad=True) * 1)[2]
    before = copy.deepcopy(vq.state_dict())
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        loss.backward()
    UNCHANGED.same(vq.state_dict(), before)
    vq.freeze_codebook = True
    run(x := torch.randn(25, 4, requires_grad=True))[2].backward()
    expected = x.grad.clone()
    x.grad = None
    vq(x)[2].backward()
    assert_close(expected, x.grad)


@pytest.mark.parametrize("name", cases("mask", "topk", "indices", "everything"))
def test_export_in_eval(name):
    vq, arguments = quantizer(name)
    x = batch(vq)
    vq(x, **arguments)
    vq.eval()
    b = torch.export.Dim("b", min=2, max=64)
    tensors = {key: {0: b} for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    tensors.pop("ema_update_weight", None)
    axes = {"x": {0: b}} | {key: tensors.get(key) for key in arguments}
    program = torch.export.export(vq, (x,), arguments, dynamic_shapes=axes)
    x = torch.cat([x, x + 1])
    arguments = {key: torch.cat([value, value]) if key in tensors else value for key, value in arguments.items()}
    for a, b in zip(flat(program.module()(x, **arguments)), flat(vq(x, **arguments)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", [pytest.param("heads", marks=pytest.mark.slow), "everything"])
def test_export_before_the_first_batch(name):
    """k-means goes into the graph; what it leads to depends on random numbers, so only the shapes are known."""
    vq, arguments = quantizer(name)
    x = batch(vq)
    for training in (False, True):
        program = torch.export.export(copy.deepcopy(vq).train(training), (x,), arguments)
        quantized, indices, _ = program.module()(x, **arguments)
        assert quantized.shape == x.shape and indices.max() < 16
