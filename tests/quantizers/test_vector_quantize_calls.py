"""VectorQuantize with heads, masks, the k nearest codes, and the cross entropy of given indices."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from promises import COPIES, INDICES, REPEATS, UNCHANGED
from quantizers import state
from torch.testing import assert_close

from vqops import VectorQuantize, nearest, nearest_topk
from vqops.quantizers.interface.losses import LossBreakdown

DIM, CODES = 6, 16
HEADS = {
    "one": {},
    "projected": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "shared": {"heads": 2, "codebook_dim": 3},
    "separate": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
}
METRICS = {"euclidean": {}, "cosine": {"use_cosine_sim": True}, "learnable": {"learnable_codebook": True}}
LAYOUTS = {
    "rows": ((2, 30, DIM), {}),
    "single": ((60, DIM), {}),
    "channel_first": ((2, DIM, 30), {"channel_last": False}),
    "grid": ((2, 6, 5, DIM), {}),
    "image": ((2, DIM, 6, 5), {"accept_image_fmap": True}),
    "volume": ((2, DIM, 3, 2, 5), {"accept_3d_fmap": True}),
}
LAST = {name: not options for name, (_, options) in LAYOUTS.items()}


def gradients(vq) -> dict:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in vq.named_parameters()}


def as_rows(x: torch.Tensor, layout: str) -> torch.Tensor:  # [N, DIM]
    return (x if LAST[layout] else x.movedim(1, -1)).reshape(-1, x.shape[-1] if LAST[layout] else x.shape[1])


# Masks


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_the_batch_without_the_masked(layout, heads, metric):
    """Results, gradients and state are those of the kept vectors alone, whatever stands in the others."""
    shape, options = LAYOUTS[layout]
    first = {"kmeans_init": True, "threshold_ema_dead_code": 1.5}
    vq = VectorQuantize(DIM, CODES, **options, **HEADS[heads], **METRICS[metric], **first)
    rows = VectorQuantize(DIM, CODES, **HEADS[heads], **METRICS[metric], **first)
    rows.load_state_dict(vq.state_dict())
    for number in range(2):
        x = torch.randn(shape)
        mask = torch.rand(as_rows(x, layout).shape[0]) < 0.7
        given = as_rows(x, layout)[mask].requires_grad_()
        spoiled = x.clone()
        features = spoiled if LAST[layout] else spoiled.movedim(1, -1)
        positions = features.shape[:-1]
        features[~mask.view(positions)] = [math.nan, math.inf][number]
        spoiled.requires_grad_()
        torch.manual_seed(number)
        quantized, indices, loss = vq(spoiled, mask=mask.view(positions))
        torch.manual_seed(number)
        expected, same, same_loss = rows(given)
        INDICES.same(indices.flatten(0, len(positions) - 1)[mask], same)
        assert (indices.flatten(0, len(positions) - 1)[~mask] == -1).all()
        assert_close(as_rows(quantized, layout)[mask], expected)
        assert not as_rows(quantized, layout)[~mask].any()
        assert_close(loss, same_loss)
        (quantized.square().sum() + loss).backward()
        (expected.square().sum() + same_loss).backward()
        assert_close(as_rows(spoiled.grad, layout)[mask], given.grad)
        assert not as_rows(spoiled.grad, layout)[~mask].any()
        assert_close(gradients(vq), gradients(rows), rtol=1e-4, atol=1e-5)
        assert_close(vq.state_dict(), rows.state_dict())


@pytest.mark.parametrize("heads", HEADS)
def test_a_mask_of_nothing(heads):
    vq = VectorQuantize(DIM, CODES, **HEADS[heads], threshold_ema_dead_code=1)
    vq(torch.randn(9, DIM))
    before = state(vq)
    x = torch.randn(2, 10, DIM, requires_grad=True)
    quantized, indices, loss = vq(x, mask=torch.zeros(2, 10, dtype=torch.bool))
    assert loss.item() == 0 and (indices == -1).all() and not quantized.any()
    (quantized.sum() + loss).backward()
    assert not x.grad.any() and not any(grad.any() for grad in gradients(vq).values())
    assert_close(vq.state_dict(), before, rtol=1e-5, atol=0)


def test_lens_is_the_mask_of_the_first_of_each_sequence():
    vq = VectorQuantize(DIM, CODES)
    twin = copy.deepcopy(vq)
    x = torch.randn(3, 5, DIM)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert_close(vq(x, lens=torch.tensor([2, 0, 5])), twin(x, None, mask))
    assert_close(vq.state_dict(), twin.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codebook_dim", [DIM, 3])
def test_masked_positions_can_keep_the_input(layout, codebook_dim):
    shape, options = LAYOUTS[layout]
    vq = VectorQuantize(DIM, CODES, codebook_dim=codebook_dim, return_zeros_for_masked_padding=False, **options)
    x = torch.randn(shape, requires_grad=True)
    mask = torch.rand(as_rows(x, layout).shape[0]) < 0.5
    positions = shape[:-1] if LAST[layout] else (shape[0], *shape[2:])
    quantized = vq(x, mask=mask.view(positions), freeze_codebook=True)[0]
    COPIES.same(as_rows(quantized, layout)[~mask], as_rows(x, layout)[~mask])
    assert_close(as_rows(quantized, layout)[mask], as_rows(vq(x)[0], layout)[mask])
    quantized.sum().backward()
    assert (as_rows(x.grad, layout)[~mask] == 1).all()


# Heads


@pytest.mark.parametrize("metric", METRICS)
def test_separate_heads_are_quantizers_of_their_own(metric):
    vq = VectorQuantize(6, CODES, heads=2, codebook_dim=3, separate_codebook_per_head=True, **METRICS[metric])
    parts = [VectorQuantize(3, CODES, **METRICS[metric]) for _ in range(2)]
    for head, part in enumerate(parts):
        part.codebook = vq.codebook[head].detach()
    vq.codebook = vq.codebook.detach().clone()
    for _ in range(3):
        x = torch.randn(2, 10, 6)
        quantized, indices, loss = vq(x)
        results = [part(x[..., 3 * head : 3 * head + 3]) for head, part in enumerate(parts)]
        INDICES.same(indices, torch.stack([r[1] for r in results], -1))
        assert_close(quantized, torch.cat([r[0] for r in results], -1))
        assert_close(loss, (results[0][2] + results[1][2]) / 2)
        assert_close(vq.codebook, torch.stack([part.codebook for part in parts]))


def test_heads_that_share_a_codebook_are_more_vectors():
    vq = VectorQuantize(6, CODES, heads=2, codebook_dim=3)
    one = VectorQuantize(3, CODES)
    one.load_state_dict(vq.state_dict())
    for _ in range(3):
        x = torch.randn(2, 10, 6)
        (quantized, indices, loss), (expected, same, same_loss) = vq(x), one(x.view(2, 10, 2, 3))
        INDICES.same(indices, same)
        COPIES.same(quantized, expected.flatten(-2))
        assert_close(loss, same_loss)
        assert_close(vq.state_dict(), one.state_dict())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_give_the_output_back(layout, heads):
    shape, options = LAYOUTS[layout]
    vq = VectorQuantize(DIM, CODES, **options, **HEADS[heads]).eval()
    quantized, indices, _ = vq(torch.randn(shape))
    assert_close(vq.get_output_from_indices(indices), quantized)
    codes = vq.get_codes_from_indices(indices)
    assert codes.shape[-1 if LAST[layout] else 1] == vq._codebook.embed.shape[-1] * vq.heads
    if "codebook_dim" not in HEADS[heads]:
        COPIES.same(codes, quantized)
    missing = torch.full_like(indices, -1)
    assert not vq.get_codes_from_indices(missing).any() and not vq.get_output_from_indices(missing).any()


def test_an_index_of_minus_one_leaves_the_other_heads():
    vq = VectorQuantize(DIM, CODES, **HEADS["shared"]).eval()
    codes = vq.get_codes_from_indices(torch.tensor([[3, -1], [-1, -1]]))
    COPIES.same(codes[0, :3], vq.codebook[3])
    assert not codes[0, 3:].any() and not codes[1].any()
    vq = VectorQuantize(DIM, CODES, **HEADS["separate"]).eval()
    indices = torch.tensor([[3, -1, 2], [-1, -1, -1]])
    expected = vq.project_out(vq.get_codes_from_indices(indices))[0]
    output = vq.get_output_from_indices(indices)
    assert_close(output[0], expected)
    assert not output[1].any()


@pytest.mark.parametrize("heads", HEADS)
def test_the_setter_takes_what_the_property_gives(heads):
    vq = VectorQuantize(DIM, CODES, **HEADS[heads])
    D = vq._codebook.embed.shape[-1]
    assert vq.codebook.shape == ((3, CODES, D) if heads == "separate" else (CODES, D))
    codes = torch.randn(vq.codebook.shape)
    vq.codebook = codes
    COPIES.same(vq.codebook, codes)
    COPIES.same(vq._codebook.embed_avg, codes.view_as(vq._codebook.embed))
    with pytest.raises(ValueError, match="codebook must have shape"):
        vq.codebook = codes[..., :-1, :]


# Gradients of the output


def test_no_gradient_to_the_input():
    vq = VectorQuantize(DIM, CODES, route_gradients_to_input=False, codebook_dim=4)
    x = torch.randn(5, DIM, requires_grad=True)
    quantized, _, loss = vq(x)
    (grad,) = torch.autograd.grad(quantized.sum(), x, allow_unused=True)
    assert grad is None
    loss.backward()
    assert x.grad.any()


@pytest.mark.parametrize("heads", ["one", "shared", "separate"])
def test_the_gradient_of_the_output_goes_to_learnable_codes_instead(heads):
    vq = VectorQuantize(DIM, CODES, route_gradients_to_input=False, learnable_codebook=True, **HEADS[heads])
    x = torch.randn(2, 10, DIM)
    quantized, indices, _ = vq(x)
    weight = torch.randn(quantized.shape)
    (quantized * weight).sum().backward()
    expected = torch.autograd.grad((vq.get_output_from_indices(indices) * weight).sum(), vq._codebook.embed)
    assert_close(vq._codebook.embed.grad, *expected)


# The k nearest codes


@pytest.mark.parametrize("gradient", ["rotation", "straight_through", "none"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_of_k_is_what_one_gives(metric, gradient):
    options = {"rotation_trick": gradient == "rotation", "route_gradients_to_input": gradient != "none"}
    vq = VectorQuantize(DIM, CODES, codebook_dim=4, **METRICS[metric], **options)
    x = torch.randn(2, 10, DIM)
    x[0, 3, 2] = torch.nan
    finite = x.isfinite().all(-1)
    mask = torch.rand(2, 10) < 0.8
    mask[0, 3] = True
    results = []
    for arguments in ({}, {"topk": 1}):
        given = x.clone().requires_grad_()
        vq.zero_grad()
        quantized, indices, loss = vq(given, mask=mask & finite, freeze_codebook=metric != "learnable", **arguments)
        if arguments:
            loss = loss.sum() / (mask & finite).sum()
        (quantized.square().sum() + loss).backward()
        results.append((quantized.view(2, 10, DIM), indices.view(2, 10), loss, given.grad, gradients(vq)))
    for one, of_k in zip(*results, strict=True):
        assert_close(of_k, one)
    quantized, indices, loss = vq(x, mask=mask, topk=2)
    assert quantized[0, 3].isnan().all() and loss[0, 3].isnan().all() and (indices[0, 3] == -1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_losses_of_the_k_nearest(layout):
    shape, options = LAYOUTS[layout]
    vq = VectorQuantize(DIM, CODES, commitment_weight=0.5, kmeans_init=True, **options)
    x = torch.randn(shape)
    vq.eval()(x)
    for training in (True, False):
        before = state(vq)
        quantized, indices, loss, breakdown = vq.train(training)(x, topk=3, return_loss_breakdown=True)
        positions = shape[:-1] if LAST[layout] else (shape[0], *shape[2:])
        expected, distances = nearest_topk(as_rows(x, layout), vq.codebook, 3)
        INDICES.same(indices, expected.view(*positions, 3))
        assert_close(loss.flatten(), distances.flatten() / DIM * 0.5)
        assert_close(breakdown.commitment * 0.5, loss)
        assert quantized.shape == ((*shape[:-1], 3, DIM) if LAST[layout] else (*shape, 3))
        features = quantized if LAST[layout] else quantized.movedim(1, -1)
        COPIES.same(features, vq.codebook[indices])
        UNCHANGED.same(vq.state_dict(), before)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(2, 0, DIM), (0, 5, DIM)])
def test_every_call_takes_an_empty_batch(shape, keep, heads):
    vq = VectorQuantize(DIM, CODES, return_zeros_for_masked_padding=keep, threshold_ema_dead_code=1, **HEADS[heads])
    before = state(vq)
    x, (b, n, _) = torch.randn(shape, requires_grad=True), shape
    mask = torch.ones(b, n, dtype=torch.bool)
    for arguments in (
        {"mask": mask},
        {"lens": torch.zeros(b, dtype=torch.int64)},
        {"indices": torch.zeros(b, n, *[vq.heads] * (vq.heads > 1), dtype=torch.int64)},
        *([{"topk": 3}, {"topk": 3, "mask": mask}] if vq.heads == 1 else []),
    ):
        for training in (True, False):
            quantized, *_, loss = vq.train(training)(x, **arguments)
            assert quantized.shape == ((b, n, 3, DIM) if "topk" in arguments else shape)
            if training:
                (quantized.sum() + loss.sum()).backward()
    indices = torch.zeros(b, n, *[vq.heads] * (vq.heads > 1), dtype=torch.int64)
    vq.update_indices(x, indices)
    assert vq.get_output_from_indices(indices).shape == shape
    assert_close(vq.state_dict(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_k_nearest_of_masked_positions_that_keep_the_input(layout):
    shape, options = LAYOUTS[layout]
    vq = VectorQuantize(DIM, CODES, return_zeros_for_masked_padding=False, codebook_dim=3, **options)
    x = torch.randn(shape)
    positions = shape[:-1] if LAST[layout] else (shape[0], *shape[2:])
    mask = torch.rand(positions) < 0.5
    quantized, features = vq(x, topk=2, mask=mask)[0], x if LAST[layout] else x.movedim(1, -1)
    quantized = quantized if LAST[layout] else quantized.movedim(1, -1)
    COPIES.same(quantized[~mask], features[~mask].unsqueeze(1).expand(-1, 2, -1))


def test_more_than_there_are():
    vq = VectorQuantize(DIM, 4)
    assert vq(torch.randn(5, DIM), topk=9)[1].sort().values.tolist() == [[0, 1, 2, 3]] * 5
    with pytest.raises(ValueError, match="k must be from 1 to min"):
        VectorQuantize(DIM, 64)(torch.randn(5, DIM), topk=33)


# The cross entropy of given indices


@pytest.mark.parametrize("training", [True, False])
def test_the_cross_entropy_of_forward(training):
    """Of the codes before the update, also in its gradient; without the masked and the -1; joined and projected."""
    vq = VectorQuantize(DIM, CODES, **HEADS["separate"]).train(training)
    codes, twin = vq.codebook.clone(), copy.deepcopy(vq)
    x = torch.randn(2, 10, DIM, requires_grad=True)
    indices = torch.randint(-1, CODES, (2, 10, 3))
    mask = torch.rand(2, 10) < 0.7
    quantized, loss = vq(x, indices, mask)
    loss.backward()
    assert (vq.codebook != codes).any() == training
    given = x.detach().requires_grad_()
    z = twin.project_in(given).view(20, 3, 4).transpose(0, 1)
    targets = indices.masked_fill(~mask.unsqueeze(-1), -1)
    rows = targets.view(20, 3).T
    expected = F.cross_entropy(-torch.cdist(z, codes).mT, rows, ignore_index=-1)
    expected.backward()
    assert_close(loss, expected)
    assert_close(x.grad, given.grad)
    assert_close(quantized, twin(x, mask=mask)[0])


def test_the_cross_entropy_of_no_index_is_zero():
    vq = VectorQuantize(DIM, CODES)
    x = torch.randn(5, DIM, requires_grad=True)
    loss = vq(x, indices=torch.full((5,), -1))[1]
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


def test_the_cross_entropy_under_autocast():
    vq = VectorQuantize(DIM, CODES).eval()
    x, indices = torch.randn(50, DIM), torch.randint(CODES, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vq(x, indices)[1]
    REPEATS.same(loss, vq(x, indices)[1])


# The breakdown


def test_the_breakdown_is_without_weights():
    vq = VectorQuantize(DIM, CODES, commitment_weight=0.25)
    x = torch.randn(50, DIM)
    codes = vq.codebook.clone()
    *_, loss, breakdown = vq(x, return_loss_breakdown=True)
    assert isinstance(breakdown, LossBreakdown)
    assert breakdown._fields == ("commitment", "codebook_diversity", "orthogonal_reg", "inplace_optimize")
    assert_close(breakdown.commitment, (x - codes[nearest(x, codes)]).square().mean())
    assert_close(loss, breakdown.commitment * 0.25)
    assert [term.item() for term in breakdown[1:]] == [0, 0, 0]
    assert [term.item() for term in vq.eval()(x, return_loss_breakdown=True)[3]] == [0, 0, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_is_changed_leaves_its_terms(training):
    *_, loss, terms = VectorQuantize(DIM, CODES).train(training)(torch.randn(50, DIM), return_loss_breakdown=True)
    before = terms.commitment.clone()
    with torch.no_grad():
        loss += 1
    UNCHANGED.same(terms.commitment, before)


# Hooks of users


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_forward_hooks_see_each_stage(heads, training):
    vq, seen = VectorQuantize(DIM, CODES, **HEADS[heads]).train(training), []
    names = ["project_in", "_codebook", "project_out"]
    for name in names:
        vq.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    vq(torch.randn(50, DIM))
    assert seen == names


# Errors


@pytest.mark.parametrize(
    "options, arguments, error, message",
    [
        ({}, {"mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, r"mask must have shape \[2, 10\], got \[2, 9\]"),
        ({}, {"mask": torch.ones(2, 10)}, TypeError, "mask must be bool, .*got torch.float32"),
        ({}, {"mask": torch.ones(2, 10, device="meta")}, ValueError, "mask is on meta, x is on cpu"),
        ({}, {"lens": torch.ones(2)}, TypeError, "lens must be integers, got torch.float32"),
        ({}, {"lens": torch.ones(3, dtype=torch.int64)}, ValueError, r"lens must have shape \[2\], got \[3\]"),
        (
            {},
            {"lens": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, 10, dtype=torch.bool)},
            ValueError,
            "mask and lens can't both be given",
        ),
        ({}, {"indices": torch.ones(2, 10)}, TypeError, "indices must be int64, got torch.float32"),
        ({}, {"indices": torch.full((2, 10), CODES)}, IndexError, r"-1 or a code in \[0, 16\).* 16 to 16"),
        ({}, {"indices": torch.zeros(2, 9, dtype=torch.int64)}, ValueError, r"shape \[2, 10\], got \[2, 9\]"),
        (
            {"heads": 2},
            {"indices": torch.zeros(2, 10, dtype=torch.int64)},
            ValueError,
            r"shape \[2, 10, 2\], got \[2, 10\]",
        ),
        ({}, {"topk": 0}, ValueError, "topk must be an integer of at least 1, got 0"),
        ({"heads": 2}, {"topk": 2}, ValueError, "topk ranks the codes of one head, got heads=2"),
        ({}, {"topk": 2, "indices": torch.zeros(2, 10, dtype=torch.int64)}, ValueError, "topk and indices"),
        ({}, {"ema_update_weight": 0.5}, TypeError, "ema_update_weight must be a tensor or a function, got float"),
        ({}, {"ema_update_weight": torch.ones(3)}, ValueError, r"must have shape \[16\] or \[1, 16\], got \[3\]"),
        ({}, {"ema_update_weight": torch.ones(16).long()}, TypeError, "ema_update_weight must be float32.*int64"),
        ({"learnable_codebook": True}, {"ema_update": True}, ValueError, "but learnable_codebook=True"),
        (
            {},
            {"codebook_transform_fn": lambda codes: codes},
            ValueError,
            r"codebook_transform_fn must return \[1, 2, 10, 16, 6\], got \[1, 16, 6\]",
        ),
        ({}, {"sample_codebook_temp": -1.0}, ValueError, "sample_codebook_temp must be .* at least 0, got -1.0"),
        ({}, {"masks": None}, TypeError, "unexpected keyword argument 'masks'"),
    ],
)
def test_wrong_arguments(options, arguments, error, message):
    vq = VectorQuantize(DIM, CODES, kmeans_init=True, threshold_ema_dead_code=1, **options)
    before = state(vq)
    with pytest.raises(error, match=message):
        vq(torch.randn(2, 10, DIM), **arguments)
    UNCHANGED.same(vq.state_dict(), before)
    assert not vq._codebook.is_initted


def test_lens_needs_sequences():
    with pytest.raises(ValueError, match=r"lens needs \[b, n\] vectors, got \[2, 3, 3\]"):
        VectorQuantize(4, 8, accept_image_fmap=True)(torch.zeros(2, 4, 3, 3), lens=torch.ones(2, dtype=torch.int64))


def test_indices_without_their_heads():
    with pytest.raises(ValueError, match=r"indices must end in an axis of heads=2, got \[5, 3\]"):
        VectorQuantize(4, 8, heads=2).get_codes_from_indices(torch.zeros(5, 3, dtype=torch.int64))
