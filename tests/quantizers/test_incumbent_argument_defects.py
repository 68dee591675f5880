"""Where vector-quantize-pytorch is wrong about the arguments beyond the codebook's updates: the right behaviour."""

import copy

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch
from promises import COPIES, UNCHANGED
from quantizers import state
from side_by_side import CLOSE, both
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from vqops import VectorQuantize
from vqops.quantizers import vector_quantize

DIM, CODES = 6, 20
AFFINE = {"affine_param": True}


def test_statistics_of_affine_parameters_stay_in_eval():
    theirs, ours = both(**AFFINE)
    for vq in (theirs, ours):
        vq(torch.randn(50, DIM))
        vq.eval()
    before, their_mean = state(ours), theirs._codebook.batch_mean.clone()
    for vq in (theirs, ours):
        vq(torch.randn(50, DIM) + 3)
    UNCHANGED.same(ours.state_dict(), before)
    assert (theirs._codebook.batch_mean - their_mean).abs().max() > 0.01


def test_affine_parameters_before_the_first_batch_change_nothing():
    """There the statistics of the codes are what `torch.empty` found."""
    vq, plain = VectorQuantize(DIM, CODES, **AFFINE), VectorQuantize(DIM, CODES)
    plain.codebook = vq.codebook
    x = torch.randn(50, DIM)
    COPIES.same(vq.eval()(x)[1], plain.eval()(x)[1])


def test_a_state_with_affine_parameters_loads():
    theirs = vector_quantize_pytorch.VectorQuantize(DIM, CODES, **AFFINE)
    ours = VectorQuantize(DIM, CODES, **AFFINE)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(80, DIM)
    for vq in (theirs, ours):
        vq(x)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with pytest.raises(RuntimeError, match="batch_mean"):
        vector_quantize_pytorch.VectorQuantize(DIM, CODES, **AFFINE).load_state_dict(theirs.state_dict())
    fresh = VectorQuantize(DIM, CODES, **AFFINE)
    fresh.load_state_dict(theirs.state_dict())
    CLOSE(fresh.eval()(x)[0], theirs.eval()(x)[0])


def test_dead_codes_of_an_affine_codebook_restart_at_a_vector():
    """Where they are searched: theirs restart where the vector is before the shift and the scale, far from all."""
    distances = []
    for kind in (VectorQuantize, vector_quantize_pytorch.VectorQuantize):
        vq = kind(DIM, CODES, threshold_ema_dead_code=1.5, **AFFINE)
        x = torch.randn(60, DIM) * 3 + 10
        vq(x)
        restarted = vq._codebook.cluster_size[0] == 1.5
        assert restarted.any()
        vq.eval()
        book = vq._codebook
        scale = (book.batch_variance.clamp(min=1e-5) / book.codebook_variance.clamp(min=1e-5)).sqrt()
        codes = (book.embed - book.codebook_mean) * scale + book.batch_mean
        distances.append((codes[0, restarted, None] - x).norm(dim=-1).min(1).values.max())
    assert distances[0] < 1e-4 < distances[1]


def test_a_failed_step_leaves_the_affine_statistics():
    vq = VectorQuantize(DIM, CODES, **AFFINE)
    before = state(vq)
    with pytest.raises(ValueError, match="ema_update_weight must have shape"):
        vq(torch.randn(50, DIM), ema_update_weight=torch.ones(3))
    UNCHANGED.same(vq.state_dict(), before)


def test_indices_are_decoded_through_the_bridge():
    theirs, ours = both(vq_bridge=torch.nn.Linear(DIM, DIM))
    x = torch.randn(50, DIM)
    for vq, right in ((theirs, False), (ours, True)):
        quantized, indices, _ = vq.eval()(x)
        assert torch.allclose(vq.get_output_from_indices(indices), quantized, atol=1e-6) == right


@pytest.mark.parametrize("options", [{"accept_image_fmap": True}, {}], ids=str)
def test_cross_entropy_of_images_and_single_vectors(options):
    shape = (2, DIM, 3, 4) if options else (7, DIM)
    ours = VectorQuantize(DIM, CODES, commitment_use_cross_entropy_loss=True, freeze_codebook=True, **options)
    theirs = vector_quantize_pytorch.VectorQuantize(DIM, CODES, commitment_use_cross_entropy_loss=True, **options)
    x = torch.randn(shape)
    with pytest.raises(Exception, match=r"(?i)shape|size|target"):
        theirs(x)
    _, indices, loss = ours(x)
    rows = x.movedim(1, -1).reshape(-1, DIM) if options else x
    assert_close(loss, F.cross_entropy(-torch.cdist(rows, ours.codebook), indices.flatten()))


