"""`python -m benchmarks --quick | --full`: every case of this suite, a file of rows a stage.

    --quick    few shapes and rounds, two minutes on two cores; rows go to a temporary folder unless --out names one
    --full     the rows that the documentation is made from, in benchmarks/results/<device>/; ten minutes on two cores

`python -m benchmarks.report` then draws docs/benchmarks.md from them. One thread and processor time unless --threads
says otherwise.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, growth
from benchmarks.baselines import Unavailable
from benchmarks.measure import measure
from benchmarks.rows import Writer, processor
from benchmarks.shapes import SHAPES

RESULTS = Path(__file__).parent / "results"
OFFSETS = (0.0, 10.0, 100.0, 1000.0)
QUICK = ("VQ-VAE-2 top", "DAC", "RQ-VAE")
SLOW_TO_START = "torch.compile"  # tens of seconds of compiler for each shape: not in --quick, and in --full for one


@dataclass
class Run:
    """What a stage needs to know."""

    device: str
    quick: bool
    seconds: float  # of timing a case
    shapes: re.Pattern
    cores: int
    methods: re.Pattern

    @property
    def gemm_size(self) -> int:
        return 8192 if self.device != "cpu" else 1024 if self.quick else 2048

    def chosen(self, names: tuple[str, ...]) -> list:
        if self.quick:
            names = tuple(name for name in names if name in QUICK) or names[:1]
        return [SHAPES[name] for name in names if self.shapes.search(name)]

    def rows(self, make: Callable[[], cases.Case], compiled: bool = False) -> Iterator[dict]:
        """Of one case. A case that cannot be made here is left out by name."""
        try:
            case = make()
        except Unavailable as reason:
            print(f"left out: {reason}")
            return
        names = [name for name in case.methods if self.methods.search(name)]
        if self.quick or not compiled:
            names = [name for name in names if not name.startswith(SLOW_TO_START)]
        yield from measure(case, self.seconds, self.gemm_size, tuple(names))


def search(run: Run) -> Iterator[dict]:
    for shape in run.chosen(cases.ALL):
        yield from run.rows(lambda shape=shape: cases.nearest(shape, run.device), shape.name == "VQGAN f16")
    for shape in run.chosen(("VQ-VAE-2 top",)):
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            yield from run.rows(lambda shape=shape, dtype=dtype: cases.nearest(shape, run.device, dtype))


def statistics(run: Run) -> Iterator[dict]:
    for shape in run.chosen(cases.STATISTICS):
        compiled = shape.name == "VQGAN f16"
        yield from run.rows(lambda shape=shape: cases.code_sums(shape, run.device), compiled)
        yield from run.rows(lambda shape=shape: cases.ema_update(shape, run.device))


def quantize(run: Run) -> Iterator[dict]:
    for shape in run.chosen(cases.STATISTICS):
        yield from run.rows(lambda shape=shape: cases.quantize_forward(shape, run.device))
        for gradient in ("straight_through", "rotation"):
            yield from run.rows(lambda shape=shape, g=gradient: cases.quantize_backward(shape, run.device, g))


def steps(run: Run) -> Iterator[dict]:
    for shape in run.chosen(cases.STEPS):
        yield from run.rows(lambda shape=shape: cases.training_step(shape, run.device), shape.name == "VQGAN f16")
    for shape in run.chosen(("VQ-VAE-2 top",)):
        yield from run.rows(lambda shape=shape: cases.evaluation(shape, run.device))
    size, batch = (64, 4) if run.quick else (256, 1 if run.device == "cpu" else 32)
    yield from run.rows(lambda: cases.system_step(run.device, size, batch, run.quick))


def exactness(run: Run) -> Iterator[dict]:
    """Wrong indices where data is not centred, and with the codes of an untrained model; nothing is timed."""
    data = [{"offset": offset} for offset in OFFSETS] + [{"spread": 1e-3}]
    for shape in run.chosen(("VQ-VAE-2 top",) if run.quick else ("VQ-VAE-2 top", "VQGAN f16")):
        for given in data:
            case = cases.nearest(shape, run.device, **given)
            for name, make in case.methods.items():
                if name.startswith((SLOW_TO_START, "vqops, prepared")) or not run.methods.search(name):
                    continue
                try:
                    found = case.check(make()())
                except Unavailable:
                    continue
                yield {**case.describe(), "op": "exactness", **given, "method": name, **found}


def growing(run: Run) -> Iterator[dict]:
    yield from growth.curves(run.device, run.quick, run.seconds / 4)
    if run.device == "cpu":
        with growth.baselines.threads(run.cores):
            counts = growth.thread_counts()
        for count, row in growth.thread_curve(counts, 3 if run.quick else 25):
            yield {**row, "threads": count}


def memory(run: Run) -> Iterator[dict]:
    return growth.memory(run.device, run.quick)


STAGES = {stage.__name__: stage for stage in (search, statistics, quantize, steps, exactness, growing, memory)}


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_true")
    how.add_argument("--full", action="store_true")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one; may be given more than once")
    parser.add_argument("--shape", type=re.compile, default="", help="only shapes whose name this expression finds")
    parser.add_argument("--method", type=re.compile, default="", help="only methods whose name this expression finds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return run_stages(options, cores)
    finally:
        torch.set_num_threads(before)


def run_stages(options: argparse.Namespace, cores: int) -> Path:
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    folder = options.out or (Path(tempfile.mkdtemp()) if options.quick else RESULTS / slug(name))
    run = Run(
        options.device,
        options.quick,
        0.3 if options.quick else 3.0,
        re.compile(options.shape),
        cores,
        re.compile(options.method),
    )
    begun = time.monotonic()
    for stage in options.stage or STAGES:
        path = folder / f"{stage}.jsonl"
        path.unlink(missing_ok=True)  # rows of one run only
        writer = Writer(path)
        writer.common |= {"device": name, "load": load()}
        for row in STAGES[stage](run):
            writer.common["threads"] = row.pop("threads", options.threads)
            writer.write(row)
            print(line(row), flush=True)
        print(f"-- {stage}: {time.monotonic() - begun:.0f} s")
    print(f"rows are in {folder}")
    return folder


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def load() -> float | None:
    """Runnable programs over a minute when the stage begins: how busy the machine was with other things."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def line(row: dict) -> str:
    """A row for the screen."""
    head = " ".join(str(row[key]) for key in ("op", "shape", "axis", "N", "D", "K", "dtype", "method") if key in row)
    keys = ("left_out", "failed", "p50_ms", "times_vqops", "share_of_ceiling", "extra_mb", "wrong", "checked")
    keys += ("exponent", "times_one_thread", "largest_N_equal_K")
    return head + ": " + ", ".join(f"{key} {row[key]}" for key in keys if row.get(key) is not None)


if __name__ == "__main__":
    main()
