"""Against the installed vector-quantize-pytorch: the same results wherever it is right."""

from functools import partial

import pytest
import torch
import vector_quantize_pytorch
from torch.testing import assert_close

from vqops import VectorQuantize
from vqops.quantizers import kmeans
from vqops.quantizers.rows import RandomRows

DIM, CODES = 6, 20
CLOSE = partial(assert_close, rtol=2e-5, atol=2e-6)
METRICS = {"euclidean": {}, "cosine": {"use_cosine_sim": True}, "learnable": {"learnable_codebook": True}}
LAYOUTS = {
    "rows": ((3, 40, DIM), {}),
    "single": ((50, DIM), {}),
    "channel_first": ((3, DIM, 40), {"channel_last": False}),
    "image": ((3, DIM, 6, 7), {"accept_image_fmap": True}),
}


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on inputs this small a second thread only costs time
    yield
    torch.set_num_threads(threads)


def incumbent(**options) -> vector_quantize_pytorch.VectorQuantize:
    if options.get("learnable_codebook"):
        options["ema_update"] = False  # alone it is an AssertionError there
    return vector_quantize_pytorch.VectorQuantize(DIM, CODES, **options)


def both(**options):
    theirs, ours = incumbent(**options), VectorQuantize(DIM, CODES, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same_step(theirs, ours, x, **arguments):
    """One forward and backward of each on x: results, gradients, and the state after it."""
    results = []
    for vq in (theirs, ours):
        given = x.clone().requires_grad_()
        vq.zero_grad()
        quantized, indices, loss = vq(given, **arguments)
        if quantized.requires_grad:
            torch.manual_seed(1)
            ((quantized * torch.randn(quantized.shape)).sum() + 3 * loss).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in vq.named_parameters()}
        results.append((quantized, indices, loss, given.grad, grads))
    (quantized, indices, loss, grad, grads), (our_quantized, our_indices, our_loss, our_grad, our_grads) = results
    assert torch.equal(indices, our_indices)
    assert quantized.dtype == our_quantized.dtype and loss.shape == our_loss.shape
    assert quantized.requires_grad == our_quantized.requires_grad
    assert loss.requires_grad == our_loss.requires_grad or not ours.training  # theirs says True in eval after training
    CLOSE(our_quantized, quantized)
    CLOSE(our_loss, loss)
    CLOSE(our_grad, grad)
    assert our_grads.keys() == grads.keys()
    for name, value in grads.items():
        CLOSE(our_grads[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert_same_state(theirs, ours)


def assert_same_state(theirs, ours):
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        CLOSE(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rotation_trick", [None, False])
@pytest.mark.parametrize("codebook_dim", [None, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metric", METRICS)
def test_several_steps_and_eval(metric, layout, codebook_dim, rotation_trick):
    shape, options = LAYOUTS[layout]
    theirs, ours = both(codebook_dim=codebook_dim, rotation_trick=rotation_trick, **options, **METRICS[metric])
    for _ in range(3):
        assert_same_step(theirs, ours, torch.randn(shape))
    theirs.eval(), ours.eval()
    if metric != "learnable":
        assert_same_step(theirs, ours, torch.randn(shape))
    indices = ours(torch.randn(shape))[1]
    CLOSE(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    if codebook_dim is None or not options:  # with a projection and channels first, theirs projects the wrong axis
        CLOSE(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))


@pytest.mark.parametrize("options", [{"decay": 0.99}, {"decay": 0.0}, {"decay": 1.0}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("use_cosine_sim", [False, True])
def test_averages(options, use_cosine_sim):
    theirs, ours = both(use_cosine_sim=use_cosine_sim, **options)
    for _ in range(6):
        # Rows for every code: with decay=0 a code without one becomes 0 / 0 there.
        x = torch.cat([ours.codebook + 0.01 * torch.randn(CODES, DIM), torch.randn(80, DIM)])
        assert_same_step(theirs, ours, x)


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25])
@pytest.mark.parametrize("metric", METRICS)
def test_commitment_weight(commitment_weight, metric):
    theirs, ours = both(commitment_weight=commitment_weight, **METRICS[metric])
    assert_same_step(theirs, ours, torch.randn(50, DIM))


@pytest.mark.parametrize("metric", METRICS)
def test_freezing(metric):
    theirs, ours = both(freeze_codebook=True, **METRICS[metric])
    assert_same_step(theirs, ours, torch.randn(50, DIM))
    assert_same_step(theirs, ours, torch.randn(50, DIM), freeze_codebook=False)


@pytest.mark.parametrize("metric", METRICS)
def test_dead_codes(metric):
    """The same codes die, with the same counts, and restart from rows of the batch."""
    theirs, ours = both(threshold_ema_dead_code=1.9, **METRICS[metric])
    x = torch.randn(3, 40, DIM)
    dead = None
    for vq in (theirs, ours):
        vq(x)
        restarted = vq._codebook.cluster_size[0] == 1.9
        dead = restarted if dead is None else dead
        assert restarted.any() and torch.equal(restarted, dead)
        rows = torch.nn.functional.normalize(x, dim=-1) if metric == "cosine" else x
        distance = (vq.codebook[dead][:, None] - rows.flatten(0, 1)).norm(dim=-1)
        assert (distance.min(1).values < 1e-6).all()
        CLOSE(vq._codebook.embed_avg[0, dead], 1.9 * vq.codebook[dead])
    for name, value in ours._codebook.state_dict().items():
        if value.dim():
            CLOSE(value[0, ~dead], getattr(theirs._codebook, name)[0, ~dead])


@pytest.mark.parametrize("codebook_dim", [None, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_k_means_from_the_same_start(metric, codebook_dim, monkeypatch):
    theirs, ours = both(kmeans_init=True, codebook_dim=codebook_dim, **METRICS[metric])
    theirs._codebook.sample_fn = lambda rows, num: rows[:, :num]

    def first_rows(x, valid, num_codes):
        here = torch.ones(1, num_codes, dtype=torch.bool)
        return RandomRows(x[:, :num_codes].float(), here, valid.sum(1))

    monkeypatch.setattr(kmeans, "random_rows", first_rows)
    x = torch.randn(3, 100, DIM)
    for _ in range(3):
        assert_same_step(theirs, ours, x)
    assert theirs._codebook.initted and ours._codebook.initted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    theirs, ours = both()
    x = torch.randn(50, DIM).to(dtype)
    (quantized, indices, loss), (our_quantized, our_indices, our_loss) = theirs(x), ours(x)
    assert torch.equal(indices, our_indices)
    assert our_quantized.dtype == dtype
    assert_close(our_quantized, quantized)
    assert our_loss.dtype == loss.dtype
    assert_close(our_loss.to(dtype), loss.to(dtype))  # theirs adds up in the dtype of x
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"kmeans_init": True}, {"learnable_codebook": True}], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_checkpoints_load_in_both_directions(options, trained, tmp_path):
    for source, target in ((incumbent, partial(VectorQuantize, DIM, CODES)), (partial(VectorQuantize, DIM, CODES), incumbent)):
        written, read = source(**options), target(**options)
        if trained:
            written(torch.randn(100, DIM))
        torch.save(written.state_dict(), tmp_path / "model.pt")
        read.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        x = torch.randn(50, DIM)
        if trained or "kmeans_init" not in options:
            a, b = written.eval()(x), read.eval()(x)
            assert torch.equal(a[1], b[1])
            CLOSE(a[0], b[0])
        else:
            assert not read._codebook.initted
            read(x)
            assert read._codebook.initted


# Where it is wrong


def test_small_data_keeps_its_nearest_codes():
    theirs, ours = both()
    scale = 1e-5
    for vq in (theirs, ours):
        vq.eval()._codebook.embed.mul_(scale)
    x = torch.randn(200, DIM) * scale
    nearest = torch.cdist(x.double(), ours.codebook.double()).argmin(1)
    assert not torch.equal(theirs(x)[1], nearest)
    assert torch.equal(ours(x)[1], nearest)


def test_offset_data_keeps_its_nearest_codes():
    theirs, ours = both()
    for vq in (theirs, ours):
        vq.eval()._codebook.embed.add_(1000)
    x = torch.randn(200, DIM) + 1000
    nearest = (x.double()[:, None] - ours.codebook.double()).square().sum(-1).argmin(1)
    assert not torch.equal(theirs(x)[1], nearest)
    assert torch.equal(ours(x)[1], nearest)


def test_one_nan_does_not_spoil_the_codebook():
    theirs, ours = both()
    x = torch.randn(50, DIM)
    x[7, 2] = torch.nan
    theirs(x), ours(x)
    assert theirs.codebook.isnan().any(1).all()
    assert ours.codebook.isfinite().all()


def test_a_learnable_codebook_alone_is_valid():
    with pytest.raises(AssertionError):
        vector_quantize_pytorch.VectorQuantize(DIM, CODES, learnable_codebook=True)
    VectorQuantize(DIM, CODES, learnable_codebook=True)


def test_the_setter_lasts():
    theirs, ours = both()
    codes = 5 * torch.randn(CODES, DIM)
    for vq in (theirs, ours):
        vq.codebook = codes
        vq(codes)
    assert (theirs.codebook - codes).abs().max() > 1
    assert_close(ours.codebook, codes, rtol=1e-4, atol=1e-4)
