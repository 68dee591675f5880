"""The blocks of docs/gpu.md that tell what a first run has shown and what calls cost on the host, from their rows."""

from collections.abc import Iterator

from benchmarks.gpu.plan import PARTS
from benchmarks.tables import Machine, grouped, number, table
from vqops.check.record import is_right, said

LARGEST = 4  # kernels of a search that are named


def first_run(machine: Machine, figures: str) -> str:
    rows = machine.rows("first_run")
    if not rows:
        return ""
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    parts = [f"**{machine.name}**, {versions}, commit {commits}.", parts_of(rows), *cases_of(rows), times_of(rows)]
    return "\n\n".join(filter(None, parts))


def parts_of(rows: list[dict]) -> str:
    """The last outcome of each part, and what its commands said."""
    ended = {row["part"]: row for row in rows if "left" in row or row.get("outcome") == "no time left"}
    notes = {}
    for row in rows:
        if "outcome" in row and "left" not in row and "case" not in row:
            said = row.get("why") or " ".join(row.get("last_lines", [])[-1:])
            notes.setdefault(row["part"].partition(" ")[0], {})[row["part"]] = said.replace("|", "/")[:160]
    lines = [[name, ended[name]["outcome"], "; ".join(notes.get(name, {}).values())] for name in PARTS if name in ended]
    return table(["part", "outcome", "it said"], lines)


def cases_of(rows: list[dict]) -> Iterator[str]:
    """By part and who ran them, of each case the last row; then what was not right, in full."""
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if "case" in row:
            cases.setdefault((row["part"], row.get("tool") or row["implementation"]), {})[row["case"]] = row
    lines, others = [], []
    for (part, by), found in cases.items():
        shares = [row["share_of_bound"] for row in found.values() if "share_of_bound" in row]
        right = sum(map(is_right, found.values()))
        lines.append([part, by, f"{right} of {len(found)}", number(max(shares)) if shares else ""])
        others += [f"- {part}, {by}, {name}: {said(row)}" for name, row in found.items() if not is_right(row)]
    if lines:
        yield table(["part", "by", "cases right", "largest share of the proof's error"], lines)
    if others:
        yield "\n".join(others)


def times_of(rows: list[dict]) -> str:
    found, loaded = (
        {tuple(row["kernels"]): row for row in rows if row["part"] == part and "kernels" in row}
        for part in ("times", "loader")
    )
    lines = []
    for shape, row in found.items():
        name = " x ".join(map(str, shape))
        if "failed" in row:
            lines.append([name, "failed", "", "", "", row["failed"].replace("\n", " ").replace("|", "/")[-160:]])
            continue
        kernels = list(row.get("microseconds", {}).items())[:LARGEST]
        each = "; ".join(f"{short(kernel)} {number(time)}" for kernel, time in kernels)
        certified = f"{100 * row['tiers'][0] / max(1, sum(row['tiers'])):.2f} %"
        wrong = f"; {row['wrong']} wrong" * bool(row["wrong"])
        loader = loaded.get(shape, {})
        other = number(loader["p50_ms"]) if "p50_ms" in loader else "failed" * bool(loader)
        lines.append([name, f"{number(row['p50_ms'])}{wrong}", other, number(row["tflops"]), certified, each])
    titles = ["N x D x K", "ms", "with a loader", "TFLOP/s", "certified", "its largest kernels, microseconds"]
    return table(titles, lines)


def short(kernel: str) -> str:
    """The body that a kernel of ours runs, or the name as it is."""
    name = kernel.partition("run<")[2] or kernel
    return name.partition("(")[0].removeprefix("vqops::cuda::")[:60].replace("|", "/")


def host_cost(machine: Machine, figures: str) -> str:
    """Launches and calls of each op, and the time of its host beside that of a search in plain PyTorch."""
    rows = machine.rows("host_cost")
    if not rows:
        return ""
    first, versions = rows[0], rows[0]["versions"]
    lines = []
    for row in rows:
        launches = [str(len(row["kernels"])), str(sum(row["launched_by_pytorch"].values()))]
        ratio = f"{number(row['p50_us'] / first['p50_us'])} x" if row is not first else ""
        lines.append([f"`{row['op']}`", *launches, str(row["aten"]), grouped(row["p50_us"]), ratio])
    shape = ", ".join(grouped(first[axis]) for axis in "NDK")
    timed = ", ".join(grouped(size) for size in first["timed_at"])
    about = f"Counts at N, D, K = {shape}, times at {timed}, where PyTorch's arithmetic takes next to nothing; "
    about += f"{machine.name}, "
    about += f"torch {versions['torch']}, Triton {versions['triton']}, commit `{first['commit']}`, "
    about += f"{first['load']} other programs on average in the minute before."
    heads = ["call", "kernels", "launches of PyTorch", "its calls", "host us", f"of {first['op']}"]
    return f"{about}\n\n{table(heads, lines)}"
