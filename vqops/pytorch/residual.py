"""Residual quantization, of which the searches and the sums by code are those of this folder."""

from functools import partial

from vqops import reference
from vqops.pytorch.code_sums import code_sums
from vqops.pytorch.host import on_host
from vqops.pytorch.quantize_backward import quantize_backward
from vqops.pytorch.search import nearest

residual_quantize = on_host(partial(reference.residual_quantize, find_nearest=nearest, sum_codes=code_sums))
residual_quantize_backward = on_host(partial(reference.residual_quantize_backward, backward_of_level=quantize_backward))
