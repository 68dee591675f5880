"""What the tests are compared with: equality to the bit, and PyTorch that rounds otherwise."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import processor
import pytest
import torch
from promises import ORDER


@pytest.mark.parametrize(
    "found, expected",
    [
        (torch.ones(3), torch.full((3,), 1 + 2.0**-23)),
        (torch.ones(3), torch.ones(3).double()),
        (torch.ones(3), torch.ones(1, 3)),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan])),
        ({"a": torch.ones(3)}, {"b": torch.ones(3)}),
        ([torch.ones(3)], [torch.ones(3), torch.ones(3)]),
        (1.0, 1 + 2.0**-52),
    ],
)
def test_what_is_not_the_same(found, expected):
    with pytest.raises(AssertionError):
        ORDER.same(found, expected)


def test_a_difference_names_the_promise():
    with pytest.raises(AssertionError, match=r"(?s)sums: distances, .* fixed order.*1 / 3"):
        ORDER.same(torch.ones(3), torch.tensor([1.0, 2.0, 1.0]), where="sums")


def test_what_is_the_same():
    ORDER.same((torch.ones(2), {"a": 2}), [torch.ones(2), {"a": 2}])
    ORDER.same(np.ones(2, np.uint16), torch.ones(2, dtype=torch.uint16))
    ORDER.same(torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0]), equal_nan=True)


ROUNDED = """
import torch
import processor
x, layer = torch.randn(12, 64), torch.nn.Linear(64, 80)
assert layer(x).equal(layer(x))
assert not layer(x)[:2].equal(layer(x[:2])) and not layer(x).equal(layer(x.T.contiguous().T))
torch.testing.assert_close(layer(x)[:2], layer(x[:2]))
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    values = torch.arange(21.0).to(dtype)
    assert values.sum() == 210 and values.exp()[0] == 1 and values.pow(2)[11] == 121
error = (torch.arange(80.0).exp().double() / torch.arange(80.0).double().exp() - 1).abs()
assert 2.0**-24 < error.max() < 2.0**-22
"""


def test_another_rounding_moves_what_is_rounded():
    environment = processor.environment(VQOPS_TEST_ROUNDING="other")
    command = [sys.executable, "-W", "ignore", "-c", ROUNDED]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
