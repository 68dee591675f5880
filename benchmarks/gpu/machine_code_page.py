"""The block of docs/gpu.md that counts the machine code of the search's kernels, from its rows."""

from pathlib import Path

from benchmarks.rows import read
from benchmarks.tables import table


def machine_code(results: Path) -> str:
    """A table for each architecture and compiler."""
    rows = [row for file in sorted((results / "machine_code").glob("*.jsonl")) for row in read(file)]
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        of = row["classes"]
        kilobytes = span([round(size / 1024) for size in row["shared_bytes"]])
        cells = [f"`{row['kernel']}`", span(row["D"]), str(row["registers"]), kilobytes, span(row["blocks"])]
        cells += [str(row["turn"]), f"{row['turn'] / row['scores']:.2f}", str(of["products"])]
        cells += [str(of["FFMA"] + of["FMUL"]), *(str(of[name]) for name in ("FMNMX", "LDS", "other"))]
        cells += [str(row["piece"] or "-"), *(str(row[name]) for name in ("loop", "instructions", "spills"))]
        cells += [str(row["barriers"]), ", ".join(map(str, row["waits"])) or "-"]
        tables.setdefault((row["architecture"], row["compiler"], row["sources"]), []).append(cells)
    heads = ["kernel", "D as stored", "registers", "KB a block", "blocks of an SM", "a turn", "a score", "products"]
    heads += ["FFMA, FMUL", "FMNMX", "LDS", "other", "a further piece", "loop", "kernel's", "spills", "barriers"]
    heads.append("waits")
    parts = [
        f"**{architecture}**, {compiler}, sources `{sources}`:\n\n{table(heads, lines)}"
        for (architecture, compiler, sources), lines in tables.items()
    ]
    return "\n\n".join(parts)


def span(ends: list[int]) -> str:
    return " - ".join(map(str, dict.fromkeys(ends)))
