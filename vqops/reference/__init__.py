"""Every op in a few lines of PyTorch: the specification, the oracle of the tests, and the fallback on
any device with float64.

A file per family. Nothing here is of size N x K: rows and codes are walked in blocks of at most 64 MB; soft
assignments also hold the codes of a head, and gradients to codes, in float64.
Arguments come in the ops' shapes and are not checked; the functions of `vqops.ops` document errors and defaults.

Axis letters: H codebooks (heads), N vectors, D dimensions, K codes, Q levels.
"""

from vqops.reference.code_sums import RUN, code_sums
from vqops.reference.cross_entropy import code_cross_entropy, code_cross_entropy_backward
from vqops.reference.distance import TINY
from vqops.reference.ema import ema_update_
from vqops.reference.entropy import assignment_entropy, assignment_entropy_backward
from vqops.reference.quantize import quantize
from vqops.reference.quantize_backward import LARGEST_SCALE, quantize_backward
from vqops.reference.residual import residual_quantize, residual_quantize_backward
from vqops.reference.sample import sample, sample_topk
from vqops.reference.search import nearest, nearest_topk, prepare, search_statistics
from vqops.reference.soft_codes import soft_codes, soft_codes_backward

__all__ = [
    "LARGEST_SCALE",
    "RUN",
    "TINY",
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
