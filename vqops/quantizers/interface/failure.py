"""Calls that fail leave the state as it was."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext


def joined(contexts: Iterable[AbstractContextManager]) -> AbstractContextManager:
    """All of them at once; a compiled graph follows one that does nothing, but no stack."""
    kept = [context for context in contexts if not isinstance(context, nullcontext)]
    if not kept:
        return nullcontext()
    with ExitStack() as stack:
        for context in kept:
            stack.enter_context(context)
        return stack.pop_all()
