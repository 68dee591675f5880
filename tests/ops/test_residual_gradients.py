"""The gradients of residual_quantize: against autograd in float64, and what they take from the forward."""

import pytest
import torch
from levels import DTYPES, TINY, WAYS, on_cpu, rows, rows_and_codes
from promises import COPIES, ORDER
from short_rows import short_rows
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.check.inputs import INF, NAN, SEARCHES


def defined(x, codebooks, indices, mask, levels, units, gradient, per_level, scale):
    """quantized and errors with the gradients that are promised, out of differentiable torch functions."""
    rest, through, codes, errors = x, 0, 0, []
    for level, c in enumerate(codebooks):
        q = c.gather(1, indices[..., level].clamp_min(0).unsqueeze(-1).expand(*indices.shape[:2], x.shape[-1]))
        start = rest / rest.norm(dim=-1, keepdim=True).clamp_min(TINY) if units else rest
        code = q.detach()
        to_x, to_codes = (start - code).square().sum(-1), (start.detach() - q).square().sum(-1)
        error = to_x + scale * (to_codes - to_codes.detach())
        errors.append(error.masked_fill(~mask, 0).sum(-1) * (level < levels))
        if level < levels:
            through = through + turned(start, code, gradient)
            codes = codes + code
            rest = rest - code
    passed = through if per_level else turned(x, codes, gradient)
    quantized = codes + passed - passed.detach()
    return quantized.masked_fill(~mask.unsqueeze(-1), 0), torch.stack(errors, -1)


def turned(start, code, gradient):
    """R x |q| / |x|, R the rotation that takes x to q: equations of arXiv 2410.06424, section 4.2."""
    if gradient != "rotation":
        return start if gradient == "straight_through" else 0 * start
    a = start.detach()
    u, v = a / a.norm(dim=-1, keepdim=True), code / code.norm(dim=-1, keepdim=True)
    w = torch.nn.functional.normalize(u + v, dim=-1)
    both = start - 2 * (start * w).sum(-1, keepdim=True) * w + 2 * (start * u).sum(-1, keepdim=True) * v
    return both * (code.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("per_level", [True, False])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("metric, normalize", WAYS)
def test_gradients_are_as_defined(implementation, metric, normalize, gradient, per_level, levels):
    N = rows(implementation, 300)
    leaves = [torch.randn(2, K, 5, dtype=torch.float64) for K in (N, 9, 4, 6)]
    mask = torch.rand(2, N) > 0.2
    ours, theirs = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    options = {"metric": metric, "gradient": gradient, "per_level": per_level, "normalize": normalize}
    found = implementation.residual_quantize(ours[0], ours[1:], mask, levels, codebook_error_scale=0.5, **options)
    units, running = metric == "cosine" and normalize, levels or 3
    expected = defined(theirs[0], theirs[1:], found.indices.cpu(), mask, running, units, gradient, per_level, 0.5)
    near = {"atol": 1e-9, "rtol": 1e-9}
    assert_close(found.quantized.cpu(), expected[0].detach(), **near)
    assert_close(found.error.cpu(), expected[1].detach(), **near)
    g, e = torch.randn_like(leaves[0]), torch.randn(2, 3, dtype=torch.float64)
    torch.autograd.backward([found.quantized, found.error], [implementation.put(g), implementation.put(e)])
    torch.autograd.backward(expected, [g, e])
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad, **near)


