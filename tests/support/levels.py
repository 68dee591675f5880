"""Cases of residual quantization, and fewer of them for Triton's interpreter."""

import pytest
import torch
from implementations import INTERPRETED

from vqops.check.inputs import SEARCHES

WAYS = (("euclidean", True), ("cosine", True), ("cosine", False))  # the metric, and normalize
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TINY = 1e-6
INTERPRETED_SEARCHES = (
    *("heads", "one_row", "one_code", "one_dimension", "no_rows", "deep", "denormal", "overflowing", "huge_rows"),
    *("one_code_x_1e37", "duplicates", "zero_rows", "not_finite_rows", "not_finite_codes", "no_finite_code"),
)


def is_interpreted(implementation):
    return (implementation.name, implementation.device.type) == INTERPRETED


def rows(implementation, number):
    """Fewer in Triton's interpreter, where each costs milliseconds."""
    return max(2, number // 12) if is_interpreted(implementation) else number


def rows_and_codes(kernel, case):
    """Searches of each kind are tested in test_search.py; the interpreter takes seconds for those of all levels."""
    if is_interpreted(kernel) and case not in INTERPRETED_SEARCHES:
        pytest.skip("in the interpreter some cases stand for all")
    return SEARCHES[case]()


def on_cpu(found):
    """All results, one behind the other."""
    return [t.cpu() for field in found for t in (field if isinstance(field, list) else [field])]
