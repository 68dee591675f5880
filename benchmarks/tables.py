"""Rows of results as tables: machines that have some, the rows of a case side by side, and how figures are written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import read

OURS = ("vqops", "vqops, prepared")
SHORT = {
    "addmm + argmin": "addmm",
    "cdist + argmin": "cdist",
    "torch.compile of addmm + argmin": "torch.compile of addmm",
    "vector-quantize-pytorch": "v-q-pytorch",
    "faiss IndexFlatL2": "faiss",
}


ANY_OF = ("search", "kernels", "first_run")  # stages, one of which every machine has


@dataclass
class Machine:
    """The rows of one folder of results."""

    folder: Path

    def rows(self, stage: str, op: str | None = None) -> list[dict]:
        return [row for row in read(self.folder / f"{stage}.jsonl") if op is None or row["op"] == op]

    @property
    def name(self) -> str:
        first = next(filter(None, map(self.rows, ANY_OF)))[0]
        return f"{first['device']} ({first['instructions']})"


def machines(root: Path) -> list[Machine]:
    found = map(Machine, sorted((root / "benchmarks" / "results").iterdir()))
    return [machine for machine in found if any(map(machine.rows, ANY_OF))]


def by_case(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows that were measured together, by method; those without a time are left out."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "p50_ms" in row:
            key = ("op", "shape", "N", "D", "K", "dtype", "direction", "gradient", "indices", "levels", "sums", "model")
            cases.setdefault(tuple(row.get(name) for name in key), {})[row["method"]] = row
    return cases


def table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines] if lines else []
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}"


def times(row: dict) -> str:
    return f"{number(row['p50_ms'])} ({number(row['p20_ms'])}-{number(row['p80_ms'])})"


def size(row: dict) -> list[str]:
    return [row["shape"], *(f"{row[axis]:,}".replace(",", " ") for axis in "NDK")]


def wrong(row: dict) -> str:
    if not row.get("wrong"):
        return ""
    return f"; {row['wrong']} wrong of {row['checked']}"


def peer_columns(cases: dict, heads: list[str], describe: Callable[[dict], list[str]], share: str = "") -> str:
    """A line a case: the time of vqops, then each peer's as a multiple of it."""
    peers = dict.fromkeys(m for found in cases.values() for m in found if m not in OURS and not m.startswith("ceiling"))
    prepared = any("vqops, prepared" in found for found in cases.values())
    lines = []
    for found in cases.values():
        if "vqops" not in found:
            continue
        ours = found["vqops"]
        line = [*describe(ours), times(ours)]
        if share:
            line.append(f"{ours['share_of_ceiling']:.2f}")
        if prepared:
            line.append(ratio_cell(found.get("vqops, prepared")))
        lines.append(line + [ratio_cell(found.get(peer)) for peer in peers])
    heads = [*heads, "vqops ms: p50 (p20-p80)", *([share] if share else []), *(["prepared"] if prepared else [])]
    return table(heads + [SHORT.get(peer, peer) for peer in peers], lines)


def ratio_cell(row: dict | None) -> str:
    return "-" if row is None else f"{number(row['times_vqops'])} x{wrong(row)}"


SIZE = ["shape", "N", "D", "K"]
