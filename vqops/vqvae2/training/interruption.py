"""The signals that end a job, as wishes that a training grants at the end of a step."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from signal import Signals
from typing import TypeVar

from vqops.vqvae2.data.batches import STOP_SIGNALS

Item = TypeVar("Item")


class GivenUp(Exception):
    """Work that can be left out was ended by a signal."""


class Interruption:
    """The signal that asked to stop, if one did."""

    signal: Signals | None = None

    def is_set(self) -> bool:
        return self.signal is not None

    @property
    def by_user(self) -> bool:
        """Whether somebody at a terminal waits for what there is."""
        return self.signal == Signals.SIGINT

    @property
    def by_scheduler(self) -> bool:
        """Whether somebody waits for the end, and not for long."""
        return self.is_set() and not self.by_user

    @property
    def cause(self) -> str:
        if self.signal is None:
            return "a signal to another process"
        return "Ctrl-C" if self.by_user else self.signal.name

    def until_set(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; raises GivenUp before the next one when a signal has come."""
        for item in items:
            if self.is_set():
                raise GivenUp
            yield item


class Latest:
    """The interruption of this process that is listening, and the last one that did."""

    listening: Interruption | None = None
    ended: Interruption | None = None


def exit_code() -> int:
    """128 + its number where a scheduler's signal ended a training since this was asked, else 0."""
    ended, Latest.ended = Latest.ended, None
    return 128 + ended.signal if ended is not None and ended.by_scheduler else 0


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Listen for Ctrl-C, SIGTERM and SIGUSR1, so that a step is never left half done.

    Ctrl-C after one of them interrupts at once. Within another interruption it is that one: who trains several models
    notices what ended one of them.
    """
    if Latest.listening is not None:
        yield Latest.listening
        return
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield Interruption()
        return
    interrupted = Interruption()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    previous = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def remember(number: int, frame: object) -> None:
        interrupted.signal = interrupted.signal or Signals(number)
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, remember)
    Latest.listening = interrupted
    try:
        yield interrupted
    finally:
        Latest.listening, Latest.ended = None, interrupted
        for number, handler in previous.items():
            signal.signal(number, handler)
