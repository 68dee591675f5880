"""Vector quantization for PyTorch: exact, fused ops and the modules built on them."""

from vqops.clustering.ids import unique_ids
from vqops.clustering.residual_kmeans import residual_kmeans
from vqops.clustering.result import ResidualKMeans
from vqops.dispatch.choice import use_implementation
from vqops.dispatch.library import implementations
from vqops.ops.code_sums import code_sums
from vqops.ops.ema import ema_update_
from vqops.ops.entropy import assignment_entropy
from vqops.ops.quantize import Quantized, quantize
from vqops.ops.residual_quantize import ResidualQuantized, residual_quantize
from vqops.ops.sample import sample, sample_topk
from vqops.ops.search import PreparedCodebook, nearest, nearest_topk, prepare, search_statistics
from vqops.ops.soft_codes import soft_codes
from vqops.quantizers.grouped_residual_vq import GroupedResidualVQ
from vqops.quantizers.hierarchical_vq import HierarchicalVQ
from vqops.quantizers.interface.losses import LossBreakdown
from vqops.quantizers.random_projection_quantizer import RandomProjectionQuantizer
from vqops.quantizers.residual_vq import ResidualVQ
from vqops.quantizers.vector_quantize import VectorQuantize

__version__ = "0.1.0"

__all__ = [
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LossBreakdown",
    "PreparedCodebook",
    "Quantized",
    "RandomProjectionQuantizer",
    "ResidualKMeans",
    "ResidualQuantized",
    "ResidualVQ",
    "VectorQuantize",
    "assignment_entropy",
    "code_sums",
    "ema_update_",
    "implementations",
    "nearest",
    "nearest_topk",
    "prepare",
    "quantize",
    "residual_kmeans",
    "residual_quantize",
    "sample",
    "sample_topk",
    "search_statistics",
    "soft_codes",
    "unique_ids",
    "use_implementation",
]
