"""Device time of a call, and the two ceilings that it is compared with.

Never run on a GPU so far.
"""

from collections.abc import Callable

import torch

WARMUP = 3
PRODUCT = 8192  # rows, columns and depth of the matrix product that gives the matrix rate
COPY = 1 << 30  # bytes of the copy that gives the bandwidth, far beyond any second cache


class Gpu:
    """Times calls on the current CUDA device by events."""

    device = torch.device("cuda")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    def timings(self, methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
        """Per method: seconds of each round, whether from a CUDA graph, peak bytes beyond the inputs; or the error.

        Every method once a round, so that what disturbs the device disturbs all of them.
        """
        prepared, found = {}, {}
        for name, method in methods.items():
            try:
                prepared[name], found[name] = self.prepare(method)
            except Exception as error:  # a peer that fails is a row, not the end of the run
                found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        for _ in range(rounds):
            for name, call in prepared.items():
                found[name]["seconds"].append(self.time(call))
        return found

    def prepare(self, method: Callable[[], object]) -> tuple[Callable[[], object], dict]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(WARMUP):
            method()
        torch.cuda.synchronize()
        facts = {"seconds": [], "graph": True, "peak_bytes": torch.cuda.max_memory_allocated() - before}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                method()
        except Exception:  # it synchronises, or cannot be captured for another reason
            torch.cuda.synchronize()
            return method, {**facts, "graph": False}
        return graph.replay, facts

    def time(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def ceilings(self, rounds: int = 20) -> dict[str, float]:
        """Bytes a second of a copy (read and written), and operations a second of float16 and TF32 products."""
        source = torch.empty(COPY // 4, device=self.device).normal_()
        target = torch.empty_like(source)
        a, b = (torch.randn(PRODUCT, PRODUCT, device=self.device) for _ in range(2))
        half = a.half(), b.half()
        with tensor_float_32(True):
            found = self.timings(
                {"copy": lambda: target.copy_(source), "fp16": lambda: half[0] @ half[1], "tf32": lambda: a @ b}, rounds
            )
        seconds = {name: sorted(timing["seconds"])[rounds // 2] for name, timing in found.items()}
        operations = 2 * PRODUCT**3
        return {
            "copy_bytes_per_s": 2 * COPY / seconds["copy"],
            "fp16_ops_per_s": operations / seconds["fp16"],
            "tf32_ops_per_s": operations / seconds["tf32"],
        }


class tensor_float_32:
    """Whether float32 matrix products may round their inputs to TF32."""

    def __init__(self, allowed: bool):
        self.allowed = allowed

    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.allowed

    def __exit__(self, *_):
        torch.backends.cuda.matmul.allow_tf32 = self.before
