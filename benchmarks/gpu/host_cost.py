"""What a call of the Triton kernels costs on the host, measured without a GPU: `python -m benchmarks.gpu.host_cost`.

Each call of CALLS runs through Triton's own launcher to a driver that does nothing (stand_in.py). Launches and aten
calls are counted at SIZE; at TIMED, where PyTorch's own arithmetic takes next to nothing and the launches are the same,
the host's time is measured. What the driver itself takes of a launch, and PyTorch's launches and allocator for a GPU,
are not in it. Rows go to host_cost.jsonl in the machine's folder of results.
"""

import argparse
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import quantiles
from time import process_time_ns
from typing import NamedTuple

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

import vqops
from benchmarks.gpu import stand_in
from benchmarks.rows import Writer, environment, folder_of, instructions

SIZE = (4096, 256, 1024)  # N, D, K
TIMED = (1, 16, 512)
ROUNDS = 400
# Calls of PyTorch that launch nothing, unless one of COPIES is within.
VIEWS = frozenset(
    {
        *("alias", "as_strided", "broadcast_tensors", "broadcast_to", "chunk", "contiguous", "detach", "detach_"),
        *("empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten", "lift_fresh", "mT", "movedim"),
        *("narrow", "new_empty", "numpy_T", "permute", "promote_types", "reshape", "resize_", "result_type", "select"),
        *("slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze"),
        *("view", "view_as", "_reshape_alias", "_unsafe_view"),
    }
)
COPIES = ("aten::copy_", "aten::clone", "aten::_to_copy")

Call = Callable[[], object]


class Cost(NamedTuple):
    kernels: list[str]  # ours, in order
    aten: Counter[str]  # calls of PyTorch's ops that are not made by another
    launches: Counter[str]  # those of them that launch

    def row(self) -> dict:
        return {
            "kernels": self.kernels,
            "launched_by_pytorch": dict(sorted(self.launches.items())),
            "aten": self.aten.total(),
        }


def calls(N: int, D: int, K: int) -> dict[str, Call]:
    """By name; the first one is what others are compared with, without our kernels."""
    torch.manual_seed(0)
    x, codebook, rows = torch.randn(N, D), torch.randn(K, D), torch.randn(1, N, D)
    size, average, embed, counts, sums = (torch.rand(1, K, *more) for more in ((), (D,), (D,), (), (D,)))
    indices, error, decay = torch.zeros(1, N, dtype=torch.int64), torch.ones(1, N), torch.tensor(0.9)
    prepared = vqops.prepare(codebook)
    ops = torch.ops.vqops
    vq = vqops.VectorQuantize(D, K)
    leaf = rows.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        quantized, _, loss = vq(leaf)
        torch.autograd.backward((quantized, loss), (rows, None))

    evaluated = vqops.VectorQuantize(D, K).eval()

    def evaluation() -> None:
        with torch.no_grad():
            evaluated(rows)

    return {
        "addmm + argmin": lambda: torch.addmm(codebook.square().sum(-1), x, codebook.mT, beta=0.5, alpha=-1).argmin(-1),
        "nearest": lambda: vqops.nearest(x, codebook),
        "nearest, prepared": lambda: vqops.nearest(x, prepared),
        "quantize with sums": lambda: vqops.quantize(x, codebook, code_sums=True),
        "quantize_backward": lambda: ops.quantize_backward_triton(
            rows, error, rows, codebook[None], indices, None, "euclidean", "rotation", 0.0, True, True, False
        ),
        "code_sums": lambda: ops.code_sums_triton(rows, indices, K),
        "ema_update_": lambda: vqops.ema_update_(size, average, embed, counts, sums, decay),
        "training step": step,
        "evaluation": evaluation,
    }


def counted(call: Call, driver: stand_in.Driver) -> Cost:
    call()  # compiles
    driver.launched()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    kernels = driver.launched()
    aten, launches = Counter(), Counter()
    for event in profiled.events():
        if event.name.startswith("aten::") and not within_aten(event):
            name = event.name.removeprefix("aten::")
            aten[name] += 1
            launches[name] += name not in VIEWS or copies(event)
    return Cost(kernels, aten, +launches)


def within_aten(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or within_aten(parent))


def copies(event: FunctionEvent) -> bool:
    return any(child.name in COPIES or copies(child) for child in event.cpu_children)


def timed(calls: dict[str, Call], driver: stand_in.Driver, rounds: int) -> dict[str, list[float]]:
    """Microseconds of the process, all calls in turn, each with what it has just used in the caches."""
    taken = {name: [] for name in calls}
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            began = process_time_ns()
            call()
            taken[name].append((process_time_ns() - began) / 1e3)
        driver.launched()
    gc.enable()
    return taken


def rows(driver: stand_in.Driver, rounds: int = ROUNDS) -> Iterator[dict]:
    costs = {name: counted(call, driver) for name, call in calls(*SIZE).items()}
    small = calls(*TIMED)
    for name, call in small.items():
        if counted(call, driver).kernels != costs[name].kernels:
            raise RuntimeError(f"{name} launches other kernels at {TIMED} than at {SIZE}")
    taken = timed(small, driver, rounds)
    for name, cost in costs.items():
        p20, p50, p80 = (round(quantiles(taken[name], n=10, method="inclusive")[i], 1) for i in (1, 4, 7))
        sizes = dict(zip("NDK", SIZE, strict=True)) | {"timed_at": TIMED}
        yield {"op": name, **sizes, **cost.row(), "p20_us": p20, "p50_us": p50, "p80_us": p80, "rounds": rounds}


def triton() -> AbstractContextManager:
    return vqops.use_implementation("triton")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.host_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=folder_of("cpu"), help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    common = {"instructions": instructions("cpu"), "load": round(os.getloadavg()[0], 1), **environment()}
    with stand_in.gpu() as driver, triton():
        found = list(rows(driver, options.rounds))
    path = options.out / "host_cost.jsonl"
    path.unlink(missing_ok=True)
    writer = Writer(path, common)
    for row in found:
        writer.write(row)
        ours, others = len(row["kernels"]), sum(row["launched_by_pytorch"].values())
        print(f"{row['op']:20} {ours:3} {others:3} {row['aten']:3} {row['p50_us']:7}")


if __name__ == "__main__":
    main()
