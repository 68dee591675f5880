"""The plan of `python -m benchmarks`: a list of tasks per stage, none of which makes a tensor before it runs."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks import cases, codecs, growth, levels, modules, soft
from benchmarks import sets as instruction_sets
from benchmarks.measure import measure
from benchmarks.rows import label
from benchmarks.shapes import (
    CALLS,
    LEAST,
    LEVEL_CALLS,
    LEVEL_STEPS,
    PLAIN,
    RESIDUALS,
    SEARCHES,
    SETS,
    SHAPES,
    STEPS,
    Shape,
)

OFFSETS = (10.0, 100.0, 1000.0)
QUICK = ("VQ-VAE-2 top", "DAC", "RQ-VAE")
SLOW_TO_START = "torch.compile"  # tens of seconds of compiler for each shape: not in --quick, and in --full for one
ANY = re.compile("")
UNNAMED = ("vqops", "vqops, prepared")  # where each implementation is measured by name
LARGE = 2**31  # N x K beyond which the incumbent's matrices fill a GPU


@dataclass
class Task:
    name: str
    rows: Callable[[], Iterable[dict]]
    facts: dict = field(default_factory=dict)  # what is known of it where it fails

    @property
    def products(self) -> int:
        return self.facts.get("N", 0) * self.facts.get("D", 0) * self.facts.get("K", 0)


@dataclass
class Run:
    """The settings of a stage."""

    device: str = "cpu"
    quick: bool = True
    seconds: float = 0.3  # of timing a case
    shapes: re.Pattern = ANY
    methods: re.Pattern = ANY

    @property
    def gemm_size(self) -> int:
        return 8192 if self.device != "cpu" else 1024 if self.quick else 2048

    def named(self, names: tuple[str, ...]) -> list[Shape]:
        if self.quick:
            names = tuple(name for name in names if name in QUICK) or names[:1]
        return [SHAPES[name] for name in names if self.shapes.search(name)]

    def sized(self, sizes: dict[str, list[tuple[int, int, int]]]) -> list[Shape]:
        given = [min(sizes[self.device], key=math.prod)] if self.quick else sizes[self.device]
        return [shape for shape in (Shape.of(*size) for size in given) if self.shapes.search(shape.name)]

    def leveled(self, sizes: dict[tuple[int, int, int], int]) -> list[tuple[Shape, int]]:
        """With their numbers of levels."""
        shapes = self.sized({self.device: list(sizes)})
        return [(shape, sizes[shape.N(self.device), shape.D, shape.K]) for shape in shapes]

    def timed(
        self, case: cases.Case, compiled: bool = False, but: tuple[str, ...] = (), only: tuple[str, ...] = ()
    ) -> Task:
        def wanted(method: str) -> bool:
            slow = (self.quick or not compiled) and method.startswith(SLOW_TO_START)
            kept = method not in but and (not only or method in only)
            return bool(self.methods.search(method)) and not slow and kept

        rows = partial(measure, case, self.seconds, self.gemm_size, wanted)
        return Task(label(case.describe()), rows, case.describe())


def search(run: Run) -> Iterator[Task]:
    for shape in [*run.named(cases.ALL), *run.sized(LEAST)]:
        yield run.timed(cases.nearest(shape, run.device), shape.name == "VQGAN f16")
    for shape in run.named(("VQ-VAE-2 top",)):
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            yield run.timed(cases.nearest(shape, run.device, dtype))
    for shape in run.named(cases.STATISTICS):
        yield run.timed(cases.sample(shape, run.device))


def statistics(run: Run) -> Iterator[Task]:
    for shape in [*run.named(cases.STATISTICS), *run.sized(LEAST)]:
        yield run.timed(cases.code_sums(shape, run.device), shape.name == "VQGAN f16")
        yield run.timed(cases.ema_update(shape, run.device))


def quantize(run: Run) -> Iterator[Task]:
    for shape in [*run.named(cases.STATISTICS), *run.sized(LEAST)]:
        yield run.timed(cases.quantize_forward(shape, run.device))
        for gradient in ("straight_through", "rotation"):
            yield run.timed(cases.quantize_backward(shape, run.device, gradient))


def residual(run: Run) -> Iterator[Task]:
    for shape, number in run.leveled(RESIDUALS):
        for code_sums in (False, True):
            yield run.timed(levels.residual_quantize(shape, run.device, number, code_sums))
    for shape, number in run.leveled(LEVEL_STEPS):
        yield run.timed(levels.training_step(shape, run.device, number))
    for shape, number in run.leveled(LEVEL_CALLS):
        yield run.timed(levels.evaluation(shape, run.device, number))
    for name in codecs.CODECS:
        yield run.timed(codecs.codec(name, run.device))


def assignments(run: Run) -> Iterator[Task]:
    for shape in run.named(cases.STATISTICS):
        for op in soft.OPS:
            yield run.timed(soft.assignments(op, shape, run.device))


def steps(run: Run) -> Iterator[Task]:
    for shape in [*run.named(modules.STEPS), *run.sized(LEAST)]:
        yield run.timed(modules.training_step(shape, run.device), shape.name == "VQGAN f16")
    for shape in [*run.named(("VQ-VAE-2 top",)), *run.sized({run.device: CALLS}), *run.sized(LEAST)]:
        yield run.timed(modules.evaluation(shape, run.device))
    size, batch = (64, 4) if run.quick else (256, 1 if run.device == "cpu" else 32)
    yield run.timed(modules.system_step(run.device, size, batch, run.quick))


def kernels(run: Run) -> Iterator[Task]:
    """Sizes of no model. On a GPU every op, each implementation by name beside the peers."""
    if run.device == "cpu":
        for shape in run.sized(SEARCHES):
            yield run.timed(cases.nearest(shape, run.device), but=("vector-quantize-pytorch",))  # seconds a call
        for shape in [] if run.quick else run.sized(STEPS):
            yield run.timed(cases.code_sums(shape, run.device))
            yield run.timed(modules.training_step(shape, run.device))
    else:
        yield from by_implementation(run, run.sized(SEARCHES), run.sized(STEPS))


def by_implementation(run: Run, searches: list[Shape], steps: list[Shape]) -> Iterator[Task]:
    timed = partial(run.timed, but=UNNAMED)
    for shape in searches:
        large = ("vector-quantize-pytorch",) if shape.vectors * shape.K > LARGE else ()
        for dtype in (torch.float32, torch.bfloat16):
            case = cases.nearest(shape, run.device, dtype, every=True)
            yield run.timed(case, but=(*UNNAMED, *large))
        yield timed(cases.search_statistics(shape, run.device))
    for shape in steps:
        for kind in ("uniform", "zipf", "one code"):
            yield timed(cases.code_sums(shape, run.device, kind=kind, every=True))
        yield timed(cases.nearest_topk(shape, run.device, every=True))
        yield timed(cases.sample(shape, run.device, every=True))
        yield timed(cases.ema_update(shape, run.device, every=True))
        for gradient in ("straight_through", "rotation"):
            yield timed(cases.quantize_backward(shape, run.device, gradient, every=True))
        yield timed(modules.training_step(shape, run.device, every=True), shape == steps[0])


def sets(run: Run) -> Iterator[Task]:
    """Whatever set this process has."""
    if run.device == "cpu":
        given = run.sized({"cpu": SETS}), run.seconds, lambda method: bool(run.methods.search(method))
        yield Task("sets of kernels", partial(instruction_sets.rows, *given))


def plain(run: Run) -> Iterator[Task]:
    """Without a kernel: "pytorch" beside what is written by hand."""
    for shape in run.sized({run.device: PLAIN}):
        yield run.timed(cases.nearest(shape, run.device, every=True), only=("vqops pytorch", "addmm + argmin"))
        step = modules.training_step(shape, run.device, every=True)
        yield run.timed(step, only=("vqops pytorch", "PyTorch, index_add_"))


def exactness(run: Run) -> Iterator[Task]:
    """Searches of data that is not centred, and with the codes of an untrained model: peers find wrong indices."""
    for shape in run.named(("VQ-VAE-2 top",) if run.quick else ("VQ-VAE-2 top", "VQGAN f16")):
        for given in [{"offset": offset} for offset in OFFSETS] + [{"spread": 1e-3}]:
            yield run.timed(cases.nearest(shape, run.device, **given))


def growing(run: Run) -> Iterator[Task]:
    for axis in growth.AXES:
        yield Task(f"growth over {axis}", partial(growth.curve, axis, run.device, run.quick, run.seconds / 4))
    if run.device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        yield Task("growth over threads", partial(growth.thread_curve, cores, 3 if run.quick else 25))


def memory(run: Run) -> Iterator[Task]:
    for op in growth.MEASURED:
        yield Task(f"memory of {op}", partial(growth.memory, op, run.device, run.quick))


PARTS = search, statistics, quantize, residual, assignments, steps, kernels, sets, plain, exactness, growing, memory
STAGES = {stage.__name__: stage for stage in PARTS}
