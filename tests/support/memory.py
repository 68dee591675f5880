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
                users, _ = self.alive.get(storage.data_ptr(), ([], 0))  # a view may outlive the tensor, and it a view
                self.alive[storage.data_ptr()] = [*users, weakref.ref(tensor)], storage.nbytes()
        if self.held() > self.most:
            left = ((key, [user for user in users if user() is not None], n) for key, (users, n) in self.alive.items())
            self.alive = {key: (users, size) for key, users, size in left if users}
            self.most = max(self.most, self.held())
        return result

    def held(self) -> int:
        return sum(size for _, size in self.alive.values())
