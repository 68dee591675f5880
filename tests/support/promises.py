"""What vqops promises to the last bit: a test that demands equal bits names the promise that it checks.

    INDICES.same(found, expected)

Everything else is compared with assert_close. PyTorch's products, convolutions, reductions and vectorised functions
round differently between shapes, layouts, numbers of threads and processors: a test that holds on one machine can fail
on the next. other_rounding.py shows on any machine which tests would.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.testing import assert_close


class Promise:
    """Why two results, computed in different ways, are the same bits."""

    def __init__(self, text: str):
        self.text = text

    def same(self, found, expected, *, equal_nan: bool = False, where: str = "") -> None:
        """Tensors, arrays, or sequences and mappings of them: equal in value, shape and dtype. -0 is 0."""
        why = f"{where}: {self.text}" if where else self.text
        assert_close(
            tensors(found), tensors(expected), rtol=0, atol=0, equal_nan=equal_nan, msg=lambda text: f"{why}\n{text}"
        )


def tensors(value):
    """With tensors in the place of arrays, and lists and dicts in that of other sequences and mappings."""
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, Mapping):
        return {key: tensors(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensors(item) for item in value]
    return value


INDICES = Promise("indices, counts and tiers follow from the values given, whatever computes them and in which batch")
ORDER = Promise("distances, errors, sums and averages by code are added and rounded in one fixed order")
COPIES = Promise("values that are looked up, moved, cut out or stored are taken as they are")
WHOLE = Promise("sums of whole numbers, none of which is rounded, do not depend on the order of addition")
RANKS = Promise("every rank holds the same codebook")
UNCHANGED = Promise("a call that fails, or that has nothing to update, leaves every value as it was")
REPEATS = Promise("the same calls with the same values, seed and number of threads give the same bits on one machine")
