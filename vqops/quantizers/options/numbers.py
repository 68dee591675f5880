"""Numbers that may change between steps: a compiled step takes them as tensors, so that a new value is no new graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqops.dispatch.calls import is_captured, runs_itself
from vqops.quantizers.options.checks import as_number, check_needs


class Numbers(nn.Module):
    """Numbers by name, each as a float for the host and as a 0-d float32 buffer for the ops.

    The buffers, which are in no state_dict, follow the floats, also after a cast or a new allocation.
    `positive` says of each whether it is above 0: what a graph may branch on.
    """

    def __init__(self, **values: float):
        super().__init__()
        self.values: dict[str, float] = {}
        self.positive: dict[str, bool] = {}
        for name, value in values.items():
            self.register_buffer(name, torch.empty((), dtype=torch.float32), persistent=False)
            self.set(name, value)

    def set(self, name: str, value: float) -> None:
        self.values[name], self.positive[name] = float(value), value > 0
        with torch.no_grad():
            self._buffers[name].fill_(value)

    def __getitem__(self, name: str) -> Tensor:  # ()
        """A copy, which a backward may keep while the number changes."""
        return self._buffers[name].clone()

    def times(self, t: Tensor, name: str) -> Tensor:
        """t times the number, which is 1 as often as not."""
        one = runs_itself() and self.values[name] == 1 and not is_captured(t.device)
        return t if one else t * self[name]

    def follow_(self, tensor: Tensor) -> None:
        """To the device of a tensor and back to float32, after what bypasses `_apply`: trainers that cast, and a
        state_dict that is assigned to a module without memory."""
        first, device = next(iter(self._buffers.values())), tensor.device
        if first.dtype == torch.float32 and first.device == device:  # what befalls one befalls all
            return
        for name in self._buffers:
            self._restore(name, device)

    def _restore(self, name: str, device: torch.device) -> None:
        self._buffers[name] = torch.full((), self.values[name], dtype=torch.float32, device=device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            self._restore(name, buffer.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.values.items())


class Number:
    """A module's attribute that is one of its `numbers`: reads as a float, and may be set between steps.

    `there` says whether the module has what a value above 0 needs, which is `needed`.
    """

    def __init__(self, check: Callable[..., None], needed: str = "", there: Callable[[nn.Module], bool] | None = None):
        self.check, self.needed, self.there = check, needed, there  # check is one of checks.py

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None):
        return self if module is None else module.numbers.values[self.name]

    def __set__(self, module: nn.Module, value: float) -> None:
        value = as_number(module.owner, self.name, value)
        self.check(module.owner, **{self.name: value})
        check_needs(module.owner, self.name, value > 0, self.needed, self.there is None or self.there(module))
        module.numbers.set(self.name, value)
