"""How time and memory grow with N, K, D and threads, and what still fits."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from benchmarks import baselines, cases, modules
from benchmarks.baselines import Unavailable
from benchmarks.measure import measure
from benchmarks.memory import peak_extra_mb
from benchmarks.rows import summary
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Cpu, interleaved, ratio

BASE = {"N": 4096, "D": 64, "K": 1024}
AXES = {
    "N": [2**i for i in range(8, 16)],
    "K": [2**i for i in range(6, 15)],
    "D": [8, 16, 32, 64, 128, 256, 512, 1024],
}
METHODS = ("vqops", "addmm + argmin", "cdist + argmin", "faiss IndexFlatL2")
FITTED = 4  # the exponent is that of the longest times: below them the fixed cost of a call shows
GRID = [(N, K) for N in (4096, 8192, 12288) for K in (1024, 4096, 8192)]  # at D = 64
LIMIT_GIB = 16
NOISE = 2**19  # bytes: pages and arenas that a call happens to touch; a term below it at the largest size is none


def curve(axis: str, device: str, quick: bool, seconds: float) -> Iterator[dict]:
    """Searches over one axis, and the exponent of each method."""
    timed = []
    for value in AXES[axis][1:-1:2] if quick else AXES[axis]:
        size = BASE | {axis: value}
        case = cases.nearest(Shape(f"growth over {axis}", "", size["N"], size["D"], size["K"]), device)
        rows = [{**row, "axis": axis} for row in measure(case, seconds, 1024, METHODS.__contains__)]
        timed += [row for row in rows if "p50_ms" in row and not row["method"].startswith("ceiling")]
    yield from timed
    for method in dict.fromkeys(row["method"] for row in timed):
        points = [(row[axis], row["p50_ms"]) for row in timed if row["method"] == method][-FITTED:]
        fitted = {"exponent": round(exponent(points), 3), "from": points[0][0], "to": points[-1][0]}
        yield {"op": "growth exponent", "axis": axis, "method": method, **fitted}


def exponent(points: list[tuple[float, float]]) -> float:
    """e of time ~ size^e, by least squares on logarithms."""
    size, duration = np.log(np.asarray(points, float)).T
    return float(np.polyfit(size, duration, 1)[0])


def thread_curve(cores: int, rounds: int) -> Iterator[dict]:
    """Wall time of the same calls with 1, 2, 4, ... threads, side by side."""
    case = cases.nearest(SHAPES["VQ-VAE-2 bottom"], "cpu")
    counts = [2**i for i in range(cores.bit_length()) if 2**i <= cores]

    def call(count: int, search):
        with baselines.threads(count):
            return search()

    searches = {name: case.methods[name]() for name in ("vqops", "addmm + argmin")}
    calls = {(name, count): partial(call, count, search) for name, search in searches.items() for count in counts}
    times = interleaved({key: Cpu("wall").prepare(each) for key, each in calls.items()}, rounds)
    for (name, count), seconds in times.items():
        row = {**case.describe(), "method": name, "axis": "threads", "threads": count, "clock": "wall"}
        faster = round(ratio(times[name, 1], seconds), 3)
        yield {**row, "rounds": rounds, **summary(seconds), "times_one_thread": faster}


def memory(op: str, device: str, quick: bool) -> Iterator[dict]:
    """Peak extra memory over a grid of N and K, the law through it, and the largest N = K that it lets fit."""
    found = {}
    for N, K in GRID[::4] if quick else GRID:
        case = MEASURED[op](Shape("growth of memory", "", N, 64, K), device)
        for name, make in case.methods.items():
            if name.startswith("torch.compile") or name == "vqops, prepared":
                continue
            try:
                call = make()
            except Unavailable:
                continue
            call()  # what is kept between calls is kept before the measurement
            extra = peak_extra_mb(call, device)
            if extra is None:
                return
            found.setdefault(name, []).append((N, K, extra * 2**20))
            yield {**case.describe(), "method": name, "axis": "memory", "extra_mb": extra}
    if not quick:
        for name, points in found.items():
            yield {"op": "memory law", "of": op, "method": name, "D": 64, **law(points)}


MEASURED = {"nearest": cases.nearest, "training step": modules.training_step}


def law(points: list[tuple[int, int, float]]) -> dict:
    """Bytes = per_NK N K + per_N N + per_K K + constant, no term negative, and the N = K where it meets the limit."""
    sizes = np.asarray([(N * K, N, K, 1) for N, K, _ in points], float)
    extra = np.asarray([bytes for *_, bytes in points])
    per_NK, per_N, per_K, constant = non_negative_fit(sizes, extra).tolist()

    def fits(n: int) -> bool:
        given = 2 * n * 64 * 4  # x and the codebook themselves
        return given + per_NK * n * n + (per_N + per_K) * n + constant <= LIMIT_GIB * 2**30

    n, step = 0, 2**40
    while step >= 1:
        n, step = n + step * fits(n + step), step // 2
    return {
        "bytes_per_NK": round(per_NK, 3),
        "bytes_per_N": round(per_N, 1),
        "bytes_per_K": round(per_K, 1),
        "limit_gib": LIMIT_GIB,
        "largest_N_equal_K": float(f"{n:.3g}"),
    }


def non_negative_fit(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares, leaving out the smallest term until none is negative or within the noise."""
    scale = columns.max(0)
    kept = list(range(columns.shape[1]))
    while True:
        found = np.linalg.lstsq(columns[:, kept] / scale[kept], values, rcond=None)[0]
        if found.min() >= NOISE or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    terms = np.zeros(columns.shape[1])
    terms[kept] = found / scale[kept]
    return terms
