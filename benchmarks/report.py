"""`python -m benchmarks.report`: the tables and figures of the documentation, from the committed rows and nothing else.

In README.md and the PAGES of docs/, what stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks -->` is
replaced by the block of that name (BLOCKS), of all machines that have rows of it; `NAME of FOLDER` has only those of
that one. Figures go to docs/figures/.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.figures import draw_growth, draw_memory, draw_search, draw_sets
from benchmarks.gpu.machine_code_page import expected, machine_code
from benchmarks.gpu.page import first_run, host_cost
from benchmarks.kernel_tables import kernels
from benchmarks.losses import losses
from benchmarks.shapes import SHAPES
from benchmarks.tables import (
    SHORT,
    SIZE,
    STAGES,
    Line,
    Machine,
    by_case,
    conditions,
    data,
    gradient,
    grouped,
    machines,
    number,
    of_machines,
    peer_columns,
    ratio_cell,
    size,
    table,
    times,
    titled,
    wrong,
)
from benchmarks.worth import sets

ROOT = Path(__file__).parents[1]
PAGES = ("benchmarks.md", "cpu.md", "gpu.md")
MARKED = re.compile(r"(<!-- benchmarks:([\w-]+)(?: of ([\w-]+))? -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
FIXED_COST_MS = 1.0  # a search below this is mostly the call itself
FIGURES = {
    "search": ("search", draw_search, "search time of the peers over that of vqops"),
    "growth": ("growing", draw_growth, "time over N, K and D"),
    "memory": ("memory", draw_memory, "extra memory over K"),
    "sets": ("sets", draw_sets, "rates of the sets of kernels over that of sgemm"),
}

Block = Callable[[list[Machine], str], str]  # of machines, with the folder of the figures


def each(part: Callable[[Machine, str], str]) -> Block:
    """A part a machine, one after the other."""
    return lambda found, figures: "\n\n".join(filter(None, (part(machine, figures) for machine in found)))


def measured(machine: Machine, figures: str) -> str:
    """The machines, versions and commits of the rows."""
    lines = []
    rows = {stage: machine.rows(stage) for stage in STAGES}
    every = [row for found in rows.values() for row in found]
    if not rows["search"]:
        return ""
    lines.append(f"**{machine.name}**{identity(machine)}, {conditions(rows['search'])}.")
    commits = dict.fromkeys(row["commit"] for row in every)
    lines.append(f"Sources measured: commit {', '.join(f'`{commit}`' for commit in commits)}.")
    loads = [found[0]["load"] for found in rows.values() if found and found[0].get("load") is not None]
    if loads:
        lines.append(f"Programs that wanted to run when a stage began: {min(loads)} to {max(loads)}.")
    skipped = {row["method"]: row["left_out"] for row in rows["search"] + rows["steps"] if "left_out" in row}
    skipped = {method: why for method, why in skipped.items() if "float32" not in why and "takes no" not in why}
    failed = [f"{row['method']} ({row['shape']}): {row['failed']}" for row in every if "failed" in row]
    if skipped:
        lines.append(f"Left out: {'; '.join(dict.fromkeys(skipped.values()))}.")
    if failed:
        lines.append(f"Failed, and so not timed: {'; '.join(failed)}.")
    return "\n".join(lines)


def identity(machine: Machine) -> str:
    """What the processor calls itself, where the name of the machine is not that."""
    said = machine.first.get("processor")
    if not said:
        return ""
    device = machine.first["device"]
    known = [device] if device != machine.processor else []
    return ", ".join(["", *known, f"{said['vendor']} family {said['family']} model {said['model']}"])


def bounds(found: list[Machine], figures: str) -> str:
    """The share of the GEMM rate and the bound of the search at each shape, a column a machine."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for machine in found:
        for methods in by_case(searches(machine)).values():
            if "vqops" in methods:
                row = methods["vqops"]
                cell = f"{row['share_of_ceiling']:.2f}, {bound(row, methods.get('vqops, prepared'))}"
                lines.setdefault(tuple(size(row)), {})[machine.name] = cell
    names = list(dict.fromkeys(name for cells in lines.values() for name in cells))
    return table([*SIZE, *names], [[*of, *(cells.get(name, "-") for name in names)] for of, cells in lines.items()])


def bound(row: dict, prepared: dict | None) -> str:
    fixed = row["p50_ms"] < FIXED_COST_MS
    if prepared and prepared["times_vqops"] < 0.75 and row["share_of_ceiling"] < 1:
        return "launch and packing" if fixed else "memory: packing"
    if fixed:
        return "launch"
    if row["D"] <= 16:
        return "epilogue"
    return "memory" if row["share_of_ceiling"] < 0.7 else "matrix units"


