"""What needs float64 on a device without it: on the CPU."""

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from vqops.reference.distance import has_float64


def on_host(function: Callable) -> Callable:
    """The function of tensors and values, computed on the CPU where its first tensor's device has no float64."""

    @wraps(function)
    def run(*arguments, **named):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if has_float64(device):
            return function(*arguments, **named)
        given = {**dict(enumerate(arguments)), **named}
        moved = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in given.items()}
        result = function(*(moved[place] for place in range(len(arguments))), **{name: moved[name] for name in named})
        for key, value in given.items():
            if isinstance(value, Tensor) and moved[key]._version:  # changed in place
                value.copy_(moved[key])
        return tuple(tensor.to(device) for tensor in result) if isinstance(result, tuple) else result

    return run
