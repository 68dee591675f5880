"""quantize and its backward: every implementation, by hand, against the definition in float64 and against autograd."""

import pytest
import torch
from promises import COPIES, INDICES, ORDER
from short_rows import short_rows
from torch.testing import assert_close

import vqops
from vqops import reference
from vqops.check.inputs import INF, NAN, SEARCHES

METRICS = ("euclidean", "cosine")
WAYS = (("euclidean", True), ("cosine", True), ("cosine", False))  # the metric, and normalize
TINY = 1e-6


def test_by_hand(implementation):
    x, c = torch.tensor([[1.0, 0], [0, 1], [3, 0], [NAN, 0]]), torch.tensor([[0.0, 0], [4, 0]])
    mask = torch.tensor([True, False, True, True])
    found = implementation.quantize(x, c, mask, code_sums=True)
    assert found.indices.tolist() == [0, -1, 1, -1]
    assert found.quantized[:3].tolist() == [[0, 0], [0, 0], [4, 0]] and found.quantized[3].isnan().all()
    assert found.error[:3].tolist() == [1, 0, 1] and found.error[3].isnan()
    assert found.counts.tolist() == [1, 1] and found.sums.tolist() == [[1, 0], [3, 0]]


@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("case", SEARCHES)
def test_forward(kernel, case, metric, normalize):
    x, c = SEARCHES[case]()
    weight = torch.rand(x.shape[:2])
    found = kernel.quantize(x, c, None, weight, metric, code_sums=True, normalize=normalize)
    expected = reference.quantize(x, c, None, weight, metric, with_sums=True, normalize=normalize, snapshot=False)
    for name, a, b in zip(found._fields, found, expected, strict=False):
        ORDER.same(a.cpu(), b, equal_nan=True, where=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_types(kernel, dtype, codebook_dtype):
    x, c = torch.randn(2, 50, 6).to(dtype), torch.randn(2, 9, 6).to(codebook_dtype)
    found = kernel.quantize(x, c, code_sums=True)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [dtype, torch.int64, real, torch.int64, torch.float32]
    expected = reference.quantize(x, c, with_sums=True, snapshot=False)
    for a, b in zip(found, expected, strict=False):
        order_differs = kernel.name == "triton" and b.dtype == torch.float64  # of the additions of an error
        assert_close(a.cpu(), b, rtol=1e-14 if order_differs else 0, atol=0)
    COPIES.same(found.quantized.cpu(), c.gather(1, found.indices.cpu()[..., None].expand(-1, -1, 6)).to(dtype))


def test_sums_only_if_asked(implementation):
    found = implementation.quantize(torch.randn(4, 3), torch.randn(5, 3))
    assert found.counts.shape == found.sums.shape == (0,)


# Gradients


def defined(x, c, indices, mask, units, gradient, scale):
    """quantized and error with the gradients that quantize promises, out of differentiable torch functions."""
    start = x
    if units:
        norm = x.norm(dim=-1, keepdim=True)
        start = x / norm.clamp_min(TINY)
    q = c.gather(1, indices.clamp_min(0).unsqueeze(-1).expand(*indices.shape, x.shape[-1]))
    code = q.detach()
    if gradient == "straight_through":
        quantized = start + (code - start).detach()
    elif gradient == "none":
        quantized = code + 0 * start
    else:  # R x |q| / |x|, R the rotation that takes x to q: equations of arXiv 2410.06424, section 4.2
        a = start.detach()
        u = a / a.norm(dim=-1, keepdim=True)
        v = code / code.norm(dim=-1, keepdim=True)
        w = torch.nn.functional.normalize(u + v, dim=-1)
        turned = start - 2 * (start * w).sum(-1, keepdim=True) * w + 2 * (start * u).sum(-1, keepdim=True) * v
        quantized = turned * (code.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True))
    to_x = (start - code).square().sum(-1)
    to_codes = (start.detach() - q).square().sum(-1)
    error = to_x + scale * (to_codes - to_codes.detach())
    off = ~mask
    return quantized.masked_fill(off.unsqueeze(-1), 0), error.masked_fill(off, 0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("metric, normalize", WAYS)
def test_gradients_are_as_defined(implementation, metric, normalize, gradient, scale):
    x, c = torch.randn(2, 300, 5, dtype=torch.float64), torch.randn(2, 9, 5, dtype=torch.float64)
    c = torch.nn.functional.normalize(c, dim=-1) if metric == "cosine" and normalize else c
    mask = torch.rand(2, 300) > 0.2
    ours = [x.clone().requires_grad_(), c.clone().requires_grad_()]
    options = {"metric": metric, "gradient": gradient, "codebook_error_scale": scale, "normalize": normalize}
    found = implementation.quantize(*ours, mask, **options)
    theirs = [x.clone().requires_grad_(), c.clone().requires_grad_()]
    expected = defined(*theirs, found.indices.cpu(), mask, metric == "cosine" and normalize, gradient, scale)
    assert_close(found.quantized.cpu(), expected[0].detach(), atol=1e-9, rtol=1e-9)
    assert_close(found.error.cpu(), expected[1].detach(), atol=1e-9, rtol=1e-9)
    g, e = torch.randn_like(x), torch.randn(2, 300, dtype=torch.float64)
    torch.autograd.backward([found.quantized, found.error], [g.to(implementation.device), e.to(implementation.device)])
    torch.autograd.backward(expected, [g, e])
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.grad if a.grad is not None else torch.zeros_like(a), b.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("metric, normalize", WAYS)
@pytest.mark.parametrize("case", SEARCHES)
def test_backward(kernel, case, metric, normalize, gradient):
    """No further from float64 than twice the reference, which computes in float32 as well."""
    x, c = SEARCHES[case]()
    mask = torch.rand(x.shape[:2]) > 0.1
    indices = reference.nearest(x, c, mask, metric)
    g, e = torch.randn(x.shape), torch.randn(indices.shape)
    options = (metric, gradient, 0.5, normalize, True, True)
    op = getattr(torch.ops.vqops, f"quantize_backward_{kernel.name}")
    found = [t.cpu() for t in op(*map(kernel.put, (g, e, x, c, indices, mask)), *options)]
    same = reference.quantize_backward(g, e, x, c, indices, mask, *options)
    truth = reference.quantize_backward(g.double(), e.double(), x.double(), c.double(), indices, mask, *options)
    for name, a, b, t in zip(("x", "codebook"), found, same, truth, strict=True):
        assert (a.isnan() == b.isnan()).all(), name
        usable = b.isfinite() & t.isfinite() & (t.abs() < 1e38)
        largest = t.where(usable, 0).abs().flatten(1 if name == "codebook" else 2).amax(-1) if t.numel() else t
        allowed = 2 * (b.double() - t).abs() + 2e-6 * largest.reshape(*largest.shape, *[1] * (3 - largest.dim())) + 1e-6
        assert ((a.double() - t).abs() <= allowed)[usable].all(), name


@pytest.mark.parametrize("error", [None, 0.0, 2e38])
@pytest.mark.parametrize("code", [[NAN, NAN, NAN], [0.0, 0, 0], [1.0, 2, 0.1]], ids=str)
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("metric, normalize", WAYS)
def test_backward_without_a_code_or_a_direction(kernel, metric, normalize, gradient, code, error):
    x, c = short_rows(), torch.tensor([[code]])
    g, e = torch.arange(15.0).view(1, 5, 3), None if error is None else torch.full((1, 5), error)
    given = g, e, x, c, reference.nearest(x, c, None, metric), None
    options = (metric, gradient, 0.5, normalize, True, True)
    found = getattr(torch.ops.vqops, f"quantize_backward_{kernel.name}")(*map(kernel.put, given), *options)
    assert_close([t.cpu() for t in found], list(reference.quantize_backward(*given, *options)), equal_nan=True)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_as_given_are_those_of_euclidean(implementation, metric, gradient):
    """But for the indices; and there, normalize changes nothing."""
    x, c, mask = torch.randn(2, 50, 6), torch.randn(2, 9, 6), torch.rand(2, 50) > 0.2
    x[0, 0], c[0, 0] = 0, 0
    found = implementation.quantize(x, c, mask, torch.rand(2, 50), metric, code_sums=True, normalize=False)
    INDICES.same(found.indices.cpu(), reference.nearest(x, c, mask, metric))
    g, e = torch.randn(x.shape), torch.randn(mask.shape)
    op = getattr(torch.ops.vqops, f"quantize_backward_{implementation.name}")
    given = [implementation.put(t) for t in (g, e, x, c)]
    given += [found.indices, implementation.put(mask)]
    ORDER.same(
        [t.cpu() for t in op(*given, metric, gradient, 0.5, False, True, True)],
        [t.cpu() for t in op(*given, "euclidean", gradient, 0.5, True, True, True)],
    )


def dac(x, codebook):
    """The quantizer of descript-audio-codec on projected latents: output, indices, commitment and codebook loss."""
    unit, codes = (torch.nn.functional.normalize(t) for t in (x, codebook))
    distance = unit.pow(2).sum(1, keepdim=True) - 2 * unit @ codes.t() + codes.pow(2).sum(1, keepdim=True).t()
    indices = (-distance).max(1)[1]
    q = torch.nn.functional.embedding(indices, codebook)
    mse = torch.nn.functional.mse_loss
    return x + (q - x).detach(), indices, mse(x, q.detach()), mse(q, x.detach())


def rq_vae(x, codebook):
    """The same of RQ-VAE with the cosine distance: each loss is of a row."""
    distance = -(x / x.norm(dim=1, keepdim=True)) @ (codebook.T / codebook.T.norm(dim=0, keepdim=True))
    indices = distance.detach().min(1).indices
    q = codebook[indices]
    return x + (q - x).detach(), indices, (x - q.detach()).pow(2).sum(-1), (x.detach() - q).pow(2).sum(-1)


@pytest.mark.parametrize("theirs, features", [(dac, 8), (rq_vae, 1)])
def test_the_quantizers_of_codecs(implementation, theirs, features):
    """Search by direction, all else of raw vectors."""
    commitment, of_codes = 0.25, 1.0
    x, codebook = 3 * torch.randn(400, 8, dtype=torch.float64), 2 * torch.randn(50, 8, dtype=torch.float64)
    g, results = torch.randn_like(x), []
    for ours in (True, False):
        given = [t.clone().requires_grad_() for t in (x, codebook)]
        if ours:
            scale = of_codes / commitment
            found = implementation.quantize(*given, metric="cosine", codebook_error_scale=scale, normalize=False)
            out, indices, error = found.quantized.cpu(), found.indices.cpu(), found.error.cpu() / features
            loss = commitment * error.mean()
            losses = error.mean(), error.mean()
        else:
            out, indices, *losses = theirs(*given)
            losses = [each.mean() for each in losses]
            loss = commitment * losses[0] + of_codes * losses[1]
        ((out * g).sum() + loss).backward()
        results.append((indices, out.detach(), *(each.detach() for each in losses), *(t.grad for t in given)))
    assert_close(*map(list, results), rtol=1e-9, atol=1e-9)


def test_gradients_of_rows_without_a_code(implementation):
    x = torch.tensor([[1.0, 2], [NAN, 0], [INF, 1], [5, 5]], requires_grad=True)
    c = torch.tensor([[1.0, 1], [4, 4]], requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    found = implementation.quantize(x, c, mask, codebook_error_scale=1.0)
    g = torch.arange(8.0).view(4, 2).to(implementation.device)
    torch.autograd.backward([found.quantized, found.error], [g, torch.ones(4, device=implementation.device)])
    assert x.grad[0].tolist() == [0 + 0, 1 + 2] and x.grad[1:3].isnan().all() and x.grad[3].tolist() == [0, 0]
    assert c.grad.tolist() == [[0, -2], [0, 0]]


def test_rotation_of_degenerate_pairs(implementation):
    """x = 0 and q = 0 have no rotation between them, and pass the gradient on; that of x = -q stays finite."""
    x = torch.tensor([[0.0, 0], [1, 0], [-3, 0], [2, 0]])
    c = torch.tensor([[0.0, 0], [3, 0]])
    op = getattr(torch.ops.vqops, f"quantize_backward_{implementation.name}")
    indices = torch.tensor([[1, 0, 1, 1]])
    arguments = map(implementation.put, (torch.ones(1, 4, 2), torch.ones(1, 4), x[None], c[None], indices))
    grad, _ = op(*arguments, None, "euclidean", "rotation")
    assert grad.isfinite().all()
    error = 2 * (x - c[indices[0]])
    assert_close(grad[0, :2].cpu(), 1 + error[:2])
    assert_close(grad[0, 3].cpu(), torch.tensor([1.5 + 2 * (2 - 3), 1.5]))  # parallel: only scaled


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def short_pairs(metric, dtype):
    """Rows and codes of short and usual lengths, every row with every code: gradient, error's gradient, x, codebook,
    indices, |x|, |q|."""
    lengths = torch.tensor([0, 1e-30, 1e-7, 0.8e-6, 1.3e-6, 1e-5, 1e-4, 2e-3, 1, 30])
    way = torch.nn.functional.normalize(torch.randn(2, len(lengths), 5), dim=-1)
    x, c = (way * lengths[:, None]).to(dtype)
    x, c = x.repeat_interleave(len(lengths), 0)[None], c[None]
    indices = torch.arange(len(lengths)).repeat(len(lengths))[None]
    given = x.double().norm(dim=-1), c.double().norm(dim=-1)[0, indices]
    # At most 1 after the division by 1e-6, so that float16 holds it.
    g = (torch.rand(x.shape) - 0.5).to(dtype) * (1e-6 if metric == "cosine" else 1)
    return g.to(dtype), torch.zeros(indices.shape), x, c, indices, *given


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_a_rotation_of_short_vectors_is_bounded(implementation, metric, dtype):
    """Straight-through where x or q has no direction, else a turn and a scale of at most 1000."""
    *arguments, x_length, q_length = short_pairs(metric, dtype)
    g, _, x, c, indices = arguments
    op = getattr(torch.ops.vqops, f"quantize_backward_{implementation.name}")
    given = [implementation.put(t) for t in arguments]
    found, straight = (op(*given, None, metric, way)[0].cpu() for way in ("rotation", "straight_through"))
    assert found.isfinite().all()
    short = (x_length <= TINY) | (q_length <= TINY)
    assert short.any() and not short.all()
    assert_close(found[short], straight[short], rtol=0, atol=0)
    # The turn as test_gradients_are_as_defined has it, in float64, with its scale.
    start = torch.nn.functional.normalize(x.double(), dim=-1, eps=TINY) if metric == "cosine" else x.double()
    u = torch.nn.functional.normalize(start, dim=-1, eps=1e-300)
    q = c.double()[0, indices[0]][None]
    v = torch.nn.functional.normalize(q, dim=-1, eps=1e-300)
    w, back = torch.nn.functional.normalize(u + v, dim=-1), g.double()
    back = back - 2 * w * (w * back).sum(-1, keepdim=True) + 2 * u * (v * back).sum(-1, keepdim=True)
    back = back * (q_length / start.norm(dim=-1)).clamp_max(1000)[..., None]
    if metric == "cosine":
        back = (back - u * (u * back).sum(-1, keepdim=True)) / x_length[..., None]
    largest = back.norm(dim=-1, keepdim=True).expand_as(back)[~short]
    error = (found.double() - back)[~short].abs()
    assert (error <= (4 * torch.finfo(dtype).eps + 1e-5 * (dtype != torch.float64)) * largest + 6e-8).all()


def test_unused_gradients_are_not_computed(implementation):
    x, c = torch.randn(20, 4, requires_grad=True), torch.randn(5, 4)
    implementation.quantize(x, c).quantized.sum().backward()
    COPIES.same(x.grad, torch.ones(20, 4))
    x.grad = None
    found = implementation.quantize(x, c)
    found.error.sum().backward()
    assert_close(x.grad, 2 * (x - found.quantized.to("cpu")).detach())
    frozen = implementation.quantize(x.detach(), c.requires_grad_(), codebook_error_scale=0.0)
    frozen.error.sum().backward()
    assert c.grad is None or not c.grad.any()


def test_the_codebook_gradient_adds_in_the_order_of_code_sums(kernel):
    x, c = torch.randn(1, 3000, 6), torch.randn(1, 3, 6)
    indices, e = reference.nearest(x, c), torch.randn(1, 3000)
    options = ("euclidean", "none", 0.5, True, False, True)
    op = getattr(torch.ops.vqops, f"quantize_backward_{kernel.name}")
    found = op(*map(kernel.put, (None, e, x, c, indices, None)), *options)[1]
    ORDER.same(found.cpu(), reference.quantize_backward(None, e, x, c, indices, None, *options)[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_an_update_between_forward_and_backward(backend, gradient):
    """The backward is that of the codebook which quantized, whatever has become of it."""
    x = torch.randn(1, 60, 4)
    old = torch.randn(1, 7, 4)

    def loss_of(x, codebook, size, average):
        found = vqops.quantize(x, codebook, gradient=gradient, code_sums=True)
        with torch.no_grad():
            vqops.ema_update_(size, average, codebook, found.counts, found.sums, 0.0)
        return (found.quantized * torch.arange(4.0)).sum() + found.error.sum()

    given = x.clone().requires_grad_()
    codebook = old.clone()
    compiled = loss_of if backend == "eager" else torch.compile(loss_of, backend=backend, fullgraph=True)
    compiled(given, codebook, torch.ones(1, 7), old.clone()).backward()
    assert (codebook != old).any()
    indices = reference.nearest(x, old)
    g = torch.arange(4.0).expand(1, 60, 4)
    expected, _ = reference.quantize_backward(g, torch.ones(1, 60), x, old, indices, None, "euclidean", gradient)
    assert_close(given.grad, expected)


def test_second_derivatives_are_an_error(implementation):
    x = torch.randn(5, 3, requires_grad=True)
    found = implementation.quantize(x, torch.randn(4, 3))
    (g,) = torch.autograd.grad(found.error.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="quantize_backward: the gradient of a gradient"):
        g.sum().backward()
