"""Vectors and codes as searches meet them: what a certificate leaves open depends on the data."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.shapes import Shape
from vqops.clustering.lloyd import lloyd
from vqops.vqvae2.data.photographs import training_photographs

SPREAD = 0.1  # of the vectors about their codes, whose values have standard deviation 1
CORRELATION = 0.9  # of a value with the one before it
ROWS_A_CODE, ITERATIONS = 4, 6  # of k-means


def normal(shape: Shape) -> tuple[Tensor, Tensor]:
    """Independent values: the hard case for a certificate relative to the distances."""
    return shape.data("cpu")


def clustered(shape: Shape) -> tuple[Tensor, Tensor]:
    """Each vector near a code: the easy one."""
    noise, codebook = shape.data("cpu")
    chosen = torch.randint(shape.K, (len(noise),), generator=torch.Generator().manual_seed(1))
    return codebook[chosen] + SPREAD * noise, codebook


def correlated(count: int, D: int, generator: torch.Generator) -> Tensor:
    """Each row an autoregressive process of order 1."""
    rows = torch.randn(count, D, generator=generator)
    for column in range(1, D):
        rows[:, column] *= (1 - CORRELATION**2) ** 0.5
        rows[:, column] += CORRELATION * rows[:, column - 1]
    return rows


def patches(count: int, D: int, generator: torch.Generator) -> Tensor:
    """Grey patches of photographs, means kept: many nearly flat among few strong ones."""
    height = next(h for h in range(int(D**0.5), 0, -1) if D % h == 0)
    windows = []
    for photograph in training_photographs():
        grey = photograph.mean(-1, dtype=np.float32) / 255
        windows.append(np.lib.stride_tricks.sliding_window_view(grey, (height, D // height)).reshape(-1, D))
    # So many of each that larger photographs count for more.
    shares = torch.tensor([float(len(each)) for each in windows])
    of_which = torch.multinomial(shares, count, replacement=True, generator=generator)
    rows = torch.empty(count, D)
    for number, each in enumerate(windows):
        at = (of_which == number).nonzero().squeeze(-1)
        rows[at] = torch.from_numpy(each[torch.randint(len(each), (len(at),), generator=generator).numpy()])
    return rows


def trained(draw: Callable[[int, int, torch.Generator], Tensor]) -> Callable[[Shape], tuple[Tensor, Tensor]]:
    """Vectors, and codes that k-means makes of others."""

    def data(shape: Shape) -> tuple[Tensor, Tensor]:
        generator, N = torch.Generator().manual_seed(shape.D * shape.K), shape.N("cpu")
        rows = draw(N + ROWS_A_CODE * shape.K, shape.D, generator)
        others = rows[N:].clone()
        codebook, _ = lloyd(others, others[: shape.K], ITERATIONS, generator)
        return rows[:N].clone(), codebook.float()

    return data


KINDS = {
    "normal": normal,
    "clustered": clustered,
    "correlated": trained(correlated),
    "patches": trained(patches),
}
