"""In a step the host waits for no value on the device."""

import sys

import pytest
import torch
from waiting import NoSynchronisation

from vqops import HierarchicalVQ, VectorQuantize
from vqops.quantizers.interface import layout as layout_module

MASK = torch.tensor([True, False, True, True, True]).repeat(2, 5, 1)
HEADS = {"heads": 2, "codebook_dim": 3}
ASYNCHRONOUS = {
    "ema": ({}, {}),
    "learnable": ({"learnable_codebook": True, "route_gradients_to_input": False}, {}),
    "cosine": ({"use_cosine_sim": True}, {"accum_ema_update": True}),
    "mask": (HEADS, {"mask": MASK, "return_loss_breakdown": True}),
    "separate": (
        HEADS | {"separate_codebook_per_head": True, "return_zeros_for_masked_padding": False},
        {"mask": MASK, "ema_update_weight": lambda sums, counts: counts / (1 + counts)},
    ),
    "topk": ({}, {"topk": 3, "mask": MASK}),
    "topk_rotated": ({"rotation_trick": True, "use_cosine_sim": True}, {"topk": 3}),
    "indices": (HEADS, {"indices": torch.arange(100).view(2, 5, 5, 2) % 9 - 1}),
    "manual": ({"manual_ema_update": True}, {"ema_update_weight": torch.linspace(0, 1, 8)}),
    "losses": (
        {
            "commitment_use_cross_entropy_loss": True,
            "codebook_diversity_loss_weight": 0.1,
            "orthogonal_reg_weight": 0.1,
            "orthogonal_reg_active_codes_only": True,
            "orthogonal_reg_max_codes": 3,
        },
        {},
    ),
    "drawn": ({"stochastic_sample_codes": True}, {"sample_codebook_temp": torch.tensor(0.5)}),
    "affine": ({"affine_param": True}, {"mask": MASK}),
    "directional": ({"directional_reparam": True}, {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_the_host_never_waits(name, training, monkeypatch):
    options, arguments = ASYNCHRONOUS[name]
    # On the CPU it reads the values; elsewhere it is an assertion on the device.
    for module in (layout_module, *(sys.modules[f"vqops.ops.{op}"] for op in ("code_sums", "cross_entropy"))):
        monkeypatch.setattr(module, "check_indices", lambda *_: None)
    fixed = {"kmeans_init": True, "threshold_ema_dead_code": 2, "accept_image_fmap": True}
    vq = VectorQuantize(4, 8, **({"codebook_dim": 3} | fixed | options))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    vq(x.detach())  # k-means, before which it asks whether others have done it
    vq.train(training)
    with NoSynchronisation():
        for _ in range(3):
            quantized, *_, loss = vq(x, **arguments)[: 2 if name == "indices" else 3]
            (quantized.sum() + loss.sum()).backward()
        vq.update_indices(x, torch.zeros(2, 5, 5, *[2] * (vq.heads > 1), dtype=torch.int64), mask=MASK)
        vq.expire_codes_(x)
    with pytest.raises(AssertionError), NoSynchronisation():
        bool(loss.sum() > 0)
    with pytest.raises(AssertionError), NoSynchronisation():
        x[x > 0]


@pytest.mark.parametrize("shared_codebook", [True, False])
def test_the_host_waits_for_no_level(shared_codebook):
    options = {"dim": 4, "codebook_size": 8, "scales": (1, 2, 4), "accept_image_fmap": True}
    vq = HierarchicalVQ(**options, nested_dropout=0.5, share_quant_resi=0, shared_codebook=shared_codebook)
    x = torch.randn(9, 4, 5, 5, requires_grad=True)
    vq(x.detach())  # k-means
    with NoSynchronisation():
        for training in (True, True, True, False):
            output, _, loss = vq.train(training)(x, mask=MASK.view(2, 5, 5)[:1].expand(9, 5, 5))
            (output.sum() + loss).backward()
