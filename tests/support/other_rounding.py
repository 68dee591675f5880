"""PyTorch as on another processor: VQOPS_TEST_ROUNDING=other makes the tests run with this.

Products, convolutions, reductions and transcendental functions come out with each inexact value moved by up to one
unit in the last place. Which ones are moved depends on shapes, strides, dtypes and the number of threads, as it does in
real libraries, so that equal calls still give equal bits; a test that demands more than that fails on every machine.
"""

import threading
import zlib

import torch
from torch import Tensor

# Not index_add_ and its like: they add one value to another, which IEEE 754 rounds in one way only.
ROUNDED = """
    mm bmm addmm addmv addbmm baddbmm dot mv convolution convolution_backward
    sum sum.dim_IntList mean mean.dim prod prod.dim_int cumsum var.correction std.correction var_mean.correction
    norm.Scalar norm.ScalarOpt_dim linalg_vector_norm logsumexp
    _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm native_batch_norm_backward
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    exp exp_ log log_ log2 log1p expm1 sqrt sqrt_ rsqrt rsqrt_ sin cos tanh tanh_ sigmoid sigmoid_ erf hypot atan2
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar pow_.Scalar gelu gelu_backward silu softplus
    addcmul addcmul_ addcdiv addcdiv_ lerp.Scalar lerp.Tensor lerp_.Scalar lerp_.Tensor
    _cdist_forward _cdist_backward _euclidean_dist embedding_dense_backward
    upsample_bilinear2d upsample_bilinear2d_backward _upsample_bilinear2d_aa upsample_bicubic2d
    avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d
    mse_loss mse_loss_backward nll_loss_forward nll_loss_backward
"""

inside = threading.local()  # a kernel that calls another rounds once


def float64(value):
    """A copy in float64, so that a kernel which writes into its arguments spoils none."""
    if isinstance(value, Tensor):
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(float64, value))
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def layout(value):
    if isinstance(value, Tensor):
        return (*value.shape, *value.stride(), value.dtype)
    return tuple(map(layout, value)) if isinstance(value, (list, tuple)) else str(value)


def moved(result: Tensor, in_float64: Tensor, seed: int) -> Tensor:
    """`result` with its inexact values moved; in_float64 shows which those are. Of float64, chance seldom leaves a
    value that float32 holds. What is rounded to 16 bits at the end is moved before."""
    exact = (result.float() if result.dtype == torch.float64 else in_float64).double() == result.double()
    value = in_float64 if result.dtype.itemsize == 2 else result.double()
    unit = 2.0**-52 if result.dtype == torch.float64 else 2.0**-23
    places = torch.randint(-1, 2, result.shape, generator=torch.Generator().manual_seed(seed))
    other = (value * (1 + places * unit)).to(result.dtype)
    return result.copy_(other.where(other.isfinite() & ~exact, result))


def floats(result) -> list[Tensor]:
    results = [result] if isinstance(result, Tensor) else result
    return [t for t in results if isinstance(t, Tensor) and t.is_floating_point()]


def round_otherwise(library: torch.library.Library, name: str) -> None:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def run(keys, *arguments, **named):
        a_product = name.startswith("pow") and not isinstance(arguments[1], Tensor) and arguments[1] == 2
        if a_product or getattr(inside, "kernel", False):
            return kernel.call_boxed(keys, *arguments, **named)
        inside.kernel = True
        try:
            call = name, layout(arguments), layout([*named.values()]), torch.get_num_threads()
            seed = zlib.crc32(repr(call).encode())
            doubled = float64(arguments), {key: float64(value) for key, value in named.items()}
            with torch.no_grad():
                in_float64 = kernel.call_boxed(keys, *doubled[0], **doubled[1])
                result = kernel.call_boxed(keys, *arguments, **named)
                for number, (one, other) in enumerate(zip(floats(result), floats(in_float64), strict=True)):
                    moved(one, other, seed + number)
            return result
        finally:
            inside.kernel = False

    library.impl(name, run, "CPU", with_keyset=True)


overrides = torch.library.Library("aten", "IMPL")  # for as long as the process lives
for name in ROUNDED.split():
    round_otherwise(overrides, name)
