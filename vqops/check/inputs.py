"""Inputs of the search that have gone wrong somewhere, by name: each builds x [H, N, D] and codebook [H, K, D]."""

import math

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


def normal(H: int, N: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    return torch.randn(H, N, D), torch.randn(H, K, D)


def off_centre(offset: float):
    return lambda: tuple(t + offset for t in normal(1, 120, 65, 12))


def scaled(x_scale: float, c_scale: float):
    def build():
        x, c = normal(1, 100, 65, 12)
        return x * x_scale, c * c_scale

    return build


def one_huge_code(scale: float):
    def build():
        x, c = normal(1, 100, 65, 12)
        c[0, 7] *= scale
        return x, c

    return build


def duplicates():
    x, c = normal(1, 100, 33, 12)
    return x, c.repeat(1, 3, 1)


def identical():
    x, c = normal(1, 100, 1, 12)
    return x, c.repeat(1, 150, 1)


def zero_codebook():
    x, c = normal(2, 110, 70, 9)
    return x, torch.zeros_like(c)


def zero_rows():
    x, c = normal(1, 60, 70, 9)
    x[0, ::3] = 0
    c[0, ::5] = 0
    return x, c


def near_ties():
    """Codes on both sides of each row, at distances that differ in the last bits of float32 or not at all."""
    x, _ = normal(1, 64, 1, 12)
    step = torch.zeros(12)
    step[3] = 1
    ulp = torch.nextafter(torch.ones(()), torch.full((), 2.0))
    c = torch.cat([x[0] + step, x[0] - step * ulp, x[0] - step, x[0] + step * ulp])
    return x, c[None]


def collapsed():
    """Codes within 1e-6 of each other, rows as close."""
    x, c = normal(1, 80, 200, 8)
    return 1 + x * 1e-6, 1 + c * 1e-6


def on_the_codes():
    _, c = normal(1, 1, 90, 12)
    return c[:, torch.randint(90, (100,))].clone(), c


def not_finite_rows():
    x, c = normal(2, 60, 40, 7)
    for n, value in enumerate([NAN, INF, -INF]):
        x[0, 5 * n, n] = value
    x[1] = NAN
    return x, c


def not_finite_codes():
    x, c = normal(2, 60, 40, 7)
    for k, value in enumerate([NAN, INF, -INF]):
        c[0, 3 * k, k] = value
    return x, c


def no_finite_code():
    x, c = normal(1, 20, 10, 7)
    return x, torch.full_like(c, NAN)


def heavy_tails():
    x, c = normal(1, 100, 130, 16)
    return x * torch.exp(3 * torch.randn(1, 100, 1)), c * torch.exp(3 * torch.randn(1, 130, 1))


def integers():
    """Many exact ties, all of which float32 represents."""
    return torch.randint(-2, 3, (1, 200, 4)).float(), torch.randint(-2, 3, (1, 60, 4)).float()


SEARCHES = {
    "normal": lambda: normal(1, 150, 129, 16),
    "heads": lambda: normal(3, 50, 40, 11),
    "one_row": lambda: normal(1, 1, 100, 16),
    "one_code": lambda: normal(1, 50, 1, 5),
    "one_dimension": lambda: normal(1, 70, 65, 1),
    "one_of_all": lambda: normal(1, 1, 1, 1),
    "no_rows": lambda: normal(2, 0, 9, 5),
    "odd_sizes": lambda: normal(1, 131, 67, 63),
    "deep": lambda: normal(1, 40, 50, 515),
    "offset_100": off_centre(100.0),
    "offset_10000": off_centre(1e4),
    "tiny": scaled(1e-20, 1e-20),
    "denormal": scaled(1e-41, 1e-41),
    "huge": scaled(1e18, 1e18),
    "overflowing": scaled(1e30, 1e30),
    "huge_rows": scaled(1e30, 1.0),
    "far_codes": scaled(1.0, 1e25),
    "one_code_x_1e3": one_huge_code(1e3),
    "one_code_x_1e15": one_huge_code(1e15),
    "one_code_x_1e37": one_huge_code(1e37),
    "duplicates": duplicates,
    "identical": identical,
    "zero_codebook": zero_codebook,
    "zero_rows": zero_rows,
    "near_ties": near_ties,
    "collapsed": collapsed,
    "on_the_codes": on_the_codes,
    "not_finite_rows": not_finite_rows,
    "not_finite_codes": not_finite_codes,
    "no_finite_code": no_finite_code,
    "heavy_tails": heavy_tails,
    "integers": integers,
}
