"""A small ResidualVQ, in each of the ways that its levels are taken."""

import pytest

from vqops import ResidualVQ

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