@pytest.mark.parametrize("per_level", [True, False])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("case", SEARCHES)
def test_backward(kernel, case, metric, normalize, gradient, per_level):
    """No further from float64 than twice the reference, which computes in float32 as well."""
    x, c = rows_and_codes(kernel, case)
    typical = c.nan_to_num(0, 0, 0).abs().median()  # codes of any direction: a turn by half a circle is ill-conditioned
    codebooks = [c, *(torch.randn(len(c), K, c.shape[2]) * typical for K in (9, 1))]
    sizes, old, mask = [t.shape[1] for t in codebooks], torch.cat(codebooks, 1), torch.rand(x.shape[:2]) > 0.1
    indices = reference.residual_quantize(x, codebooks, mask, None, metric)[1]
    g, e = torch.randn(x.shape), torch.randn(len(x), 3)
    options = (metric, gradient, per_level, 0.5, normalize, True, True)
    op = getattr(torch.ops.vqops, f"residual_quantize_backward_{kernel.name}")
    found = op(*map(kernel.put, (g, e, x, old, sizes, indices, mask, None)), *options)
    same = reference.residual_quantize_backward(g, e, x, old, sizes, indices, mask, None, *options)
    wide = (g.double(), e.double(), x.double(), old.double(), sizes, indices, mask, None)
    truth = reference.residual_quantize_backward(*wide, *options)
    for name, a, b, t in zip(("x", "codebooks"), found, same, truth, strict=True):
        a = a.cpu()
        assert (a.isnan() == b.isnan()).all(), name
        usable = b.isfinite() & t.isfinite() & (t.abs() < 1e36)
        largest = t.where(usable, 0).abs().flatten(1 if name == "codebooks" else 2).amax(-1) if t.numel() else t
        allowed = 2 * (b.double() - t).abs() + 4e-6 * largest.reshape(*largest.shape, *[1] * (3 - largest.dim())) + 1e-6
        assert ((a.double() - t).abs() <= allowed)[usable].all(), name


@pytest.mark.parametrize("error", [None, 2e38])
@pytest.mark.parametrize("code", [[NAN, NAN, NAN], [0.0, 0, 0], [1.0, 2, 0.1]], ids=str)
@pytest.mark.parametrize("per_level", [True, False])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("metric, normalize", WAYS)
def test_backward_without_a_code_or_a_direction(kernel, metric, normalize, gradient, per_level, code, error):
    x, codebooks = short_rows(), [torch.tensor([[code]]), torch.tensor([[[0.5, 0.1, 0], [0, 0, 0]]])]
    g, e = torch.arange(15.0).view(1, 5, 3), None if error is None else torch.tensor([[error, 1.0]])
    options = (metric, gradient, per_level, 0.5, normalize, True, True)
    op = getattr(torch.ops.vqops, f"residual_quantize_backward_{kernel.name}")
    for levels in map(torch.tensor, (0, 1, 2)):
        indices = reference.residual_quantize(x, codebooks, None, levels, metric)[1]
        given = g, e, x, torch.cat(codebooks, 1), [1, 2], indices, None, levels
        expected = reference.residual_quantize_backward(*given, *options)
        assert_close([t.cpu() for t in op(*map(kernel.put, given), *options)], list(expected), equal_nan=True)


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_have_the_dtypes_of_their_values(implementation, dtype, codebook_dtype):
    leaves = [torch.randn(2, 50, 6).to(dtype), *(torch.randn(2, K, 6).to(codebook_dtype) for K in (9, 4))]
    given, wide = ([t.clone().to(d or t.dtype).requires_grad_() for t in leaves] for d in (None, torch.float64))
    results = []
    for x, *codebooks in (given, wide):
        found = implementation.residual_quantize(x, codebooks, gradient="rotation", codebook_error_scale=1.0)
        results.append(torch.autograd.grad(found.quantized.sum() + found.error.sum(), [x, *codebooks]))
    coarsest = max(torch.finfo(t.dtype).eps for t in leaves)
    for leaf, found, expected in zip(leaves, *results, strict=True):
        assert found.dtype == leaf.dtype
        assert_close(found.double(), expected, atol=8 * coarsest * float(expected.abs().max()), rtol=8 * coarsest)


def test_the_codebook_gradients_add_in_the_order_of_code_sums(kernel):
    x, codebooks = torch.randn(1, 3000, 6), [torch.randn(1, K, 6) for K in (3, 2)]
    indices, e = reference.residual_quantize(x, codebooks)[1], torch.randn(1, 2)
    given = None, e, x, torch.cat(codebooks, 1), [3, 2], indices, None, None
    options = ("euclidean", "none", True, 0.5, True, False, True)
    op = getattr(torch.ops.vqops, f"residual_quantize_backward_{kernel.name}")
    found = op(*map(kernel.put, given), *options)[1]
    ORDER.same(found.cpu(), reference.residual_quantize_backward(*given, *options)[1])


