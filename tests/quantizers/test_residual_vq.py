"""ResidualVQ: what it returns, how it learns, and what it refuses."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from promises import COPIES, INDICES, UNCHANGED
from quantizers import state
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vqops
from vqops import GroupedResidualVQ, ResidualVQ
from vqops.quantizers.codebook import codebook as codebook_module
from vqops.quantizers.codebook import moved, steps
from vqops.quantizers.residual import level_dropout

DIM, CODES, LEVELS = 6, 16, 3
SIZES = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS}
# What one op does for all levels, and what is done level by level.
TOGETHER, IN_TURN = {}, {"quant_grad_frac": 0.5}
WAYS = {
    "together": TOGETHER,
    "in turn": IN_TURN,
    "shared": {"shared_codebook": True},
    "beam": {"beam_size": 2},
    "implicit": {"implicit_neural_codebook": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "cosine": {"use_cosine_sim": True},
    "projected": {"codebook_dim": 4},
}
every_way = pytest.mark.parametrize("way", WAYS)


def residual_vq(way: str = "together", **options) -> ResidualVQ:
    return ResidualVQ(**SIZES | WAYS[way] | options)


# Values


def test_by_hand():
    vq = ResidualVQ(dim=1, codebook_size=2, num_quantizers=2, rotation_trick=False)
    vq.layers[0].codebook, vq.layers[1].codebook = torch.tensor([[0.0], [4.0]]), torch.tensor([[-1.0], [1.0]])
    x = torch.tensor([[[1.5], [3.25], [5.0]]], requires_grad=True)
    quantized, indices, losses, codes = vq(x, return_all_codes=True)
    assert indices.tolist() == [[[0, 1], [1, 0], [1, 1]]]
    assert quantized.tolist() == [[[1.0], [3.0], [5.0]]]
    assert codes.flatten(1).tolist() == [[0.0, 4.0, 4.0], [1.0, -1.0, 1.0]]
    assert_close(losses, torch.tensor([(2.25 + 0.5625 + 1) / 3, (0.25 + 0.0625 + 0) / 3]))
    quantized.sum().backward(retain_graph=True)
    assert x.grad.flatten().tolist() == [2.0, 2.0, 2.0]  # once a level
    (x.grad,) = torch.autograd.grad(losses[1], x)
    assert_close(x.grad.flatten(), 2 * torch.tensor([0.5, 0.25, 0.0]) / 3)
    # m_k / N_k of averages that start at the code and 1, with Laplace smoothing of eps = 1e-5
    assert_close(vq.layers[0].codebook[1], torch.tensor([(4 * 0.8 + 8.25 * 0.2) / (0.8 + 2 * 0.2)]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["together", "in turn", "beam"])
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_the_gradient_of_the_output_once(rotation_trick, way, monkeypatch):
    """Through the sum, as if one quantizer had chosen it."""
    if way == "in turn":
        monkeypatch.setattr("vqops.quantizers.residual_vq.fits", lambda *_: False)
    beam = {"beam_size": 3} if way == "beam" else {}
    vq = residual_vq(gradient_per_level=False, rotation_trick=rotation_trick, commitment_weight=0.0, **beam)
    x = torch.randn(2, 10, DIM, requires_grad=True)
    mask = torch.rand(2, 10) < 0.7
    quantized = vq(x, mask=mask)[0]
    g = torch.randn_like(quantized)
    (grad,) = torch.autograd.grad(quantized, x, g)
    if not rotation_trick:
        assert_close(grad, g.masked_fill(~mask.unsqueeze(-1), 0))
        return
    for row, place in enumerate(mask.flatten()):
        one, code = x.detach().view(-1, DIM)[row].requires_grad_(), quantized.detach().view(-1, DIM)[row]
        turned = vqops.quantize(one[None], code[None], gradient="rotation").quantized
        (expected,) = torch.autograd.grad(turned, one, g.view(-1, DIM)[row][None])
        assert_close(grad.view(-1, DIM)[row], expected * place)


def test_codes_are_those_of_the_forward_though_it_moves_them():
    vq = residual_vq()
    quantized, indices, _, codes = vq(torch.randn(2, 10, DIM), return_all_codes=True)
    assert_close(codes.sum(0), quantized)
    assert (vq.get_codes_from_indices(indices) - codes).abs().max() > 0


@every_way
def test_decoding(way):
    vq = residual_vq(way)
    vq.eval()
    x = torch.randn(2, 10, DIM)
    quantized, indices, _ = vq(x)
    assert_close(vq.get_output_from_indices(indices), quantized)
    codes = vq.get_codes_from_indices(indices)
    for level in range(1, LEVELS + 1):
        some = vq.get_codes_from_indices(indices[..., :level])
        COPIES.same(some[:level], codes[:level])
        assert (some[level:] == 0).all()
        assert_close(vq.get_output_from_indices(indices[..., :level]), vq.project_out(codes[:level].sum(0)))
    none = torch.full_like(indices, -1)
    assert (vq.get_output_from_indices(none) == 0).all() and (vq.get_codes_from_indices(none) == 0).all()


def test_levels_of_different_sizes():
    vq = ResidualVQ(dim=DIM, codebook_size=[4, 9, 30])
    assert vq.num_quantizers == 3 and [len(book) for book in vq.codebooks] == [4, 9, 30]
    _, indices, _ = vq(torch.randn(2, 50, DIM))
    assert [int(level.max()) < size for level, size in zip(indices.unbind(-1), (4, 9, 30), strict=True)] == [True] * 3


@pytest.mark.parametrize("make", [ResidualVQ, lambda **options: GroupedResidualVQ(groups=2, **options)])
@pytest.mark.parametrize("options", [{"accept_image_fmap": True}, {"channel_last": False}, {"accept_3d_fmap": True}])
def test_layouts(options, make):
    """Image maps and channels first are the vectors, moved."""
    vq = make(**SIZES)
    other = make(**SIZES | options)
    other.load_state_dict(vq.state_dict())
    shape = (2, DIM, 2, 3, 4) if "accept_3d_fmap" in options else (2, DIM, 3, 4)
    x = torch.randn(shape)
    rows = x.flatten(2).mT
    for module in (vq, other):
        module.eval()
    (quantized, indices, _, codes), (expected, of_rows, _, of_codes) = (
        module(values, return_all_codes=True) for module, values in ((other, x), (vq, rows))
    )
    COPIES.same(quantized.flatten(2).mT, expected)
    at = indices.dim() - len(shape) + 2 - 1  # of the first axis of space
    INDICES.same(indices.flatten(at, -2), of_rows)
    COPIES.same(codes.flatten(codes.dim() - len(shape) + 1, -2), of_codes)
    COPIES.same(other.get_output_from_indices(indices), quantized)
    mask = torch.rand(x[:, 0].shape) < 0.5
    masked, given = other(x, mask=mask)[0], vq(rows, mask=mask.flatten(1))[0]
    COPIES.same(masked.flatten(2).mT, given)


def test_single_vectors_and_lens():
    vq = residual_vq().eval()
    x = torch.randn(4, 7, DIM)
    COPIES.same(vq(x[:, 0])[0], vq(x)[0][:, 0])
    lens = torch.tensor([7, 0, 3, 1])
    mask = torch.arange(7) < lens.unsqueeze(-1)
    for a, b in zip(vq(x, lens=lens), vq(x, mask=mask), strict=True):
        COPIES.same(a, b)


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("make", [ResidualVQ, lambda **options: GroupedResidualVQ(groups=2, **options)])
def test_cross_entropy_of_given_indices(make, as_list):
    """The sum over the levels of the mean of -log softmax(-|r - c|), r what the nearest codes have left."""
    vq = make(**SIZES).eval()
    x = torch.randn(2, 10, DIM, requires_grad=True)
    groups = getattr(vq, "groups", 1)
    targets = torch.randint(-1, CODES, (groups, 2, 10, LEVELS))
    given = targets if groups > 1 else targets[0]
    if as_list:
        given = [part.unbind(-1) for part in given] if groups > 1 else list(given.unbind(-1))
    loss = vq(x, indices=given)[1]
    expected = 0
    for g in range(groups):
        rvq = vq.rvqs[g] if groups > 1 else vq
        residual = x.chunk(groups, -1)[g].reshape(20, -1)
        for level in range(LEVELS):
            codes = rvq.layers[level].codebook
            logits = -torch.cdist(residual, codes)
            goal = targets[g, ..., level].flatten()
            expected = expected + torch.nn.functional.cross_entropy(logits, goal, ignore_index=-1)
            residual = residual - codes[logits.argmax(-1)]
    assert_close(loss, expected)
    (grad,), (expected,) = (torch.autograd.grad(value, x, retain_graph=True) for value in (loss, expected))
    assert_close(grad, expected, rtol=1e-4, atol=1e-5)


# Beam search


@pytest.mark.parametrize("implicit", [False, True])
def test_a_beam_of_all_paths_finds_the_best(implicit):
    options = {"codebook_size": 4, "implicit_neural_codebook": implicit}
    vq = ResidualVQ(**SIZES | options | {"beam_size": 16, "beam_score_quantizer_weights": [0.5, 1.0, 2.0]}).eval()
    x = torch.randn(1, 30, DIM)
    _, indices, losses = vq(x)
    paths = torch.tensor(list(itertools.product(range(4), repeat=LEVELS)))  # [64, Q]
    codes = vq.get_codes_from_indices(paths[None])[:, 0]  # [Q, 64, D]
    error = (x[0, :, None] - codes.cumsum(0)[:, None]).square().mean(-1)  # [Q, 30, 64]
    best = (error * torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1)).sum(0).argmin(-1)
    INDICES.same(indices[0], paths[best])
    assert_close(losses, error[:, torch.arange(30), best].mean(1))


def test_a_beam_is_at_least_as_good():
    vq = residual_vq("beam", beam_size=8, num_quantizers=6).eval()
    x = torch.randn(1, 500, DIM)
    greedy, found = ((vq(x, beam_size=size)[0] - x).square().sum(-1).mean() for size in (1, 8))
    assert found < 0.98 * greedy


def test_a_training_step_of_a_beam_learns_from_the_paths_it_took():
    vq = residual_vq("beam")
    twin, x = copy.deepcopy(vq), torch.randn(2, 20, DIM)
    mask = torch.rand(2, 20) < 0.8
    _, indices, _ = vq(x, mask=mask)
    residual = x
    for layer, other, chosen in zip(vq.layers, twin.layers, indices.unbind(-1), strict=True):
        codes = other.get_codes_from_indices(chosen)
        other.update_indices(residual, chosen)
        residual = residual - codes
        for name, value in layer.state_dict().items():
            assert_close(other.state_dict()[name], value)


def test_a_beam_passes_by_places_without_a_code():
    """Two finite codes for a beam of four, and a row without any."""
    vq = ResidualVQ(**SIZES | {"codebook_size": 5, "beam_size": 4}).eval()
    for layer in vq.layers:
        layer._codebook.embed[:, 2:] = torch.inf
    x = torch.randn(1, 8, DIM)
    x[0, 3, 2] = torch.nan
    quantized, indices, _ = vq(x)
    assert (indices[0, 3] == -1).all() and quantized[0, 3].isnan().all()
    others = torch.arange(8) != 3
    assert quantized[0, others].isfinite().all() and ((indices[0, others] >= 0) & (indices[0, others] < 2)).all()


# Implicit codes


@pytest.mark.parametrize("beam_size", [None, 3])
def test_blocks_of_implicit_codes_are_one(beam_size, monkeypatch):
    vq = residual_vq(implicit_neural_codebook=True, beam_size=beam_size)
    x, results = torch.randn(2, 10, DIM), []
    for values in (1 << 22, 7 * CODES * DIM):
        monkeypatch.setattr(moved, "BLOCK_VALUES", values)
        vq.zero_grad()
        given = x.clone().requires_grad_()
        quantized, indices, losses = vq(given, mask=torch.arange(10).expand(2, 10) < 8)
        (quantized.square().sum() + losses.sum()).backward()
        results.append((quantized, losses, given.grad, *(p.grad for p in vq.parameters())))
        results.append(indices)
    assert_close(results[2], results[0])
    INDICES.same(results[3], results[1])


def test_a_step_of_implicit_codes_holds_no_codes_of_each_row():
    """Of 4000 rows: 128 codes of 16 features for each would be 31 MB in one layer alone."""
    vq = ResidualVQ(dim=16, codebook_size=128, num_quantizers=2, implicit_neural_codebook=True)
    x = torch.randn(1, 4000, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        vq(x)
    assert max(kept) <= x.numel()


def test_a_beam_of_losses_that_overflow_prefers_paths_to_places_without_a_code():
    vq = ResidualVQ(**SIZES | {"codebook_size": 5, "beam_size": 4}).eval()
    for layer in vq.layers:
        layer._codebook.embed[:, 2:] = torch.inf
        layer._codebook.embed[:, :2] *= 1e25
    _, indices, _ = vq(1e25 * torch.randn(1, 8, DIM))
    assert ((indices >= 0) & (indices < 2)).all()


def test_dead_codes_of_a_beam_of_implicit_codes_restart_from_what_was_left():
    options = {"implicit_neural_codebook": True, "threshold_ema_dead_code": 2, "num_quantizers": 2}
    vq = residual_vq("beam", **options)
    vq.layers[1]._codebook.cluster_size.zero_()
    x = torch.randn(1, 30, DIM)
    first = copy.deepcopy(vq)
    _, indices, _ = vq(x)
    rest = x[0] - first.get_codes_from_indices(indices)[0, 0]
    dead = vq.layers[1]._codebook.cluster_size[0] == 2
    assert dead.sum() > 5
    codes = vq.layers[1].codebook[dead].detach()
    assert torch.cdist(codes.double(), rest.detach().double()).amin(1).max() < 1e-5


# Dropout of levels


def test_dropout_uses_every_number_of_levels():
    vq = residual_vq(quantize_dropout=True, num_quantizers=8, quantize_dropout_cutoff_index=2)
    seen, x = set(), torch.randn(1, 5, DIM)
    for _ in range(200):
        before = state(vq)
        _, indices, losses = vq(x)
        used = int((indices[0, 0] >= 0).sum())
        assert ((indices >= 0).sum(-1) == used).all() and (losses[used:] == 0).all() and (losses[:used] > 0).all()
        for level, layer in enumerate(vq.layers):
            now = layer.state_dict().items()
            assert any((value != before[f"layers.{level}.{name}"]).any() for name, value in now) == (level < used)
        seen.add(used)
    assert seen == set(range(3, 9))
    vq.quantize_dropout_multiple_of = 4
    assert {int((vq(x)[1][0, 0] >= 0).sum()) for _ in range(60)} == {4, 8}
    assert (vq.eval()(x)[1] >= 0).all()


@pytest.mark.parametrize("way", ["together", "in turn"])
def test_levels_that_are_dropped_keep_what_waits(way):
    """Codes that were set in place, and sums that wait for the next update."""
    vq = residual_vq(way, quantize_dropout=True, num_quantizers=4)
    seed = next(s for s in range(99) if level_dropout.levels_of(s, 0, 4, 1) == 2)
    vq.layers[3](torch.randn(1, 10, DIM), accum_ema_update=True)
    vq.layers[3]._codebook.embed += 1
    before = state(vq.layers[3])
    vq(torch.randn(1, 10, DIM), rand_quantize_dropout_fixed_seed=seed)
    UNCHANGED.same(vq.layers[3].state_dict(), before)
    assert vq.layers[3]._codebook.pending is not None


def test_the_first_step_with_k_means_uses_all_levels():
    vq = residual_vq(quantize_dropout=True, kmeans_init=True)
    assert (vq(torch.randn(1, 50, DIM))[1] >= 0).all()
    assert len({int((vq(torch.randn(1, 50, DIM))[1] >= 0).sum()) for _ in range(30)}) == LEVELS


def test_groups_drop_the_same_levels():
    vq = GroupedResidualVQ(**SIZES, groups=3, quantize_dropout=True)
    for _ in range(10):
        used = (vq(torch.randn(1, 5, DIM))[1] >= 0).sum(-1)
        assert (used == used.flatten()[0]).all()


# Learning


def test_k_means_level_by_level():
    """Each level's first codes are means of what the levels before have left."""
    vq = residual_vq(kmeans_init=True, kmeans_iters=20, codebook_size=8)
    x = torch.randn(1, 400, DIM)
    vq(x, freeze_codebook=True)
    residual = x[0]
    for layer in vq.layers:
        nearest = vqops.nearest(residual, layer.codebook)
        counts, sums = vqops.code_sums(residual, nearest, 8)
        assert layer._codebook.initted and (counts > 0).all()
        assert_close(sums / counts.unsqueeze(-1), layer.codebook, rtol=0, atol=0.1)
        residual = residual - layer.codebook[nearest]


