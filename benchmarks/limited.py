"""A command that may crash or hang without taking anything else along."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def run_limited(command: list, seconds: float, folder: Path, **environment: str) -> tuple[int | None, str]:
    """Exit status and output; status None where the time was up, and then all of its processes are ended."""
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    status = output = None
    try:
        output = process.communicate(timeout=seconds)[0]
        status = process.returncode
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return status, process.communicate()[0] if output is None else output
