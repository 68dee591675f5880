"""`pytest benchmarks/test_cpu.py`: the cases of benchmarks.cpu under pytest-benchmark, one thread, processor time."""

import time

import pytest
import torch

from benchmarks.cpu import TABLES

CASES = [
    pytest.param(op, shape, method, id=f"{op}-{'x'.join(map(str, shape))}-{method}")
    for op, methods in (
        ("nearest", ("vqops", "addmm + argmin", "faiss IndexFlatL2")),
        ("code_sums", ("vqops", "bincount + index_add_")),
        ("training step", ("vqops", "naive", "vector-quantize-pytorch")),
    )
    for shape in TABLES[op][1]
    for method in methods
]


@pytest.mark.parametrize(("op", "shape", "method"), CASES)
@pytest.mark.benchmark(timer=time.process_time, warmup=True, warmup_iterations=1)
def test_one_thread(benchmark, op, shape, method):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        methods = TABLES[op][0](*shape)
        if method not in methods:
            pytest.skip(f"{method} is not installed")
        benchmark.group = f"{op} {shape}"
        benchmark(methods[method])
    finally:
        torch.set_num_threads(before)
