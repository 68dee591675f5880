"""Pictures: every value that was recorded can be seen, and few images suffice."""

import pytest
import torch

from vqops.vqvae2.pictures.curves import curves, training_panels
from vqops.vqvae2.pictures.latents import plane


@pytest.mark.parametrize("steps", [1, 40])
def test_every_point_is_in_sight(steps):
    rows = []
    for step in range(steps):
        row = {"step": 10 * step, "loss": 1.0, "mse": 0.1 / (step + 1), "perplexity_top": 30.0 + 11 * step}
        rows.append(row | {"perplexity_bottom": 480.0, "used_top": step / steps, "used_bottom": 1.0})
        if step % 5 == 0:
            rows[-1]["val_mse"] = 0.2 / (step + 1)
    errors, perplexities, used = curves(rows, training_panels(rows)).axes
    assert [len(axes.lines) for axes in (errors, perplexities, used)] == [2, 2, 2]
    for axes in (errors, perplexities, used):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for line in axes.lines:
            assert all(left <= x <= right and bottom <= y <= top for x, y in line.get_xydata())
    assert perplexities.get_ylim()[0] == used.get_ylim()[0] == 0


@pytest.mark.parametrize("shape", [(1, 4), (3, 1)], ids=["one vector", "one dimension"])
def test_the_plane_has_two_axes(shape):
    vectors = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    mean, axes = plane(vectors)
    assert axes.shape == (shape[1], 2)
    assert torch.all(((vectors - mean) @ axes)[:, 1] == 0)
