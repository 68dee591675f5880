"""Quantize: search, gather and, if asked, the sums of an EMA update, which read x once more if they are in order."""

import torch

from vqops.triton_kernels.code_sums import code_sums as sum_codes
from vqops.triton_kernels.code_sums import in_order, no_sums
from vqops.triton_kernels.gather import gather
from vqops.triton_kernels.search import nearest


def quantize(
    x,
    codebook,
    mask=None,
    weight=None,
    metric="euclidean",
    gradient="straight_through",
    code_sums=False,
    codebook_error_scale=0.0,
    normalize=True,
    snapshot=True,
    prepared=None,
):
    indices = nearest(x, codebook, mask, metric, prepared)
    units, K = metric == "cosine" and normalize, codebook.shape[1]
    if code_sums and not in_order(x):
        counts, sums = no_sums(x, K, weight)
        quantized, error, _ = gather(x, codebook, indices, mask, units, weight, counts, sums)
    else:
        quantized, error, norms = gather(x, codebook, indices, mask, units)
        counts, sums = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
        if code_sums:
            counts, sums = sum_codes(x, indices, K, weight, norms)
    old = codebook.clone(memory_format=torch.contiguous_format) if snapshot else codebook.new_empty(0)
    return quantized, indices, error, counts, sums, old
