"""The ops as torch sees them: opcheck, one graph under compile and export, meta tensors, autocast, and selection."""

import pytest
import torch
from promises import INDICES, ORDER, REPEATS, WHOLE
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.dispatch import library

ops = torch.ops.vqops


def samples():
    """Arguments of each op that reach all of its outputs, by the op's name."""
    torch.manual_seed(0)
    x, c = torch.randn(2, 20, 5), torch.randn(2, 7, 5)
    mask, weight = torch.rand(2, 20) > 0.3, torch.rand(2, 20)
    indices = reference.nearest(x, c, mask)
    strided = torch.randn(2, 5, 20).mT
    sums = (torch.rand(2, 7), torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.rand(2, 7), torch.randn(2, 7, 5))
    draw = torch.tensor(0.5), torch.tensor([3, 4])
    memory = torch.ops.vqops.prepare(c), torch.zeros(2, dtype=torch.int64)
    total = torch.rand(2, 2, 20, dtype=torch.float64)
    saved = torch.rand(3, 2, 5, 4), torch.rand(5, 7)
    learnable = (x.clone().requires_grad_(), c.clone().requires_grad_())
    levels = [c, torch.randn(2, 3, 5)]
    depth, by_level = torch.tensor(1), (torch.cat(levels, 1), [7, 3], torch.randint(3, (2, 20, 2)))
    return {
        "nearest": [(x, c), (strided, c, mask, "cosine")],
        "nearest_topk": [(x, c, 3, mask), (strided, c, 3)],
        "prepare": [(c,), (torch.randn(2, 5, 7).mT, "cosine")],
        "search_statistics": [(x, c), (strided, c)],
        "sample": [(x, c, *draw), (strided, c, *draw, mask, "cosine")],
        "sample_topk": [(x, c, *draw, 3), (strided, c, *draw, 3, mask, "cosine")],
        "code_sums": [(x, indices, 7), (strided, indices, 7, weight)],
        "ema_update_": [(*sums, torch.tensor(0.9)), (*sums, torch.tensor(0.9), 1e-5, torch.rand(2, 7), "cosine")],
        "quantize": [
            (x, c, mask, weight, "euclidean", "straight_through", True),
            (*learnable, None, None, "cosine", "rotation", True, 0.5),
            (strided, c, None, None, "euclidean", "none", False, 0.0, True, False),
            (*learnable, mask, weight, "cosine", "rotation", True, 0.5, False),
        ],
        "keep_prepared_": [(x, c, *memory, "euclidean")],
        "check_first_run_": [(c, "VectorQuantize")],
        "code_cross_entropy": [(strided, c, indices, "euclidean"), (*learnable, indices, "cosine")],
        "code_cross_entropy_backward": [
            (torch.randn(2, 20), x, c, indices, total, "euclidean", True, True),
            (torch.randn(2, 20), strided, c, indices, total, "cosine", True, True),
        ],
        "assignment_entropy": [
            (x.unflatten(1, (4, 5)), c, torch.tensor(2.0), mask.unflatten(1, (4, 5))),
            (learnable[0].detach().unflatten(1, (5, 4)).requires_grad_(), learnable[1], torch.tensor(2.0)),
            (strided.unflatten(1, (20, 1)), c, torch.tensor(2.0), None, "cosine"),
        ],
        "assignment_entropy_backward": [
            (torch.randn(5), grouped, c, torch.tensor(2.0), mask.unflatten(1, (5, 4)), *saved, "euclidean", True, True)
            for grouped in (x.unflatten(1, (5, 4)), strided.unflatten(1, (5, 4)))
        ],
        "soft_codes": [
            (strided, c, torch.tensor(0.5), mask),
            (*learnable, torch.tensor(0.5), None, "cosine"),
        ],
        "soft_codes_backward": [
            (strided, x, c, torch.tensor(0.5), mask, "euclidean", True, True),
            (torch.randn(x.shape), strided, c, torch.tensor(0.5), None, "cosine", True, False),
        ],
        "quantize_backward": [
            (strided, torch.randn(2, 20), x, c, indices, mask, "cosine", "rotation", 0.5, True, True, True),
            (strided, torch.randn(2, 20), x, c, indices, mask, "cosine", "rotation", 0.5, False, True, True),
            (strided, torch.randn(2, 20), strided, c, indices, mask, "euclidean", "none", 0.5, True, True, True),
            (None, torch.randn(2, 20), x, c, indices, None, "euclidean", "none", 0.5, True, False, True),
        ],
        "residual_quantize": [
            (x, levels, mask, depth, "euclidean", "straight_through", True, True),
            (learnable[0], [learnable[1], levels[1]], None, None, "cosine", "rotation", True, True, 0.5),
            (strided, levels, None, None, "euclidean", "none", False, False, 0.0, True, False),
            (x, [learnable[1]], None, None, "euclidean", "rotation", False, False, 0.5),
        ],
        "residual_quantize_backward": [
            (strided, torch.randn(2, 2), x, *by_level, mask, depth, "cosine", "rotation", True, 0.5, True, True, True),
            (strided, None, strided, *by_level, mask, None, "euclidean", "rotation", False, 0.5, True, True, False),
            (None, torch.randn(2, 2), x, *by_level, None, None, "euclidean", "none", True, 0.5, True, False, True),
        ],
    }


