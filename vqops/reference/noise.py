"""Gumbel noise, to the last bit: a generator that counts (Philox4x32-10) and a logarithm whose steps round separately.

Source of the generator: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, between rounds
ROUNDS = 10
ROOT_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
SERIES = [2 / (2 * n + 1) for n in range(1, 11)]  # of 2 atanh(s) / s - 2, in s^2; the next is below 2^-60 of the sum


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random words of four words of a counter and two of a key: int64 that hold 32 bits, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # of 64 bits; int64 wraps
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + STEPS[0] & WORD, k1 + STEPS[1] & WORD
    return c0, c1, c2, c3


def words(
    seed: Tensor,  # [2] int64, key and offset of the rows
    h: int | Tensor,
    rows: Tensor,  # [..., 1] int64
    codes: slice,  # starts at a multiple of four
) -> Tensor:  # [..., codes] int64 that hold 32 bits
    """The word of each row and code. Four codes share a call of `philox`, whose counter is the row plus seed[1] in 64
    bits, the number of the four, and the head."""
    row = rows + seed[1]
    four = torch.arange(codes.start // 4, -(-codes.stop // 4), device=rows.device)
    head = torch.as_tensor(h, device=rows.device)
    found = philox((row & WORD, row >> 32 & WORD, four, head), (seed[0] & WORD, seed[0] >> 32 & WORD))
    return torch.stack(found, -1).flatten(-2)[..., : codes.stop - codes.start]


def log(t: Tensor) -> Tensor:  # float64, positive and normal
    """e log(2) + 2 atanh(s), by its series: t = m 2^e with m from sqrt(1/2) to sqrt(2), s = (m - 1) / (m + 1)."""
    bits = t.view(torch.int64)
    exponent = bits - ROOT_HALF >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    s = (m - 1) / (m + 1)
    z = s * s
    series = torch.full_like(z, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = series.mul_(z).add_(coefficient)
    return exponent.double() * math.log(2) + (s * 2 + s * z * series)


def gumbel(word: Tensor) -> Tensor:  # int64 that hold 32 bits -> float64
    """-log(-log u) with u = (word + 1/2) / 2^32, from -3.2 to 22.9."""
    u = (word.double() + 0.5) * 2.0**-32
    return -log(-log(u))
