"""Commands that may crash or hang without taking anything else along."""

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LAST = 5.0  # seconds for a process that was killed: one that the kernel does not let go of is left behind


class OutOfTime(Exception):
    """A command has said nothing for too long."""


class Command:
    """A command in a session of its own, all of whose processes end with the `with` block."""

    def __init__(self, command: list, folder: Path | None = None, **environment: str):
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env={**os.environ, **environment},
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,  # ends when this process does
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.said: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in self.process.stdout:
            self.said.put(line)
        self.said.put(None)

    def lines(self, until: float) -> Iterator[str]:
        """What it says, as it says it; raises OutOfTime at time.monotonic() == `until`, after what came before."""
        while True:
            try:
                line = self.said.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise OutOfTime from None
            if line is None:
                return
            yield line

    def ended(self) -> int | None:
        """Its exit status, where it has closed its output; None where it does not end."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(LAST)
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        self.ended()


def run_limited(command: list, seconds: float, folder: Path, **environment: str) -> tuple[int | None, str]:
    """Exit status and output; status None where the time was up."""
    said, status = [], None
    with Command(command, folder, **environment) as running, suppress(OutOfTime):
        for line in running.lines(time.monotonic() + seconds):
            said.append(line)
        status = running.ended()
    return status, "".join(said)
