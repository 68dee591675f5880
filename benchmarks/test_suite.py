"""The same cases for pytest-benchmark: `pytest benchmarks`, with -k to choose, --benchmark-json to keep.

One test per op or step, direction, shape, dtype and implementation; `python -m benchmarks` measures them interleaved.
The result is checked before it is timed. VQOPS_BENCHMARK_DEVICE=cuda runs them on a GPU.
"""

import os
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch

import vqops
from benchmarks import baselines, cases
from benchmarks.baselines import Unavailable
from benchmarks.shapes import SHAPES

DEVICE = os.environ.get("VQOPS_BENCHMARK_DEVICE", "cpu")
FLOAT32 = (torch.float32,)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def implementations(op: str) -> list[str]:
    return ["vqops", *(f"vqops {name}" for name in vqops.implementations()[op][DEVICE])]


STEPS = ["vqops", *baselines.STEPS]
# name, what makes the case, methods, shapes, dtypes
TABLE: list[tuple[str, Callable, list[str], tuple[str, ...], tuple]] = [
    ("nearest", cases.nearest, [*implementations("nearest"), "vqops, prepared", *baselines.SEARCH], cases.ALL, DTYPES),
    ("code_sums", cases.code_sums, [*implementations("code_sums"), *baselines.SUMS], cases.STATISTICS, DTYPES),
    ("ema_update_", cases.ema_update, [*implementations("ema_update_"), "PyTorch"], cases.STATISTICS, FLOAT32),
    (
        "quantize-forward",
        cases.quantize_forward,
        [*implementations("quantize"), "PyTorch, addmm + argmin"],
        cases.STATISTICS,
        DTYPES,
    ),
    *(
        (
            f"quantize-backward-{gradient}",
            partial(cases.quantize_backward, gradient=gradient),
            [*implementations("quantize"), "PyTorch"],
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
    op, make, _, _, dtypes = TABLE[number]
    given = [SHAPES[shape]] if shape else []
    options = {"dtype": dtype} if len(dtypes) > 1 else {}
    if "VectorQuantize" not in op and shape:
        options["every"] = True
    return make(*given, DEVICE, **options)


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
def test_benchmark(benchmark, number, shape, dtype, method):
    torch.set_num_threads(1)
    try:
        case = case_of(number, shape, dtype)
        call = case.methods[method]()
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.extra_info |= {**case.describe(), "method": method, **case.check(call())}
    wait = torch.cuda.synchronize if DEVICE == "cuda" else (lambda: None)
    benchmark(lambda: (call(), wait()))
