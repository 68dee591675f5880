"""`python -m benchmarks --quick | --full`: every case of this suite, a file of rows per stage.

    --quick    few shapes and rounds, three minutes on two cores; rows go to a temporary folder unless --out names one
    --full     the rows that the documentation is made from, in benchmarks/results/<device>/; twenty-five minutes there

`python -m benchmarks.report` then draws the pages of docs/ from them. One thread and processor time unless --threads
says otherwise. Stage `sets` measures all sets of CPU kernels that the processor has;
`VQOPS_CPU=avx512 python -m benchmarks --full --stage kernels` has all sizes of one that would not be chosen. On a GPU,
smallest cases first, each in a process of its own.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.plan import STAGES, Run, Task
from benchmarks.rows import Writer, environment, folder_of, instructions, label, read
from vqops.check.process import run_limited

ROOT = Path(__file__).parents[1]
ALL = "all"  # the method of a row about a process that did not end well


def main(arguments: list[str] | None = None) -> bool:
    """Whether all was measured for which there was time."""
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
    parser.add_argument("--skip-done", action="store_true", help="leave out cases that this commit has measured")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--case-seconds", type=float, help="each case in a process that ends after so long; GPU: 60")
    parser.add_argument("--case", help="only the case of this name, in this process")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if options.device == "cuda" and options.case_seconds is None:
        options.case_seconds = 60.0
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return run_stages(options, sys.argv[1:] if arguments is None else arguments)
    finally:
        torch.set_num_threads(before)


def run_stages(options: argparse.Namespace, arguments: list[str]) -> bool:
    temporary = options.quick and not options.out
    folder = options.out or (Path(tempfile.mkdtemp()) if temporary else folder_of(options.device))
    seconds = 0.3 if options.quick else 3.0
    run = Run(options.device, options.quick, seconds, re.compile(options.shape), re.compile(options.method))
    common = environment(options.device) | {"instructions": instructions(options.device), "threads": options.threads}
    begun, found = time.monotonic(), 0
    for stage in dict.fromkeys(options.stage or STAGES):
        path = folder / f"{stage}.jsonl"
        writer = Writer(path, common | {"load": load()})
        tasks = list(STAGES[stage](run))
        if options.device == "cuda":
            tasks.sort(key=lambda task: task.products)
        if options.case:
            tasks = [task for task in tasks if task.name == options.case]
        elif options.skip_done:
            done = measured(path, common["commit"])
            tasks = [task for task in tasks if task.name not in done]
        else:
            path.unlink(missing_ok=True)  # rows of one run only
        for task in tasks:
            if time.monotonic() - begun > options.seconds:
                print(f"time is up before {task.name}: go on with --skip-done")
                return False
            if options.case_seconds and not options.case:
                apart(task, stage, writer, folder, options.case_seconds, arguments)
                continue
            for row in task.rows():
                writer.write({**row, "case": task.name})
                print(line(row), flush=True)
        found += len(tasks)
        print(f"-- {stage}: {time.monotonic() - begun:.0f} s")
    if options.case and not found:
        sys.exit(f"--case: none of these stages has one that is called {options.case}")
    print(f"rows are in {folder}")
    return True


def apart(task: Task, stage: str, writer: Writer, folder: Path, seconds: float, arguments: list[str]) -> None:
    """In a process of its own, whose end is a row where it is not a good one."""
    command = [sys.executable, "-m", "benchmarks", *arguments, "--out", folder.resolve(), "--case", task.name]
    status, output = run_limited([*command, "--stage", stage], seconds, ROOT)
    print(output, end="", flush=True)
    if status != 0:
        said = "out of time" if status is None else f"ended with {status}: {output.strip()[-300:]}"
        writer.write({"op": task.name, **task.facts, "method": ALL, "failed": said, "case": task.name})


def measured(path: Path, commit: str) -> set[str]:
    """Names of the cases of which this commit has rows, each method's last one without a failure."""
    found: dict[str, dict[str, bool]] = {}
    for row in read(path):
        if row["commit"] == commit:
            methods = found.setdefault(row["case"], {})
            methods.pop(ALL, None)
            methods[row["method"]] = "failed" not in row
    return {case for case, methods in found.items() if all(methods.values())}


def load() -> float | None:
    """Runnable programs over a minute when the stage begins: how busy the machine was with other things."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def line(row: dict) -> str:
    """A row for the screen."""
    keys = ("left_out", "failed", "p50_ms", "times_vqops", "share_of_ceiling", "extra_mb", "wrong", "checked", "tiers")
    keys += ("exponent", "times_one_thread", "largest_N_equal_K")
    return label(row) + ": " + ", ".join(f"{key} {row[key]}" for key in keys if row.get(key) is not None)


if __name__ == "__main__":
    sys.exit(not main())
