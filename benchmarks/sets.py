"""The sets of CPU kernels that this processor has, on several kinds of data: each set in a process of its own, since a
process has one, a round in turn with the others. A round of a process has its own GEMM beside the search, so that
shares of it compare across processes; the peers have a process, too.
"""

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import vqops
from benchmarks import baselines, correctness
from benchmarks.cases import Case, check_of_indices, search_work
from benchmarks.kinds import KINDS
from benchmarks.measure import Bench, rounds_in
from benchmarks.rows import instructions
from benchmarks.shapes import Shape
from benchmarks.timing import ratio
from vqops import _C

PEERS = ("faiss IndexFlatL2", "addmm + argmin")
PEER = ""  # the name of their process, in the place of a set
GEMM_SIZE = 1024  # enough for its full rate, since each process has one in each round

Ask = Callable[..., Any]  # calls a function in another process
Wanted = Callable[[str], bool]  # by the name of a method


def rows(shapes: list[Shape], seconds: float, wanted: Wanted) -> Iterator[dict]:
    """Of `vqops SET` for each set, and of the peers. times_vqops is over the set that vqops chooses here."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        names = [name for name in _C.instruction_sets.split() if wanted(f"vqops {name}")]
        asks = {name: stack.enter_context(process()) for name in (PEER, *names)}
        asks = {name: ask for name, ask in asks.items() if name == PEER or ask(choose, name)}
        for shape in shapes:
            for kind in KINDS:
                yield from side_by_side(asks, shape, kind, folder / "data.pt", seconds, wanted)


@contextmanager
def process() -> Iterator[Ask]:
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        pool.submit(int)  # begins it now, beside the next one
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def side_by_side(
    asks: dict[str, Ask], shape: Shape, kind: str, file: Path, seconds: float, wanted: Wanted
) -> Iterator[dict]:
    """A case: rounds of all processes in turn, in an order drawn anew."""
    x, codebook = KINDS[kind](shape)
    exact = correctness.exact_indices(x[correctness.checked_rows(x, codebook)], codebook)
    torch.save((x, codebook, exact), file)
    took, times, draw, order = 0.0, {}, random.Random(0), list(asks)
    for name, ask in asks.items():
        methods = tuple(filter(wanted, PEERS)) if name == PEER else ("vqops",)
        took += ask(begin, shape, kind, file, methods)
    for _ in range(rounds_in(seconds, took)):
        draw.shuffle(order)
        for name in order:
            for method, passed in asks[name](one_round).items():
                times.setdefault((name, method), []).append(passed)
    chosen = instructions("cpu")
    for name, ask in asks.items():
        for row in ask(results):
            compared = times.get((name, row["method"])), times.get((chosen, "vqops"))
            row |= {"method": f"{row['method']} {name}".strip(), "instructions": name or chosen}
            if all(compared) and not row["method"].startswith("ceiling"):
                row["times_vqops"] = round(ratio(*compared), 3)
            yield row


# In such a process

bench: Bench


def choose(name: str) -> bool:
    """Whether its processor has this set, which it uses from here on."""
    os.environ["VQOPS_CPU"] = name
    try:
        return instructions("cpu") == name
    except RuntimeError:
        return False


def begin(shape: Shape, kind: str, file: Path, methods: tuple[str, ...]) -> float:
    """Seconds of a round."""
    global bench

    def build():
        x, codebook, exact = torch.load(file)
        calls = {"vqops": lambda: partial(vqops.nearest, x, codebook)}
        calls |= {name: partial(baselines.SEARCH[name], x, codebook) for name in PEERS}
        return calls, check_of_indices(x, codebook, lambda: exact, rounding_only=False)

    work = search_work(shape, "cpu", torch.float32, 8)
    bench = Bench(Case("nearest", shape, "cpu", build, work, facts={"data": kind}), GEMM_SIZE, methods.__contains__)
    return bench.took()


def one_round() -> dict[str, float]:
    """Seconds by method."""
    bench.run(1)
    return {method: seconds[-1] for method, seconds in bench.times.items()}


def results() -> list[dict]:
    return bench.results()
