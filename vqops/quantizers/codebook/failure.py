"""Calls that fail leave the state as it was."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch


def joined(contexts: Iterable[AbstractContextManager]) -> AbstractContextManager:
    """All of them at once. A compiled graph follows no stack of contexts: in one nothing is taken back."""
    if torch.compiler.is_compiling():
        return nullcontext()
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()
