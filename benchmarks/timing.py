"""Side-by-side timing: every method once a round, so that what disturbs the machine disturbs all of them; in another
order each time, so that none has always the caches of the same one before it.

One clock per device; it prepares a call and tells its seconds.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

LONG = 0.01  # seconds of a call of which caches are a small part, and whose first one shows what the next will take
SHORT_CALLS = 5  # of a short one, of which the fastest says how many fit a millisecond
WARMUP = 3  # calls on a GPU, before its graph is captured


@dataclass
class Timed:
    clock: str
    seconds: Callable[[], float]  # of one call, measured now
    took: float  # seconds of a round


class Cpu:
    """Processor time on one thread, which other programs do not stretch; else wall time.

    A method that takes less than a millisecond is called as often in a row as fits one. All but long ones are timed
    with their data in cache, after a call that is not: what other methods leave of the caches and of the allocator can
    take a millisecond by itself, and would count for the more the fewer calls follow.
    """

    def __init__(self, clock: str = ""):
        self.clock = clock or ("process" if torch.get_num_threads() == 1 else "wall")

    def prepare(self, call: Callable[[], object]) -> Timed:
        read = time.process_time if self.clock == "process" else time.perf_counter

        def seconds(calls: int, warm: bool = False) -> float:
            if warm:
                call()
            start = read()
            for _ in range(calls):
                call()
            return (read() - start) / calls

        took = seconds(1)
        if short := took < LONG:
            took = min(seconds(1) for _ in range(SHORT_CALLS))
        calls = max(1, int(1e-3 / max(took, 1e-6)))
        return Timed(self.clock, lambda: seconds(calls, warm=short), took * (calls + short))


class Cuda:
    """Device time by events: of the replay of a CUDA graph, or of the call itself where it can't be captured."""

    def prepare(self, call: Callable[[], object]) -> Timed:
        for _ in range(WARMUP):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
            clock, replay = "graph", graph.replay
        except Exception:  # it waits for the device, or cannot be captured for another reason
            torch.cuda.synchronize()
            clock, replay = "events", call

        def seconds() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return Timed(clock, seconds, seconds())


def clock_of(device: str) -> Cpu | Cuda:
    return Cpu() if device == "cpu" else Cuda()


def interleaved(
    timed: dict[str, Timed], rounds: int, draw: random.Random | None = None
) -> dict[str, list[float]]:
    """Seconds per call in each round for each method. `draw` gives the orders; by default the same in each run."""
    seconds, order, draw = {name: [] for name in timed}, list(timed), draw or random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            seconds[name].append(timed[name].seconds())
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of how many times as long `slow` took."""
    return median(a / b for a, b in zip(slow, fast, strict=True))
