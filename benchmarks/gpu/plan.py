"""The parts of a first run, in order of what a second of them tells, each with a limit; a rehearsal has small inputs.

    facts          driver, clocks, compiler and versions of the machine
    cases          the cases of `vqops check` with CUDA C++ and PyTorch, each by several processes at once
    mma            the depths of wgmma once more with mma.sync in its place: which of the two is wrong, if one is
    times          the search at seven shapes: time of a CUDA graph, of each kernel, rows by tier
    loader         both for the depths of wgmma where its blocks have a loader
    triton         the cases with the Triton kernels, which are compiled first
    profile        the hardware counters of three shapes
    suite          the tests of the ops with the CUDA kernels and with PyTorch, on all cores
    sanitizer      memory and race checks of a case for each kernel
    triton_suite   the tests of the ops with the Triton kernels
    check          `vqops check` itself; its record is kept in --out/record.json
    bench          `python -m benchmarks --stage kernels`, smallest cases first
    processor      tests and times of the CPU kernels: its processor may have instructions that no other at hand has

All but the last three are one call, which may end before the last of them; what is left, and these, a second one.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.prepare import ROOT
from benchmarks.rows import Writer, environment, instructions
from benchmarks.shapes import SEARCHES
from vqops.check.cases import CASES
from vqops.check.child import heard
from vqops.check.process import run_limited
from vqops.check.record import is_right
from vqops.check.runner import CHILD, Runner, shared
from vqops.dispatch.records import VARIABLE

LOG = 12_000_000  # characters of an output that are kept
LEAST = 15.0  # seconds, without which no part begins
AT_ONCE = 6  # processes on the GPU
SECOND_CALL = ("check", "bench", "processor")
SMALL = 6  # of the cases, a rehearsal takes each so-manieth
WGMMA = [name for name in CASES if re.fullmatch(r"nearest \d+ x (64|128|200|256|400|512) x \d+", name)]
SANITIZED = [  # each kernel once, and where it shares its work with others
    *("ema_update_ euclidean", "code_sums float32 in order", "code_sums float32 atomic"),
    *("quantize cosine float32 in order", "quantize_backward rotation euclidean float32 atomic"),
    *("residual_quantize cosine", "residual_quantize_backward rotation cosine atomic"),
    *("nearest heads", "nearest duplicates", "nearest 300 x 256 x 3000"),
    *("nearest 4096 x 8 x 3000", "nearest 4096 x 64 x 3000", "nearest 4096 x 700 x 3000"),
    *("nearest_topk 300 x 8 x 3000", "nearest_topk duplicates", "sample 300 x 8 x 3000", "sample duplicates"),
]
TOOLS = ("memcheck", "racecheck")
REFUSALS = "^=+ .*(not supported|Unable to|failed to (attach|initialize))"  # of a sanitizer that cannot run here
TESTS = ["tests/cuda", "tests/ops"]  # the modules' need packages that such a machine may lack
FACTS = """nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total --format=csv
nvcc --version | tail -2
which ncu compute-sanitizer
{python} -m pip list 2>/dev/null | grep -iE '^(torch|triton|setuptools|pytest|numpy|ninja) '
{python} -c 'import vqops; print(vqops._C.__file__, vqops._C.cuda)'"""


class Plan:
    """Each part is a method, and returns whether it passed."""

    def __init__(self, writer: Writer, end: float, rehearsal: bool):
        self.writer, self.end, self.rehearsal = writer, end, rehearsal
        self.folder = writer.path.parent
        self.device = "cpu" if rehearsal else "cuda:0"

    # How parts are run

    def left(self, most: float) -> float:
        return min(most, self.end - time.monotonic())

    def write(self, part: str, **facts) -> dict:
        row = {"part": part, **facts}
        self.writer.write(row)
        print(json.dumps(row)[:400], flush=True)
        return row

    def command(self, part: str, command: list, seconds: float, **environment: str) -> dict:
        """Runs a command; its row, already written. The whole output is beside the rows."""
        began = time.monotonic()
        status, output = run_limited(command, self.left(seconds), ROOT, **environment)
        outcome = {0: "passed", None: "out of time"}.get(status, "failed")
        (self.folder / f"{part.replace(' ', '_')}.log").write_text(output[-LOG:])
        lines = [line[:300] for line in output.splitlines() if line.strip()][-3:]
        return self.write(part, outcome=outcome, seconds=round(time.monotonic() - began, 1), last_lines=lines)

    def judge(self, part: str, implementation: str, names: list[str], seconds: float, **environment: str) -> bool:
        """The cases by several processes, each of which has its share and restarts behind a case that ends it."""
        if self.rehearsal:
            names = names[::SMALL]
        threads = max(1, (os.cpu_count() or 1) // AT_ONCE)
        runner = Runner(time.monotonic() + self.left(seconds), threads=threads)
        task = {"device": self.device, "implementation": implementation, "small": self.rehearsal}
        right = []

        def run(share: list[str]) -> None:
            for row in runner.rows(task, share, **environment):
                right.append(is_right(row))
                self.write(part, implementation=implementation, case=row.pop("name"), **row)

        with ThreadPoolExecutor(AT_ONCE if not self.rehearsal else 2) as pool:
            list(pool.map(run, shared(names, AT_ONCE)))
        return all(right)

    def names(self, implementation: str) -> list[str]:
        return [name for name, case in CASES.items() if case.concerns(implementation, self.device.partition(":")[0])]

    # The parts

    def facts(self) -> bool:
        command = ["bash", "-c", FACTS.format(python=sys.executable)]
        return self.command("facts", command, 40)["outcome"] == "passed"

    def cases(self) -> bool:
        passed = [self.judge("cases", name, self.names(name), 90) for name in ("compiled", "pytorch")]
        return all(passed)

    def mma(self) -> bool:
        return self.judge("mma", "compiled", WGMMA, 45, VQOPS_WGMMA="0")

    def times(self) -> bool:
        right = [self.time("times", shape) for shape in self.shapes()]
        return all(right)

    def loader(self) -> bool:
        chosen = {"VQOPS_WGMMA": "loader"}
        right = [self.judge("loader", "compiled", WGMMA, 45, **chosen)]
        right += [self.time("loader", shape, **chosen) for shape in self.shapes() if 32 < shape[1] <= 512]
        return all(right)

    def shapes(self) -> list[tuple[int, int, int]]:
        shapes = sorted(SEARCHES["cuda"], key=lambda shape: shape[0] * shape[1] * shape[2])
        return [(100, D, min(K, 100)) for _, D, K in shapes[:2]] if self.rehearsal else shapes

    def of_kernels(self, shape: tuple[int, int, int], *flags: str) -> list:
        device = self.device.partition(":")[0]
        return [sys.executable, "-m", "benchmarks.gpu.kernels", *shape, "--device", device, *flags]

    def time(self, part: str, shape: tuple[int, int, int], **environment: str) -> bool:
        status, output = run_limited(self.of_kernels(shape), self.left(60), ROOT, **environment)
        rows = list(filter(None, map(heard, output.splitlines())))
        if rows:
            return not self.write(part, **rows[-1])["wrong"]
        how = "out of time" if status is None else f"ended with {status}: {output.strip()[-500:]}"
        self.write(part, kernels=shape, failed=how)
        return False

    def profile(self) -> bool:
        profiler = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
        if profiler is None or self.rehearsal:
            self.write("profile", outcome="not possible", why="there is no ncu, or nothing to count")
            return True
        shapes, outcomes = self.shapes(), []
        for shape in (shapes[0], shapes[len(shapes) // 2], shapes[-2]):
            name = "profile " + "x".join(map(str, shape))
            counting = [profiler, "--clock-control", "none", "--set", "full", "-k", "regex:run", "-c", "8"]
            command = [*counting, "--csv", "--page", "raw", *self.of_kernels(shape, "--once")]
            outcomes.append(self.command(name, command, 60)["outcome"])
        return set(outcomes) == {"passed"}

    def suite(self) -> bool:
        select = "(compiled-cuda or pytorch-cuda or test_device) and not triton"
        return self.pytest("suite", select, 120, "cuda")

    def pytest(self, part: str, select: str, seconds: float, required: str) -> bool:
        # By name, as they pass and fail: of a run that is ended early there is nothing else.
        command = [sys.executable, "-m", "pytest", "-v", "--tb", "short", "-p", "no:cacheprovider"]
        if self.rehearsal:  # a few tests, on the CPU
            command += ["-k", "by_hand and compiled-cpu", *TESTS]
            return self.command(part, command, seconds)["outcome"] == "passed"
        command += ["-n", str(min(12, os.cpu_count() or 1)), "-k", select, *TESTS]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", "90", "--timeout-method", "thread"]  # also within a call that hangs
        return self.command(part, command, seconds, VQOPS_REQUIRE=required)["outcome"] == "passed"

    def sanitizer(self) -> bool:
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if tool is None or self.rehearsal:
            self.write("sanitizer", outcome="not possible", why="there is no compute-sanitizer, or nothing to check")
            return True
        jobs = [(kind, case) for kind in TOOLS for case in SANITIZED]
        end = time.monotonic() + self.left(90)
        task = {"device": self.device, "implementation": "compiled", "small": False}
        hidden = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # torch's allocator would hide what is read beyond a tensor

        def run(job: tuple[str, str]) -> bool:
            kind, case = job
            command = [tool, "--tool", kind, "--error-exitcode", "9", *CHILD, json.dumps({**task, "names": [case]})]
            status, output = run_limited(command, max(1.0, end - time.monotonic()), ROOT, **hidden)
            said = [line for line in output.splitlines() if line.startswith("=====")]
            row = next((row for row in reversed(list(map(heard, output.splitlines()))) if row and "name" in row), {})
            if status is None:
                outcome = "out of time"
            elif status == 0 and row and is_right(row):
                outcome = "passed"
            else:
                outcome = "not possible" if any(re.search(REFUSALS, line) for line in said) else "failed"
            failed = {} if outcome == "passed" else {"failed": "\n".join([outcome, *said[:20]])}
            self.write("sanitizer", **{**row, **failed, "tool": kind, "case": case, "outcome": outcome})
            return outcome != "failed"

        with ThreadPoolExecutor(8) as pool:
            return all(list(pool.map(run, jobs)))

    def triton(self) -> bool:
        return self.judge("triton", "triton", self.names("triton"), 150)

    def triton_suite(self) -> bool:
        return self.pytest("triton_suite", "triton-cuda or (test_device and triton)", 240, "cuda,triton")

    def check(self) -> bool:
        record, seconds = self.folder / "record.json", self.left(270)
        command = [sys.executable, "-m", "vqops", "check", "--device", self.device, "--seconds", seconds - 30]
        if self.rehearsal:
            command = [sys.executable, "-m", "vqops", "check"]  # the GPUs of a machine that may have none
        return self.command("check", command, seconds, **{VARIABLE: str(record)})["outcome"] == "passed"

    def bench(self) -> bool:
        seconds = self.left(300)
        how = ["--full", "--device", "cuda", "--stage", "kernels", "--skip-done", "--seconds", seconds - 60]
        if self.rehearsal:
            how = ["--quick", "--stage", "search", "--shape", "RQ-VAE", "--method", "^vqops$"]
        command = [sys.executable, "-m", "benchmarks", *how, "--out", self.folder]
        return self.command("bench", command, seconds)["outcome"] == "passed"

    def processor(self) -> bool:
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cpu/test_kernels.py"]
        if self.rehearsal:
            return self.command("processor tests", [*tests, "-k", "unknown"], 60)["outcome"] == "passed"
        outcomes = [self.command("processor tests", tests, 120)["outcome"]]
        for name in (instructions("cpu"), "avx512"):
            how = ["--full", "--stage", "kernels", "--method", "^(vqops$|ceiling)", "--seconds", "45"]
            command = [sys.executable, "-m", "benchmarks", *how, "--out", self.folder / name]
            outcomes.append(self.command(f"processor {name}", command, 100, VQOPS_CPU=name)["outcome"])
        return set(outcomes) == {"passed"}


PARTS: dict[str, Callable[[Plan], bool]] = {
    part.__name__: part
    for part in (
        *(Plan.facts, Plan.cases, Plan.mma, Plan.times, Plan.loader, Plan.triton, Plan.profile),
        *(Plan.suite, Plan.sanitizer, Plan.triton_suite, Plan.check, Plan.bench, Plan.processor),
    )
}


def run(out: Path, parts: str | None, end: float, rehearsal: bool, built: dict) -> int:
    """0 where all parts passed. What fails does not keep the next from its rows."""
    default = [name for name in PARTS if rehearsal or name not in SECOND_CALL]
    chosen = parts.split(",") if parts else default
    if unknown := [name for name in chosen if name not in PARTS]:
        raise SystemExit(f"--parts: there is no {', '.join(unknown)}, only {', '.join(PARTS)}")
    device = "cpu" if rehearsal else "cuda"
    about = environment(device) | {"instructions": instructions(device)}
    writer = Writer(out.resolve() / "first_run.jsonl", about)
    plan, passed = Plan(writer, end, rehearsal), []
    if built:
        plan.write(built.pop("part"), **built)
    for name in (name for name in PARTS if name in chosen):
        if plan.left(LEAST) < LEAST:
            plan.write(name, outcome="no time left")
            passed.append(False)
            continue
        try:
            passed.append(PARTS[name](plan))
        except Exception as error:  # a fault of the plan itself costs its part
            plan.write(name, outcome="failed", why=f"{type(error).__name__}: {error}"[:500])
            passed.append(False)
        plan.write(name, outcome="passed" if passed[-1] else "failed", left=round(end - time.monotonic()))
    return 0 if all(passed) else 1
