"""`python -m benchmarks.report`: the tables and figures of the documentation, from the committed rows and nothing else.

In README.md and the PAGES of docs/, what stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks -->` is
replaced by the block of that name (BLOCKS), one part per machine that has rows of it; `NAME of FOLDER` has only
that one. Figures go to docs/figures/.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.figures import draw_growth, draw_memory, draw_search
from benchmarks.gpu.page import first_run
from benchmarks.rows import label
from benchmarks.shapes import SHAPES
from benchmarks.tables import (
    OURS,
    SHORT,
    SIZE,
    Machine,
    by_case,
    machines,
    number,
    peer_columns,
    ratio_cell,
    size,
    table,
    times,
    wrong,
)

ROOT = Path(__file__).parents[1]
PAGES = ("benchmarks.md", "cpu.md", "gpu.md")
# Of docs/benchmarks.md.
STAGES = ("search", "statistics", "quantize", "residual", "assignments", "steps", "exactness", "growing", "memory")
MARKED = re.compile(r"(<!-- benchmarks:([\w-]+)(?: of ([\w-]+))? -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
NAMED = ("machine", "cpu-kernels", "gpu-kernels", "gpu-run")  # blocks whose text names the machine
PARTS_OF_OURS = ("no quantizer", "searches alone", "vqops.quantize a level")
FIXED_COST_MS = 1.0  # a search below this is mostly the call itself
FIGURES = {"search": ("search", draw_search), "growth": ("growing", draw_growth), "memory": ("memory", draw_memory)}


def measured(machine: Machine, figures: str) -> str:
    """The machines, versions and commits of the rows."""
    lines = []
    rows = {stage: machine.rows(stage) for stage in STAGES}
    every = [row for found in rows.values() for row in found]
    if not rows["search"]:
        return ""
    lines.append(f"**{machine.name}**, {conditions(rows['search'])}.")
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


def conditions(rows: list[dict]) -> str:
    threads = f"{rows[0]['threads']} thread" + "s" * (rows[0]["threads"] != 1)
    clock = next((f"{row['clock']} time" for row in rows if "clock" in row), "nothing timed")
    return ", ".join([threads, clock, *(f"{name} {version}" for name, version in rows[0]["versions"].items())])


def bounds(machine: Machine, figures: str) -> str:
    """The bound of the search at each shape, and what a user can do."""
    lines = []
    for found in by_case(searches(machine)).values():
        if "vqops" in found:
            row, prepared = found["vqops"], found.get("vqops, prepared")
            cause, remedy = bound(row, prepared)
            share = f"{row['share_of_ceiling']:.2f}"
            lines.append([*size(row), number(row["p50_ms"]), share, ratio_cell(prepared), cause, remedy])
    heads = [*SIZE, "ms", "share of GEMM", "prepared", "bound by", "what you can do"]
    return table(heads, lines)


def bound(row: dict, prepared: dict | None) -> tuple[str, str]:
    fixed = row["p50_ms"] < FIXED_COST_MS
    if prepared and prepared["times_vqops"] < 0.75 and row["share_of_ceiling"] < 1:
        packing = "memory: the codebook is packed for few vectors"
        cause = "launch, and preparing the codebook" if fixed else packing
        return cause, "more vectors a call; `vqops.prepare` where codes stay as they are"
    if fixed:
        return "launch: the fixed cost of a call", "more vectors a call"
    if row["D"] <= 16:
        return "epilogue: a comparison every D products", "a smaller K; a larger D costs little more"
    if row["share_of_ceiling"] < 0.7:
        return "memory: codes pass through the caches for few vectors", "more vectors a call"
    return "matrix units", "nothing but a smaller N, K or D"


def shapes(machine: Machine, figures: str) -> str:
    found = {row["shape"]: row for row in machine.rows("search") if row["shape"] in SHAPES}
    return table([*SIZE, "from"], [[*size(row), SHAPES[name].model] for name, row in found.items()])


def searches(machine: Machine, float32: bool = True) -> list[dict]:
    return [row for row in machine.rows("search", "nearest") if (row["dtype"] == "float32") == float32]


def search(machine: Machine, figures: str) -> str:
    return peer_columns(by_case(searches(machine)), SIZE, size, "share of GEMM")


def dtypes(machine: Machine, figures: str) -> str:
    found = by_case(searches(machine, float32=False))
    return peer_columns(found, ["dtype", *SIZE], lambda row: [row["dtype"], *size(row)])


def statistics(machine: Machine, figures: str) -> str:
    sums, update = (by_case(machine.rows("statistics", op)) for op in ("code_sums", "ema_update_"))
    parts = [peer_columns(sums, SIZE, size, "share of copy")] if sums else []
    if update:
        codes = peer_columns(update, ["shape", "D", "K"], lambda row: [row["shape"], *size(row)[2:]], "share of copy")
        parts += ["`ema_update_`:", codes]
    return "\n\n".join(parts)


def quantize(machine: Machine, figures: str) -> str:
    backward = by_case(machine.rows("quantize", "quantize_backward"))
    if not backward:
        return ""
    forward = peer_columns(by_case(machine.rows("quantize", "quantize")), SIZE, size, "share of GEMM")
    named = peer_columns(backward, ["gradient", *SIZE], lambda row: [gradient(row), *size(row)], "share of copy")
    return f"{forward}\n\nBackward:\n\n{named}"


def gradient(row: dict) -> str:
    return row["gradient"].replace("_", "-")


def assignments(machine: Machine, figures: str) -> str:
    """Time and memory beside those of PyTorch."""
    lines = []
    for found in by_case(machine.rows("search", "sample") + machine.rows("assignments")).values():
        ours, *peers = (row for method, row in found.items() if not method.startswith("ceiling"))
        for row in peers:
            megabytes = [number(each["extra_mb"]) for each in (ours, row)]
            lines.append([f"`{ours['op']}`", *size(ours), times(ours), ratio_cell(row), *megabytes])
    return table(["op", *SIZE, "vqops ms: p50 (p20-p80)", "PyTorch", "vqops MB", "PyTorch MB"], lines)


def residual(machine: Machine, figures: str) -> str:
    """The op, and ResidualVQ in training and in use."""
    parts = []
    for title, op, more in (
        ("The op:", "residual_quantize", lambda row: ["yes" if row["sums"] else "no"]),
        ("A training step of `ResidualVQ`:", "residual training step", lambda row: []),
        ("`ResidualVQ` in eval:", "residual evaluation", lambda row: []),
    ):
        heads = ["levels", *SIZE, *(["sums"] if op == "residual_quantize" else [])]
        found = by_case(machine.rows("residual", op))
        if found:
            describe = lambda row, more=more: [str(row["levels"]), *size(row), *more(row)]  # noqa: E731
            parts.append(f"{title}\n\n{peer_columns(found, heads, describe)}")
    return "\n\n".join(parts)


def codec(machine: Machine, figures: str) -> str:
    heads = ["quantizer of", "levels", "frames", "D", "K"]
    describe = lambda row: [row["model"], str(row["levels"]), *size(row)[1:]]  # noqa: E731
    return peer_columns(by_case(machine.rows("residual", "codec")), heads, describe)


def step(machine: Machine, figures: str) -> str:
    return peer_columns(by_case(machine.rows("steps", "training step")), SIZE, size)


def system(machine: Machine, figures: str) -> str:
    return peer_columns(by_case(machine.rows("steps", "VQ-VAE-2 training step")), ["step", "vectors", "D", "K"], size)


def evaluation(machine: Machine, figures: str) -> str:
    return peer_columns(by_case(machine.rows("steps", "evaluation")), SIZE, size)


def plain(machine: Machine, figures: str) -> str:
    """"pytorch" as a multiple of what is written by hand."""
    lines = []
    for found in by_case(machine.rows("plain")).values():
        ours = found["vqops pytorch"]
        for name in found.keys() - {"vqops pytorch"}:
            if name.startswith("ceiling"):
                continue
            theirs = found[name]
            took = f"{number(1 / theirs['times_vqops'])} x"
            lines.append([ours["op"], *size(ours)[1:], times(ours), f"{times(theirs)}{wrong(theirs)}", took])
    commit = f"\n\nCommit `{machine.rows('plain')[0]['commit']}`." if lines else ""
    return table(["op", "N", "D", "K", '"pytorch" ms: p50 (p20-p80)', "by hand ms", "of that"], lines) + commit


def exactness(machine: Machine, figures: str) -> str:
    """Share of wrong indices, in percent."""
    rows = machine.rows("exactness")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        data = "codes 1000 times smaller" if "spread" in row else f"all values + {row['offset']:g}"
        cases.setdefault((row["shape"], data), {})[row["method"]] = row
    lines = [
        [*key, *(f"{number(100 * found[m]['wrong'] / found[m]['checked'])} %" if m in found else "-" for m in methods)]
        for key, found in cases.items()
    ]
    return table(["shape", "data", *(SHORT.get(method, method) for method in methods)], lines)


def growth(machine: Machine, figures: str) -> str:
    rows = machine.rows("growing", "growth exponent")
    if not rows:
        return ""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    axes = dict.fromkeys((row["axis"], row["from"], row["to"]) for row in rows)
    exponents = {(row["axis"], row["method"]): row["exponent"] for row in rows}
    heads = ["exponent of time over", *(SHORT.get(method, method) for method in methods)]
    lines = [[f"{a} from {b} to {c}", *(f"{exponents[a, m]:.2f}" for m in methods)] for a, b, c in axes]
    return picture("growth", "time over N, K and D", machine, figures) + f"\n\n{table(heads, lines)}"


def threads(machine: Machine, figures: str) -> str:
    rows = [row for row in machine.rows("growing", "nearest") if row["axis"] == "threads"]
    lines = [[row["method"], str(row["threads"]), times(row), f"{number(row['times_one_thread'])} x"] for row in rows]
    return table(["method", "threads", "wall ms: p50 (p20-p80)", "as fast as one thread"], lines)


def memory(machine: Machine, figures: str) -> str:
    rows = machine.rows("memory", "memory law")
    if not rows:
        return ""
    limits = " or ".join(dict.fromkeys(f"{row['limit_gib']} GiB" for row in rows))
    largest = f"largest N = K in {limits}"
    heads = ["op", "method", "bytes a vector and code", "bytes a vector", "bytes a code", largest]
    lines = [
        [
            row["of"],
            row["method"],
            *(number(row[f"bytes_per_{of}"]) for of in ("NK", "N", "K")),
            f"{row['largest_N_equal_K']:,.0f}".replace(",", " "),
        ]
        for row in rows
    ]
    return picture("memory", "extra memory over K", machine, figures) + f"\n\n{table(heads, lines)}"


def losses(machine: Machine, figures: str) -> str:
    """Every peer that was faster, from all stages."""
    lines = []
    if not machine.rows("search"):
        return ""
    for stage in ("search", "statistics", "quantize", "residual", "assignments", "steps", "growing"):
        for found in by_case(machine.rows(stage)).values():
            for name, row in found.items():
                if name in OURS or name in PARTS_OF_OURS or row.get("times_vqops", 1) >= 1:
                    continue
                milliseconds = f"{number(row['p50_ms'])} against {number(found['vqops']['p50_ms'])} ms"
                op = ", ".join([row["op"], *variant(row)])
                took = f"{name} took {number(row['times_vqops'])} x our time ({milliseconds})"
                where = f"{row['shape']}, {row['axis']} = {row[row['axis']]}" if "axis" in row else row["shape"]
                lines.append(f"- {op}, {where}: {took}{wrong(row)}.")
    for op in ("nearest", "training step"):
        rows = machine.rows("memory", op)
        largest = [row for row in rows if all(row[axis] == rows[-1][axis] for axis in "NK")]
        ours = next((row["extra_mb"] for row in largest if row["method"] == "vqops"), 0.0)
        for row in largest:
            if row["extra_mb"] < ours:
                took = f"{row['method']} took {number(row['extra_mb'])} against {number(ours)} MB"
                lines.append(f"- memory of {op}, N = {row['N']}, D = {row['D']}, K = {row['K']}: {took}.")
    return "\n".join(lines) or "- In none of these cases was a peer faster."


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
    heads = ["op", "N, D, K", "ms", "GFLOP/s", "share of the ceiling", "of multiply-adds", "times as long:"]
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
    return ", ".join(f"{SHORT.get(name, name)} {row['times_vqops']:.3g}{wrong(row)}" for name, row in others.items())


def picture(kind: str, text: str, machine: Machine, figures: str) -> str:
    stage, _ = FIGURES[kind]
    return f"![{text}]({figures}/benchmarks_{machine.folder.name}_{kind}.svg)" if machine.rows(stage) else ""


BLOCKS: dict[str, Callable[[Machine, str], str]] = {
    block.__name__: block
    for block in (
        *(bounds, shapes, search, dtypes, statistics, quantize, assignments, step, system, evaluation),
        *(residual, codec, plain, exactness, growth, threads, memory, losses),
    )
} | {
    "machine": measured,
    "search-figure": partial(picture, "search", "search time of the peers over that of vqops"),
    "cpu-kernels": partial(kernels, False),
    "gpu-kernels": partial(kernels, True),
    "gpu-run": first_run,
}


def rendered(text: str, found: list[Machine], figures: str) -> str:
    """The text with its blocks made anew. Raises KeyError for a marker that names no block."""

    def block(match: re.Match) -> str:
        wanted = [machine for machine in found if match[3] in (None, machine.folder.name)]
        made = {machine.name: BLOCKS[match[2]](machine, figures) for machine in wanted}
        made = {name: text for name, text in made.items() if text}
        titled = len(made) > 1 and match[2] not in NAMED
        parts = [f"**{name}**\n\n{text}" if titled else text for name, text in made.items()]
        return "\n".join([match[1] + ("\n\n".join(parts) or "No run yet."), match[4]])

    return MARKED.sub(block, text)


def main(root: Path = ROOT) -> None:
    found = machines(root)
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for machine in found:
        for kind, (stage, draw) in FIGURES.items():
            if machine.rows(stage):
                draw(machine, folder / f"benchmarks_{machine.folder.name}_{kind}.svg")
    for path in (*(root / "docs" / page for page in PAGES), root / "README.md"):
        path.write_text(rendered(path.read_text(), found, "docs/figures" if path.parent == root else "figures"))


if __name__ == "__main__":
    main()
