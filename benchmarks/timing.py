"""Side-by-side timing: every method once a round, so that what disturbs the machine disturbs all of them."""

import time
from collections.abc import Callable
from statistics import median


def interleaved(
    methods: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds a call in each round for each method, after one round of warm-up.

    A method that takes less than a millisecond is called as often in a row as fits one, with its data in cache.

    process_time counts the processor time of all threads of this process: on one thread it is not stretched by other
    programs. For several threads give time.perf_counter.
    """
    calls = {}
    for name, method in methods.items():
        method()
        start = clock()
        method()
        calls[name] = max(1, int(1e-3 / max(clock() - start, 1e-6)))
    seconds = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = clock()
            for _ in range(calls[name]):
                method()
            seconds[name].append((clock() - start) / calls[name])
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of how many times as long `slow` took."""
    return median(a / b for a, b in zip(slow, fast, strict=True))
