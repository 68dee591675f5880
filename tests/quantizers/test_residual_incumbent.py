"""ResidualVQ and GroupedResidualVQ against the installed vector-quantize-pytorch: equal wherever it is right."""

import itertools
from functools import partial

import pytest
import torch
from promises import INDICES
from quantizers import state
from side_by_side import CLOSE, METRICS, assert_same_state, assert_same_step, pair

from vqops.quantizers.residual import together

DIM, CODES, LEVELS = 6, 20, 4
SIZES = {"dim": DIM, "codebook_size": CODES, "num_quantizers": LEVELS}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}  # the first alone is an AssertionError there
METRICS = METRICS | {"learnable": LEARNABLE}
GRADIENTS = {"rotation": {}, "straight_through": {"rotation_trick": False}}
WAYS = {
    "plain": {},
    "projected": {"codebook_dim": 4},
    "sizes": {"codebook_size": (8, 20, 12, 30)},
    "shared": {"shared_codebook": True},
    "dropout": {"quantize_dropout": True},
    "some": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1, "quantize_dropout_multiple_of": 2},
    "gradient_to_the_level_before": {"quant_grad_frac": 0.3},
    "all_of_it": {"quant_grad_frac": 1.0, "codebook_dim": 5},
    "weights": {"commitment_weight": 0.25, "decay": 0.9, "eps": 1e-3},
    "no_loss": {"commitment_weight": 0.0, "shared_codebook": True},
}
PRODUCT = list(itertools.product(METRICS, GRADIENTS, WAYS))


@torch.no_grad()
def assert_same_in_eval(theirs, ours, x, **arguments):
    """In eval theirs lets gradients through to learnable codes, and with beam search to the input."""
    assert_same_step(theirs.eval(), ours.eval(), x, **arguments)


@pytest.mark.parametrize("metric, gradient, way", PRODUCT, ids=["-".join(case) for case in PRODUCT])
def test_four_steps_and_eval(metric, gradient, way):
    theirs, ours = pair("ResidualVQ", **SIZES | METRICS[metric] | GRADIENTS[gradient] | WAYS[way])
    for _ in range(4):
        assert_same_step(theirs, ours, torch.randn(3, 20, DIM))
    theirs.eval(), ours.eval()
    x = torch.randn(3, 20, DIM)
    (quantized, indices, losses, codes), expected = ours(x, return_all_codes=True), theirs(x, return_all_codes=True)
    for a, b in zip((quantized, losses, codes), (expected[0], *expected[2:]), strict=True):
        CLOSE(a, b)
    INDICES.same(indices, expected[1])
    CLOSE(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    CLOSE(ours.get_output_from_indices(indices), quantized)
    books, expected = ours.codebooks, theirs.codebooks
    CLOSE(books, expected)


OPTIONS = {
    "stochastic_is_off": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.0},
    "frozen": {"freeze_codebook": True},
    "entropy": {"commitment_use_cross_entropy_loss": True, **LEARNABLE},
    "orthogonal": {"orthogonal_reg_weight": 0.5, "ema_update": False},
    "diversity": {"codebook_diversity_loss_weight": 0.5, "ema_update": False},
    "affine": {"affine_param": True, "affine_param_batch_decay": 0.8},
    "no_update": {"ema_update": False},
    "codes_alone": {"route_gradients_to_input": False, **LEARNABLE},
    "synchronous": {"sync_update_v": 0.5, **LEARNABLE},
    "in_place": {"in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1), **LEARNABLE},
    "diveq": {"diveq": True},
    "implicit": {"implicit_neural_codebook": True, "mlp_kwargs": {"depth": 2, "dim_hidden": 5}},
    "implicit_and_frozen": {"implicit_neural_codebook": True, "quantize_dropout": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_levels(option):
    """freeze_codebook of the constructor is overridden there by forward's default, so it is given to forward."""
    theirs, ours = pair("ResidualVQ", **SIZES | OPTIONS[option])
    given = {"freeze_codebook": True} if "frozen" in option else {}
    for _ in range(4):
        assert_same_step(theirs, ours, torch.randn(3, 20, DIM), **given)
    if option in ("diveq", "affine"):
        return  # in eval too, theirs moves the output and the statistics
    assert_same_in_eval(theirs, ours, torch.randn(3, 20, DIM))


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "learnable"])
@pytest.mark.parametrize("way", ["plain", "shared", "projected", "dropout"])
def test_masks(way, metric, padding):
    options = SIZES | METRICS[metric] | WAYS[way] | {"return_zeros_for_masked_padding": padding}
    theirs, ours = pair("ResidualVQ", **options)
    for _ in range(4):
        assert_same_step(theirs, ours, torch.randn(3, 20, DIM), mask=torch.rand(3, 20) < 0.7)
    assert_same_in_eval(theirs, ours, torch.randn(3, 20, DIM), mask=torch.rand(3, 20) < 0.7)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"quant_grad_frac": 0.5}, LEARNABLE], ids=str)
