"""ResidualVQ and GroupedResidualVQ: what they return, in which axes, and what they refuse."""


import pytest
import torch
from promises import COPIES, INDICES, UNCHANGED
from quantizers import state
from residual import CODES, DIM, LEVELS, SIZES, every_way, residual_vq
from torch.testing import assert_close

import vqops
from vqops import GroupedResidualVQ, ResidualVQ


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


# Refusals

WRONG = {
    "codebook_size is one number": {"num_quantizers": None},
    r"codebook_size must be an integer or 3 of them, got \(4, 5\)": {"codebook_size": (4, 5)},
    r"codebook_size must be an integer or one for each level, got \[\]": {"codebook_size": [], "num_quantizers": None},
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
    r"codebook_size must be one for all levels with shared_codebook, got \(4, 5, 6\)": {
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
