"""The queue: rows that screening leaves open, from the front for decide.py, from the back for scan.py.

Its length stays on the device, so that nothing waits for the host.
"""

import triton
import triton.language as tl

ENTRY = 256  # an entry of the queue is ENTRY * row + the number of its candidates
# Counters of a search: rows queued from the front, rows queued from the back or scanned, rows without a code.
COUNTERS = 3

# A row's state before screening.
SETTLED = tl.constexpr(0)
SCREENED = tl.constexpr(1)
SCANNED = tl.constexpr(2)
LOST = tl.constexpr(3)  # settled, because it is not finite


@triton.jit
def append(queue, counter, direction: tl.constexpr, value, which):
    """The values that `which` marks, from the front or, with direction -1, from the back."""
    marks = which.to(tl.int32)
    number = tl.sum(marks, 0)
    if number > 0:
        first = tl.atomic_add(counter, number.to(tl.int64))
        at = first + tl.cumsum(marks, 0) - 1
        tl.store(queue + at * direction, value, mask=which)


@triton.jit
def enqueue(queue, counters, h, n, N, count, decided, scanned, ENTRY: tl.constexpr):
    entry = (h * N + n) * ENTRY + count
    append(queue, counters, 1, entry, decided)
    last = tl.num_programs(1).to(tl.int64) * N - 1
    append(queue + last, counters + 1, -1, entry, scanned)
