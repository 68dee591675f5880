"""The same cases for pytest-benchmark: `pytest benchmarks`, with -k to choose, --benchmark-json to keep.

One test per op or step, direction, shape, dtype and implementation; `python -m benchmarks` measures them interleaved.
The result is checked before it is timed. VQOPS_BENCHMARK_DEVICE=cuda runs them on a GPU.
"""

import os
import time
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch

import vqops
from benchmarks import baselines, cases
from benchmarks.baselines import Unavailable
from benchmarks.shapes import SEARCHES, SHAPES, Shape

DEVICE = os.environ.get("VQOPS_BENCHMARK_DEVICE", "cpu")
FLOAT32 = (torch.float32,)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPE_OF = SHAPES | {shape.name: shape for shape in (Shape.of(*size) for size in SEARCHES[DEVICE])}
SIZED = tuple(name for name in SHAPE_OF if name not in SHAPES)


def implementations(op: str) -> list[str]:
    return ["vqops", *(f"vqops {name}" for name in vqops.implementations()[op][DEVICE])]


NEAREST = [*implementations("nearest"), "vqops, prepared", *baselines.SEARCH]
STEPS = ["vqops", *baselines.STEPS]
BACKWARD = [*implementations("quantize_backward"), "PyTorch"]
# name, what makes the case, methods, shapes, dtypes
TABLE: list[tuple[str, Callable, list[str], tuple[str, ...], tuple]] = [
    ("nearest", partial(cases.nearest, every=True), NEAREST, cases.ALL, DTYPES),
    ("nearest", partial(cases.nearest, every=True), NEAREST, SIZED, FLOAT32),
    (
        "code_sums",
        partial(cases.code_sums, every=True),
        [*implementations("code_sums"), *baselines.SUMS],
        cases.STATISTICS,
        DTYPES,
    ),
    (
        "ema_update_",
        partial(cases.ema_update, every=True),
        [*implementations("ema_update_"), "PyTorch"],
        cases.STATISTICS,
        FLOAT32,
    ),
    (
        "quantize-forward",
        partial(cases.quantize_forward, every=True),
        [*implementations("quantize"), "PyTorch, addmm + argmin"],
        cases.STATISTICS,
        DTYPES,
    ),
    *(
        (
            f"quantize-backward-{gradient}",
            partial(cases.quantize_backward, gradient=gradient, every=True),
            BACKWARD,
            cases.STATISTICS,
            FLOAT32,
        )
        for gradient in ("straight_through", "rotation")
    ),
    ("VectorQuantize-training", cases.training_step, STEPS, cases.STEPS, FLOAT32),
    ("VectorQuantize-evaluation", cases.evaluation, ["vqops", "vector-quantize-pytorch"], cases.STEPS, FLOAT32),
    ("VQ-VAE-2-training", cases.system_step, ["vqops", "vector-quantize-pytorch", "no quantizer"], ("",), FLOAT32),
]


@lru_cache(maxsize=1)
def case_of(number: int, shape: str, dtype: torch.dtype) -> cases.Case:
    _, make, _, _, dtypes = TABLE[number]
    given = [SHAPE_OF[shape]] if shape else []
    return make(*given, DEVICE, **({"dtype": dtype} if len(dtypes) > 1 else {}))


@pytest.mark.parametrize(
    "number, shape, dtype, method",
    [
        pytest.param(number, shape, dtype, method, id="-".join((op, shape or "256 px", str(dtype)[6:], method)))
        for number, (op, _, methods, shapes, dtypes) in enumerate(TABLE)
        for shape in shapes
        for dtype in dtypes
        for method in methods
    ],
)
@pytest.mark.benchmark(timer=time.process_time if DEVICE == "cpu" else time.perf_counter)
def test_benchmark(benchmark, number, shape, dtype, method):
    torch.set_num_threads(1)
    case = case_of(number, shape, dtype)
    if method not in case.methods:
        pytest.skip(f"{method} is only the oracle at this size")
    try:
        call = case.methods[method]()
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = " ".join((case.op, shape, str(dtype)[6:]))
    benchmark.extra_info |= {**case.describe(), "method": method, **case.check(call())}
    wait = torch.cuda.synchronize if DEVICE == "cuda" else (lambda: None)
    benchmark(lambda: (call(), wait()))
