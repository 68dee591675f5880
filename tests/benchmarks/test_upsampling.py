"""The ways to double a map that are compared, and the spectrum that shows a checkerboard."""

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.upsampling import WAYS, excess, spectrum

NOISE = torch.randn(200, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS, COLUMNS = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")


@pytest.mark.parametrize("way", WAYS)
def test_ways_double_a_map(way):
    assert WAYS[way](8, 3)(torch.randn(2, 8, 5, 7)).shape == (2, 3, 10, 14)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "transposed"])
def test_what_is_flat_starts_flat(way):
    torch.manual_seed(0)
    inside = WAYS[way](8, 3)(torch.ones(1, 8, 6, 6))[:, :, 2:-2, 2:-2]
    assert inside.std((2, 3)).max() < 1e-5


def test_noise_is_even():
    for values in spectrum(NOISE).values():
        assert values == pytest.approx([1] * 17, abs=0.2)


@pytest.mark.parametrize("pattern, shown_in", [(ROWS + COLUMNS, "diagonal"), (ROWS, "straight"), (COLUMNS, "straight")])
def test_a_pattern_of_single_pixels_is_seen(pattern, shown_in):
    images = spectrum(NOISE)
    for direction, values in spectrum(NOISE + 0.3 * (-1.0) ** pattern).items():
        assert (excess(values, images[direction]) > 5) == (direction == shown_in)