@pytest.mark.parametrize("way", ["together", "in turn", "beam", "cosine"])
def test_dead_codes_restart_from_rows_of_their_level(way):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    for layer in vq.layers:
        layer._codebook.cluster_size[0, :4] = 0
        layer._codebook.embed[0, :4] = 1000 * (1 + torch.arange(4).unsqueeze(-1))  # that no row is near to
        layer._codebook.embed[0, :4, 0] = 0
    if way == "cosine":
        for layer in vq.layers:
            layer._codebook.embed[0, :4] = torch.eye(DIM)[0]
    before = copy.deepcopy(vq)
    x = torch.randn(1, 30, DIM)
    _, indices, _ = vq(x)
    residual = x[0]
    for layer, old, chosen in zip(vq.layers, before.layers, indices[0].unbind(-1), strict=True):
        new = layer.codebook[:4]
        rows = residual / residual.norm(dim=-1, keepdim=True) if way == "cosine" else residual
        assert torch.cdist(new.double(), rows.double()).amin(1).max() < 1e-5
        residual = residual - old.codebook[chosen]


@pytest.mark.parametrize("way", ["shared", "beam"])
def test_dead_codes_of_a_shared_codebook_restart_from_rows_of_any_level(way):
    vq = residual_vq(way, threshold_ema_dead_code=2, shared_codebook=True, codebook_size=64)
    book = vq.layers[0]._codebook
    book.cluster_size.zero_()
    book.embed.mul_(100)
    codes, x = book.embed[0].clone(), torch.randn(1, 40, DIM)
    _, indices, _ = vq(x)
    levels = [x[0]]
    for chosen in indices[0].unbind(-1):
        levels.append(levels[-1] - codes[chosen])
    distance = torch.cdist(book.embed[0].double(), torch.cat(levels[:-1]).double())
    dead = book.cluster_size[0] == 2
    assert dead.sum() > 10 and (distance[dead].amin(1) < 1e-4).all()
    assert {int(row) // 40 for row in distance[dead].argmin(1)} == {0, 1, 2}


def test_a_shared_codebook_is_one():
    vq = residual_vq("shared")
    vq(torch.randn(2, 10, DIM))
    first, *others = (layer._codebook for layer in vq.layers)
    assert all(book is first for book in others)
    books = vq.codebooks
    COPIES.same(books[1:], books[:1].expand(LEVELS - 1, -1, -1))
    twin = residual_vq("shared")
    twin.load_state_dict(vq.state_dict())
    COPIES.same(twin.codebooks, books)


def test_an_optimizer_in_place_moves_a_shared_codebook_once():
    """By the gradient of all levels."""
    rate = partial(torch.optim.SGD, lr=0.5)
    options = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": rate}
    vq = residual_vq("shared", **options)
    codes, x = vq.layers[0].codebook.detach().clone(), torch.randn(1, 20, DIM)
    _, indices, _ = vq(x)
    expected, residual = codes.clone().requires_grad_(), x[0]
    for chosen in indices[0].unbind(-1):
        (residual - expected[chosen]).square().mean().backward()
        residual = residual - codes[chosen]
    assert_close(vq.layers[0].codebook, codes - 0.5 * expected.grad)


    codes = vq.layers[0].codebook.detach().clone()
    vq(x, freeze_codebook=True)
    COPIES.same(vq.layers[0].codebook.detach(), codes)


# State


def fail(*_, **__):
    raise RuntimeError("lost rank")


def test_a_failure_of_the_last_level_takes_the_others_back(monkeypatch):
    vq = residual_vq(threshold_ema_dead_code=2)
    vq(torch.randn(2, 9, DIM))
    before, real, calls = state(vq), codebook_module.ema_update_, []

    def fail_later(*arguments, **keywords):
        calls.append(1)
        return (fail if len(calls) == LEVELS else real)(*arguments, **keywords)

    monkeypatch.setattr(codebook_module, "ema_update_", fail_later)
    # The compiled op needs no memory that it could not get.
    with vqops.use_implementation("pytorch"), pytest.raises(RuntimeError, match="lost rank"):
        vq(torch.randn(2, 9, DIM))
    assert len(calls) == LEVELS
    UNCHANGED.same(vq.state_dict(), before)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("shared", [True, False])
def test_a_failed_step_of_an_optimizer_in_place_is_none(shared, make, monkeypatch):
    options = {"learnable_codebook": True, "ema_update": False, "in_place_codebook_optimizer": partial(make, lr=0.1)}
    vq = residual_vq(shared_codebook=shared, **options)
    twin, x = residual_vq(shared_codebook=shared, **options), torch.randn(1, 20, DIM)
    twin.load_state_dict(vq.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(vq.layers[1], "_searched", fail)
        with pytest.raises(RuntimeError, match="lost rank"):
            vq(x)
    UNCHANGED.same(vq.state_dict(), twin.state_dict())
    vq(x), twin(x)
    UNCHANGED.same(vq.state_dict(), twin.state_dict())


@pytest.mark.parametrize("lost", ["sum_over_ranks", "ema_update_", "choose_rows", "project_out"])
@every_way
def test_a_failed_call_leaves_every_level(way, lost, monkeypatch):
    if lost == "ema_update_" and way in ("learnable", "implicit"):
        lost = "sum_over_ranks"
    vq = residual_vq(way, codebook_dim=4, threshold_ema_dead_code=2, kmeans_init=True)
    for first in (True, False):
        before = state(vq)
        with monkeypatch.context() as patch:
            if lost == "project_out":
                patch.setattr(vq.project_out, "forward", fail)
            else:
                patch.setattr(codebook_module if lost == "ema_update_" else steps, lost, fail)
            with pytest.raises(RuntimeError, match="lost rank"):
                vq(torch.randn(2, 9, DIM))
        UNCHANGED.same(vq.state_dict(), before, equal_nan=True)
        if first:
            vq(torch.randn(2, 9, DIM))
            assert all(layer._codebook.is_initted for layer in vq.layers)


@every_way
def test_rows_that_are_not_finite_teach_nothing(way):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    twin = copy.deepcopy(vq)
    x = torch.randn(1, 20, DIM)
    x[0, 3, 1], x[0, 7] = torch.nan, torch.inf
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 7]] = True
    torch.manual_seed(1)
    quantized, indices, losses = vq(x)
    assert losses.isnan().all() and quantized[0, bad].isnan().all() and (indices[0, bad] == -1).all()
    torch.manual_seed(1)
    others, chosen, _ = twin(x[:, ~bad])
    assert_close(quantized[:, ~bad], others)
    INDICES.same(indices[:, ~bad], chosen)
    for name, value in vq.state_dict().items():
        assert value.isfinite().all()
        assert_close(twin.state_dict()[name], value)


