"""One search by an implementation, and what each of its kernels takes: `python -m benchmarks.gpu.kernels N D K`.

Run by the plan, also under a profiler (--once, which leaves all but the search out). Prints rows as a child of the
check does, the first before the profiler of PyTorch is asked, which may fail.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

import vqops
from benchmarks.rows import summary
from benchmarks.shapes import Shape
from benchmarks.timing import clock_of
from vqops.check.cases import oracle
from vqops.check.child import say

CHECKED = 256  # rows
ROUNDS, PROFILED = 15, 5
MOST = 9  # kernels that are listed


def measure(N: int, D: int, K: int, implementation: str, device: str) -> None:
    x, codebook = Shape.of(N, D, K).data(device)
    call = partial(vqops.nearest, x, codebook, implementation=implementation)
    row = {"kernels": [N, D, K], "implementation": implementation}
    exact = oracle(implementation, x.device).nearest(x[:CHECKED].cpu(), codebook.cpu())
    row["wrong"] = int((call()[:CHECKED].cpu() != exact).sum())
    row["tiers"] = vqops.search_statistics(x, codebook, implementation=implementation).tolist()
    timed = clock_of(device).prepare(call)
    row |= {"clock": timed.clock, **summary([timed.seconds() for _ in range(ROUNDS)])}
    row["tflops"] = round(2 * N * D * K / row["p50_ms"] / 1e9, 1)
    say(row)
    if device == "cuda":
        say(row | {"microseconds": of_each_kernel(call)})


def of_each_kernel(call: Callable[[], object]) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    times = {event.key[:120]: event.device_time_total / PROFILED for event in profiled.key_averages()}
    return {name: round(time, 1) for name, time in sorted(times.items(), key=lambda item: -item[1])[:MOST]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels")
    for axis in "NDK":
        parser.add_argument(axis, type=int)
    parser.add_argument("--implementation", default="compiled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    if options.once:
        x, codebook = Shape.of(options.N, options.D, options.K).data(options.device)
        vqops.nearest(x, codebook, implementation=options.implementation)
        return
    measure(options.N, options.D, options.K, options.implementation, options.device)


if __name__ == "__main__":
    main()