def test_gradients_of_rows_without_a_code(implementation):
    x = torch.tensor([[1.0, 2], [NAN, 0], [INF, 1], [5, 5]], requires_grad=True)
    codebooks = [torch.tensor([[1.0, 1], [4, 4]], requires_grad=True), torch.tensor([[0.0, 1]], requires_grad=True)]
    mask = torch.tensor([True, True, True, False])
    found = implementation.residual_quantize(x, codebooks, mask, codebook_error_scale=1.0)
    g = implementation.put(torch.arange(8.0).view(4, 2))
    torch.autograd.backward([found.quantized, found.error], [g, implementation.put(torch.ones(2))])
    assert x.grad[0].tolist() == [2 * 0 + 0, 2 * 1 + 2] and x.grad[1:3].isnan().all() and not x.grad[3].any()
    assert [c.grad.tolist() for c in codebooks] == [[[0, -2], [0, 0]], [[0, 0]]]


def test_unused_gradients_are_not_computed(implementation):
    x, codebooks = torch.randn(20, 4, requires_grad=True), [torch.randn(5, 4), torch.randn(3, 4)]
    implementation.residual_quantize(x, codebooks).quantized.sum().backward()
    COPIES.same(x.grad, torch.full((20, 4), 2.0))
    x.grad = None
    found = implementation.residual_quantize(x, codebooks)
    found.error[1].backward()
    assert_close(x.grad, 2 * (x - found.quantized.cpu()).detach())
    frozen = implementation.residual_quantize(x.detach(), [codebooks[0], codebooks[1].requires_grad_()])
    frozen.error.sum().backward()
    assert codebooks[1].grad is None or not codebooks[1].grad.any()
    assert [t.requires_grad for t in on_cpu(frozen)] == [True, False, True]


def test_one_codebook_may_learn_alone(implementation):
    x, codebooks = torch.randn(50, 4), [torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)]
    found = implementation.residual_quantize(x, codebooks, codebook_error_scale=1.0)
    found.error.sum().backward()
    rest = x - codebooks[0][found.indices[:, 0].cpu()]
    picked = codebooks[1][found.indices[:, 1].cpu()]
    (expected,) = torch.autograd.grad((rest - picked).square().sum(), codebooks[1])
    assert_close(codebooks[1].grad, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_an_update_between_forward_and_backward(backend, gradient):
    """The backward is that of the codebooks which quantized, whatever has become of them."""
    x, old = torch.randn(1, 60, 4), [torch.randn(1, 7, 4), torch.randn(1, 3, 4)]

    def loss_of(x, codebooks, sizes, averages, levels):
        found = vqops.residual_quantize(x, codebooks, levels=levels, gradient=gradient, code_sums=True)
        with torch.no_grad():
            for state in zip(sizes, averages, codebooks, found.counts, found.sums, strict=True):
                vqops.ema_update_(*state, 0.0)
        return (found.quantized * torch.arange(4.0)).sum() + found.error.sum()

    compiled = loss_of if backend == "eager" else torch.compile(loss_of, backend=backend, fullgraph=True)
    for levels in (2, 1):  # in one graph
        given, codebooks = x.clone().requires_grad_(), [t.clone() for t in old]
        state = [torch.ones(t.shape[:2]) for t in old], [t.clone() for t in old]
        with torch.compiler.set_stance("default" if levels == 2 else "fail_on_recompile"):
            compiled(given, codebooks, *state, torch.tensor(levels)).backward()
        assert (codebooks[0] != old[0]).any()
        indices = reference.residual_quantize(x, old, None, torch.tensor(levels))[1]
        g, given_back = torch.arange(4.0).expand(1, 60, 4), (torch.cat(old, 1), [7, 3], indices, None)
        options = torch.tensor(levels), "euclidean", gradient
        expected, _ = reference.residual_quantize_backward(g, torch.ones(1, 2), x, *given_back, *options)
        assert_close(given.grad, expected)


def test_second_derivatives_are_an_error(implementation):
    x = torch.randn(5, 3, requires_grad=True)
    found = implementation.residual_quantize(x, torch.randn(2, 4, 3))
    (g,) = torch.autograd.grad(found.error.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="residual_quantize_backward: the gradient of a gradient"):
        g.sum().backward()
