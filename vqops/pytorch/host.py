"""What needs float64 on a device without it: on the CPU."""

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from vqops.reference.distance import has_float64


def on_host(function: Callable) -> Callable:
    """The function of tensors and values, computed on the CPU where its first tensor's device has no float64."""

    @wraps(function)
    def run(*arguments):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if has_float64(device):
            return function(*arguments)
        moved = [argument.cpu() if isinstance(argument, Tensor) else argument for argument in arguments]
        result = function(*moved)
        for argument, copy in zip(arguments, moved, strict=True):
            if isinstance(argument, Tensor) and copy._version:  # changed in place
                argument.copy_(copy)
        return tuple(tensor.to(device) for tensor in result) if isinstance(result, tuple) else result

    return run