def test_straight_through_alone_turns_the_rotation_off():
    with pytest.raises(AssertionError):
        vector_quantize_pytorch.VectorQuantize(DIM, CODES, straight_through=True)
    vq = VectorQuantize(DIM, CODES, straight_through=True)
    x = torch.randn(5, DIM, requires_grad=True)
    vq(x)[0].sum().backward()
    assert not vq.rotation_trick
    assert_close(x.grad, torch.ones_like(x))


def test_active_codes_of_separate_codebooks():
    options = {"heads": 2, "separate_codebook_per_head": True, "learnable_codebook": True}
    active = {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True}
    theirs = vector_quantize_pytorch.VectorQuantize(DIM, CODES, **options, **active, ema_update=False)
    with pytest.raises(AssertionError):
        theirs(torch.randn(2, 9, DIM))
    vq = VectorQuantize(DIM, CODES, **options, **active)
    _, indices, _, terms = vq(torch.randn(2, 9, DIM), return_loss_breakdown=True)
    each = []
    for head in range(2):
        unit = F.normalize(vq.codebook[head, indices[..., head].unique()], dim=-1)
        each.append((unit @ unit.T).square().mean() - 1 / len(unit))
    assert_close(terms.orthogonal_reg, torch.stack(each).mean())


def test_a_lost_vector_leaves_the_statistics_and_the_entropy_finite():
    vq = VectorQuantize(DIM, CODES, codebook_diversity_loss_weight=1.0, commitment_weight=0.0, **AFFINE)
    x = torch.randn(3, 5, DIM)
    x[1, 2, 3] = torch.nan
    loss = vq(x)[2]
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in vq.state_dict().values() if value.is_floating_point())


def test_a_row_beyond_all_squares_leaves_the_statistics():
    vq = VectorQuantize(DIM, CODES, **AFFINE)
    x = torch.randn(50, DIM)
    x[7] = 1e20
    for batch in (x, torch.randn(50, DIM)):
        assert (vq(batch)[1] >= 0).sum() >= 49
    assert all(value.isfinite().all() for value in vq.state_dict().values() if value.is_floating_point())


def test_affine_statistics_start_at_the_first_vectors():
    vq = VectorQuantize(DIM, CODES, **AFFINE)
    vq(torch.randn(5, 9, DIM), mask=torch.zeros(5, 9, dtype=torch.bool))
    assert vq._codebook.codebook_mean_needs_init
    x = torch.randn(5, 9, DIM) + 5
    vq(x)
    assert_close(vq._codebook.batch_mean[0, 0], x.mean((0, 1)))


def test_directional_with_cosine_starts_at_the_unit_vector():
    vq = VectorQuantize(
        *(DIM, CODES),
        use_cosine_sim=True,
        directional_reparam=True,
        directional_reparam_variance=0.0,
        learnable_codebook=False,
        threshold_ema_dead_code=1e-9,
    )
    x = torch.randn(30, DIM, requires_grad=True)
    codes = vq.codebook.clone()
    quantized, indices, _ = vq(x)
    assert_close(quantized, codes[indices])
    unit = F.normalize(x, dim=-1)
    direction = F.normalize(codes[indices] - unit, dim=-1).detach()
    expected = unit + direction * (codes[indices] - unit).norm(dim=-1, keepdim=True)
    weight = torch.randn(30, DIM)
    (found,), (wanted,) = (torch.autograd.grad((t * weight).sum(), x) for t in (quantized, expected))
    assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_averages_move_a_parameter_that_was_cast(dtype):
    vq = VectorQuantize(DIM, CODES, orthogonal_reg_weight=1.0).to(dtype)
    vq(torch.randn(50, DIM, dtype=dtype))
    book = vq._codebook
    assert book.embed.dtype == dtype and book.embed_avg.dtype == torch.float32
    size = book.cluster_size
    smoothed = (size + 1e-5) / (size.sum() + CODES * 1e-5) * size.sum()
    assert_close(book.embed.float(), book.embed_avg / smoothed.unsqueeze(-1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"learnable_codebook": True, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=1.0)},
        AFFINE | {"learnable_codebook": True},
    ],
    ids=["in_place", "affine"],
)
def test_a_step_that_is_repeated_in_backward_is_refused(options):
    """Those with an optimizer within are at once, since its backward is one in which forward runs again."""
    vq = VectorQuantize(DIM, CODES, **options)
    before = state(vq)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        loss = checkpoint(vq, torch.randn(30, DIM, requires_grad=True), use_reentrant=False)[2]
        before = state(vq)
        loss.backward()
    UNCHANGED.same(vq.state_dict(), before)


