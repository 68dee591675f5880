"""What a check has found, as a file for vqops.dispatch to read, and as text."""

import json
import os
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from statistics import median

from vqops.check import timing
from vqops.check.cases import CASES
from vqops.check.runner import GAVE_UP, NO_TIME
from vqops.check.timing import fastest
from vqops.dispatch import records
from vqops.dispatch.records import Gpu

FIRST_LINES = 3  # of a failure, in a report


def passed(rows: list[dict]) -> bool:
    return all(is_right(row) for row in rows)


def is_right(row: dict) -> bool:
    return "failed" not in row and not row.get("wrong")


def why_incomplete(record: dict) -> str | None:
    """Why a record would say less than the GPU can, or None."""
    rows = [row for of in record["cases"].values() for row in of["others"]] + record["times"]
    if any(row.get("failed") == NO_TIME for row in rows):
        return "there was too little time: --seconds"
    if any(row.get("failed", "").startswith(GAVE_UP) for row in record["cases"]["pytorch"]["others"]):
        return "plain PyTorch brought no results either"
    return None


def families(results: dict[str, list[dict]]) -> dict[str, list[str]]:
    """By timed op, the implementations all of whose cases are right there: a search speaks for all that search."""
    found = {}
    for op in timing.OPS:
        of = {op, "nearest"} if op in ("quantize", "nearest_topk") else {op}
        found[op] = [
            implementation
            for implementation, rows in results.items()
            if passed([row for row in rows if CASES[row["name"]].op in of])
        ]
    return found


def made(gpu: Gpu, facts: dict, results: dict[str, list[dict]], times: list[dict]) -> dict:
    rows = timing.rows_of(times)
    here = records.kernels_here()
    return {
        "format": records.FORMAT,
        "gpu": gpu._asdict(),
        "kernels": {name: here[name] for name in results if name in here},
        "rows": rows,
        **facts,
        "cases": {
            name: {"right": sum(map(is_right, of)), "of": len(of), "others": [row for row in of if not is_right(row)]}
            for name, of in results.items()
        },
        "products": {
            implementation: {row["name"]: row["share_of_bound"] for row in of if "share_of_bound" in row}
            for implementation, of in results.items()
        },
        "times": times,
    }


def write(record: dict, path: Path) -> None:
    """Whole or not at all, whoever reads or writes it meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".new")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
        os.chmod(name, 0o644)  # mkstemp's is for its owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# As text


def described(record: dict) -> str:
    """What was right, what was not and how, and the times beside each other."""
    lines = []
    for implementation, found in record["cases"].items():
        largest = max(record["products"][implementation].values(), default=None)
        note = "" if largest is None else f"; tensor cores: at most {largest} of the error that the proof allows for"
        lines.append(f"{implementation}: {found['right']} of {found['of']} cases right{note}")
        for why, of in groupby(found["others"], key=said):
            names = [row["name"] for row in of]
            lines.append(f"  {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}")
    timed = [row for row in record["times"] if "milliseconds" in row]
    lines += ["", times_table(timed)] if timed else []
    for row in timed:
        lines += (f"{row['name']}, {call}: {why}" for call, why in row.get("raised", {}).items())
        lines += [f"{row['name']}, so that nothing is named there: {said(row)}"] if row.get("wrong") else []
    others = (row for row in record["times"] if "milliseconds" not in row)
    lines += (f"{row['name']} is not timed: {row.get('left_out') or said(row)}" for row in others)
    return "\n".join(lines)


def said(row: dict) -> str:
    if "failed" in row:
        return "\n    ".join(row["failed"].strip().splitlines()[-FIRST_LINES:])
    return "; ".join(f"{name}: {of_difference(how)}" for name, how in row["wrong"].items())


def of_difference(how: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in how.items())


def times_table(times: list[dict]) -> str:
    """Median milliseconds of a call; * where a kernel wins."""
    names = list(dict.fromkeys(each for row in times for of in row["milliseconds"].values() for each in of))
    head = ["ms a call", "N x D x K", *names]
    body = [cells for row in times for cells in of_shape(row, names)]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *body)
    )


def of_shape(row: dict, names: list[str]) -> Iterable[list[str]]:
    for op, of in row["milliseconds"].items():
        taken = fastest(of)
        marks = {each: " *" if each == taken and each != "pytorch" else "" for each in of}
        shown = {each: f"{median(rounds):.3f}{marks[each]}" for each, rounds in of.items() if rounds}
        yield [op, f"{row['N']} x {row['D']} x {row['K']}", *(shown.get(each, "-") for each in names)]