@every_way
@pytest.mark.parametrize("rows", ["masked", "none", "nan"])
def test_a_batch_of_nothing_changes_nothing(way, rows):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    before = state(vq)
    x = torch.randn(2, 0 if rows == "none" else 5, DIM)
    mask = torch.zeros(2, 5, dtype=torch.bool) if rows == "masked" else None
    if rows == "nan":
        x[:] = torch.nan
    quantized, indices, losses = vq(x, mask=mask)
    for name, value in vq.state_dict().items():
        if way == "cosine" and name.endswith("embed"):
            assert_close(value, before[name])  # divided by its norm once more
        else:
            UNCHANGED.same(value, before[name], where=name)
    assert indices.shape == (*x.shape[:2], LEVELS) and quantized.shape == x.shape
    assert (indices == -1).all() and (losses.isnan().all() if rows == "nan" else (losses == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["together", "in turn", "shared", "cosine"])
def test_casts_leave_the_averages_in_float32(way, dtype):
    vq = residual_vq(way).to(dtype)
    x = torch.randn(2, 10, DIM).to(dtype)
    quantized, _, losses = vq(x)
    assert quantized.dtype == dtype and losses.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in vq.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("way", ["together", "in turn"])
def test_residuals_are_float32_whatever_the_input(way):
    """So the same values in another dtype get the same codes."""
    vq = residual_vq(way, num_quantizers=8).eval()
    x = torch.randn(2, 50, DIM).bfloat16()
    INDICES.same(vq(x)[1], vq(x.float())[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        INDICES.same(vq(x)[1], vq(x.float())[1])


def test_copies():
    vq = residual_vq(quantize_dropout=True, threshold_ema_dead_code=2)
    vq(torch.randn(2, 10, DIM))
    x = torch.randn(2, 10, DIM)
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        expected = copy.deepcopy(vq)
        torch.manual_seed(3)
        found = twin(x)
        torch.manual_seed(3)
        for a, b in zip(found, expected(x), strict=True):
            COPIES.same(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_way
def test_activation_checkpointing_is_refused_before_any_change(way, use_reentrant):
    vq = residual_vq(way, threshold_ema_dead_code=2)
    x = torch.randn(2, 10, DIM, requires_grad=True)
    quantized, _, _ = checkpoint(vq, x, use_reentrant=use_reentrant)
    before = state(vq)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        quantized.sum().backward()
    UNCHANGED.same(vq.state_dict(), before)


def test_a_frozen_constructor_stays_frozen():
    vq = residual_vq(freeze_codebook=True)
    before = state(vq)
    vq(torch.randn(2, 10, DIM))
    UNCHANGED.same(vq.state_dict(), before)
    vq(torch.randn(2, 10, DIM), freeze_codebook=False)
    assert any((value != before[name]).any() for name, value in vq.state_dict().items())


def test_a_module_made_without_memory():
    """Whatever of it is in no state_dict."""
    options = {"beam_size": 3, "beam_score_quantizer_weights": [1.0, 2.0, 0.3]}
    vq, x = residual_vq(**options).eval(), torch.randn(1, 20, DIM)
    expected = vq(x)
    for assign in (True, False):
        with torch.device("meta"):
            twin = residual_vq(**options).eval()
        if not assign:
            twin.to_empty(device="cpu")
        twin.load_state_dict(vq.state_dict(), assign=assign)
        for a, b in zip(twin(x), expected, strict=True):
            COPIES.same(a, b)


def test_vmap():
    vq, x = residual_vq().eval(), torch.randn(3, 2, 10, DIM)
    found = torch.vmap(vq)(x)
    for i in range(3):
        for a, b in zip(found, vq(x[i]), strict=True):
            assert_close(a[i], b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32])
@pytest.mark.parametrize("codebook_dim", [DIM, 4])
def test_indices_of_any_integer_dtype_decode(codebook_dim, dtype):
    vq = residual_vq(codebook_dim=codebook_dim).eval()
    quantized, indices, _ = vq(torch.randn(2, 10, DIM))
    assert_close(vq.get_output_from_indices(indices.to(dtype)), quantized)


# Refusals

WRONG = {
    "codebook_size is one number": {"num_quantizers": None},
    "codebook_size must be num_quantizers=3 numbers, got 2": {"codebook_size": (4, 5)},
    "heads must be 1, got 2": {"heads": 2},
    r"quantize_dropout_cutoff_index must be an integer in \[0, num_quantizers=3\), got 3": {
        "quantize_dropout": True,
        "quantize_dropout_cutoff_index": 3,
    },
    "quantize_dropout_multiple_of must be an integer of at least 1, got 0": {"quantize_dropout_multiple_of": 0},
    r"quant_grad_frac must be in \[0, 1\], got 2.0": {"quant_grad_frac": 2},
    "eval_beam_size needs beam_size": {"eval_beam_size": 2},
    "beam_size must be at most 32, got 33": {"beam_size": 33},
    "beam_score_quantizer_weights must be num_quantizers=3 numbers, got 2": {"beam_score_quantizer_weights": [1, 2]},
    r"shared_codebook needs levels of one size, got codebook_size=\[4, 5, 6\]": {
        "shared_codebook": True,
        "codebook_size": (4, 5, 6),
    },
    "beam_score_quantizer_weights must be finite and at least 0": {"beam_score_quantizer_weights": [1, -1, 2]},
    "gradient_per_level=False needs quant_grad_frac=0, got 0.5": {"gradient_per_level": False, "quant_grad_frac": 0.5},
    "gradient_per_level=False needs route_gradients_to_input=True, got False": {
        "gradient_per_level": False,
        "route_gradients_to_input": False,
        "learnable_codebook": True,
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_do_not_fit(message):
    with pytest.raises(ValueError, match=f"ResidualVQ: .*{message}"):
        ResidualVQ(**SIZES | WRONG[message])


def test_calls_that_do_not_fit():
    vq = residual_vq("beam")
    before, x = state(vq), torch.randn(2, 5, DIM)
    for error, message, arguments in (
        (ValueError, r"x must be \[b, ..., dim\] with dim=6, got \[2, 5, 7\]", {"x": torch.randn(2, 5, 7)}),
        (TypeError, "mask must be bool", {"mask": torch.zeros(2, 5, LEVELS, dtype=torch.long)}),
        (ValueError, r"indices must have shape \[2, 5, 3\], got \[2, 5, 2\]", {"indices": torch.zeros(2, 5, 2).long()}),
        (ValueError, "indices and beam search", {"indices": torch.zeros(2, 5, 3).long()}),
        (IndexError, r"indices must be -1 or a code in \[0, 16\)", {"indices": torch.full((2, 5, 3), 16)}),
        (ValueError, "beam_size must be at most 32", {"beam_size": 40}),
        (ValueError, "mask and lens", {"mask": torch.ones(2, 5).bool(), "lens": torch.tensor([1, 2])}),
    ):
        with pytest.raises(error, match=f"ResidualVQ: .*{message}"):
            vq(**{"x": x} | arguments)
    UNCHANGED.same(vq.state_dict(), before)
    with pytest.raises(ValueError, match="an axis of 1 to num_quantizers=3 levels, got"):
        vq.get_codes_from_indices(torch.zeros(2, 5, 4).long())
    groups = GroupedResidualVQ(**SIZES, groups=2)
    with pytest.raises(ValueError, match="GroupedResidualVQ: indices must be those of groups=2, got 3"):
        groups.get_output_from_indices(torch.zeros(3, 2, 5, LEVELS).long())
    with pytest.raises(ValueError, match="GroupedResidualVQ: dim must be a multiple of groups=4, got 6"):
        GroupedResidualVQ(**SIZES, groups=4)
    with pytest.raises(ValueError, match="GroupedResidualVQ: x must have dim=6 in axis -1"):
        groups(torch.randn(2, 5, 3))
