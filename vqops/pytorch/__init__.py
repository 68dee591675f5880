"""Every op fast in plain PyTorch, and exact: for any device without a kernel that is known to be right there.

The search multiplies in float32, bounds the error of every product, and decides in float64 what the bounds leave open
(docs/exactness.md). What is no search is the reference, in blocks of the device's size and, unless PyTorch is to be
deterministic, with sums by code in any order. A file per family; names and arguments are those of `vqops.reference`.
"""

from vqops import reference
from vqops.pytorch.code_sums import code_sums
from vqops.pytorch.host import on_host
from vqops.pytorch.quantize import quantize
from vqops.pytorch.quantize_backward import quantize_backward
from vqops.pytorch.sample import sample, sample_topk
from vqops.pytorch.search import nearest, nearest_topk, prepare, search_statistics

code_cross_entropy = on_host(reference.code_cross_entropy)
code_cross_entropy_backward = on_host(reference.code_cross_entropy_backward)
ema_update_ = on_host(reference.ema_update_, changes=3)

__all__ = [
    "code_cross_entropy",
    "code_cross_entropy_backward",
    "code_sums",
    "ema_update_",
    "nearest",
    "nearest_topk",
    "prepare",
    "quantize",
    "quantize_backward",
    "sample",
    "sample_topk",
    "search_statistics",
]
