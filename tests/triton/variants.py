"""Prints, as JSON lines, the kernels that series of calls need, each when it is first needed. Compiles nothing.

    python tests/triton/variants.py

The calls of a series differ in their numbers of rows and codes.
"""

import json

import torch
from compiler import Launches, replace_launches

# The first has its codes in parts, and so do those with fewer rows. 20000 rows fill the processors.
SIZES = [
    (4096, 512), (4095, 512), (4094, 513), (4097, 1000), (20000, 512), (20001, 513), (20002, 1000), (1, 512), (17, 1),
    (1, 1),
]  # fmt: skip
# Heads, dimensions, with mask and weights, metric.
SERIES = [
    (1, 64, False, "euclidean"), (1, 63, True, "cosine"), (2, 64, True, "euclidean"), (2, 63, False, "euclidean"),
    (3, 24, True, "cosine"), (1, 1, False, "cosine"), (2, 1, True, "euclidean"),
]  # fmt: skip


class Needed(Launches):
    def new(self, kernel, *_):
        print(json.dumps({**self.case, "kernel": kernel.__name__}))


def calls(N: int, K: int, H: int, D: int, masked: bool, metric: str):
    from vqops.triton_kernels import (
        code_sums,
        ema,
        gather,
        quantize,
        quantize_backward,
        residual,
        residual_backward,
        search,
    )

    x, codebook = torch.zeros(H, N, D), torch.zeros(H, K, D)
    size, error, indices = torch.zeros(H, K), torch.zeros(H, N), torch.zeros(H, N, dtype=torch.int64)
    mask, weight = (torch.ones(H, N, dtype=torch.bool), error) if masked else (None, None)
    quantize.quantize(x, codebook, mask, weight, metric, code_sums=True)
    search.nearest_topk(x, codebook, 8 if N > 1 else 5, mask, metric)
    search.nearest(x.double(), codebook, mask, metric)
    code_sums.atomic(x, indices, K, weight)
    added = weight, *code_sums.no_sums(x, K, weight)
    gather.gather(x, codebook, indices, mask, metric == "cosine", *added)
    quantize_backward.quantize_backward(x, error, x, codebook, indices, mask, metric, "rotation", 1.0, True, True, True)
    levels = torch.tensor(2)
    codes = residual.residual_quantize(x, [codebook] * 3, mask, levels, metric, code_sums=True)
    back = x, error[:, :1].expand(H, 3), x, codes[5], [K] * 3, codes[1], mask, levels, metric, "rotation", True, 1.0
    residual_backward.residual_quantize_backward(*back, True, True, True)
    ema.ema_update_(size, codebook, codebook, size, codebook, torch.tensor(0.9), weight=size, metric=metric)


def main() -> None:
    needed = Needed(90)
    replace_launches(needed)
    for series in SERIES:
        needed.needed.clear()
        for number, (N, K) in enumerate(SIZES):
            needed.case = {"series": series, "N": N, "K": K, "first": number == 0}
            calls(N, K, *series)


if __name__ == "__main__":
    main()