def test_a_refused_weight_leaves_the_codes_where_the_optimizer_found_them():
    options = {"in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "threshold_ema_dead_code": 1.0}
    vq = VectorQuantize(DIM, CODES, learnable_codebook=True, **options)
    before = state(vq)
    for weight in (torch.ones(7), lambda sums, counts: torch.ones(7)):
        with pytest.raises(ValueError, match="ema_update_weight must have shape"):
            vq(torch.randn(30, DIM), ema_update_weight=weight)
        UNCHANGED.same(vq.state_dict(), before)


def test_codes_of_each_vectors_own_without_a_code():
    vq = VectorQuantize(DIM, CODES, straight_through=True, route_gradients_to_input=False)
    x = torch.randn(4, 5, DIM, requires_grad=True)
    for temperature in (torch.tensor(0.0), torch.tensor(1e-20)):
        quantized = vq(x, codebook_transform_fn=Own(), sample_codebook_temp=temperature)[0]
        quantized.sum().backward()
        assert quantized.isfinite().all() and x.grad.isfinite().all()
    with torch.no_grad():
        x[1, 2, 3] = torch.nan
    given = torch.zeros(4, 5, dtype=torch.int64)
    assert vq(x, given)[1].isnan() and vq(x, given, codebook_transform_fn=Own())[1].isnan()


def test_a_draw_leaves_out_what_a_search_does():
    vq = VectorQuantize(DIM, CODES, stochastic_sample_codes=True)
    x = torch.randn(50, DIM)
    x[3] = torch.inf
    mask = torch.arange(50) > 1
    quantized, indices, loss = vq(x, mask=mask)
    assert (indices[:2] == -1).all() and indices[3] == -1 and (indices[4:] >= 0).all()
    assert (quantized[:2] == 0).all() and quantized[3].isnan().all() and loss.isnan()
    assert all(value.isfinite().all() for value in vq.state_dict().values())


@pytest.mark.parametrize("heads", [{}, {"heads": 2}, {"heads": 2, "separate_codebook_per_head": True}], ids=str)
def test_drawn_codes_are_another_set_at_each_step_and_the_same_for_a_seed(heads):
    vq = VectorQuantize(DIM, CODES, stochastic_sample_codes=True, freeze_codebook=True, **heads)
    x = torch.randn(2, 200, DIM)
    torch.manual_seed(3)
    first, second = vq(x)[1], vq(x)[1]
    assert (first != second).float().mean() > 0.2
    torch.manual_seed(3)
    COPIES.same(vq(x)[1], first)
    assert len(vq(x, topk=3)[1].flatten(0, -2).unique(dim=0)) > 3 if not heads else True


class Own(torch.nn.Module):
    """Codes of each vector's own, with a parameter, so that its backward needs the codes."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, 4, 5, 1, 1))

    def forward(self, codes):
        return codes[:, None, None] * self.scale


@pytest.mark.parametrize(
    "options, own",
    [
        ({"vq_bridge": torch.nn.Linear(DIM, DIM), "threshold_ema_dead_code": 2.0}, False),
        ({"learnable_codebook": True, "threshold_ema_dead_code": 2.0}, True),
        ({"learnable_codebook": True, "orthogonal_reg_weight": 1.0, "threshold_ema_dead_code": 2.0}, False),
        ({"orthogonal_reg_weight": 1.0}, False),
        ({"affine_param": True, "learnable_codebook": True, "threshold_ema_dead_code": 2.0}, False),
        ({}, True),
    ],
    ids=str,
)
def test_the_backward_takes_the_codes_of_its_forward(options, own, monkeypatch):
    """Whatever moves them in between: the gradients of a step are those of the same step without its update."""
    vq = VectorQuantize(DIM, CODES, codebook_diversity_loss_weight=1.0, **options)
    fixed = copy.deepcopy(vq)
    function = Own() if own else None
    x, grads = torch.randn(4, 5, DIM), []
    for module in (vq, fixed):
        if module is fixed:
            monkeypatch.setattr(vector_quantize, "take_steps_", lambda _: None)
        given = x.clone().requires_grad_()
        quantized, _, loss = module(given, codebook_transform_fn=function)
        parameters = [given, *module.parameters(), *(function.parameters() if own else ())]
        grads.append(torch.autograd.grad(quantized.square().sum() + loss, parameters, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)
    assert (vq.codebook - fixed.codebook).abs().max() > 0 or "vq_bridge" in options