SAMPLES = samples()
SOFT = ("assignment_entropy", "code_cross_entropy", "soft_codes")
WITHOUT_KERNELS = {"check_first_run_", "sample_topk", *SOFT, *(f"{name}_backward" for name in SOFT)}


def test_every_op_has_samples():
    assert set(SAMPLES) == set(vqops.implementations()) == set(library.OPS)


@pytest.mark.parametrize("suffix", ["", "_compiled", "_pytorch", "_reference"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, suffix):
    if suffix == "_compiled" and not library.is_compiled(name, "cpu"):
        pytest.skip("no compiled kernels here")
    for arguments in SAMPLES[name]:
        # The graph that autograd makes of a step uses fixed shapes here; dynamic ones have tests of their own.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(ops, name + suffix).default, copied(arguments), test_utils=utils)


def of_tensors(function, value):
    """The arguments of a call with function(tensor) in the place of each tensor, also in lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(of_tensors(function, each) for each in value)
    return function(value) if isinstance(value, torch.Tensor) else value


def copied(arguments):
    return of_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad), arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_chooses_on_cuda(name):
    """The key of a GPU with the CPU's tensors: the table is asked of any call, and has no row for this device."""
    same = assert_close if name == "residual_quantize_backward" else REPEATS.same  # the gradient of a level is compiled
    for arguments in SAMPLES[name]:
        expected, found = copied(arguments), copied(arguments)
        results = getattr(ops, name + "_pytorch")(*expected)
        chosen = getattr(ops, name).default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *found)
        for a, b in zip([*flat(chosen), *found], [*flat(results), *expected], strict=True):
            if isinstance(a, torch.Tensor):
                same(a, b)


def ema_step(x, c):
    size, average, embed = torch.ones(1, 9), c[None].clone(), c[None].clone()
    found = vqops.quantize(x[None], embed, code_sums=True)
    vqops.ema_update_(size, average, embed, found.counts, found.sums, 0.9)
    return size, average, embed


CALLS = {
    "ema_update_": ema_step,
    "nearest": lambda x, c: vqops.nearest(x, c),
    "nearest_topk": lambda x, c: vqops.nearest_topk(x, c, 2, metric="cosine"),
    "prepared": lambda x, c: vqops.nearest(x, vqops.prepare(c)),
    "search_statistics": lambda x, c: vqops.search_statistics(x, c),
    "sample": lambda x, c: vqops.sample(x, c, 0.5, torch.tensor([3, 4])),
    "sample_topk": lambda x, c: vqops.sample_topk(x, c, 0.5, torch.tensor([3, 4]), 3, metric="cosine"),
    "quantize": lambda x, c: tuple(vqops.quantize(x, c, gradient="rotation", code_sums=True)),
    "residual_quantize": lambda x, c: tuple(vqops.residual_quantize(x, [c, c[:3]], levels=1, code_sums=True)[:3]),
    "code_sums": lambda x, c: vqops.code_sums(x, vqops.nearest(x, c), 9),
    "soft_codes": lambda x, c: vqops.soft_codes(x, c, 0.5),
    "assignment_entropy": lambda x, c: vqops.assignment_entropy(x.unsqueeze(1), c, 2.0),
    "assignment_entropy of one group": lambda x, c: vqops.assignment_entropy(x.unsqueeze(0), c, 2.0),
    "reference": lambda x, c: vqops.nearest(x, c, implementation="reference"),
}


def test_a_codebook_prepared_outside_the_graph():
    c = torch.randn(9, 4)
    prepared = vqops.prepare(c)
    compiled = torch.compile(lambda x: vqops.nearest(x, prepared), fullgraph=True, backend="aot_eager")
    x = torch.randn(30, 4)
    INDICES.same(compiled(x), vqops.nearest(x, c))


