"""`python -m benchmarks.gpu STAGE`: build, test, check and measure on a machine with a GPU. It has never met one.

    build   compile the kernels into this folder
    test    the test suite, with the CUDA and Triton kernels required
    check   memory and race checks over a short selection, where the sanitizer can run
    bench   every op beside plain PyTorch and the peers that are installed, with the ceilings measured in the same run
    all     one after the other

Each stage ends within eight minutes; `bench --skip-done` goes on where the last run ended. It needs no network:
gpu_requirements.txt lists the wheels to bring. Rows are JSON lines in benchmarks/results/<device>/gpu.jsonl, written as
they are measured.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Nothing of vqops: the first stage builds it.
ROOT = Path(__file__).parents[1]
STAGES = ("build", "test", "check", "bench")
PACKAGES = ("vqops", "numpy", "triton", "vector-quantize-pytorch", "flash-kmeans")
SECONDS = 470  # a stage
ROUNDS = 50
CHECKS = [f"tests/test_{name}.py" for name in ("ops_search", "ops_quantize", "ops_statistics", "cuda_device")]
SELECTION = "cuda and (normal or heads or duplicates or odd_sizes or sums_agree or (every_depth and 300-euclidean))"
TOOLS = ("memcheck", "racecheck")


class Rows:
    """A file of rows; each is flushed when it is written, with what all rows of the run share."""

    def __init__(self, path: Path, common: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.common = path, common

    def write(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**row, **self.common}) + "\n")
        print(json.dumps(row), flush=True)

    def done(self) -> set[str]:
        """Keys of the rows of this commit that were measured, without error."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines]
        return {key_of(row) for row in rows if row.get("commit") == self.common["commit"] and "error" not in row}


def key_of(row: dict) -> str:
    """Which measurement a row is, apart from when and what came out."""
    names = ("stage", "op", "method", "N", "D", "K", "dtype", "indices", "gradient")
    return json.dumps([row.get(name) for name in names])


def common_facts(device: str) -> dict:
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"device": device, "versions": versions, "commit": commit()}


def commit() -> str:
    """Of the sources measured; ends in + where they differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def run(command: list, seconds: float, **environment) -> tuple[int | None, str]:
    """Exit status and output; status None where the time was up."""
    environment = {**os.environ, **environment}
    options = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run([str(part) for part in command], timeout=seconds, **options)
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        return None, said if isinstance(said, str) else said.decode(errors="replace")
    return done.returncode, done.stdout


def outcome(stage: str, status: int | None, output: str, seconds: float, **facts) -> dict:
    said = {0: "passed", None: "out of time"}.get(status, "failed")
    last = [line for line in output.splitlines() if line.strip()][-1:]
    return {"stage": stage, **facts, "outcome": said, "seconds": round(seconds, 1), "last_line": "".join(last)[:300]}


def build(rows: Rows) -> bool:
    start = time.monotonic()
    # One architecture, that of this GPU: all of them do not fit in the time.
    major, minor = torch.cuda.get_device_capability()
    architecture = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = run(command, SECONDS, VQOPS_CUDA="1", TORCH_CUDA_ARCH_LIST=architecture)
    rows.write(outcome("build", status, output, time.monotonic() - start, architecture=architecture))
    if status != 0:
        print(output[-4000:])
    return status == 0


def test(rows: Rows) -> bool:
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "-k", "cuda"]
    on_cpu = ("kernels", "sums", "search", "benchmarks")
    command += [f"--ignore=tests/test_cuda_{name}.py" for name in on_cpu]
    status, output = run(command, SECONDS, VQOPS_REQUIRE="cuda,triton")
    rows.write(outcome("test", status, output, time.monotonic() - start))
    if status != 0:
        print(output[-4000:])
    return status == 0


def check(rows: Rows) -> bool:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        rows.write({"stage": "check", "outcome": "not possible", "why": "compute-sanitizer is not installed"})
        return True
    passed = True
    for tool in TOOLS:
        start = time.monotonic()
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *CHECKS]
        # Torch's allocator would hide what is read beyond a tensor.
        status, output = run(command, SECONDS / len(TOOLS), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        row = outcome("check", status, output, time.monotonic() - start, tool=tool)
        if status not in (0, None) and re.search("not supported|Unable to|failed to (attach|initialize)", output):
            row["outcome"], row["why"] = "not possible", "the sanitizer cannot run here"
        passed &= row["outcome"] in ("passed", "not possible")
        rows.write(row)
        if row["outcome"] == "failed":
            print(output[-4000:])
    return passed


def bench(rows: Rows, gpu, cases, skip_done: bool, rounds: int = ROUNDS, seconds: float = SECONDS) -> bool:
    """Measures the cases that time allows. False where some are left for a run with --skip-done."""
    start, done = time.monotonic(), rows.done() if skip_done else set()
    ceilings = gpu.ceilings()
    rows.write({"stage": "bench", "op": "ceilings", **ceilings})
    for number, make in enumerate(cases):
        if time.monotonic() - start > seconds:
            print(f"time is up before case {number}: go on with --skip-done")
            return False
        case = make()
        facts = {"stage": "bench", "op": case.op, **case.facts}
        left = {name: call for name, call in case.methods.items() if key_of({**facts, "method": name}) not in done}
        if left:
            measure(rows, gpu, case, facts, left, ceilings, rounds)
    return True


def measure(rows: Rows, gpu, case, facts: dict, methods: dict[str, Callable], ceilings: dict, rounds: int) -> None:
    from benchmarks.rows import summary

    wrong = {}
    for name, call in methods.items():  # results first, then times
        try:
            wrong[name] = case.wrong(call()) if case.wrong else None
        except Exception:  # the timing reports it
            wrong[name] = None
    for name, timing in gpu.timings(methods, rounds).items():
        row = {**facts, "method": name}
        if "error" in timing:
            rows.write({**row, "error": timing["error"]})
            continue
        seconds = timing.pop("seconds")
        row |= {**summary(seconds), **timing, **case.notes}
        second = sorted(seconds)[len(seconds) // 2]
        floor = max(case.bytes / ceilings["copy_bytes_per_s"], case.operations / ceilings["fp16_ops_per_s"])
        row |= {"gbytes_per_s": case.bytes / second / 1e9, "tflops": case.operations / second / 1e12}
        row |= {"floor_ms": 1e3 * floor, "share_of_floor": floor / second, "wrong": wrong[name]}
        rows.write({name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--skip-done", action="store_true", help="leave out what this commit has measured already")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device here; nothing was run")
        return 0
    device = torch.cuda.get_device_name()
    folder = re.sub(r"\W+", "-", device.lower()).strip("-")
    path = options.out or Path(__file__).parent / "results" / folder / "gpu.jsonl"
    rows = Rows(path, common_facts(device))
    passed = True
    for stage in STAGES if options.stage == "all" else (options.stage,):
        if stage == "bench" and options.stage == "all":  # in a process of its own: the kernels may be new
            command = [sys.executable, "-m", "benchmarks.gpu", "bench", "--out", str(path)]
            command += ["--skip-done"] * options.skip_done
            passed &= subprocess.run(command, cwd=ROOT).returncode == 0
        elif stage == "bench":
            from benchmarks.gpu_cases import cases
            from benchmarks.gpu_timing import Gpu

            passed &= bench(rows, Gpu(), cases(Gpu.device), options.skip_done)
        else:
            passed &= {"build": build, "test": test, "check": check}[stage](rows)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
