"""vector-quantize-pytorch's own classes with our VectorQuantize inside: what they read and call is there."""

import copy
import importlib

import pytest
import torch
import vector_quantize_pytorch
from promises import INDICES
from side_by_side import CLOSE, DIM
from torch.testing import assert_close

from vqops import VectorQuantize

MODULES = [
    importlib.import_module(f"vector_quantize_pytorch.{name}")
    for name in ("residual_vq", "hierarchical_vq", "random_projection_quantizer")
]
SMALL = {"dim": DIM, "codebook_size": 24}
WITHOUT_DRAWS = {"kmeans_init": False, "threshold_ema_dead_code": 0}
RESIDUAL = SMALL | {"num_quantizers": 3}
CLASSES = {
    "residual": ("ResidualVQ", RESIDUAL, {}),
    "shared": ("ResidualVQ", RESIDUAL | {"shared_codebook": True, "threshold_ema_dead_code": 1e-9}, {}),
    "sizes": ("ResidualVQ", SMALL | {"codebook_size": (24, 12, 6)}, {}),
    "projected": ("ResidualVQ", RESIDUAL | {"codebook_dim": 4}, {}),
    "dropout": ("ResidualVQ", RESIDUAL | {"quantize_dropout": True}, {"rand_quantize_dropout_fixed_seed": 3}),
    "beam": ("ResidualVQ", RESIDUAL | {"beam_size": 2}, {}),
    "cosine": ("ResidualVQ", RESIDUAL | {"use_cosine_sim": True}, {}),
    "implicit": ("ResidualVQ", RESIDUAL | {"implicit_neural_codebook": True}, {}),
    "diveq": ("ResidualVQ", RESIDUAL | {"diveq": True, "threshold_ema_dead_code": 1e-9}, {}),
    "grouped": ("GroupedResidualVQ", RESIDUAL | {"groups": 2}, {}),
    "hierarchical": ("HierarchicalVQ", SMALL | {"scales": (1, 2, 4)} | WITHOUT_DRAWS, {}),
}


def pair(monkeypatch, name):
    """Theirs as it is, and theirs with our class inside, in the same state."""
    kind, options, _ = CLASSES[name]
    theirs = getattr(vector_quantize_pytorch, kind)(**options)
    for module in MODULES:
        if hasattr(module, "VectorQuantize"):
            monkeypatch.setattr(module, "VectorQuantize", VectorQuantize)
    ours = getattr(vector_quantize_pytorch, kind)(**options)
    assert any(isinstance(module, VectorQuantize) for module in ours.modules())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(name):
    return torch.randn(2, DIM, 30) if name == "hierarchical" else torch.randn(2, 30, DIM)


@pytest.mark.parametrize("name", CLASSES)
def test_four_steps(name, monkeypatch):
    theirs, ours = pair(monkeypatch, name)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # noise, before which ours draws rows for dead codes
    arguments = CLASSES[name][2]
    for _ in range(4):
        x, results = batch(name), []
        for module in (theirs, ours):
            torch.manual_seed(1)
            module.zero_grad()
            given = x.clone().requires_grad_()
            quantized, indices, loss = module(given, **arguments)[:3]
            (quantized.square().sum() + loss.sum()).backward()
            results.append((quantized, indices, loss, given.grad))
        (quantized, indices, loss, grad), (same, same_indices, same_loss, same_grad) = results
        for a, b in zip(flat(indices), flat(same_indices), strict=True):
            INDICES.same(a, b)
        CLOSE(same, quantized)
        CLOSE(same_loss, loss)
        assert_close(same_grad, grad, rtol=1e-4, atol=1e-5)
        for key, value in theirs.state_dict().items():
            assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=lambda t, key=key: f"{key}: {t}")
    theirs.eval(), ours.eval()
    x = batch(name)
    CLOSE(ours(x)[0], theirs(x)[0])


def flat(indices):
    return indices if isinstance(indices, list | tuple) else [indices]


def test_random_projections(monkeypatch):
    options = SMALL | {"codebook_dim": 4, "num_codebooks": 2}
    theirs = vector_quantize_pytorch.RandomProjectionQuantizer(**options)
    for module in MODULES:
        if hasattr(module, "VectorQuantize"):
            monkeypatch.setattr(module, "VectorQuantize", VectorQuantize)
    ours = vector_quantize_pytorch.RandomProjectionQuantizer(**options)
    assert isinstance(ours.vq, VectorQuantize)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 30, DIM)
    INDICES.same(ours(x), theirs(x))


def test_what_users_read():
    ours, theirs = VectorQuantize(DIM, 24), vector_quantize_pytorch.VectorQuantize(DIM, 24)
    for name in (
        *("dim", "heads", "eps", "codebook_size", "use_cosine_sim", "learnable_codebook", "ema_update"),
        *("commitment_weight", "rotation_trick", "directional_reparam", "sync_update_v", "freeze_codebook"),
        *("orthogonal_reg_weight", "orthogonal_reg_active_codes_only", "orthogonal_reg_max_codes"),
        *("codebook_diversity_loss_weight", "codebook_diversity_temperature", "channel_last"),
        *("in_place_codebook_optimizer", "manual_in_place_optimizer_update", "route_gradients_to_input"),
        *("has_projections", "accept_image_fmap", "accept_3d_fmap", "separate_codebook_per_head"),
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("codebook_size", "num_codebooks", "decay", "eps", "use_cosine_sim", "learnable_codebook"):
        assert getattr(ours._codebook, name) == getattr(theirs._codebook, name), name
    assert ours.update_in_place_optimizer() is None


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "separate_codebook_per_head": True}], ids=str)
def test_heads_are_split_as_there(options):
    ours, theirs = VectorQuantize(DIM, 24, **options), vector_quantize_pytorch.VectorQuantize(DIM, 24, **options)
    x = torch.randn(3, 5, 12)
    assert_close(ours.maybe_split_heads_from_input(x), theirs.maybe_split_heads_from_input(x))


def test_an_optimizer_within_a_copied_module_moves_the_copy():
    options = {"learnable_codebook": True, "in_place_codebook_optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    vq = VectorQuantize(DIM, 24, **options)
    twin = copy.deepcopy(vq)
    before = vq.codebook.detach().clone()
    twin(torch.randn(40, DIM))
    assert_close(vq.codebook.detach(), before)
    assert (twin.codebook.detach() - before).abs().max() > 1e-3
