"""The contract of each op, a family a file: schema, checks, fake, autograd, and the docstring with the equation."""

from vqops.dispatch.library import implementations
from vqops.ops.checkpointing import check_first_run
from vqops.ops.code_sums import code_sums
from vqops.ops.cross_entropy import code_cross_entropy
from vqops.ops.ema import ema_update_
from vqops.ops.quantize import Quantized, quantize
from vqops.ops.search import PreparedCodebook, nearest, nearest_topk, prepare, search_statistics

__all__ = [
    "PreparedCodebook",
    "Quantized",
    "check_first_run",
    "code_cross_entropy",
    "code_sums",
    "ema_update_",
    "implementations",
    "nearest",
    "nearest_topk",
    "prepare",
    "quantize",
    "search_statistics",
]
