"""Vector quantization for PyTorch: exact, fused ops and the modules built on them."""

from vqops.ops import (
    PreparedCodebook,
    Quantized,
    code_sums,
    ema_update_,
    implementations,
    nearest,
    nearest_topk,
    prepare,
    quantize,
    search_statistics,
)
from vqops.quantizers import LossBreakdown, VectorQuantize

__version__ = "0.1.0"

__all__ = [
    "LossBreakdown",
    "PreparedCodebook",
    "Quantized",
    "VectorQuantize",
    "code_sums",
    "ema_update_",
    "implementations",
    "nearest",
    "nearest_topk",
    "prepare",
    "quantize",
    "search_statistics",
]
