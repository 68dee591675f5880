"""Memory that is not to be had, in one line that names what to lower."""

import errno
import re

from vqops.cli.parsing import flag

LOWER = {  # by command, what memory grows with, first what costs least to lower
    "train": ("batch_size", "image_size", "channels"),
    "extract": ("batch_size", "image_size"),
    "train-prior": ("batch_size", "width", "layers"),
    "sample": ("batch_size",),
    "complete": ("batch_size",),
    "evaluate": ("batch_size", "image_size", "classifier_images"),
    "compare": ("batch_size", "image_size", "channels"),
}
# What PyTorch's allocators, cuBLAS and C++ say; an error in a worker of a DataLoader comes as its text.
EXHAUSTED = re.compile(
    r"out of memory|[Cc]an(?:'t|not) allocate memory|not enough memory|ALLOC_FAILED|bad_alloc|"
    r"Storage size calculation overflowed|can't start new thread|could not create a primitive$"  # the last: oneDNN
)
WORKERS_EXHAUSTED = re.compile(
    r"DataLoader worker .*(Bus error|Killed|exited unexpectedly)|MemoryError in DataLoader|unable to .* </torch_"
)
ASKED_FOR = re.compile(r"allocated? ([\d.]+) ?(bytes|[KMGTPE]i?B)")


def out_of_memory(error: BaseException | None, command: str, options: object) -> str:
    """The line for an error of memory; empty for any other error."""
    text = str(error)
    workers = getattr(options, "num_workers", 0)
    if workers and WORKERS_EXHAUSTED.search(text):
        what = "the processes that load images are out of memory or shared memory (/dev/shm)"
        return f"{what}: lower {given('num_workers', options)} or {given('batch_size', options)}"
    exhausted = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not exhausted and not EXHAUSTED.search(text):
        return ""
    return f"out of memory{asked_for(text)}: {advice(command, options)}"


def advice(command: str, options: object) -> str:
    if command not in LOWER:
        return "smaller images need less"
    *some, last = (given(name, options) for name in LOWER[command])
    return f"lower {', '.join(some)} or {last}" if some else f"lower {last}"


def given(name: str, options: object) -> str:
    value = getattr(options, name, None)
    return flag(name) if value is None else f"{flag(name)} ({value})"


def asked_for(text: str) -> str:
    """The size that an allocator could not give, in GB or MB; empty if the text does not name it."""
    if not (found := ASKED_FOR.search(text)):
        return ""
    number, unit = float(found[1]), found[2]
    size = number * (1 if unit == "bytes" else 1024 ** (1 + "KMGTPE".index(unit[0])))
    return f" ({size / 1e9:.1f} GB asked for)" if size >= 1e9 else f" ({size / 1e6:.1f} MB asked for)"
