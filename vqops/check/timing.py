"""Eight shapes, timed side by side: what each implementation takes, and which one a call should take.

Wall time of calls in a row, as a training loop makes them, so that what the host does counts; implementations take
turns, so that what disturbs the machine disturbs all of them.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

ROUNDS = 5
CALLS, ROUND = 20, 0.1  # calls in a row, but no more than about so many seconds of them
MARGIN = 1.05  # by which a kernel must be faster
REACH = 2  # how far beyond the smallest and largest D a row holds, as a factor
FEWER = 32  # how far below the smallest N
DTYPES = ["float32", "float16", "bfloat16"]


class Shape(NamedTuple):
    N: int
    D: int
    K: int

    @property
    def name(self) -> str:
        return f"{self.N} x {self.D} x {self.K}"

    @property
    def bytes(self) -> int:
        """That the calls take at most, with room: rows, their gradients, what plain PyTorch copies of both."""
        return 40 * self.N * self.D + 2**30


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(1024, 64, 512),
        Shape(4096, 256, 1024),
        Shape(2**15, 64, 512),
        Shape(2**15, 512, 1024),
        Shape(2**17, 8, 2**14),
        Shape(2**20, 64, 512),
        Shape(2**20, 128, 1024),
        Shape(2**18, 256, 2**13),
    )
}
# Each op that is timed, with those that follow it: a packed codebook is of who searches.
DECIDES = {
    "quantize": ("prepare", "nearest", "search_statistics", "quantize", "residual_quantize"),
    "nearest_topk": ("nearest_topk",),
    "sample": ("sample",),
    "code_sums": ("code_sums",),
    "quantize_backward": ("quantize_backward", "residual_quantize_backward"),
    "ema_update_": ("ema_update_",),
}
OPS = tuple(DECIDES)
SEARCHES = {"quantize": 1, "nearest_topk": 0, "sample": 0}  # where among an op's results the indices are
WITHOUT_ROWS = ("prepare", "ema_update_")


def calls(shape: Shape, device: torch.device) -> dict[str, Callable[[str], Callable]]:
    """By op: call(implementation) of the op at this shape."""
    N, D, K = shape
    generator = torch.Generator(device).manual_seed(D * K)
    x, g = (torch.randn(1, N, D, device=device, generator=generator) for _ in range(2))
    codebook = torch.randn(1, K, D, device=device, generator=generator)
    indices = torch.randint(K, (1, N), device=device, generator=generator)
    error, size, decay = torch.rand(1, N, device=device), torch.ones(1, K, device=device), torch.tensor(0.99).to(device)
    average, codes, counts = codebook.clone(), codebook.clone(), torch.ones(1, K, dtype=torch.int64, device=device)

    def op(name: str, *given) -> Callable[[str], Callable]:
        return lambda implementation: partial(getattr(torch.ops.vqops, f"{name}_{implementation}"), *given)

    return {
        "quantize": op("quantize", x, codebook, None, None, "euclidean", "straight_through", True),
        "nearest_topk": op("nearest_topk", x, codebook, 8),
        "sample": op("sample", x, codebook, torch.ones((), device=device), torch.tensor([D, K]).to(device)),
        "code_sums": op("code_sums", x, indices, K),
        "quantize_backward": op("quantize_backward", g, error, x, codebook, indices, None, "euclidean", "rotation"),
        "ema_update_": op("ema_update_", size, average, codes, counts, codebook, decay),
    }


def measure(name: str, implementations: dict[str, list[str]], device: torch.device, small: bool) -> dict:
    """Milliseconds of a call in each round, by op and implementation; `implementations` has those of each op."""
    shape = SHAPES[name]
    if small:
        shape = Shape(min(shape.N, 100), shape.D, min(shape.K, 100))
    if device.type == "cuda" and (free := torch.cuda.mem_get_info(device)[0]) < shape.bytes:
        return {"left_out": f"it needs {shape.bytes >> 20} MB, {free >> 20} are free"}
    found, wrong, raised = {}, {}, {}
    for op, make in calls(shape, device).items():
        timed, expected = {}, None
        for each in implementations.get(op, ()):
            call = make(each)
            try:
                result = call()
                timed[each] = prepared(call, device)
            except Exception as error:  # too little memory for one of them, say
                raised[f"{op}, {each}"] = f"{type(error).__name__}: {error}"[:300]
                continue
            if op in SEARCHES:  # on more rows than any case has
                indices = result[SEARCHES[op]]
                expected = indices if expected is None else expected
                if differ := int((indices != expected).sum()):
                    wrong[f"indices of {op}, {each}"] = {"differ": differ, "from those of": next(iter(timed))}
        found[op] = {each: [] for each in timed}
        for _ in range(1 if small else ROUNDS):
            for each, milliseconds in timed.items():
                found[op][each].append(round(milliseconds(), 5))
    return {**shape._asdict(), "milliseconds": found, "wrong": wrong, "raised": raised}


def prepared(call: Callable, device: torch.device) -> Callable[[], float]:
    """The clock of a call that has run: kernels are compiled, and it is known how many calls a round has time for."""

    def in_a_row(times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / times

    call()
    took = in_a_row(1)
    return lambda: 1e3 * in_a_row(max(1, min(CALLS, int(ROUND / max(took, 1e-6)))))


def fastest(milliseconds: dict[str, list[float]]) -> str | None:
    """The one to take: "pytorch" unless a kernel is faster by a margin; None where nothing was measured."""
    times = {each: median(rounds) for each, rounds in milliseconds.items() if rounds}
    taken = next((each for each in ("pytorch", "compiled", "triton") if each in times), None)
    for each in ("compiled", "triton"):
        if each in times and times[each] * MARGIN < times[taken]:
            taken = each
    return taken


# Measurements to rows of a record


def rows_of(measured: list[dict]) -> list[dict]:
    """Of a record. Between measured shapes, D and N are cut at the geometric mean; whatever K. Of a shape that was not
    measured, or where implementations disagree, nothing is named."""
    return [row for op in OPS for row in rows_of_op(op, [(SHAPES[row["name"]], winner(op, row)) for row in measured])]


def winner(op: str, row: dict) -> str | None:
    return None if row.get("wrong") else fastest(row.get("milliseconds", {}).get(op, {}))


def rows_of_op(op: str, taken: list[tuple[Shape, str | None]]) -> list[dict]:
    spans: list[tuple[list, list]] = []  # of D, and what N takes there
    depths = sorted({shape.D for shape, _ in taken})
    for i, D in enumerate(depths):
        least = -(-D // REACH) if i == 0 else middle(depths[i - 1], D) + 1
        most = D * REACH if i == len(depths) - 1 else middle(D, depths[i + 1])
        here = by_rows([(shape.N, implementation) for shape, implementation in taken if shape.D == D])
        spans.append(([least, most], here))
    found = []
    for each in DECIDES[op]:
        for depth, here in spans:
            for N, implementation in [(None, here[-1][1])] if each in WITHOUT_ROWS else here:
                if implementation not in (None, "pytorch"):
                    facts = {"op": each, "implementation": implementation, "D": depth, "K": None, "N": N}
                    found.append({**facts, "dtypes": DTYPES})
    return found


def by_rows(taken: list[tuple[int, str | None]]) -> list[tuple[list, str | None]]:
    """Spans of N, each with the implementation that it takes."""
    found: list[tuple[list, str | None]] = []
    for N, implementation in sorted(taken, key=lambda each: each[0]):
        if found and found[-1][1] == implementation:
            found[-1][0][1] = N
        else:
            found.append(([N, N], implementation))
    cuts = [middle(one[0][1], other[0][0]) for one, other in pairwise(found)]
    edges = zip([found[0][0][0] // FEWER, *(cut + 1 for cut in cuts)], [*cuts, None], strict=True)
    return [(list(edge), implementation) for edge, (_, implementation) in zip(edges, found, strict=True)]


def middle(one: int, other: int) -> int:
    return int((one * other) ** 0.5)
