"""Numbers that may change between steps: a compiled step takes them as tensors, so that a new value is no new graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Numbers(nn.Module):
    """Numbers by name, each as a float for the host and as a 0-d float32 buffer for the ops.

    The floats hold; the buffers, which are in no state_dict, follow them, also after a cast or a new allocation.
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
        if self._buffers[name].dtype != torch.float32:  # a trainer casts buffers past `_apply`
            self._restore(name)
        return self._buffers[name]

    def _restore(self, name: str) -> None:
        self._buffers[name] = torch.full_like(self._buffers[name], self.values[name], dtype=torch.float32)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in self.values:
            self._restore(name)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.values.items())


class Number:
    """A module's attribute that is one of its `numbers`: reads as a float, and may be set between steps."""

    def __init__(self, check: Callable[..., None]):
        self.check = check  # of checks.py

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None):
        return self if module is None else module.numbers.values[self.name]

    def __set__(self, module: nn.Module, value: float) -> None:
        value = float(value)
        self.check(module.owner, **{self.name: value})
        module.numbers.set(self.name, value)
