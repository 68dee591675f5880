"""`vqops check`: cases, then times, then a record, with a line for what stands in the way."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from vqops import info
from vqops.check import machine, record
from vqops.check.cases import CASES
from vqops.check.child import FACTS
from vqops.check.runner import Runner, shared
from vqops.check.timing import SHAPES
from vqops.dispatch import choice, records
from vqops.dispatch.records import VARIABLE, Gpu
from vqops.dispatch.regimes import regime_of

SECONDS = 300.0  # all of it, unless the caller says otherwise
A_PROCESS = 3 << 30  # bytes on the GPU for one of several processes
AT_ONCE, SHARES = 6, 3  # processes, and those that share the cases of Triton, which compiles on the host
REHEARSED = 2  # shapes that are timed in a rehearsal


class CannotCheck(Exception):
    """A line for the user."""


def check(device: str = "cuda", seconds: float = SECONDS) -> bool:
    """Checks the GPUs of one device, or of every kind that is there; whether everything was right.

    "cpu" rehearses all of it with small inputs, Triton's interpreter and no file. Raises CannotCheck.
    """
    began = time.monotonic()
    if device == "cpu":
        return check_one(machine.of_cpu(), {}, began + seconds)
    facts = facts_here(Runner(began + seconds))
    gpus = chosen(device, facts["gpus"])
    if not gpus:
        print(f"There is no CUDA device that torch {facts['versions']['torch']} can use here: nothing was checked.")
    if len(gpus) > 1 and os.environ.get(VARIABLE):
        there = ", ".join(f"{gpu['device']} ({gpu['name']})" for gpu in gpus)
        raise CannotCheck(f"{VARIABLE} names a file for one kind of GPU, so --device must name one of {there}")
    right = [check_one(gpu, facts, began + seconds * (number + 1)) for number, gpu in enumerate(gpus)]
    return all(right)


def facts_here(runner: Runner) -> dict:
    (found,) = runner.rows({}, [FACTS])
    if "failed" in found:
        raise CannotCheck(f"the GPUs of this machine cannot be asked for: {found['failed']}")
    return found


def chosen(device: str, gpus: list[dict]) -> list[dict]:
    """Of several GPUs of a kind the first."""
    if device == "cuda":
        return list({(gpu["name"], gpu["capability"]): gpu for gpu in reversed(gpus)}.values())[::-1]
    named = [gpu for gpu in gpus if gpu["device"] == device]
    if not named:
        there = ", ".join(["cpu", *(gpu["device"] for gpu in gpus)])
        raise CannotCheck(f"--device must be cuda or one of {there}, got {device}")
    return named


def check_one(gpu: dict, facts: dict, end: float) -> bool:
    of, rehearsal = Gpu(gpu["name"], gpu["capability"]), gpu["device"] == "cpu"
    path, at_once = records.candidates(of)[0], 2
    if not rehearsal:
        at_once = min(AT_ONCE, gpu["free"] // A_PROCESS)
        if at_once == 0:
            needed = f"{gpu['free'] >> 20} MB of its memory are free, {A_PROCESS >> 20} are needed"
            raise CannotCheck(f"{of.name} is in use: {needed}")
    with ExitStack() as stack:
        trouble = None if rehearsal else reserved(path, stack)
        names = [name for name in machine.GPU_IMPLEMENTATIONS if name not in gpu["left_out"]]
        print(f"{of.name}: {', '.join(names)}")
        for name, why in gpu["left_out"].items():
            print(f"{name} is left out: {why}")
        threads = max(1, facts.get("processors", 2) // at_once)
        began, runner = time.monotonic(), Runner(end, progress(), threads=threads)
        try:
            results = judged(names, gpu, facts, runner, at_once)
            times = timed(record.families(results), gpu, runner)
        finally:
            runner.began("")
        about = {name: facts[name] for name in ("versions", "built") if name in facts}
        about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "left_out": gpu["left_out"]}
        about["seconds"] = round(time.monotonic() - began)
        found = record.made(of, about, results, times)
        print(record.described(found))
        if reason := record.why_incomplete(found):
            raise CannotCheck(f"{reason}. No record was written, and an earlier one stays")
        rows = tuple(map(regime_of, found["rows"]))
        if rehearsal:
            print(f"A rehearsal, which writes no record. It would have {len(rows)} rows.")
        else:
            print(info.of_gpu(of.name, choice.Table(rows, keep(found, path, trouble))))
    right = all(map(record.passed, [*results.values(), times]))
    if not record.passed(results["pytorch"]):
        print('"pytorch", which takes all other calls, did not pass: set VQOPS_IMPLEMENTATION=reference, and report it')
    if not right:
        print("Something was wrong: `vqops check --report` prints what to paste into an issue.")
    return right


def reserved(path: Path, stack: ExitStack) -> str | None:
    """Nobody else checks this kind of GPU meanwhile; or why no file can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=0))
    except Timeout:
        raise CannotCheck(f"another check of this GPU is running: it holds {path.with_suffix('.lock')}") from None
    except OSError as error:
        return str(error)
    return None


def keep(found: dict, path: Path, trouble: str | None) -> str:
    """Where the record is. One that cannot be written is printed, so that nothing is lost."""
    try:
        if trouble is None:
            record.write(found, path)
            return str(path)
    except OSError as error:
        trouble = str(error)
    print(json.dumps(found, indent=1))
    print(
        f"No file could be written ({trouble}). The record is printed above: keep it in a file of your own, and name "
        f"that file by {VARIABLE}."
    )
    return "above, in no file"


def judged(names: list[str], gpu: dict, facts: dict, runner: Runner, at_once: int) -> dict[str, list[dict]]:
    """Rows of all cases, by implementation, side by side as the memory of the GPU allows."""
    kind = gpu["device"].partition(":")[0]
    of_cases = {name: [case for case in CASES if CASES[case].concerns(name, kind)] for name in names}
    shares = {"triton": max(1, min(SHARES, facts.get("processors", 1) // 4))}
    jobs = [(name, share) for name in names for share in shared(of_cases[name], shares.get(name, 1))]
    results = {name: [] for name in names}

    def run(job: tuple[str, list[str]]) -> None:
        implementation, cases = job
        task = {"device": gpu["device"], "implementation": implementation, "small": gpu["device"] == "cpu"}
        results[implementation].extend(runner.rows(task, cases))

    side_by_side(run, jobs, at_once, runner)
    order = list(CASES)
    return {name: sorted(rows, key=lambda row: order.index(row["name"])) for name, rows in results.items()}


def side_by_side(run: Callable, jobs: Iterable, at_once: int, runner: Runner) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for done in [pool.submit(run, job) for job in jobs]:
                done.result()
        except BaseException:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise


def timed(families: dict[str, list[str]], gpu: dict, runner: Runner) -> list[dict]:
    small = gpu["device"] == "cpu"
    task = {"device": gpu["device"], "implementations": families, "small": small}
    return list(runner.rows(task, list(SHAPES)[: REHEARSED if small else None]))


def progress() -> Callable[[str], None]:
    """Shows each case before it runs, where somebody looks on."""
    if not sys.stderr.isatty():
        return lambda name: None
    lock = threading.Lock()

    def show(name: str) -> None:
        with lock:
            print(f"\r\033[K{name}", end="", file=sys.stderr, flush=True)

    return show
