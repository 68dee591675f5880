"""The gradients of `quantize`; that of the codebook is summed by code as `code_sums` is."""

from functools import partial

from vqops import reference
from vqops.pytorch.code_sums import slots_of

quantize_backward = partial(reference.quantize_backward, slots_of=slots_of)
