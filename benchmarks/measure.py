"""Cases to rows: check, then memory, then time, all methods of a case interleaved with the ceiling in one process."""

import math
import time
from collections.abc import Callable

import torch

from benchmarks.baselines import Call, Unavailable
from benchmarks.cases import Case
from benchmarks.correctness import WrongResult
from benchmarks.memory import peak_extra_mb
from benchmarks.rows import summary
from benchmarks.timing import interleaved, ratio
from vqops import _C

FEWEST, MOST = 5, 40  # rounds
SHORT = 0.1  # seconds
COPY_BYTES = 2**27  # read, and as many written: more than any cache
# On one CPU thread processor time, which other programs do not stretch; else wall time, after the device is done.
CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


def device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    if device != "cpu":
        return "wall", device_clock
    name = "process" if torch.get_num_threads() == 1 else "wall"
    return name, CLOCKS[name]


def ceiling(kind: str, device: str, gemm_size: int) -> tuple[Call, float]:
    """The call that shows what this machine can do, in the same rounds as the methods, and its work."""
    if kind == "copy":
        source = torch.ones(COPY_BYTES // 4, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * COPY_BYTES
    dtype = torch.float32 if device == "cpu" else torch.float16
    a, b, product = (torch.ones(gemm_size, gemm_size, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=product), 2.0 * gemm_size**3


def measure(case: Case, seconds: float, gemm_size: int = 2048, only: tuple[str, ...] = ()) -> list[dict]:
    """A row a method, and one for the ceiling. `seconds` is how long the timing of the case should take."""
    rows, calls, took = {}, {}, {}
    clock, read = clock_of(case.device)
    for name, make in case.methods.items():
        if only and name not in only:
            continue
        try:
            call = make()
            rows[name] = case.check(call())
        except Unavailable as reason:
            rows[name] = {"left_out": str(reason)}
            continue
        except (WrongResult, MemoryError, torch.OutOfMemoryError) as error:
            rows[name] = {"failed": f"{type(error).__name__}: {error}"}
            continue
        start = read()
        rows[name]["extra_mb"] = peak_extra_mb(call, case.device)
        took[name] = read() - start
        calls[name] = call
    if case.ceiling:
        calls[case.ceiling], ceiling_work = ceiling(case.ceiling, case.device, gemm_size)
        took[case.ceiling] = 0.0
    for name, call in calls.items():
        if took[name] < SHORT:  # what the measurement of memory itself takes would count
            start = read()
            call()
            took[name] = read() - start
    rounds = max(FEWEST, min(MOST, math.floor(seconds / sum(took.values()))))
    times = interleaved(calls, rounds, read)
    for name, row in rows.items():
        if name not in calls:
            continue
        row |= {"clock": clock, "rounds": rounds, **summary(times[name])}
        if "vqops" in calls:
            row["times_vqops"] = round(ratio(times[name], times["vqops"]), 3)
        if case.ceiling:
            share = ratio(times[case.ceiling], times[name]) * case.work / ceiling_work
            row |= {"ceiling": case.ceiling, "share_of_ceiling": round(share, 4)}
        unit = "gbytes_s" if case.ceiling == "copy" else "gflops"
        row[unit] = round(case.work / row["p50_ms"] / 1e6, 2)
    if case.ceiling:
        row = {"clock": clock, "rounds": rounds, **summary(times[case.ceiling])}
        row["gbytes_s" if case.ceiling == "copy" else "gflops"] = round(ceiling_work / row["p50_ms"] / 1e6, 2)
        if case.ceiling == "gemm" and case.device == "cpu":  # in the arithmetic that the kernels screen in
            row["multiply_add_gflops"] = round(2 * _C.multiply_add_rate() / 1e9, 2)
        rows[f"ceiling: {case.ceiling}"] = row
    return [{**case.describe(), "method": name, **row} for name, row in rows.items()]
