"""Every op fast in plain PyTorch, and exact: for any device without a kernel that is known to be right there.

The search multiplies in float32, bounds the error of every product, and decides in float64 what the bounds leave open
(docs/exactness.md). What is no search is the reference, in blocks of the device's size and, unless PyTorch is to be
deterministic, with sums by code in any order. A file per family; names and arguments are those of `vqops.reference`.
"""

from vqops import reference
from vqops.pytorch.code_sums import code_sums
from vqops.pytorch.host import on_host
from vqops.pytorch.precision import in_full_precision
from vqops.pytorch.quantize import quantize
from vqops.pytorch.quantize_backward import quantize_backward
from vqops.pytorch.residual import residual_quantize, residual_quantize_backward
from vqops.pytorch.sample import sample, sample_topk
from vqops.pytorch.search import nearest, nearest_topk, prepare, search_statistics

assignment_entropy = on_host(in_full_precision(reference.assignment_entropy))
assignment_entropy_backward = on_host(in_full_precision(reference.assignment_entropy_backward))
code_cross_entropy = on_host(in_full_precision(reference.code_cross_entropy))
code_cross_entropy_backward = on_host(in_full_precision(reference.code_cross_entropy_backward))
soft_codes = on_host(in_full_precision(reference.soft_codes))
soft_codes_backward = on_host(in_full_precision(reference.soft_codes_backward))
ema_update_ = on_host(reference.ema_update_, changes=3)

__all__ = [
    "assignment_entropy",
    "assignment_entropy_backward",
    "code_cross_entropy",
    "code_cross_entropy_backward",
    "code_sums",
    "ema_update_",
    "nearest",
    "nearest_topk",
    "prepare",
    "quantize",
    "quantize_backward",
    "residual_quantize",
    "residual_quantize_backward",
    "sample",
    "sample_topk",
    "search_statistics",
    "soft_codes",
    "soft_codes_backward",
]
