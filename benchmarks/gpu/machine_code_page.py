"""The blocks of docs/gpu.md that count the machine code of the search's kernels, from its rows, and what is to be
expected of them."""

from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import read
from benchmarks.shapes import SEARCHES
from benchmarks.tables import number, table


class Gpu(NamedTuple):
    """As NVIDIA's data sheet has it, for the clock of its own figure of fp16 products."""

    name: str
    bytes_per_second: float
    operations_per_second: float  # of fp16 products
    schedulers: int
    clock: float


H200 = Gpu("H200", 4.8e12, 989e12, 132 * 4, 1.83e9)


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


def expected(results: Path) -> str:
    """Of each shape and implementation, the milliseconds of the fast pass that are counted."""
    rows = [row for file in sorted((results / "machine_code").glob("*.jsonl")) for row in read(file)]
    lines = []
    for N, D, K in SEARCHES["cuda"]:
        for row in rows:
            alone = "Loaded" not in row["kernel"] and "Topk" not in row["kernel"]
            width = max(16, 1 << (D - 1).bit_length()) if D <= 32 else -(-D // 64) * 64
            if not (alone and row["architecture"].startswith("sm_90") and row["D"][0] <= width <= row["D"][1]):
                continue
            pieces = width // 64 - 1 if row["piece"] else 0
            instructions = row["turn"] + pieces * (row["piece"] or 0)
            parts = (
                (4 * N * D + 8 * N) / H200.bytes_per_second,
                2 * N * K * width / H200.operations_per_second,
                N * K / (32 * row["scores"]) * instructions / (H200.schedulers * H200.clock),
            )
            name = "CUDA C++" if row["implementation"] == "compiled" else "Triton"
            shape = f"{N} x {D} x {K}"
            lines.append([shape, name, *(number(1e3 * part) for part in (*parts, max(parts), sum(parts)))])
    heads = ["N x D x K", "fast pass", "memory", "products", "instructions", "the largest", "all, one after the other"]
    return table(heads, lines)


def span(ends: list[int]) -> str:
    return " - ".join(map(str, dict.fromkeys(ends)))
