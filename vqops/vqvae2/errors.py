"""The error for input that cannot be used."""

from collections.abc import Callable


class Field(str):
    """The name of an option or argument, as a part of a message."""


class InputError(ValueError):
    """Input that cannot be used; the message names it, and what is allowed.

    The arguments are the parts of the message. Names of options are `Field`s, so that a command line can write its
    flags in their place.
    """

    def __str__(self) -> str:
        return self.text(str)

    # No attribute `message`: a DataLoader that passes on a worker's error would call the class with message=.
    def text(self, named: Callable[[str], str]) -> str:
        """The message, with each option as `named` writes it."""
        return "".join(named(part) if isinstance(part, Field) else part for part in self.args)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
