"""IDs by hand: who shares one, and the position that tells them apart."""

import inspect
import textwrap

import pytest
import torch
from promises import INDICES
from torch.testing import assert_close

from vqops import unique_ids
from vqops.clustering.ids import collisions

HAND = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 0], [3, 1, 2], [0, 1, 2], [3, 0, 0]])


def test_collisions_by_hand():
    rate, distinct = collisions(HAND)
    assert_close(rate, torch.tensor([6, 4, 3], dtype=torch.float64) / 6)  # 0 and 3; (0, 1); (0, 1, 2)
    INDICES.same(distinct, torch.tensor([2, 3, 4]))


def test_rows_without_an_index_do_not_collide():
    indices = torch.tensor([[-1, -1], [-1, -1], [4, 4], [4, -1], [4, -1]])
    rate, distinct = collisions(indices)
    assert rate.tolist() == [1, 0] and distinct.tolist() == [1, 1]
    rate, distinct = collisions(indices[:2])
    assert rate.tolist() == [0, 0] and distinct.tolist() == [0, 0]


def test_the_last_position_by_hand():
    INDICES.same(unique_ids(HAND)[:, -1], torch.tensor([0, 1, 0, 0, 2, 0]))
    INDICES.same(unique_ids(HAND)[:, :-1], HAND)


def test_rows_without_an_id_stay_without():
    indices = torch.tensor([[-1, -1], [0, -1], [0, 0], [-1, -1], [0, 0]])
    INDICES.same(unique_ids(indices)[:, -1], torch.tensor([-1, -1, 0, -1, 1]))


@pytest.mark.parametrize("N, K", [(300, 4), (300, 1), (1, 1), (300, 2**62)])
def test_ids_are_unique_and_the_lines_of_the_docstring(N, K):
    indices = torch.randint(-1, K, (N, 3))
    if K > 4:
        indices = indices[torch.randint(N, (N,))]
    lines = inspect.getdoc(unique_ids).partition("Equivalent to:\n")[2]
    names = {"torch": torch}
    exec(f"def equivalent(indices):\n{textwrap.indent(textwrap.dedent(lines), '    ')}", names)
    found = unique_ids(indices)
    INDICES.same(found, names["equivalent"](indices))
    whole = found[(indices >= 0).all(1)]
    assert len(whole.unique(dim=0)) == len(whole)


def test_no_rows():
    assert unique_ids(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize(
    "indices, error, words",
    [
        (torch.zeros(3, 2), TypeError, "unique_ids: indices must be an int64 tensor, got torch.float32"),
        ([[1]], TypeError, "unique_ids: indices must be an int64 tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"indices must be \[N, Q\] with a level at least, got \[3\]"),
        (torch.zeros(3, 0, dtype=torch.int64), ValueError, r"got \[3, 0\]"),
        (torch.tensor([[-2]]), ValueError, "indices must be -1 or a code, got -2"),
    ],
)
def test_refused(indices, error, words):
    with pytest.raises(error, match=words):
        unique_ids(indices)
