"""Names of cases to rows of results, in child processes: what crashes or hangs costs one row."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from vqops.check.child import heard
from vqops.check.process import Command, OutOfTime

CHILD = (sys.executable, "-m", "vqops.check.child")
FIRST, EACH = 120.0, 60.0  # seconds, with and without the start of a process and its first compilations
GIVEN_UP = 3  # children in a row that bring nothing
NO_TIME = "no time was left"
GAVE_UP = f"{GIVEN_UP} processes before it brought no result"
LINES = 12  # of what a child said at its end


@dataclass
class Runner:
    """`end`: by time.monotonic(); `began` is told of every name before it runs."""

    end: float
    began: Callable[[str], None] = lambda name: None
    each: float = EACH
    threads: int = 0  # of a child, on the CPU; 0: as it likes
    running: set[Command] = field(default_factory=set)

    def stop(self) -> None:
        """From another thread: what runs ends, and nothing more begins."""
        self.end = 0.0
        for command in list(self.running):
            command.kill()

    def rows(self, task: dict, names: list[str], **environment: str) -> Iterator[dict]:
        """A row for each name, `failed` with the reason where it has no result."""
        environment = {"OMP_NUM_THREADS": str(self.threads), **environment} if self.threads else environment
        waiting, in_vain, last = list(names), 0, ""
        while waiting:
            if time.monotonic() >= self.end:
                yield from ({"name": name, "failed": NO_TIME} for name in waiting)
                return
            if in_vain == GIVEN_UP:
                why = f"{GAVE_UP}: is the GPU still there? The last: {last}"
                yield from ({"name": name, "failed": why} for name in waiting)
                return
            brought = 0
            for row in self.of_one_child({**task, "names": list(waiting)}, **environment):
                waiting.remove(row["name"])
                brought += "failed" not in row
                last = row.get("failed", "")
                yield row
            in_vain = 0 if brought else in_vain + 1

    def of_one_child(self, task: dict, **environment: str) -> Iterator[dict]:
        """Its rows, and where it ends before it has them all, one for the name that it was at."""
        command = [*CHILD, json.dumps(task)]
        begun, done, failed, said, limit = None, 0, False, [], FIRST
        with Command(command, VQOPS_CHECK="", **environment) as child:
            self.running.add(child)
            try:
                while done < len(task["names"]):
                    # A name has `limit` seconds for all that it prints.
                    row = self.next_row(child, min(self.end, time.monotonic() + limit), said)
                    if row is None:
                        break
                    if "begins" in row:
                        begun = row["begins"]
                        self.began(begun)
                        continue
                    begun, done, limit, failed = None, done + 1, self.each, "failed" in row
                    yield row
                if begun or (done < len(task["names"]) and not failed):
                    yield {"name": begun or task["names"][done], "failed": ended(child.ended(), said)}
            except OutOfTime:
                late = NO_TIME if time.monotonic() >= self.end else f"it took more than {limit:.0f} s"
                yield {"name": begun or task["names"][done], "failed": late}
            finally:
                self.running.discard(child)

    @staticmethod
    def next_row(child: Command, until: float, said: list[str]) -> dict | None:
        for line in child.lines(until):
            if (row := heard(line)) is not None:
                return row
            said.append(line)
            del said[:-LINES]
        return None


def shared(names: list[str], shares: int) -> list[list[str]]:
    """Each share has neighbours, which often need the same kernels compiled."""
    cuts = [len(names) * i // shares for i in range(shares + 1)]
    return [names[begin:end] for begin, end in pairwise(cuts) if begin < end]


def ended(status: int | None, said: list[str]) -> str:
    how = f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"
    return f"its process ended {how}: " + "".join(said).strip()[-1000:]
