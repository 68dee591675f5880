"""What needs float64 on a device without it: on the CPU."""

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from vqops.reference.distance import has_float64


def on_host(function: Callable, changes: int = 0) -> Callable:
    """The function of tensors and values, computed on the CPU where its first tensor's device has no float64.

    It changes its first `changes` arguments in place.
    """

    @wraps(function)
    def run(*arguments, **named):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if has_float64(device):
            return function(*arguments, **named)
        given = {**dict(enumerate(arguments)), **named}
        moved = {key: on_cpu(value) for key, value in given.items()}
        result = function(*(moved[place] for place in range(len(arguments))), **{name: moved[name] for name in named})
        for place in range(changes):
            if isinstance(given[place], Tensor):
                given[place].copy_(moved[place])
        return tuple(tensor.to(device) for tensor in result) if isinstance(result, tuple) else result

    return run


def on_cpu(value):
    if isinstance(value, list):
        return [on_cpu(each) for each in value]
    return value.cpu() if isinstance(value, Tensor) else value
