"""Cases to rows: check, then memory, then time, all methods of a case interleaved with the ceilings in one process."""

import math
import random
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.baselines import Call, Unavailable, tensor_float_32
from benchmarks.cases import Case
from benchmarks.memory import peak_extra_mb
from benchmarks.rows import summary
from benchmarks.timing import clock_of, interleaved, ratio
from vqops import _C

FEWEST, MOST = 5, 40  # rounds
ONCE = 1.0  # seconds of a call that is timed once, where a case has no more
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # read, and as many written: more than any cache
RATES = {"gemm": "gflops", "copy": "gbytes_s"}


def ceilings(case: Case, gemm_size: int) -> dict[str, tuple[Call, float]]:
    """Calls that show what this machine can do, in the same rounds as the methods, and their work.

    The first kind of work bounds a case on a CPU; on a GPU either may.
    """
    on_cpu, found = case.device == "cpu", {}
    kinds = list(case.work)[:1] if on_cpu else list(case.work)
    if "gemm" in kinds:
        a, b = (torch.randn(gemm_size, gemm_size, device=case.device) for _ in range(2))
        if not on_cpu:
            found["gemm, TF32"] = tensor_float_32(lambda a=a, b=b: a @ b), 2.0 * gemm_size**3
            a, b = a.half(), b.half()
        product = torch.empty_like(a)
        found["gemm"] = lambda: torch.mm(a, b, out=product), 2.0 * gemm_size**3
    if "copy" in kinds:
        source = torch.ones(COPY_BYTES[case.device] // 4, device=case.device)
        target = torch.empty_like(source)
        found["copy"] = lambda: target.copy_(source), 8.0 * source.numel()
    return found


class Bench:
    """The wanted methods of a case and the ceilings, checked and ready for rounds, and the rows that come of them."""

    def __init__(self, case: Case, gemm_size: int, wanted: Callable[[str], bool]):
        self.case, self.rows, self.timed, self.draw = case, {}, {}, random.Random(0)
        clock = clock_of(case.device)
        for name in filter(wanted, case.methods):
            try:
                call = case.methods[name]()
                row = case.check(call())
                row["extra_mb"] = peak_extra_mb(call, case.device)
                self.timed[name] = clock.prepare(call)
            except Unavailable as reason:
                row = {"left_out": str(reason)}
            except Exception as error:  # a method that fails is a row, not the end of the run
                row = {"failed": f"{type(error).__name__}: {error}"[:300]}
            self.rows[name] = row
        try:
            limits = ceilings(case, gemm_size)
            for kind, (call, _) in limits.items():
                self.rows[f"ceiling: {kind}"] = {}
                self.timed[f"ceiling: {kind}"] = clock.prepare(call)
            self.works = {kind: work for kind, (_, work) in limits.items()}
        except Exception as error:  # a GPU that a method has left in error: that method's row says which
            self.rows["ceilings"], self.timed = {"failed": f"{type(error).__name__}: {error}"[:300]}, {}
        self.times = {name: [] for name in self.timed}

    def took(self, longest: float = math.inf) -> float:
        """Seconds of a round of the methods that take no longer."""
        return sum(method.took for method in self.timed.values() if method.took <= longest)

    def run(self, rounds: int, longest: float = math.inf) -> None:
        quick = {name: method for name, method in self.timed.items() if method.took <= longest}
        for name, seconds in interleaved(quick, rounds, self.draw).items():
            self.times[name] += seconds

    def results(self) -> list[dict]:
        """A row a method, and one per ceiling. A method that was in no round has the time of its first call."""
        rounds = max(map(len, self.times.values()), default=0)
        times = {name: self.times[name] or [method.took] * rounds for name, method in self.timed.items()}
        for name, method in self.timed.items():
            ran = len(self.times[name]) or 1
            self.rows[name] |= {"clock": method.clock, "rounds": ran, **summary(times[name])}
        if times:
            compared(self.case, self.rows, times, self.works)
        return [{**self.case.describe(), "method": name, **row} for name, row in self.rows.items()]


def measure(
    case: Case, seconds: float, gemm_size: int = 2048, wanted: Callable[[str], bool] = lambda name: True
) -> list[dict]:
    """`seconds` is how long the timing of the case should take."""
    bench, longest = Bench(case, gemm_size, wanted), max(seconds, ONCE)
    bench.run(rounds_in(seconds, bench.took(longest)), longest)
    return bench.results()


def rounds_in(seconds: float, took: float) -> int:
    return max(FEWEST, min(MOST, math.floor(seconds / max(1e-9, took))))


def compared(case: Case, rows: dict[str, dict], times: dict[str, list[float]], works: dict[str, float]) -> None:
    """Adds to the rows the multiples of our time and the share of the ceiling that bounds the case."""
    ours = sorted((name for name in times if name.startswith("vqops")), key=lambda name: median(times[name]))
    base = "vqops" if "vqops" in times else next(iter(ours), None)  # among implementations by name, the fastest
    kinds = [kind for kind in case.work if kind in works]
    for name in times:
        row = rows[name]
        if name.startswith("ceiling"):
            kind = name.removeprefix("ceiling: ")
            row[RATES[kind.partition(",")[0]]] = round(works[kind] / row["p50_ms"] / 1e6, 2)
            if kind == "gemm" and case.device == "cpu":  # in the arithmetic that the kernels screen in
                row["multiply_add_gflops"] = round(2 * _C.multiply_add_rate() / 1e9, 2)
            continue
        if base:
            row["times_vqops"] = round(ratio(times[name], times[base]), 3)
        shares = {k: ratio(times[f"ceiling: {k}"], times[name]) * case.work[k] / works[k] for k in kinds}
        if shares:
            nearest = max(shares, key=shares.get)
            row |= {"ceiling": nearest, "share_of_ceiling": float(f"{shares[nearest]:.4g}")}
        row |= {RATES[kind]: round(case.work[kind] / row["p50_ms"] / 1e6, 2) for kind in kinds}
