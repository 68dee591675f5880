"""Where vqops loses: every peer that was faster, or took less memory, by cause."""

from collections.abc import Iterator

from benchmarks.causes import CAUSES, cause_of
from benchmarks.tables import (
    STAGES,
    Line,
    Machine,
    by_case,
    data,
    is_ours,
    number,
    of_machines,
    size,
    titled,
    variant,
    wrong,
)

PARTS_OF_OURS = ("no quantizer", "searches alone")  # nothing that a user can take instead


def losses(found: list[Machine], figures: str) -> str:
    """Every peer that was faster, from all stages, by cause."""
    if not any(machine.rows("search") for machine in found):
        return ""
    lost = {machine.name: list(lost_cases(machine)) for machine in found}
    parts = {}
    for cause in (*CAUSES, None):

        def lines_of(machine: Machine, cause=cause) -> Iterator[Line]:
            for case, cells in lost[machine.name]:
                if cause_of(case[0]) == cause:
                    yield case, cells

        title = f"**{cause or 'Cause unknown.'}**"
        parts[title] = of_machines(found, lines_of, ["case", "peer"], ["of our time", "against ours"])
    return titled(parts) or "In none of these cases was a peer faster."


def lost_cases(machine: Machine) -> Iterator[Line]:
    for stage in (*STAGES, "kernels", "sets"):
        for methods in by_case(machine.rows(stage)).values():
            ours = next((row for row in methods.values() if is_ours(row) and row.get("times_vqops") == 1), None)
            for name, row in methods.items():
                peer = not is_ours(row) and not name.startswith("ceiling") and name not in PARTS_OF_OURS
                if ours is None or not peer or row.get("times_vqops", 1) >= 1:
                    continue
                milliseconds = f"{number(row['p50_ms'])} against {number(ours['p50_ms'])} ms"
                yield [case_name(row), name], [f"{number(row['times_vqops'])} x{wrong(row)}", milliseconds]
    for op in ("nearest", "training step"):
        rows = machine.rows("memory", op)
        largest = [row for row in rows if all(row[axis] == rows[-1][axis] for axis in "NK")]
        ours = next((row["extra_mb"] for row in largest if row["method"] == "vqops"), 0.0)
        for row in largest:
            if row["extra_mb"] < ours:
                took = f"{number(row['extra_mb'])} against {number(ours)} MB"
                share = f"{number(row['extra_mb'] / ours)} x"
                yield [f"memory of {op}, {size(row)[1]}", row["method"]], [share, took]


def case_name(row: dict) -> str:
    """As benchmarks/causes.py names it."""
    where = f"{row['shape']}, {row['axis']} = {row[row['axis']]}" if "axis" in row else row["shape"]
    more = [data(row)] if "offset" in row or "spread" in row else [row["data"]] if "data" in row else []
    return ", ".join([row["op"], *variant(row), where, *more])
