"""vqops.VectorQuantize and vector-quantize-pytorch's side by side: the options of both, and a step of each compared."""

from functools import partial

import torch
import vector_quantize_pytorch
from promises import INDICES
from torch.testing import assert_close

import vqops
from vqops import VectorQuantize

DIM, CODES = 6, 20
CLOSE = partial(assert_close, rtol=2e-5, atol=2e-6)
METRICS = {"euclidean": {}, "cosine": {"use_cosine_sim": True}, "learnable": {"learnable_codebook": True}}
LAYOUTS = {
    "rows": ((3, 40, DIM), {}),
    "single": ((50, DIM), {}),
    "channel_first": ((3, DIM, 40), {"channel_last": False}),
    "image": ((3, DIM, 6, 7), {"accept_image_fmap": True}),
    "volume": ((3, DIM, 2, 3, 7), {"accept_3d_fmap": True}),
}
HEADS = {
    "one": {},
    "projected": {"codebook_dim": 4},
    "shared": {"heads": 2, "codebook_dim": 3},
    "separate": {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    "shared_projected": {"heads": 3, "codebook_dim": 4, "layernorm_after_project_in": True},
    "separate_projected": {"heads": 3, "codebook_dim": 4, "separate_codebook_per_head": True},
}
GRADIENTS = {"rotation": {}, "straight_through": {"rotation_trick": False}, "none": {"route_gradients_to_input": False}}


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
        torch.manual_seed(2)
        quantized, indices, loss, *breakdown = vq(given, **arguments)
        if quantized.requires_grad or loss.requires_grad:
            torch.manual_seed(1)
            ((quantized * torch.randn(quantized.shape)).sum() + 3 * (loss * torch.rand(loss.shape)).sum()).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in vq.named_parameters()}
        grads["input"] = torch.zeros_like(x) if given.grad is None else given.grad
        results.append((quantized, indices, loss, breakdown, grads))
    (quantized, indices, loss, breakdown, grads), of_ours = results
    our_quantized, our_indices, our_loss, our_breakdown, our_grads = of_ours
    INDICES.same(indices, our_indices)
    assert quantized.dtype == our_quantized.dtype and loss.shape == our_loss.shape
    assert quantized.requires_grad == our_quantized.requires_grad
    assert loss.requires_grad == our_loss.requires_grad or not ours.training  # theirs says True in eval after training
    CLOSE(our_quantized, quantized)
    CLOSE(our_loss, loss)
    assert len(breakdown) == len(our_breakdown)
    if breakdown:
        assert our_breakdown[0]._fields == breakdown[0]._fields
        CLOSE(tuple(our_breakdown[0]), tuple(breakdown[0]))
    assert our_grads.keys() == grads.keys()
    for name, value in grads.items():
        atol = 1e-5 * max(1, value.abs().max().item())  # sums over the rows
        assert_close(our_grads[name], value, rtol=2e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert_same_state(theirs, ours)


def assert_same_state(theirs, ours):
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        CLOSE(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def pair(name: str, **options):
    """The class of this name of both, with one state."""
    theirs, ours = (getattr(package, name)(**options) for package in (vector_quantize_pytorch, vqops))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours
