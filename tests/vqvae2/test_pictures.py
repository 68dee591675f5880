"""Pictures: every value that was recorded can be seen, what is shown has its name, and few images suffice."""

import numpy as np
import pytest
import torch
from PIL import Image

from vqops.vqvae2.pictures.curves import curves, training_panels
from vqops.vqvae2.pictures.grids import save_grid, save_rows
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
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel()
        assert len(axes.get_legend().get_texts()) == 2
    assert perplexities.get_ylim()[0] == used.get_ylim()[0] == 0


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_have_their_names_at_the_left(tmp_path, channels):
    images = torch.randint(0, 255, (9, channels, 8, 6), dtype=torch.uint8)  # enlarged 16 times
    save_rows(tmp_path / "rows.png", {"a": images, "another row": 255 - images})
    picture = pixels_of(tmp_path / "rows.png")
    shown = 8 * (6 * 16 + 4)
    assert picture.shape[0] == 2 * (8 * 16 + 4)
    names, cells = picture[:, :-shown], picture[:, -shown:]
    above, below = np.split(names, 2)
    assert (above < 128).any()
    assert (below < 128).sum() > 3 * (above < 128).sum()
    last = cells[2:130:16, 7 * 100 + 2 : 800 - 2 : 16]
    assert (last == images[7].expand(3, -1, -1).permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("width", [1, 20, 64])
def test_columns_have_their_names_above(tmp_path, width):
    images = torch.zeros(5, 1, 128, width, dtype=torch.uint8)
    long = "a name that is much longer than the images are wide"
    save_grid(tmp_path / "named.png", images, 3, ["one", "two", long])
    save_grid(tmp_path / "bare.png", images, 3)
    named, bare = pixels_of(tmp_path / "named.png"), pixels_of(tmp_path / "bare.png")
    assert bare.shape == (2 * 132, 3 * (width + 4), 3)
    assert (named[-len(bare) :] == bare).all()
    heads = np.split(named[: -len(bare)], 3, axis=1)
    assert all((head < 128).any() for head in heads)
    assert (bare[132:, 2 * (width + 4) :] == 255).all()  # where a sixth image would be


@pytest.mark.parametrize("shape", [(1, 4), (3, 1)], ids=["one vector", "one dimension"])
def test_the_plane_has_two_axes(shape):
    vectors = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    mean, axes = plane(vectors)
    assert axes.shape == (shape[1], 2)
    assert torch.all(((vectors - mean) @ axes)[:, 1] == 0)
