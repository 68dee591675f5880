"""Ctrl-C as a wish that the training loop grants at the end of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event


@contextmanager
def interruption() -> Iterator[Event]:
    """An event that Ctrl-C sets, so that a step is never left half done; a second Ctrl-C interrupts at once."""
    interrupted = Event()
    if threading.current_thread() is not threading.main_thread():  # only that one gets Ctrl-C
        yield interrupted
        return
    previous = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
