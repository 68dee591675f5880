"""Calls of a quantizer that fail halfway, as where a rank is lost."""

from contextlib import contextmanager

import pytest

from vqops.quantizers.codebook import codebook, steps

PLACES = ["sum_over_ranks", "move_averages_", "choose_rows", "project_out"]  # what a training step comes to in turn


def fail(*_, **__):
    raise RuntimeError("lost rank")


@contextmanager
def failing(vq, place: str):
    """A training step within fails at this place."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="lost rank"):
        if place == "project_out":
            patch.setattr(vq.project_out, "forward", fail)
        else:
            patch.setattr(codebook if place == "move_averages_" else steps, place, fail)
        yield
