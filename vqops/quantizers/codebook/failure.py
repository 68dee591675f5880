"""Calls that fail leave the state as it was."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack


def joined(contexts: Iterable[AbstractContextManager]) -> AbstractContextManager:
    """All of them at once."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()
