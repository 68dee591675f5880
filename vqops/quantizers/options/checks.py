"""The options of quantizers: which values are allowed."""

from collections.abc import Sequence
from numbers import Integral


def as_number(owner: str, name: str, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}") from None


def check_counts(owner: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{owner}: {name} must be an integer of at least 1, got {value!r}")


def check_not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{owner}: {name} must be finite and at least 0, got {value}")


def check_fraction(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{owner}: {name} must be in [0, 1], got {value}")


def check_not_both(owner: str, **values: bool) -> None:
    """At most one of the options is set."""
    given = [name for name, value in values.items() if value]
    if len(given) > 1:
        raise ValueError(f"{owner}: {' and '.join(given)} can't both be True")


def check_needs(owner: str, option: str, given: bool, needed: str, there: bool) -> None:
    if given and not there:
        raise ValueError(f"{owner}: {option} needs {needed}")


def level_sizes(
    owner: str, codebook_size: int | Sequence[int], levels: int | None, shared_codebook: bool
) -> tuple[int, ...]:
    """The codebook_size of each level; without a number of levels there are as many as sizes."""
    each = isinstance(codebook_size, Sequence)
    if levels is None and not each:
        raise ValueError(f"{owner}: num_quantizers is needed where codebook_size is one number")
    sizes = tuple(codebook_size) if each else (codebook_size,) * levels
    if not sizes:
        raise ValueError(f"{owner}: codebook_size must be an integer or one for each level, got {codebook_size!r}")
    if levels is not None and len(sizes) != levels:
        raise ValueError(f"{owner}: codebook_size must be an integer or {levels} of them, got {codebook_size!r}")
    for size in sizes:
        check_counts(owner, codebook_size=size)
    if shared_codebook and len(set(sizes)) > 1:
        raise ValueError(f"{owner}: codebook_size must be one for all levels with shared_codebook, got {sizes}")
    return sizes
