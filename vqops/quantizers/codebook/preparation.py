"""The preparation of codes that stay as they are for many searches: in eval, and frozen in training."""

from contextlib import nullcontext

import torch
from torch import Tensor

from vqops.dispatch.calls import PLAIN
from vqops.dispatch.library import define, is_compiled, kernels, resolve, takes_cpu_kernel
from vqops.ops.checks import Metric
from vqops.ops.search import PreparedCodebook, version_of


class KeptPreparation:
    """The last preparation, made again as soon as the values of the codes are others.

    Their values say so, by a hash: not every way of changing a tensor counts its version. On a CPU alone, where a hash
    costs far less than a preparation.
    """

    def __init__(self, shape: tuple[int, int, int]):  # H, K, D
        self.shape = shape
        self.size = kernels.packed_bytes("cpu", *shape) if is_compiled("prepare", "cpu") else 0
        self.memory: tuple[Tensor, Tensor] | None = None  # one assignment, for threads: what is packed, its stamp

    def of(self, codes: Tensor, metric: Metric, x: Tensor) -> PreparedCodebook | None:  # [H, K, D], [H, N, D]
        """The preparation for a search of x, if this is where one is kept."""
        if self.size == 0 or codes.shape != self.shape or not can_be_kept(codes):
            return None
        memory = self.memory
        if memory is None or (not torch.compiler.is_compiling() and memory[0].is_inference()):
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                packed = torch.empty(self.size, dtype=torch.uint8, device="cpu")
                memory = packed, torch.zeros(2, dtype=torch.int64, device="cpu")
            self.memory = memory
        packed, stamp = memory
        torch.ops.vqops.keep_prepared_(x, codes, packed, stamp, metric)
        return PreparedCodebook(codes, packed, metric, resolve(None), version_of(codes))

    def __reduce__(self):
        return KeptPreparation, (self.shape,)  # a copy makes its own


def can_be_kept(codes: Tensor) -> bool:
    # What is exported or traced must not depend on a tensor that is no state of the module.
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing() or torch._C._functorch.maybe_current_level()
    if not torch.compiler.is_compiling():  # of which a mode is no part
        traced = traced or type(codes) not in PLAIN or torch._C._len_torch_dispatch_stack() > 0
    return not traced and takes_cpu_kernel(codes)


def keep_prepared_(x: Tensor, codebook: Tensor, packed: Tensor, stamp: Tensor, metric: str) -> None:
    """Nothing: only the CPU's kernels have a preparation that is kept."""


define(
    "keep_prepared_",
    "(Tensor x, Tensor codebook, Tensor(a!) packed, Tensor(b!) stamp, str metric) -> ()",
    keep_prepared_,
    everywhere=keep_prepared_,
)
