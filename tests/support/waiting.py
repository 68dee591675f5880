"""Whether the host waits for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoSynchronisation(TorchDispatchMode):
    """Fails on every op whose result the host has to wait for on a GPU."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "tolist", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name.startswith("index") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if isinstance(args[1], list) else [])
        )
        if boolean or any(name.startswith(word) for word in self.forbidden):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))