def shapes(found: list[Machine], figures: str) -> str:
    rows = {tuple(size(row)): row for machine in found for row in machine.rows("search") if row["shape"] in SHAPES}
    return table([*SIZE, "from"], [[*of, SHAPES[row["shape"]].model] for of, row in rows.items()])


def searches(machine: Machine, float32: bool = True) -> list[dict]:
    return [row for row in machine.rows("search", "nearest") if (row["dtype"] == "float32") == float32]


def search(found: list[Machine], figures: str) -> str:
    """Of centred data, then of what stage `exactness` has moved or made small."""

    def rows_of(machine: Machine) -> list[dict]:
        return searches(machine) + [row for row in machine.rows("exactness") if row.get("offset") != 0]

    describe = lambda row: [*size(row), data(row)]  # noqa: E731
    return peer_columns(found, rows_of, [*SIZE, "data"], describe, "share of GEMM", counted=True)


def dtypes(found: list[Machine], figures: str) -> str:
    describe = lambda row: [row["dtype"], *size(row)]  # noqa: E731
    return peer_columns(found, partial(searches, float32=False), ["dtype", *SIZE], describe, counted=True)


def statistics(found: list[Machine], figures: str) -> str:
    sums, update = (lambda machine, op=op: machine.rows("statistics", op) for op in ("code_sums", "ema_update_"))
    of_codes = lambda row: [row["shape"], f"{grouped(row['D'])}, {grouped(row['K'])}"]  # noqa: E731
    return titled(
        {
            "`code_sums`:": peer_columns(found, sums, SIZE, size, "share of copy"),
            "`ema_update_`:": peer_columns(found, update, ["shape", "D, K"], of_codes, "share of copy"),
        }
    )


def quantize(found: list[Machine], figures: str) -> str:
    forward, backward = (
        lambda machine, op=op: machine.rows("quantize", op) for op in ("quantize", "quantize_backward")
    )
    describe = lambda row: [gradient(row), *size(row)]  # noqa: E731
    return titled(
        {
            "Forward:": peer_columns(found, forward, SIZE, size, "share of GEMM"),
            "Backward:": peer_columns(found, backward, ["gradient", *SIZE], describe, "share of copy"),
        }
    )


def assignments(found: list[Machine], figures: str) -> str:
    """Time and memory beside those of PyTorch."""

    def lines_of(machine: Machine) -> Iterator[Line]:
        for methods in by_case(machine.rows("search", "sample") + machine.rows("assignments")).values():
            ours, *peers = (row for method, row in methods.items() if not method.startswith("ceiling"))
            for row in peers:
                megabytes = [number(each["extra_mb"]) for each in (ours, row)]
                yield [f"`{ours['op']}`", *size(ours)], [times(ours), ratio_cell(row), *megabytes]

    heads = ["vqops ms: p50 (p20-p80)", "PyTorch", "vqops MB", "PyTorch MB"]
    return of_machines(found, lines_of, ["op", *SIZE], heads)


def residual(found: list[Machine], figures: str) -> str:
    """The op, and ResidualVQ in training and in use."""
    parts = {}
    for title, op, more in (
        ("The op:", "residual_quantize", lambda row: ["yes" if row["sums"] else "no"]),
        ("A training step of `ResidualVQ`:", "residual training step", lambda row: []),
        ("`ResidualVQ` in eval:", "residual evaluation", lambda row: []),
    ):
        heads = ["levels", *SIZE[1:], *(["sums"] if op == "residual_quantize" else [])]
        describe = lambda row, more=more: [str(row["levels"]), *size(row)[1:], *more(row)]  # noqa: E731
        parts[title] = peer_columns(found, lambda machine, op=op: machine.rows("residual", op), heads, describe)
    return titled(parts)


def codec(found: list[Machine], figures: str) -> str:
    heads = ["quantizer of", "levels", "frames, D, K"]
    describe = lambda row: [row["model"], str(row["levels"]), *size(row)[1:]]  # noqa: E731
    return peer_columns(found, lambda machine: machine.rows("residual", "codec"), heads, describe)


def step(found: list[Machine], figures: str) -> str:
    return peer_columns(found, lambda machine: machine.rows("steps", "training step"), SIZE, size)


def system(found: list[Machine], figures: str) -> str:
    heads = ["step", "vectors, D, K"]
    return peer_columns(found, lambda machine: machine.rows("steps", "VQ-VAE-2 training step"), heads, size)


def evaluation(found: list[Machine], figures: str) -> str:
    return peer_columns(found, lambda machine: machine.rows("steps", "evaluation"), SIZE, size)