def test_beam_search(options):
    """Of one step from one state: theirs then moves the averages of the first level alone."""
    weights = [1.0, 0.5, 2.0, 1.0]
    options = SIZES | options | {"beam_size": 3, "eval_beam_size": 5, "beam_score_quantizer_weights": weights}
    theirs, ours = pair("ResidualVQ", **options)
    before = state(ours)
    for _ in range(4):
        x = torch.randn(3, 20, DIM)
        results = []
        for vq in (theirs, ours):
            given = x.clone().requires_grad_()
            vq.zero_grad()
            quantized, indices, losses = vq(given)
            (quantized.cos().sum() + (losses * torch.arange(1.0, 5)).sum()).backward()
            results.append((quantized, losses, given.grad, *(p.grad for p in vq.parameters())))
            results.append(indices)
            vq.load_state_dict(before)
        CLOSE(results[2], results[0], rtol=1e-4, atol=2e-5)
        INDICES.same(results[3], results[1])
    assert_same_in_eval(theirs, ours, torch.randn(3, 20, DIM))
    assert_same_in_eval(theirs, ours, torch.randn(3, 20, DIM), mask=torch.rand(3, 20) < 0.7, beam_size=2)


@pytest.mark.parametrize("way", WAYS)
def test_groups(way):
    options = SIZES | WAYS[way] | {"groups": 3, "dim": 3 * DIM}
    theirs, ours = pair("GroupedResidualVQ", **options)
    for step in range(4):
        given = {"mask": torch.rand(3, 20) < 0.7} if step % 2 else {}
        assert_same_step(theirs, ours, torch.randn(3, 20, 3 * DIM), **given)
    theirs.eval(), ours.eval()
    x = torch.randn(3, 20, 3 * DIM)
    found, expected = ours(x, return_all_codes=True), theirs(x, return_all_codes=True)
    for a, b in zip(found, (*expected[:3], torch.stack(expected[3])), strict=True):
        CLOSE(a, b)
    CLOSE(ours.get_codes_from_indices(found[1]), theirs.get_codes_from_indices(found[1]))
    CLOSE(ours.get_output_from_indices(found[1]), theirs.get_output_from_indices(found[1]))
    if way != "sizes":  # which theirs cannot stack
        CLOSE(ours.codebooks, theirs.codebooks)


@pytest.mark.parametrize("seed", range(6))
def test_the_seed_of_the_dropout(seed):
    theirs, ours = pair("ResidualVQ", **SIZES, quantize_dropout=True)
    x = torch.randn(2, 10, DIM)
    given = {"rand_quantize_dropout_fixed_seed": seed}
    INDICES.same(ours(x, **given)[1], theirs(x, **given)[1])
    assert_same_state(theirs, ours)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("way", ["plain", "projected", "sizes", "shared", "dropout", "weights", "no_loss"])
def test_together_is_in_turn(way, gradient, metric, monkeypatch):
    """The op of all levels and the levels one by one: the same results, gradients and state."""
    one, other = (pair("ResidualVQ", **SIZES | METRICS[metric] | GRADIENTS[gradient] | WAYS[way])[1] for _ in range(2))
    other.load_state_dict(one.state_dict())
    for step in range(3):
        x, mask = torch.randn(3, 20, DIM), torch.rand(3, 20) < 0.8
        with monkeypatch.context() as patch:
            given = {"mask": mask, "rand_quantize_dropout_fixed_seed": step}
            apart = Apart(other, patch)
            assert_same_step(apart, one, x, **given)
            assert apart.was_apart
    assert_same_step(Apart(other.eval(), monkeypatch), one.eval(), x)


class Apart:
    """A quantizer whose levels are taken in turn."""

    def __init__(self, vq, patch):
        self.vq, self.patch, self.was_apart = vq, patch, False

    def __call__(self, x, **arguments):
        from vqops.quantizers import residual_vq

        def refuse(*_):
            self.was_apart = True
            return False

        self.patch.setattr(residual_vq, "fits", refuse)
        results = self.vq(x, **arguments)
        self.patch.setattr(residual_vq, "fits", together.fits)
        return results

    def __getattr__(self, name):
        return getattr(self.vq, name)
