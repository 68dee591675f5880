"""Checks of arguments, shared by all ops: each error names the op and the argument, what came and what is allowed."""

from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine"]
Gradient = Literal["straight_through", "rotation", "none"]
METRICS, GRADIENTS = get_args(Metric), get_args(Gradient)
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")


def check_choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {x.device}; both must be on one device")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], axes: str) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {axes} = {list(shape)}, got {list(tensor.shape)}")


def check_codebook(op: str, codebook: Tensor) -> None:
    check_floating(op, codebook=codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{op}: codebook must be [K, D] or [H, K, D], got {list(codebook.shape)}")
    if 0 in codebook.shape:
        raise ValueError(f"{op}: codebook must have at least one code of one dimension, got {list(codebook.shape)}")


def check_search(
    op: str, x: Tensor, codebook: Tensor, mask: Tensor | None, metric: str, rows: tuple[str, ...] = ("N",)
) -> None:
    check_floating(op, x=x)
    check_codebook(op, codebook)
    check_choice(op, "metric", metric, METRICS)
    check_device(op, x, codebook=codebook, mask=mask)
    if codebook.dim() == 3 and x.dim() != len(rows) + 2:
        raise ValueError(f"{op}: x must be [H, {', '.join(rows)}, D] for a codebook [H, K, D], got {list(x.shape)}")
    if x.dim() == 0 or x.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"{op}: codebook has D={codebook.shape[-1]}, x has {'no' if x.dim() == 0 else f'D={x.shape[-1]}'}"
        )
    if codebook.dim() == 3 and x.shape[0] != codebook.shape[0]:
        raise ValueError(f"{op}: codebook has H={codebook.shape[0]}, x has H={x.shape[0]}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, True for the rows to quantize, got {mask.dtype}")
    check_shape(op, "mask", mask, x.shape[:-1], "of x without D")


def check_number(op: str, name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")


def check_scalar(op: str, name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A positive number, or a tensor of one, as a tensor in the dtype of x's results."""
    if isinstance(value, Tensor):
        check_floating(op, **{name: value})
        check_shape(op, name, value, (), "()")
        check_device(op, x, **{name: value})
        return value
    check_number(op, name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
    return torch.full((), value, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def check_weight(op: str, weight: Tensor | None, rows: tuple[int, ...]) -> None:
    if weight is not None:
        check_floating(op, weight=weight)
        check_shape(op, "weight", weight, rows, "of x without D")


def check_indices(op: str, indices: Tensor, num_codes: int, name: str = "indices") -> None:
    """Indices are -1 or a code. On the CPU an error; elsewhere a device-side assertion, without a synchronisation."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {indices.dtype}")
    if torch.compiler.is_compiling() or indices.numel() == 0:
        return
    lowest, highest = indices.aminmax()
    message = f"{op}: {name} must be -1 or a code in [0, {num_codes})"
    if indices.device.type == "cpu":
        if lowest < -1 or highest >= num_codes:
            raise IndexError(f"{message}, got values from {int(lowest)} to {int(highest)}")
    else:
        torch._assert_async((lowest >= -1) & (highest < num_codes), message)
