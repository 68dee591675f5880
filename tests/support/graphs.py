"""CUDA graphs on a CPU: what is called while one is captured, and called again in the same memory by a replay."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph:
    def __init__(self):
        self.calls = []  # op, its arguments, and the tensors that hold its results

    @torch.no_grad()
    def replay(self) -> None:
        for op, arguments, named, results in self.calls:
            for result, again in zip(results, tensors(op(*arguments, **named)), strict=True):
                if result.data_ptr() != again.data_ptr():
                    result.copy_(again)


class Recording(TorchDispatchMode):
    """Unlike a capture, it runs what it records."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.graph.calls.append((op, args, kwargs or {}, tensors(out)))
        return out


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@contextmanager
def stream(which: Stream):
    yield


def tensors(values) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def stand_in(monkeypatch) -> None:
    """torch.cuda's graphs and streams, for this test."""
    for name, value in (("CUDAGraph", Graph), ("graph", Recording), ("Stream", Stream), ("stream", stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
