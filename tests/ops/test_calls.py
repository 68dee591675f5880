"""Calls that go past what `torch.library` does for autograd: what they give, and who still sees them."""

import pytest
import torch
from promises import REPEATS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vqops
from vqops import VectorQuantize

D, K = 4, 7


class Dispatched(TorchDispatchMode):
    """Whoever looks on gets the ops as `torch.library` registers them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def quantized(x, codebook, **options):
    return vqops.quantize(x, codebook, gradient="rotation", codebook_error_scale=0.5, **options)


def residual(x, codebook, **options):
    codes = [codebook, codebook * 0.5] if codebook.dim() == 2 else list(codebook.unbind(0))
    return vqops.residual_quantize(x, codes, gradient="rotation", codebook_error_scale=0.5, **options)


CALLS = {
    "rows": (quantized, (9, D), (K, D), {}),
    "positions": (quantized, (2, 3, 5, D), (K, D), {"metric": "cosine"}),
    "mask": (quantized, (2, 5, D), (K, D), {"mask": torch.arange(10).view(2, 5) % 3 > 0}),
    "one vector": (quantized, (D,), (K, D), {}),
    "heads": (quantized, (2, 9, D), (2, K, D), {"code_sums": True}),
    "levels": (residual, (9, D), (3, K, D), {}),
    "levels of positions": (residual, (2, 5, D), (K, D), {"levels": 1, "per_level": False}),
}
each_call = pytest.mark.parametrize("name", CALLS)


def given(name, learnable=True):
    call, rows, codes, options = CALLS[name]
    leaves = torch.randn(rows, requires_grad=True), torch.randn(codes, requires_grad=learnable)
    return call, *leaves, options


def gradients(found, *leaves, **options):
    torch.manual_seed(1)
    weights = [torch.rand_like(t) for t in (found.quantized, found.error)]
    return torch.autograd.grad((found.quantized, found.error), leaves, weights, **options)


@each_call
def test_a_mode_changes_nothing(name):
    call, x, codebook, options = given(name)
    found = call(x, codebook, **options)
    expected = found, gradients(found, x, codebook)
    for mode in (Dispatched(), Called()):
        with mode:
            again = call(x, codebook, **options)
            REPEATS.same((again, gradients(again, x, codebook)), expected)
        assert any("quantize" in str(func) for func in mode.seen)


@each_call
@pytest.mark.parametrize("of", ["x", "codebook"])
def test_a_gradient_to_one_alone(name, of):
    call, x, codebook, options = given(name)
    expected = gradients(call(x, codebook, **options), x, codebook)[of == "codebook"]
    x.requires_grad_(of == "x"), codebook.requires_grad_(of == "codebook")
    REPEATS.same(gradients(call(x, codebook, **options), x if of == "x" else codebook), (expected,))


def test_a_mode_sees_calls_without_a_gradient():
    x, codebook, indices = torch.randn(9, D), torch.randn(K, D), torch.randint(K, (9,))
    with Dispatched() as mode:
        vqops.quantize(x, codebook), vqops.residual_quantize(x, [codebook]), vqops.code_sums(x, indices, K)
    ops = torch.ops.vqops
    assert {ops.quantize.default, ops.residual_quantize.default, ops.code_sums.default} <= set(mode.seen)


@pytest.mark.parametrize("needed", [True, False])
def test_a_subclass_keeps_its_results(needed):
    class Marked(torch.Tensor):
        pass

    x = torch.randn(9, D).as_subclass(Marked).requires_grad_(needed)
    found = vqops.quantize(x, torch.randn(K, D))
    assert type(found.quantized) is Marked and found.quantized.requires_grad == needed
    assert all(type(t) is Marked for t in vqops.code_sums(x, found.indices, K))


@each_call
def test_no_gradient_is_asked_for_where_none_is_wanted(name):
    call, x, codebook, options = given(name)
    with torch.no_grad():
        found = call(x, codebook, **options)
    assert not found.quantized.requires_grad and not found.error.requires_grad
    with torch.inference_mode():
        assert call(x, codebook, **options).quantized.is_inference()


@each_call
def test_gradients_of_a_batch_of_gradients(name):
    if name.startswith("levels"):
        pytest.skip("vmap has no rule for lists of tensors")
    call, x, codebook, options = given(name, learnable=False)
    found = call(x, codebook, **options)
    g = torch.randn(3, *found.quantized.shape)
    together = torch.autograd.grad(found.quantized, x, g, retain_graph=True, is_grads_batched=True)[0]
    each = [torch.autograd.grad(found.quantized, x, one, retain_graph=True)[0] for one in g]
    assert_close(together, torch.stack(each))


@each_call
def test_rows_that_have_changed_since_are_an_error(name):
    call, x, codebook, options = given(name)
    y = x * 1
    found = call(y, codebook, **options)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.quantized.sum().backward()


@each_call
def test_results_may_be_changed_in_place(name):
    call, x, codebook, options = given(name, learnable=False)
    (expected,) = torch.autograd.grad(call(x, codebook, **options).quantized.sum(), x)
    found = call(x, codebook, **options)
    found.quantized.mul_(2)
    assert_close(torch.autograd.grad(found.quantized.sum(), x)[0], 2 * expected)


@each_call
def test_what_is_kept_for_the_backward_goes_through_hooks(name):
    call, x, codebook, options = given(name)
    expected, packed = gradients(call(x, codebook, **options), x, codebook), []

    def pack(t):
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = call(x, codebook, **options)
    assert any(t.data_ptr() == x.data_ptr() for t in packed)
    REPEATS.same(gradients(found, x, codebook), expected)


@each_call
def test_what_is_computed_again_in_the_backward_has_its_gradient(name):
    call, x, codebook, options = given(name)
    expected = gradients(call(x, codebook, **options), x, codebook)
    found = checkpoint(lambda *leaves: call(*leaves, **options), x, codebook, use_reentrant=False)
    REPEATS.same(gradients(found, x, codebook), expected)


def test_code_sums_carry_no_gradient():
    x = torch.randn(9, D, requires_grad=True)
    counts, sums = vqops.code_sums(x, torch.randint(K, (9,)), K, torch.rand(9, requires_grad=True))
    assert not counts.requires_grad and not sums.requires_grad


@pytest.mark.parametrize("name", ["compiled", "pytorch", "reference", None])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("wrong", [-2, K, 2**62])
def test_an_index_that_is_no_code(wrong, heads, name):
    x, indices = torch.randn(2, 300, D), torch.randint(K, (2, 300))
    indices[1, 271] = wrong
    lowest, highest = int(indices.min()), int(indices.max())
    message = f"code_sums: indices must be -1 or a code in .0, {K}., got values from {lowest} to {highest}"
    with pytest.raises(IndexError, match=message):
        vqops.code_sums(x, indices, K, heads=heads, implementation=name)


@pytest.mark.parametrize("name", ["compiled", "pytorch", "reference", None])
@pytest.mark.parametrize("rows", [0, 9])
def test_indices_of_another_type(rows, name):
    with pytest.raises(TypeError, match=r"code_sums: indices must be int64, got torch.int32"):
        vqops.code_sums(torch.randn(rows, D), torch.zeros(rows, dtype=torch.int32), K, implementation=name)


def test_a_graph_is_not_made_with_indices_of_another_type():
    sums = torch.compile(lambda x, indices: vqops.code_sums(x, indices, K), backend="eager")
    with pytest.raises(TypeError, match=r"code_sums: indices must be int64, got torch.int32"):
        sums(torch.randn(9, D), torch.zeros(9, dtype=torch.int32))


def test_a_trace_of_one_sample_serves_several():
    vq = VectorQuantize(D, K).eval()
    traced = torch.jit.trace(vq, torch.randn(1, 9, D), check_trace=False)
    x = torch.randn(3, 5, D)
    REPEATS.same(traced(x)[:2], vq(x)[:2])


def test_a_step_of_fake_tensors_outside_their_mode():
    with FakeTensorMode():
        vq, x = VectorQuantize(D, K), torch.randn(1, 9, D)
    quantized, indices, _ = vq(x)
    assert quantized.shape == x.shape and indices.shape == (1, 9)
