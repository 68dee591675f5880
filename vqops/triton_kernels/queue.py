"""The queue: rows that screening leaves open, from the front for decide.py, from the back for scan.py.

Its length stays on the device, so that nothing waits for the host. It lies in the search's workspace, one allocation
for all that its kernels leave each other; T = H N' rows:
  queue        [T] int64                       ENTRY * row + the number of its candidates
  lists        [parts, T, candidates] int32    the candidates; from the first part's in the end
  part_bounds  [parts, 2, T] float32           a part's threshold and lowest, where there are several
  counts       [parts, T] int32                likewise
  rows         [parts, T, D'] float16          of rows that do not stay in registers, see rows.py
  best         see scan.py
"""

import triton
import triton.language as tl

ENTRY = 256
# Counters of a search: rows queued from the front, rows queued from the back or scanned, rows without a code. Behind
# them, the parts of each block of rows that are done, of screen.py and then of scan.py.
COUNTERS = 3


def workspace_bytes(total: int, parts: int, candidates: int, width: int) -> int:
    """Up to `best`."""
    return total * (8 + parts * (4 * candidates + 12 + 2 * width))


@triton.jit
def sections_of(work, total, parts, CANDIDATES: tl.constexpr):
    """Pointers to the queue, the lists, part_bounds, counts and rows."""
    queue = work.to(tl.pointer_type(tl.int64), bitcast=True)
    lists = (queue + total).to(tl.pointer_type(tl.int32), bitcast=True)
    part_bounds = (lists + parts * total * CANDIDATES).to(tl.pointer_type(tl.float32), bitcast=True)
    counts = (part_bounds + 2 * parts * total).to(tl.pointer_type(tl.int32), bitcast=True)
    return queue, lists, part_bounds, counts, (counts + parts * total).to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def last_to_arrive(done, parts):
    """Whether as many programs have been here before as there are other parts. The last one sees what they stored."""
    tl.debug_barrier()  # what all threads have stored comes before the count
    last = tl.atomic_add(done, 1, sem="acq_rel") == parts - 1
    tl.debug_barrier()
    return last


@triton.jit
def append(queue, counter, direction: tl.constexpr, value, which):
    """The values that `which` marks, from the front or, with direction -1, from the back."""
    marks = which.to(tl.int32)
    number = tl.sum(marks, 0)
    if number > 0:
        first = tl.atomic_add(counter, number.to(tl.int64), sem="relaxed")
        at = first + tl.cumsum(marks, 0) - 1
        tl.store(queue + at * direction, value, mask=which)


@triton.jit
def enqueue(queue, counters, h, n, N, count, decided, scanned, ENTRY: tl.constexpr):
    entry = (h * N + n) * ENTRY + count
    append(queue, counters, 1, entry, decided)
    last = tl.num_programs(1).to(tl.int64) * N - 1
    append(queue + last, counters + 1, -1, entry, scanned)
