"""Against the installed vector-quantize-pytorch: the arguments beyond the codebook's updates."""

import inspect

import pytest
import torch
import vector_quantize_pytorch
from promises import INDICES
from side_by_side import CLOSE, CODES, DIM, HEADS, LAYOUTS, assert_same_state, assert_same_step, both
from torch.testing import assert_close

import vqops
from vqops import VectorQuantize

STRAIGHT = {"rotation_trick": False}
LEARNABLE = {"learnable_codebook": True}
ORTHOGONAL = LEARNABLE | {"orthogonal_reg_weight": 3.0}
# With an update, theirs computes the gradient of logits with the codes that it has made since.
FIXED = {"ema_update": False}
DIVERSE = FIXED | {"codebook_diversity_loss_weight": 0.3, "codebook_diversity_temperature": 2.0}
ENTROPY = FIXED | {"commitment_use_cross_entropy_loss": True, "commitment_weight": 0.7}
SOFT = FIXED | STRAIGHT | {"straight_through": True, "route_gradients_to_input": False, "sample_codebook_temp": 0.7}
DIRECTIONAL = {"directional_reparam": True, "threshold_ema_dead_code": 1e-9}
IN_PLACE = LEARNABLE | {"in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=3.0)}


class Bridge(torch.nn.Module):
    """Deterministic, so that two quantizers made alike have the same."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.3))

    def forward(self, codes):
        return codes * self.scale + 0.1 * codes.roll(1, -2)


OPTIONS = {
    "orthogonal": {"orthogonal_reg_weight": 3.0, "ema_update": False},
    "orthogonal_cosine": {"orthogonal_reg_weight": 3.0, "ema_update": False, "use_cosine_sim": True},
    "orthogonal_learnable": ORTHOGONAL,
    "orthogonal_active": ORTHOGONAL | {"orthogonal_reg_active_codes_only": True},
    "orthogonal_some": ORTHOGONAL | {"orthogonal_reg_max_codes": 4},
    "orthogonal_more_than_there_are": ORTHOGONAL | {"orthogonal_reg_max_codes": 2 * CODES},
    "diversity": DIVERSE,
    "diversity_cosine": DIVERSE | {"use_cosine_sim": True},
    "diversity_learnable": DIVERSE | LEARNABLE,
    "cross_entropy": ENTROPY,
    "cross_entropy_cosine": ENTROPY | {"use_cosine_sim": True},
    "cross_entropy_learnable": ENTROPY | LEARNABLE,
    "all_losses": ORTHOGONAL | DIVERSE | ENTROPY,
    "drawn_at_0": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.0},
    "straight_through": {"straight_through": True, **STRAIGHT},
    "soft": SOFT,
    "directional": DIRECTIONAL,
    "directional_exact": DIRECTIONAL | {"directional_reparam_variance": 0.0},
    "bridge": {"vq_bridge": Bridge()},
    "in_place": IN_PLACE,
    "in_place_manual": IN_PLACE | {"manual_in_place_optimizer_update": True},
    "sync_update": LEARNABLE | {"sync_update_v": 0.3},
    "sync_update_to_codes": LEARNABLE | {"sync_update_v": 0.3, "route_gradients_to_input": False},
    "affine": {"affine_param": True},
    "affine_fast": {"affine_param": True, "affine_param_batch_decay": 0.3, "affine_param_codebook_decay": 0.2},
    "affine_learnable": LEARNABLE | {"affine_param": True},
}
# What each case is also run with; where theirs fails, it is left out.
FITS = [("rows", "one"), ("image", "projected"), ("single", "one"), ("rows", "shared"), ("channel_first", "separate")]


def fits(option: str, layout: str, heads: str) -> bool:
    if option == "orthogonal_active" and heads == "separate":
        return False  # refused there
    if option == "directional" and heads == "shared":
        return False  # other vectors get the noise
    if layout == "image" and ("cross_entropy" in option or option == "all_losses"):
        return False  # theirs takes the axes of an image for codes
    return not (layout == "single" and ("cross_entropy" in option or option == "all_losses"))


@pytest.mark.parametrize(
    "option, layout, heads",
    [(o, layout, heads) for o in OPTIONS for layout, heads in FITS if fits(o, layout, heads)],
)
def test_the_same_steps(option, layout, heads):
    shape, options = LAYOUTS[layout]
    theirs, ours = both(**OPTIONS[option], **options, **HEADS[heads])
    for _ in range(3):
        assert_same_step(theirs, ours, torch.randn(shape), return_loss_breakdown=True)
    if option == "in_place_manual":
        for vq in (theirs, ours):
            vq.update_in_place_optimizer()
        assert_same_state(theirs, ours)
    if "affine" not in option:  # theirs goes on learning in eval
        theirs.eval(), ours.eval()
        x = torch.randn(shape)
        (quantized, indices, _), (our_quantized, our_indices, _) = theirs(x), ours(x)
        INDICES.same(indices, our_indices)
        CLOSE(our_quantized, quantized)


@pytest.mark.parametrize("option", ["affine", "directional", "bridge", "soft"])
def test_the_same_steps_with_masks(option):
    theirs, ours = both(**OPTIONS[option])
    for _ in range(2):
        assert_same_step(theirs, ours, torch.randn(3, 40, DIM), mask=torch.rand(3, 40) < 0.7)


def own_codes(codes):  # [H, K, D] -> [H, 3, 40, K, D]
    shifts = torch.sin(torch.arange(120.0)).view(1, 3, 40, 1, 1)
    return codes[:, None, None] * (1 + 0.5 * shifts) + 0.1 * shifts


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, LEARNABLE, DIVERSE, ENTROPY], ids=str)
@pytest.mark.parametrize("gradient", [{}, STRAIGHT, {"route_gradients_to_input": False}], ids=str)
def test_codes_of_each_vectors_own(options, gradient):
    theirs, ours = both(**options, **gradient)
    for _ in range(3):
        assert_same_step(theirs, ours, torch.randn(3, 40, DIM), codebook_transform_fn=own_codes)
    if options is not ENTROPY:
        assert_same_step(theirs, ours, torch.randn(3, 40, DIM), codebook_transform_fn=own_codes, topk=3)
    x, indices = torch.randn(3, 40, DIM), torch.randint(-1, CODES, (3, 40))
    a, b = (vq(x, indices, codebook_transform_fn=own_codes, freeze_codebook=True)[1] for vq in (theirs, ours))
    CLOSE(b, a)
    theirs.eval(), ours.eval()
    (quantized, indices, _), (ours_too, same, _) = (vq(x, codebook_transform_fn=own_codes) for vq in (theirs, ours))
    INDICES.same(indices, same)
    CLOSE(ours_too, quantized)


def signature_of(function) -> list[tuple]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]


def test_the_arguments_are_theirs_in_their_order():
    theirs = vector_quantize_pytorch.VectorQuantize
    assert signature_of(VectorQuantize.__init__) == signature_of(theirs.__init__)
    assert signature_of(VectorQuantize.forward) == signature_of(theirs.forward)


def test_positional_arguments():
    arguments = DIM, CODES, 4, 2, True
    theirs, ours = vector_quantize_pytorch.VectorQuantize(*arguments), VectorQuantize(*arguments)
    ours.load_state_dict(theirs.state_dict())
    assert_same_step(theirs, ours, torch.randn(3, 40, DIM))


NEUTRAL = {
    name: parameter.default
    for name, parameter in inspect.signature(vector_quantize_pytorch.VectorQuantize).parameters.items()
    if parameter.default is not parameter.empty
}


def test_no_argument_is_refused_at_its_neutral_value():
    for name, value in NEUTRAL.items():
        VectorQuantize(DIM, CODES, **{name: value})
    vq = VectorQuantize(DIM, CODES, **NEUTRAL)
    vq(torch.randn(5, DIM), sample_codebook_temp=None, codebook_transform_fn=None)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_codes_are_drawn_with_the_same_probabilities(temperature):
    """Both against the softmax: the share of each code among many draws of the same vector."""
    theirs, ours = both(stochastic_sample_codes=True, sample_codebook_temp=temperature, freeze_codebook=True)
    x = torch.randn(1, 1, DIM).expand(1, 40_000, DIM)
    p = (-(x[0, 0] - ours.codebook).norm(dim=-1) / temperature).softmax(-1)
    for vq in (theirs, ours):
        share = vq(x)[1].flatten().bincount(minlength=CODES) / x.shape[1]
        assert_close(share, p, rtol=0, atol=5 * (0.25 / x.shape[1]) ** 0.5)
    vq.eval()
    assert len(vq(x)[1].unique()) == 1


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "separate_codebook_per_head": True}])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_entropy_of_assignments_is_the_diversity_loss(options, temperature):
    """With positions as groups: the value, and the gradient to x and to the codebook."""
    learnable = "use_cosine_sim" not in options
    vq = vector_quantize_pytorch.VectorQuantize(
        dim=8,
        codebook_size=20,
        codebook_dim=8 // options.get("heads", 1),
        codebook_diversity_loss_weight=1.0,
        codebook_diversity_temperature=temperature,
        commitment_weight=0.0,
        learnable_codebook=learnable,
        ema_update=False,
        **options,
    )
    x = torch.randn(3, 10, 8)
    results = []
    for ours in (False, True):
        vq.zero_grad()
        given = x.clone().requires_grad_()
        codes = vq._codebook.embed
        if ours:
            heads = codes.shape[0]
            rows = given.unflatten(-1, (heads, -1)).permute(2, 1, 0, 3)  # [H, positions, batch, D]
            metric = "cosine" if options.get("use_cosine_sim") else "euclidean"
            if metric == "cosine":
                rows = torch.nn.functional.normalize(rows, dim=-1)
            loss = -vqops.assignment_entropy(rows, codes, temperature, None, metric).mean()
        else:
            loss = vq(given, return_loss_breakdown=True)[-1].codebook_diversity
        loss.backward()
        results.append((loss.detach(), given.grad, codes.grad.clone() if learnable else None))
    for got, expected in zip(*results[::-1], strict=True):
        if expected is not None:
            assert_close(got, expected, rtol=1e-3, atol=1e-5 * temperature)
