"""Rows of results as tables: machines that have some, the rows of a case side by side, and how figures are written."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processor import plain
from benchmarks.rows import read

OURS = ("vqops", "vqops, prepared")
SHORT = {
    "vqops, prepared": "prepared",
    "addmm + argmin": "addmm",
    "cdist + argmin": "cdist",
    "torch.compile of addmm + argmin": "torch.compile of addmm",
    "vector-quantize-pytorch": "v-q-pytorch",
    "faiss IndexFlatL2": "faiss",
}

# Of docs/benchmarks.md.
STAGES = ("search", "statistics", "quantize", "residual", "assignments", "steps", "exactness", "growing", "memory")
ANY_OF = ("search", "kernels", "sets", "first_run", "host_cost")  # stages, one of which every machine has


@dataclass
class Machine:
    """The rows of one folder of results."""

    folder: Path

    def rows(self, stage: str, op: str | None = None) -> list[dict]:
        return [row for row in read(self.folder / f"{stage}.jsonl") if op is None or row["op"] == op]

    @property
    def first(self) -> dict:
        return next(filter(None, map(self.rows, ANY_OF)))[0]

    @property
    def processor(self) -> str:
        """By its microarchitecture where the rows know it: virtual machines give several the same name."""
        return self.first.get("processor", {}).get("microarchitecture") or plain(self.first["device"])

    @property
    def name(self) -> str:
        return f"{self.processor} ({self.first['instructions']})"


def machines(root: Path) -> list[Machine]:
    found = map(Machine, sorted((root / "benchmarks" / "results").iterdir()))
    return [machine for machine in found if any(map(machine.rows, ANY_OF))]


CASE = ("op", "shape", "N", "D", "K", "dtype", "direction", "gradient", "indices", "levels", "sums", "model")
CASE += ("data", "offset", "spread")


def by_case(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows that were measured together, by method; those with nothing measured are left out."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "p50_ms" in row or "wrong" in row:
            cases.setdefault(tuple(row.get(name) for name in CASE), {})[row["method"]] = row
    return cases


def table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines] if lines else []
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


Line = tuple[list[str], list[str]]  # cells that say which case it is, and those of what was measured


def of_machines(
    found: list[Machine], lines_of: Callable[[Machine], Iterable[Line]], heads: list[str], measured: list[str]
) -> str:
    """A table of all machines: the lines of a case below one another, each with its machine where several are given."""
    cases: dict[tuple[str, ...], list[list[str]]] = {}
    for machine in found:
        for case, cells in lines_of(machine):
            cases.setdefault(tuple(case), []).append([machine.name, *cells])
    several = len(found) > 1
    lines = []
    for case, group in cases.items():
        for number, (name, *cells) in enumerate(group):
            shown = case if number == 0 else [""] * len(case)
            lines.append([*shown, *([name] if several else []), *cells])
    return table([*heads, *(["on"] if several else []), *measured], lines)


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}"


def times(row: dict) -> str:
    return f"{number(row['p50_ms'])} ({number(row['p20_ms'])}-{number(row['p80_ms'])})"


def size(row: dict) -> list[str]:
    axes = [row[axis] for axis in "NDK"]
    unnamed = row["shape"] == " x ".join(map(str, axes))
    return ["" if unnamed else row["shape"], ", ".join(map(grouped, axes))]


def grouped(count: float) -> str:
    return f"{count:,.0f}".replace(",", " ")


def wrong(row: dict) -> str:
    if not row.get("wrong"):
        return ""
    return f"; {row['wrong']} wrong of {row['checked']}"


def peer_columns(
    found: list[Machine],
    rows_of: Callable[[Machine], list[dict]],
    heads: list[str],
    describe: Callable[[dict], list[str]],
    share: str = "",
    counted: bool = False,
) -> str:
    """A line a case and machine: the time of vqops, then each peer's as a multiple of it. Counted: of a search, with
    the wrong indices beside each time."""
    cases = {machine.name: by_case(rows_of(machine)).values() for machine in found}
    methods = dict.fromkeys(method for each in cases.values() for case in each for method in case)
    peers = [method for method in methods if method not in OURS and not method.startswith("ceiling")]
    columns = (["vqops, prepared"] if "vqops, prepared" in methods else []) + peers

    def lines_of(machine: Machine) -> Iterator[Line]:
        for case in cases[machine.name]:
            if "vqops" in case:
                ours = case["vqops"]
                took = times(ours) if "p50_ms" in ours else "-"
                cells = [grouped(ours["checked"]), f"{took}, {ours['wrong']}"] if counted else [took]
                cells += [f"{ours['share_of_ceiling']:.2f}" if "share_of_ceiling" in ours else "-"] if share else []
                yield describe(ours), cells + [ratio_cell(case.get(method), counted) for method in columns]

    took, each = "vqops ms: p50 (p20-p80)", ": x, wrong" if counted else ""
    measured = ["checked", f"{took}, wrong"] if counted else [took]
    measured += [share] if share else []
    return of_machines(found, lines_of, heads, measured + [SHORT.get(method, method) + each for method in columns])


def ratio_cell(row: dict | None, counted: bool = False) -> str:
    if row is None:
        return "-"
    took = f"{number(row['times_vqops'])} x" if "times_vqops" in row else "-"
    return f"{took}, {row['wrong']}" if counted else f"{took}{wrong(row)}"


SIZE = ["shape", "N, D, K"]


def titled(parts: dict[str, str]) -> str:
    return "\n\n".join(f"{title}\n\n{part}".strip() for title, part in parts.items() if part)


def conditions(rows: list[dict]) -> str:
    threads = f"{rows[0]['threads']} thread" + "s" * (rows[0]["threads"] != 1)
    clock = next((f"{row['clock']} time" for row in rows if "clock" in row), "nothing timed")
    return ", ".join([threads, clock, *(f"{name} {version}" for name, version in rows[0]["versions"].items())])


def is_ours(row: dict) -> bool:
    return row["method"].startswith("vqops")


def variant(row: dict) -> list[str]:
    """The facts that set a case apart from others of its op and sizes."""
    parts = [row["dtype"]] if row["dtype"] != "float32" else []
    if "gradient" in row:
        parts.append(gradient(row))
    return parts + ([row["indices"]] if row.get("indices", "uniform") != "uniform" else [])


def data(row: dict) -> str:
    if "spread" in row:
        return "small codes"
    return f"all + {row['offset']:g}" if "offset" in row else "normal"


def gradient(row: dict) -> str:
    return row["gradient"].replace("_", "-")