def plain(found: list[Machine], figures: str) -> str:
    """"pytorch" as a multiple of what is written by hand."""

    def lines_of(machine: Machine) -> Iterator[Line]:
        for methods in by_case(machine.rows("plain")).values():
            ours = methods["vqops pytorch"]
            for name, row in methods.items():
                if row is not ours and not name.startswith("ceiling"):
                    took = f"{number(1 / row['times_vqops'])} x"
                    yield [ours["op"], *size(ours)[1:]], [times(ours), f"{times(row)}{wrong(row)}", took]

    made = of_machines(found, lines_of, ["op", "N, D, K"], ['"pytorch" ms: p50 (p20-p80)', "by hand ms", "of that"])
    commits = dict.fromkeys(f"`{row['commit']}`" for machine in found for row in machine.rows("plain"))
    return f"{made}\n\nCommit {', '.join(commits)}." if made else ""


def pictures(kind: str, found: list[Machine], figures: str) -> str:
    stage, _, text = FIGURES[kind]
    having = [machine for machine in found if machine.rows(stage)]
    shown = [f"![{text}]({figures}/benchmarks_{machine.folder.name}_{kind}.svg)" for machine in having]
    names = [f"**{machine.name}**\n\n" * (len(having) > 1) for machine in having]
    return "\n\n".join(map("".join, zip(names, shown, strict=True)))


def growth(found: list[Machine], figures: str) -> str:
    rows = {machine.name: machine.rows("growing", "growth exponent") for machine in found}
    methods = list(dict.fromkeys(row["method"] for each in rows.values() for row in each))

    def lines_of(machine: Machine) -> Iterator[Line]:
        exponents: dict[str, dict[str, str]] = {}
        for row in rows[machine.name]:
            over = f"{row['axis']} from {grouped(row['from'])} to {grouped(row['to'])}"
            exponents.setdefault(over, {})[row["method"]] = f"{row['exponent']:.2f}"
        for over, of in exponents.items():
            yield [over], [of.get(method, "-") for method in methods]

    heads = [SHORT.get(method, method) for method in methods]
    made = of_machines(found, lines_of, ["exponent of time over"], heads)
    return f"{pictures('growth', found, figures)}\n\n{made}".strip()


def threads(found: list[Machine], figures: str) -> str:
    def lines_of(machine: Machine) -> Iterator[Line]:
        for row in machine.rows("growing", "nearest"):
            if row["axis"] == "threads":
                yield [row["method"], str(row["threads"])], [times(row), f"{number(row['times_one_thread'])} x"]

    return of_machines(found, lines_of, ["method", "threads"], ["wall ms: p50 (p20-p80)", "as fast as one thread"])


def memory(found: list[Machine], figures: str) -> str:
    rows = {machine.name: machine.rows("memory", "memory law") for machine in found}
    limits = " or ".join(dict.fromkeys(f"{row['limit_gib']} GiB" for each in rows.values() for row in each))

    def lines_of(machine: Machine) -> Iterator[Line]:
        for row in rows[machine.name]:
            bytes = [number(row[f"bytes_per_{of}"]) for of in ("NK", "N", "K")]
            yield [row["of"], row["method"]], [*bytes, grouped(row["largest_N_equal_K"])]

    heads = ["bytes a vector and code", "bytes a vector", "bytes a code", f"largest N = K in {limits}"]
    made = of_machines(found, lines_of, ["op", "method"], heads)
    return f"{pictures('memory', found, figures)}\n\n{made}".strip()


BLOCKS: dict[str, Block] = {
    block.__name__: block
    for block in (
        *(bounds, shapes, search, dtypes, statistics, quantize, assignments, step, system, evaluation),
        *(residual, codec, plain, growth, threads, memory, losses, sets),
    )
} | {
    "machine": each(measured),
    "machine-code": lambda found, figures: machine_code(found[0].folder.parent),  # of no machine
    "expected": lambda found, figures: expected(found[0].folder.parent),
    "search-figure": partial(pictures, "search"),
    "sets-figure": partial(pictures, "sets"),
    "cpu-kernels": each(partial(kernels, False)),
    "gpu-kernels": each(partial(kernels, True)),
    "gpu-run": each(first_run),
    "gpu-host": each(host_cost),
}


def rendered(text: str, found: list[Machine], figures: str) -> str:
    """The text with its blocks made anew. Raises KeyError for a marker that names no block."""

    def block(match: re.Match) -> str:
        wanted = [machine for machine in found if match[3] in (None, machine.folder.name)]
        return "\n".join([match[1] + (BLOCKS[match[2]](wanted, figures) or "No run yet."), match[4]])

    return MARKED.sub(block, text)


def main(root: Path = ROOT) -> None:
    found = machines(root)
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for machine in found:
        for kind, (stage, draw, _) in FIGURES.items():
            if machine.rows(stage):
                draw(machine, folder / f"benchmarks_{machine.folder.name}_{kind}.svg")
    for path in (*(root / "docs" / page for page in PAGES), root / "README.md"):
        path.write_text(rendered(path.read_text(), found, "docs/figures" if path.parent == root else "figures"))


if __name__ == "__main__":
    main()
