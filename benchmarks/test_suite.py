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
from benchmarks import baselines, cases, codecs, levels, modules, soft
from benchmarks.baselines import Unavailable
from benchmarks.shapes import SEARCHES, SHAPES, Shape

DEVICE = os.environ.get("VQOPS_BENCHMARK_DEVICE", "cpu")
FLOAT32 = (torch.float32,)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPE_OF = SHAPES | {shape.name: shape for shape in (Shape.of(*size) for size in SEARCHES[DEVICE])}
SIZED = tuple(name for name in SHAPE_OF if name not in SHAPES)


def implementations(op: str) -> list[str]:
    return ["vqops", *(f"vqops {name}" for name in vqops.implementations()[op][DEVICE])]


def every(make: Callable, **facts) -> Callable:
    return partial(make, every=True, **facts)


NEAREST = [*implementations("nearest"), "vqops, prepared", *baselines.SEARCH]
SAMPLE = [*implementations("sample"), "cdist + Gumbel + argmax"]
SUMS = [*implementations("code_sums"), *baselines.SUMS]
UPDATE = [*implementations("ema_update_"), "PyTorch"]
FORWARD = [*implementations("quantize"), "PyTorch, addmm + argmin"]
BACKWARD = [*implementations("quantize_backward"), "PyTorch"]
LEVELS = [*implementations("residual_quantize"), "vqops.quantize a level", "searches alone"]
STEP_OF_LEVELS = ["vqops", "searches alone", "vector-quantize-pytorch"]
CODEC = ["vqops", "transformers"]
ROTATION = every(cases.quantize_backward, gradient="rotation")
STEPS = ["vqops", *baselines.STEPS]
EVALUATION = ["vqops", "addmm + argmin + lookup", "vector-quantize-pytorch"]
# name, what makes the case, methods, shapes, dtypes
TABLE: list[tuple[str, Callable, list[str], tuple[str, ...], tuple]] = [
    ("nearest", every(cases.nearest), NEAREST, cases.ALL, DTYPES),
    ("nearest", every(cases.nearest), NEAREST, SIZED, FLOAT32),
    ("sample", every(cases.sample), SAMPLE, cases.STATISTICS, FLOAT32),
    ("code_sums", every(cases.code_sums), SUMS, cases.STATISTICS, DTYPES),
    ("ema_update_", every(cases.ema_update), UPDATE, cases.STATISTICS, FLOAT32),
    ("quantize-forward", every(cases.quantize_forward), FORWARD, cases.STATISTICS, DTYPES),
    ("quantize-backward-straight_through", every(cases.quantize_backward), BACKWARD, cases.STATISTICS, FLOAT32),
    ("quantize-backward-rotation", ROTATION, BACKWARD, cases.STATISTICS, FLOAT32),
    ("residual_quantize", every(levels.residual_quantize, levels=4), LEVELS, ("EnCodec", "DAC", "RQ-VAE"), FLOAT32),
    ("ResidualVQ-training", partial(levels.training_step, levels=4), STEP_OF_LEVELS, ("EnCodec", "RQ-VAE"), FLOAT32),
    ("ResidualVQ-evaluation", partial(levels.evaluation, levels=4), EVALUATION, ("EnCodec", "RQ-VAE"), FLOAT32),
    *((f"codec-{name}", partial(codecs.codec, name), CODEC, ("",), FLOAT32) for name in codecs.CODECS),
    ("VectorQuantize-training", modules.training_step, STEPS, modules.STEPS, FLOAT32),
    *((op, partial(soft.assignments, op), ["vqops", "PyTorch, cdist"], cases.STATISTICS, FLOAT32) for op in soft.OPS),
    ("VectorQuantize-evaluation", modules.evaluation, EVALUATION, modules.STEPS, FLOAT32),
    ("VQ-VAE-2-training", modules.system_step, ["vqops", "vector-quantize-pytorch", "no quantizer"], ("",), FLOAT32),
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
