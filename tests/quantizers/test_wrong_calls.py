"""Options and inputs that VectorQuantize refuses, and the words with which it does."""

import math

import pytest
import torch
from promises import UNCHANGED
from quantizers import state

from vqops import VectorQuantize


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"dim": 2.5}, "dim must be an integer of at least 1, got 2.5"),
        ({"codebook_size": 0}, "codebook_size must be an integer of at least 1, got 0"),
        ({"codebook_dim": -1}, "codebook_dim must be an integer of at least 1, got -1"),
        ({"kmeans_iters": 0}, "kmeans_iters must be an integer of at least 1, got 0"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": math.nan}, r"decay must be in \[0, 1\], got nan"),
        ({"eps": -1.0}, "eps must be finite and at least 0, got -1.0"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must be finite and at least 0, got -1"),
        ({"commitment_weight": math.inf}, "commitment_weight must be finite and at least 0, got inf"),
        ({"use_cosine_sim": True, "learnable_codebook": True}, "use_cosine_sim and learnable_codebook"),
        ({"ema_update": True, "learnable_codebook": True}, "ema_update and learnable_codebook can't both be True"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "accept_image_fmap and accept_3d_fmap"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantize(**({"dim": 4, "codebook_size": 8} | options))


class Named(VectorQuantize):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda: Named(0, 8),
        lambda: Named(4, 8, decay=2),
        lambda: Named(4, 8)(torch.zeros(2, 3)),
        lambda: Named(4, 8)(torch.zeros(2, 4), mask=torch.zeros(2)),
        lambda: Named(4, 8)(torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool)),
        lambda: Named(4, 8)(torch.zeros(2, 4), ema_update_weight=torch.zeros(3)),
        lambda: Named(4, 8, straight_through=True, rotation_trick=True),
        lambda: Named(4, 8)(torch.zeros(2, 4), sample_codebook_temp=-1.0),
        lambda: Named(4, 8, learnable_codebook=True)._codebook.update_ema(),
        lambda: setattr(Named(4, 8), "codebook", torch.zeros(3)),
    ],
)
def test_messages_name_the_class_that_was_called(call):
    with pytest.raises(Exception, match=r"^Named[:.]"):
        call()


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'codebook_dims'"):
        VectorQuantize(4, 8, codebook_dims=3)


@pytest.mark.parametrize(
    "options, x, error, message",
    [
        ({}, torch.zeros(2, 3, 5), ValueError, r"x must be \[b, ..., dim\] with dim=4, got \[2, 3, 5\]"),
        ({}, torch.zeros(4), ValueError, r"x must be \[b, ..., dim\] with dim=4, got \[4\]"),
        ({"channel_last": False}, torch.zeros(2, 3, 4), ValueError, r"\[b, dim, ...\] with dim=4, got \[2, 3, 4\]"),
        ({"accept_image_fmap": True}, torch.zeros(2, 4, 3), ValueError, r"\[b, dim, h, w\] with dim=4, got"),
        ({}, torch.zeros(2, 4, dtype=torch.int64), TypeError, "x must be float32, .*got torch.int64"),
        ({}, [[0.0] * 4], TypeError, "x must be a tensor, got list"),
        ({}, torch.zeros(2, 4, device="meta"), ValueError, "codebook is on cpu, x is on meta"),
    ],
)
def test_wrong_inputs(options, x, error, message):
    vq = VectorQuantize(4, 8, kmeans_init=True, **options)
    before = state(vq)
    with pytest.raises(error, match=message):
        vq(x)
    UNCHANGED.same(vq.state_dict(), before)
