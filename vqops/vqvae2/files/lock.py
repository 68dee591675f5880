"""One writer a folder: a lock that ends with the process that holds it, and a note of who that is."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vqops.vqvae2.errors import InputError

LOCK, WRITER = ".lock", ".writer"
NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems
LOADERS_END = 20.0  # seconds: what loads images for a process that was killed notices it within five, after its batch


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in the folder, where its file system has locks.

    Raises InputError if one writes there, or if nothing can be written. A file that was left behind locks nothing.
    """
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not is_dead(writer_of(folder)):
                raise
            lock.acquire(timeout=LOADERS_END)  # they inherit the lock
    except Timeout:
        raise InputError(f"{folder}: {named(writer_of(folder))} is writing here") from None
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise InputError(f"{folder}: cannot write here ({error.strerror})") from error
    try:
        note_writer(folder)
        yield
    finally:
        lock.release()


def note_writer(folder: Path) -> None:
    writer = {"pid": os.getpid(), "host": socket.gethostname(), "job": job()}
    try:
        (folder / WRITER).write_text(json.dumps(writer) + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot write here ({error.strerror})") from error


def writer_of(folder: Path) -> dict[str, Any]:
    """The note of the process that writes here, or did last; empty where there is none."""
    try:
        writer = json.loads((folder / WRITER).read_text())
    except (OSError, ValueError):
        return {}
    return writer if isinstance(writer, dict) else {}


def named(writer: dict[str, Any]) -> str:
    return f"process {writer['pid']} on {writer.get('host')}" if "pid" in writer else "another process"


def is_dead(writer: dict[str, Any]) -> bool:
    """Whether the process is known to have ended; of other machines nothing is known."""
    if os.name == "nt" or writer.get("host") != socket.gethostname() or not isinstance(writer.get("pid"), int):
        return False
    try:
        os.kill(writer["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False


def job() -> str:
    """What the processes have in common that one torchrun starts, and starts again; empty without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()} {os.getppid()}" if run_id == "none" else run_id


def is_of_this_job(folder: Path) -> bool:
    """Whether a process of this very job of torchrun wrote here last."""
    return bool(job()) and writer_of(folder).get("job") == job()
