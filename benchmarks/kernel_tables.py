"""The kernels at sizes of their own, a table a machine: of CPUs and of GPUs."""

from collections.abc import Iterator

from benchmarks.rows import label
from benchmarks.tables import SHORT, STAGES, Machine, conditions, is_ours, number, table, variant


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
