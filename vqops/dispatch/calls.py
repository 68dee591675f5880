"""How a call reaches an op: past what `torch.library` does for autograd, in Python, longer than a small op takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

Calling = Callable[..., Any]  # function(op, *arguments): the op, and views between the caller's shapes and its own
PLAIN = {Tensor, torch.nn.Parameter}


class OpGradient(NamedTuple):
    """As `torch.library.register_autograd` has it; `op` is the one that its backward calls."""

    setup_context: Callable
    backward: Callable
    op: OpOverloadPacket


# Also past what marks views: a Function's result that is one could not be changed in place.
past_autograd = torch._C._AutoDispatchBelowADInplaceOrView

OP_GRADIENTS: dict[OpOverloadPacket, OpGradient] = {}


def call(function: Calling, op: OpOverloadPacket, *arguments: Any, needed: bool = False) -> Any:
    """function(op, *arguments); needed: with a gradient to the first two, x and a codebook or a list of them."""
    if is_transformed():
        return function(op, *arguments)
    if not needed:
        with past_autograd():
            return function(op.default, *arguments)
    x, codes = arguments[:2]
    tensors = (x, *codes) if isinstance(codes, list) else (x, codes)
    if not runs_itself() or any(type(t) not in PLAIN for t in tensors):
        return function(op, *arguments)
    return Differentiable.apply(*tensors, (function, op, arguments))


def as_given(op: OpOverloadPacket, *arguments: Any) -> Any:
    return op(*arguments)


def is_transformed() -> bool:
    """Whether the call becomes a graph, or another call."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def runs_itself() -> bool:
    """Whether nothing but its kernels sees the call: no transform, tracer or mode."""
    if is_transformed() or torch._C._is_tracing():
        return False
    return torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() == 0


def is_captured(device: torch.device) -> bool:
    """Whether the call goes into a CUDA graph, which repeats its kernels and nothing that the host does."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Differentiable(torch.autograd.Function):
    """A call with the gradient of its op. What `torch.library` makes of the same takes four times as long."""

    @staticmethod
    def forward(ctx, *given):
        function, op, arguments = given[-1]
        with past_autograd():
            output = function(op.default, *arguments)
        ctx.of = OP_GRADIENTS[op]
        ctx.of.setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        _, backward, op = ctx.of

        # The op alone: what backward has saved may be computed again when it asks for it, with autograd.
        def run(*arguments):
            if torch.is_grad_enabled() or is_transformed():  # create_graph, is_grads_batched
                return op(*arguments)
            with past_autograd():
                return op.default(*arguments)

        of_x, of_codes, *_ = backward(ctx, *gradients, op=run)
        return of_x, *(of_codes if isinstance(of_codes, list) else [of_codes]), None
