"""A process that starts trainings by forking, so that each begins at once, and lets something befall them.

`python soak.py SCENARIO COUNT`, in a folder with options.toml, begins and resumes runs there until it has happened so
often, and prints the runs as JSON. Each ends undisturbed, so that it can be compared with one that always was.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import processor  # noqa: F401  (before torch: the instruction set of the tests)
import torch

import vqops.cli
import vqops.vqvae2.prior.train_prior
import vqops.vqvae2.training.train

DISK = Path("disk")  # of its own, where a scenario needs one
chance = random.Random(0)


class Started:
    """A command in a process of its own."""

    number = 0

    def __init__(self, *arguments: str, before: Callable[[], None] = lambda: None):
        Started.number += 1
        self.out, self.err = Path(f"{self.number}.out"), Path(f"{self.number}.err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self.pid = os.fork()
            if self.pid:
                return
            code = 99
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                before()
                code = vqops.cli.main(list(arguments))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def runs(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def code(self) -> int:
        """Its exit code, once it has ended; the code of a refusal comes with one line."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        refusal = self.err.read_text()
        assert code in (0, 2, -signal.SIGKILL) and (refusal.count("\n") == 1 or code != 2), (code, refusal)
        return code


def command(run: Path) -> list[str]:
    """To begin a run, or to go on with it."""
    if (run / "config.toml").exists():
        return ["train", "--resume", str(run)]
    return ["train", "--config", "options.toml", "--out", str(run), "--overwrite"]


def step_of(run: Path) -> int:
    """Of its checkpoint, which must be whole; 0 before the first."""
    path = run / "train_state.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def befall(count: int, happens: Callable[[Path, Started], bool], folder: Path = Path(), **how) -> list[Path]:
    """Begin and resume runs, with something that happens to their processes at random moments; return the runs.

    `happens` says whether it came in time. No process may lose a checkpoint.
    """
    happened, lived, runs = 0, 0.2, []
    while happened < count:
        runs.append(run := folder / f"run{len(runs)}")
        step, code = 0, None
        while code != 0:
            process = Started(*command(run), **how)
            if happened < count:
                time.sleep(chance.uniform(0, lived))
                happened += happens(run, process)
                lived *= 1.05  # so that runs end, on a slow machine too
            code = process.code()
            assert step_of(run) >= step, "a checkpoint is lost"
            step = step_of(run)
    return runs


def kill(run: Path, process: Started) -> bool:
    in_time = process.runs()
    os.kill(process.pid, signal.SIGKILL)
    return in_time


def fill_disk(run: Path, process: Started) -> bool:
    ballast = DISK / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    failed = wait(process) == 2
    left = hidden(run)
    ballast.unlink()
    assert not left, left
    return failed


def forbid_writing(run: Path, process: Started) -> bool:
    while process.runs() and not run.is_dir():
        time.sleep(0.01)
    subprocess.run(["mount", "--bind", run, run], check=True)
    if subprocess.run(["mount", "-o", "remount,ro,bind", run], stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["umount", "--lazy", run], check=True)  # a file was opened in between
        return False
    failed = wait(process) == 2
    subprocess.run(["umount", run], check=True)
    return failed


def turn_clock(run: Path, process: Started) -> bool:
    """By years, to and fro, also of the files that are there; then kill."""
    for path in run.glob("**/*"):
        with suppress(FileNotFoundError):
            os.utime(path, (chance.uniform(0, 4e9),) * 2)
    return kill(run, process)


def without_a_clock() -> None:
    time.time = lambda: chance.uniform(0, 4e9)


def start_twice(count: int) -> list[Path]:
    """Two processes a run, the second a moment after the first: one does it all, the other is refused."""
    runs = [Path(f"run{number}") for number in range(count)]
    for run in runs:
        processes = [Started(*command(run)) for _ in (time.sleep(0), time.sleep(chance.uniform(0, 0.5)))]
        codes = [process.code() for process in processes]
        assert sorted(codes) == [0, 2], codes
        assert "is writing here" in processes[codes.index(2)].err.read_text()
    return runs


def wait(process: Started) -> int:
    status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return status.si_status


def hidden(run: Path) -> list[str]:
    return [path.name for path in run.glob(".*") if path.name not in (".lock", ".writer")]


@contextmanager
def disk_of(megabytes: int):
    """A disk of its own, whose files are kept as those of a folder."""
    DISK.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", DISK], check=True)
    yield DISK
    subprocess.run(["cp", "-r", DISK, "kept"], check=True)
    subprocess.run(["umount", DISK], check=True)
    DISK.rmdir()
    Path("kept").rename(DISK)


def scenario(name: str, count: int) -> list[Path]:
    if name == "kills":
        return befall(count, kill)
    if name == "clock":
        return befall(count, turn_clock, before=without_a_clock)
    if name == "two on one folder":
        return start_twice(count)
    happens, megabytes = {"full disk": (fill_disk, 3), "read-only": (forbid_writing, 100)}[name]
    with disk_of(megabytes) as folder:
        return befall(count, happens, folder)


if __name__ == "__main__":
    print(json.dumps([str(run) for run in scenario(sys.argv[1], int(sys.argv[2]))]))
