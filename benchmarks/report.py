"""`python -m benchmarks.report`: the tables and figures of the documentation, from the committed rows and nothing else.

In README.md and the PAGES of docs/, what stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks -->` is
replaced by the block of that name (BLOCKS), of all machines that have rows of it; `NAME of FOLDER` has only those of
that one. Figures go to docs/figures/.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.causes import CAUSES, cause_of
from benchmarks.figures import draw_growth, draw_memory, draw_search, draw_sets
from benchmarks.gpu.page import first_run
from benchmarks.rows import label
from benchmarks.shapes import SHAPES
from benchmarks.tables import (
    SHORT,
    SIZE,
    Line,
    Machine,
    by_case,
    grouped,
    machines,
    number,
    of_machines,
    peer_columns,
    ratio_cell,
    size,
    table,
    times,
    wrong,
)
from benchmarks.worth import sets

ROOT = Path(__file__).parents[1]
PAGES = ("benchmarks.md", "cpu.md", "gpu.md")
# Of docs/benchmarks.md.
STAGES = ("search", "statistics", "quantize", "residual", "assignments", "steps", "exactness", "growing", "memory")
MARKED = re.compile(r"(<!-- benchmarks:([\w-]+)(?: of ([\w-]+))? -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
PARTS_OF_OURS = ("no quantizer", "searches alone")  # nothing that a user can take instead
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
    known = [machine.first["device"]] if "microarchitecture" in said else []
    return ", ".join(["", *known, f"{said['vendor']} family {said['family']} model {said['model']}"])


def conditions(rows: list[dict]) -> str:
    threads = f"{rows[0]['threads']} thread" + "s" * (rows[0]["threads"] != 1)
    clock = next((f"{row['clock']} time" for row in rows if "clock" in row), "nothing timed")
    return ", ".join([threads, clock, *(f"{name} {version}" for name, version in rows[0]["versions"].items())])


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


def data(row: dict) -> str:
    if "spread" in row:
        return "small codes"
    return f"all + {row['offset']:g}" if "offset" in row else "normal"


def dtypes(found: list[Machine], figures: str) -> str:
    describe = lambda row: [row["dtype"], *size(row)]  # noqa: E731
    return peer_columns(found, partial(searches, float32=False), ["dtype", *SIZE], describe, counted=True)


def titled(parts: dict[str, str]) -> str:
    return "\n\n".join(f"{title}\n\n{part}".strip() for title, part in parts.items() if part)


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


def gradient(row: dict) -> str:
    return row["gradient"].replace("_", "-")


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


def variant(row: dict) -> list[str]:
    """The facts that set a case apart from others of its op and sizes."""
    parts = [row["dtype"]] if row["dtype"] != "float32" else []
    if "gradient" in row:
        parts.append(gradient(row))
    return parts + ([row["indices"]] if row.get("indices", "uniform") != "uniform" else [])


def kernels(of_gpu: bool, machine: Machine, figures: str) -> str:
    """A line per case of the kernels' own sizes."""
    rows = machine.rows("kernels")
    if not rows or rows[0]["instructions"].startswith("sm_") != of_gpu:
        return ""
    lines, shown, older = [], [], []
    for newest, before in runs_of_cases(machine):
        ours = next((row for row in newest.values() if is_ours(row) and row["times_vqops"] == 1), None)
        if ours is None:
            continue
        shown += newest.values()
        op = ", ".join([ours["op"], *ours["method"].split()[1:], *variant(ours)])
        sizes = ", ".join(str(ours[axis]) for axis in "NDK")
        lines.append([op, sizes, *rates(ours, newest.get("ceiling: gemm", {})), multiples(ours, newest)])
        older += [f"{op} {sizes}: {number(row['p50_ms'])} ms (`{row['commit']}`)" for row in before]
    shown.sort(key=lambda row: row["committed"])
    commits = ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in shown))
    parts = [f"**{machine.name}**, {conditions(rows)}, commit {commits}."]
    heads = ["op", "N, D, K", "ms", "GFLOP/s", "share of the ceiling", "of multiply-adds", "times as long (wrong):"]
    parts += [table(heads, lines)]
    latest = {label(row): row for row in rows if "failed" in row or "p50_ms" in row}.values()
    done = {row.get("case") for row in latest if "p50_ms" in row}  # after a process that did not end well, too
    failed = [row for row in latest if "failed" in row and (row["method"] != "all" or row["case"] not in done)]
    failed = [f"{row['method']} ({row['op']} {row['shape']}): {row['failed']}" for row in failed]
    by_events = dict.fromkeys(row["method"] for row in shown if row["clock"] == "events")
    parts += [f"Failed: {'; '.join(failed)}."] if failed else []
    parts += [f"Not from a CUDA graph, which can't hold them: {', '.join(by_events)}."] if by_events else []
    parts += [f"Measured again since, and shown from there: {'; '.join(older)}."] if older else []
    return "\n\n".join(parts)


def runs_of_cases(machine: Machine) -> Iterator[tuple[dict[str, dict], list[dict]]]:
    """Per case of the stage `kernels`: the rows of its newest run in any stage by method, and ours of older commits."""
    found: dict[tuple, dict[tuple, dict[str, dict]]] = {}
    for stage in ("kernels", *STAGES):
        for row in machine.rows(stage):
            if row["method"].startswith("ceiling") or ("p50_ms" in row and row.get("axis") != "threads"):
                case = tuple(row.get(key) for key in ("op", "N", "D", "K", "dtype", "gradient", "indices"))
                run = row["committed"], stage == "kernels", row.get("axis", "")
                found.setdefault(case, {}).setdefault(run, {})[row["method"]] = row
    for runs in found.values():
        if any(kernels for _, kernels, _ in runs):
            *before, newest = (rows for _, rows in sorted(runs.items()))
            commits = {row["commit"] for row in newest.values()}
            older = [rows["vqops"] for rows in before if "vqops" in rows]
            yield newest, [row for row in older if row["commit"] not in commits]


def is_ours(row: dict) -> bool:
    return row["method"].startswith("vqops")


def rates(row: dict, gemm: dict) -> list[str]:
    """Cells of a row's time, its rate, and its shares of what the machine can do."""
    cells = [f"{row['p50_ms']:.3g}", f"{row['gflops']:.0f}" if "ceiling" in row and "gflops" in row else "", "", ""]
    if "share_of_ceiling" in row:
        cells[2] = f"{row['share_of_ceiling']:.2f}" + (" (copy)" if row["ceiling"] == "copy" else "")
        if "gflops" in row and "multiply_add_gflops" in gemm:
            cells[3] = f"{row['gflops'] / gemm['multiply_add_gflops']:.2f}"
    return cells


def multiples(ours: dict, found: dict[str, dict]) -> str:
    others = {name: row for name, row in found.items() if row is not ours and not name.startswith("ceiling")}
    counted = {name: f" ({row['wrong']})" if "wrong" in row else "" for name, row in others.items()}
    return ", ".join(
        f"{SHORT.get(name, name)} {row['times_vqops']:.3g}{counted[name]}" for name, row in others.items()
    )


BLOCKS: dict[str, Block] = {
    block.__name__: block
    for block in (
        *(bounds, shapes, search, dtypes, statistics, quantize, assignments, step, system, evaluation),
        *(residual, codec, plain, growth, threads, memory, losses, sets),
    )
} | {
    "machine": each(measured),
    "search-figure": partial(pictures, "search"),
    "sets-figure": partial(pictures, "sets"),
    "cpu-kernels": each(partial(kernels, False)),
    "gpu-kernels": each(partial(kernels, True)),
    "gpu-run": each(first_run),
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
