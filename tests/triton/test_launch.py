"""What is kept of launches: a call takes the compiled kernel of one before it only where Triton would."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from vqops.triton_kernels import launch


class Stub:
    """Stands for a kernel of triton.jit, which is given options, and for those that it compiles, which are not."""

    arg_names = ()

    def __init__(self, compiles=True):
        self.compiles, self.compiled, self.launched = compiles, 0, []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.launched.append((grid, len(arguments)))
            self.compiled += bool(options)
            return self if self.compiles else None

        return run


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(launch.Kept, "found", {})


def test_the_same_call_does_not_ask_triton_again():
    stub = Stub()
    kernel = launch.Kept(stub)
    for _ in range(3):
        kernel[(4, 2)](torch.zeros(8), None, 5, 0.5, True, num_warps=4)
    assert stub.compiled == 1
    assert stub.launched == [((4, 2), 5), ((4, 2, 1), 5), ((4, 2, 1), 5)]
    kernel[(7,)](torch.ones(8), None, 5, 0.5, True, num_warps=4)  # the grid is kept with it
    kernel[(7,)](torch.ones(8), None, 5, 0.5, True, num_warps=4)
    assert stub.compiled == 2 and stub.launched[-1] == ((7, 1, 1), 5)


def test_what_triton_looks_at_makes_another_call():
    stub = Stub()
    kernel, x = launch.Kept(stub), torch.zeros(64)
    others = [
        (x, None, 16, 4),
        (x.half(), None, 16, 4),
        (x[1:], None, 16, 4),  # not at a multiple of 16 bytes
        (x[4:], None, 17, 4),  # at one
        (x, x, 16, 4),
        (None, x, 16, 4),
        (x, None, 16, 8),
    ]
    for _ in range(2):
        for a, b, number, warps in others:
            kernel[(1,)](a, b, number, num_warps=warps)
    assert stub.compiled == len(others)
    kernel[(1,)](x[4:], None, 16, num_warps=4)
    assert stub.compiled == len(others)
    launch.Kept(Stub())[(1,)](x, None, 16, num_warps=4)  # another kernel
    assert len(launch.Kept.found) == len(others) + 1


def test_the_interpreter_is_asked_each_time():
    stub = Stub(compiles=False)
    for _ in range(2):
        launch.Kept(stub)[(1,)](torch.zeros(4), 3, num_warps=4)
    assert stub.compiled == 2 and not launch.Kept.found


def test_not_more_is_kept_than_the_most():
    kernel, x = launch.Kept(Stub()), torch.zeros(4)
    for number in range(launch.MOST + 10):
        kernel[(1,)](x, number, num_warps=4)
    assert len(launch.Kept.found) == 10


@pytest.mark.parametrize("a, b, expected", [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_cdiv(a, b, expected):
    assert launch.cdiv(a, b) == expected


def of_rows(x, N, D, h_stride, n_stride):
    pass


def test_heads_of_rows_that_are_not_aligned(monkeypatch):
    """test_variants.py counts kernels."""
    asked = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: asked.append(set(kernel.do_not_specialize)))
    kernel = launch.Kept(JITFunction(of_rows, do_not_specialize=["N"]))
    for D in (48, 50, 1):
        kernel[(1,)](torch.zeros(2, 8, D), 8, D, 8 * D, D)
    assert asked == [{"N"}, {"N", "h_stride"}, {"N", "h_stride"}]