def flat(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name, backend):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=backend)
    for rows in (30, 40, 41):
        x, c = torch.randn(rows, 4), torch.randn(9, 4)
        for a, b in zip(flat(compiled(x, c)), flat(CALLS[name](x, c)), strict=True):
            REPEATS.same(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_compile(backend):
    def loss(x, c):
        found = vqops.quantize(x, c, gradient="rotation", codebook_error_scale=0.5)
        return found.quantized.square().sum() + found.error.sum()

    inputs = [torch.randn(30, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*inputs), inputs)
    assert_close(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_exports(name):
    class Module(torch.nn.Module):
        def forward(self, x, c):
            return CALLS[name](x, c)

    x, c = torch.randn(30, 4), torch.randn(9, 4)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(Module(), (x, c), dynamic_shapes=({0: rows}, None))
    x = torch.randn(44, 4)
    for a, b in zip(flat(program.module()(x, c)), flat(CALLS[name](x, c)), strict=True):
        REPEATS.same(a, b)


@pytest.mark.parametrize("name", [name for name in SAMPLES if not name.endswith("_")])
def test_meta_tensors_have_the_right_shapes(name):
    for arguments in SAMPLES[name]:
        real = flat(getattr(ops, name)(*arguments))
        meta = flat(getattr(ops, name)(*of_tensors(lambda t: t.to("meta"), arguments)))
        for a, b in zip(meta, real, strict=True):
            assert b.dtype == a.dtype and (a.shape == b.shape or name == "prepare")


def test_ema_on_meta_tensors():
    vqops.ema_update_(*(t.to("meta") for t in SAMPLES["ema_update_"][0][:5]), torch.empty((), device="meta"))


def test_autocast_changes_nothing():
    x, c = torch.randn(200, 8), torch.randn(50, 8)
    expected = vqops.quantize(x, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vqops.quantize(x, c)
    ORDER.same(found, expected)


def test_indices_carry_no_gradient():
    x, c = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    found = vqops.quantize(x, c, code_sums=True)
    assert [t.requires_grad for t in found] == [True, False, True, False, False]
    assert not vqops.nearest(x, c).requires_grad
    assert not any(t.requires_grad for t in vqops.nearest_topk(x, c, 2))
    assert not any(t.requires_grad for t in vqops.code_sums(x, vqops.nearest(x, c), 5))


def test_the_default_comes_first_and_is_what_runs():
    for name, devices in vqops.implementations().items():
        cpu = "pytorch" if name in WITHOUT_KERNELS else "compiled"
        assert devices["cpu"][0] == cpu and devices["cuda"][0] == "pytorch", name


def test_sums_on_cuda_are_in_order_where_torch_is_to_be_deterministic(monkeypatch):
    """With stand-ins for the two CUDA kernels, reached as a CUDA tensor would reach them."""
    monkeypatch.setitem(library.COMPILED, "cuda", {f"vqops::stand_in_compiled_{order}" for order in library.BY_ORDER})
    monkeypatch.setattr(library, "OPS", [])
    assert library.is_compiled("stand_in", "cuda") and not library.is_compiled("stand_in", "cpu")
    schema = "(Tensor x, int twice=2) -> Tensor"
    library.define("stand_in", schema, lambda x, twice=2: torch.empty_like(x), everywhere=torch.neg)
    for number, order in enumerate(library.BY_ORDER):
        kernel = lambda x, twice=2, number=number: x * twice + number  # noqa: E731
        library.library.impl(f"stand_in_compiled_{order}", kernel, "CPU")
    assert library.available("stand_in", "cuda") == ["compiled", "pytorch", "reference"]
    cuda, x = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.ones(3)
    for deterministic, added in ((False, 0), (True, 1)):
        torch.use_deterministic_algorithms(deterministic)
        WHOLE.same(ops.stand_in_compiled.default.redispatch(cuda, x), 2 * x + added)
        WHOLE.same(ops.stand_in_compiled.default.redispatch(cuda, x, 5), 5 * x + added)


@pytest.mark.parametrize("name", ["fastest", "Compiled", ""])
def test_an_unknown_implementation_is_named(name):
    with pytest.raises(ValueError, match=f"nearest: implementation must be .*got {name!r}"):
        vqops.nearest(torch.randn(3, 2), torch.randn(2, 2), implementation=name)


def test_the_command_that_says_so_too():
    from vqops.info import report

    assert all(name in report() for name in vqops.implementations())
