"""How much memory the tensors of a call take."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTemporaries(TorchDispatchMode):
    """The most bytes that tensors made inside the block held together."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(tensor), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if value[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result
