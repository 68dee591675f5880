"""RandomProjectionQuantizer: the same as vector-quantize-pytorch's where that is right, and always the same."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch
from promises import INDICES, UNCHANGED
from side_by_side import CLOSE
from torch.testing import assert_close

import vqops
from vqops import RandomProjectionQuantizer
from vqops.quantizers.codebook import preparation

SMALL = {"dim": 16, "codebook_size": 40, "codebook_dim": 4}
X = (2, 30, 16)


def both(**options):
    theirs = vector_quantize_pytorch.RandomProjectionQuantizer(**(SMALL | options))
    ours = RandomProjectionQuantizer(**(SMALL | options))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("codebook_dim", [1, 4, 16])
def test_one_codebook(codebook_dim, norm):
    theirs, ours = both(codebook_dim=codebook_dim, norm=norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(3):
        x = torch.randn(X)
        INDICES.same(ours(x), theirs(x))
        results, targets = [], torch.randint(40, X[:2])
        for module in (theirs, ours):
            given = x.clone().requires_grad_()
            loss = module(given, targets)
            loss.backward()
            results.append((loss.detach(), given.grad))
        CLOSE(results[1], results[0])
    for name, value in theirs.state_dict().items():
        UNCHANGED.same(ours.state_dict()[name], value)
    theirs.load_state_dict(ours.state_dict())


def test_the_same_seed_draws_the_same():
    """So that a run which kept a seed instead of a state goes on."""
    modules = []
    for package in (vector_quantize_pytorch, vqops):
        torch.manual_seed(5)
        modules.append(package.RandomProjectionQuantizer(**SMALL))
    CLOSE(dict(modules[1].state_dict()), dict(modules[0].state_dict()))


def test_codebooks_have_the_features_asked_for_and_no_trainable_projection():
    theirs, ours = vector_quantize_pytorch, vqops
    theirs, ours = (p.RandomProjectionQuantizer(**SMALL, num_codebooks=3) for p in (theirs, ours))
    assert len(list(theirs.parameters())) == 4 and theirs.vq._codebook.embed.shape == (3, 40, 12)
    assert not list(ours.parameters())
    assert {name: list(value.shape) for name, value in ours.state_dict().items()} == {
        "rand_projs": [3, 16, 4],
        "vq._codebook.initted": [],
        "vq._codebook.cluster_size": [3, 40],
        "vq._codebook.embed_avg": [3, 40, 4],
        "vq._codebook.embed": [3, 40, 4],
    }
    x = torch.randn(X)
    normed = (x.double() - x.double().mean(-1, keepdim=True)) / (x.double().var(-1, False, keepdim=True) + 1e-5).sqrt()
    indices, cosines = ours(x), []
    for h in range(3):
        projected = F.normalize(normed @ ours.rand_projs[h].double(), dim=-1)
        cosines.append(projected @ ours.vq.codebook[h].double().mT)
    INDICES.same(indices, torch.stack([each.argmax(-1) for each in cosines], -1))
    targets = torch.randint(-1, 40, (2, 30, 3))
    expected = F.cross_entropy(torch.stack(cosines, 2).flatten(0, 2), targets.flatten(), ignore_index=-1)
    assert_close(ours(x, targets), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_always_in_eval_and_frozen(num_codebooks):
    ours = RandomProjectionQuantizer(**SMALL, num_codebooks=num_codebooks)
    before, x = copy.deepcopy(ours.state_dict()), torch.randn(X)
    expected = ours(x)
    torch.nn.Sequential(ours).train()
    assert not ours.training and not ours.vq.training
    INDICES.same(ours(x), expected)
    ours.vq.train()
    INDICES.same(ours(x), expected)
    ours(x, expected)
    UNCHANGED.same(ours.state_dict(), before)


@pytest.mark.parametrize(
    "run",
    [
        lambda vq, x: torch.cat([vq(each) for each in x.split(1)]),
        lambda vq, x: torch.stack([vq(each) for each in x.unbind(1)], 1),
        lambda vq, x: vq(x.transpose(0, 1).contiguous().transpose(0, 1)),
        lambda vq, x: vq(x.flatten(0, 1)).view(*x.shape[:2], 2),
        lambda vq, x: vq(x.unflatten(1, (5, 6))).flatten(1, 2),
        lambda vq, x: copy.deepcopy(vq)(x),
        lambda vq, x: pickle.loads(pickle.dumps(vq))(x),
        lambda vq, x: copy.deepcopy(vq).bfloat16()(x),
        lambda vq, x: copy.deepcopy(vq).double()(x),
        lambda vq, x: torch.compile(vq, fullgraph=True, backend="aot_eager")(x),
        lambda vq, x: torch.export.export(vq, (x,)).module()(x),
    ],
    ids=["samples", "rows", "strides", "flat", "grid", "copy", "pickle", "bfloat16", "double", "compile", "export"],
)
def test_the_same_indices_however_it_is_called(run):
    vq, x = RandomProjectionQuantizer(**SMALL, num_codebooks=2), torch.randn(X)
    INDICES.same(run(vq, x), vq(x))


def test_casts_and_autocast_change_nothing():
    theirs, ours = both()
    x = torch.randn(20, 100, 16)
    expected = ours(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (theirs(x) != expected).any()
        INDICES.same(ours(x), expected)
    ours.half()
    assert ours.rand_projs.dtype == ours.vq._codebook.embed.dtype == torch.float32
    INDICES.same(ours(x), expected)
    for dtype in (torch.bfloat16, torch.float16):
        INDICES.same(ours(x.to(dtype)), ours(x.to(dtype).float()))
    assert ours(x.double(), expected).dtype == torch.float64


@pytest.mark.skipif(not preparation.is_compiled("prepare", "cpu"), reason="no compiled kernels here")
def test_codes_are_prepared_once():
    vq = RandomProjectionQuantizer(**SMALL, num_codebooks=2)
    stamps = []
    for _ in range(3):
        vq(torch.randn(X))
        stamps.append(vq.vq._codebook.preparation.memory[1].clone())
    INDICES.same(stamps[0], stamps[1])
    INDICES.same(stamps[0], stamps[2])


def test_vectors_that_are_not_finite_and_none_at_all():
    vq = RandomProjectionQuantizer(**SMALL, num_codebooks=2)
    x = torch.randn(X)
    expected = vq(x)
    x[0, 3, 5], x[1, 2, 0] = torch.nan, torch.inf
    found = vq(x)
    lost = ~x.isfinite().all(-1)
    assert (found[lost] == -1).all()
    INDICES.same(found[~lost], expected[~lost])
    assert vq(x[:0]).shape == (0, 30, 2)
    assert vq(x[:0], found[:0]) == 0
    assert (vq(torch.ones(1, 2, 16)) >= 0).all()  # no deviation, so 0 after the norm


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dim": 0}, ValueError, "RandomProjectionQuantizer: dim must be an integer of at least 1, got 0"),
        ({"codebook_dim": 0}, ValueError, "RandomProjectionQuantizer: codebook_dim must be an integer of at least 1"),
        ({"num_codebooks": 1.5}, ValueError, "RandomProjectionQuantizer: num_codebooks must be an integer of at least"),
        ({"codebook_size": 0}, ValueError, "codebook_size must be an integer of at least 1, got 0"),
        ({"heads": 2}, TypeError, "heads"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        RandomProjectionQuantizer(**(SMALL | options))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda vq: vq(torch.zeros(2, 5, 4)), ValueError, r"x must be \[b, ..., dim\] with dim=16, got \[2, 5, 4\]"),
        (lambda vq: vq(torch.zeros(2, 16).long()), TypeError, "x must be float32, float64, float16 or bfloat16, got"),
        (lambda vq: vq(torch.zeros(X, device="meta")), ValueError, "projections is on cpu, x is on meta"),
        (
            lambda vq: vq(torch.zeros(X), torch.zeros(2, 30).long()),
            ValueError,
            r"indices must have shape \[2, 30, 2\], got \[2, 30\]",
        ),
        (lambda vq: vq(torch.zeros(X), torch.full((2, 30, 2), 40)), IndexError, "indices must be -1 or a code in"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=f"^RandomProjectionQuantizer: {message}"):
        call(RandomProjectionQuantizer(**SMALL, num_codebooks=2))


def test_a_state_of_heads_behind_their_projections_is_refused():
    theirs = vector_quantize_pytorch.RandomProjectionQuantizer(**SMALL, num_codebooks=3)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"vq.project_in.weight\""):
        RandomProjectionQuantizer(**SMALL, num_codebooks=3).load_state_dict(theirs.state_dict())
