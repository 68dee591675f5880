"""`python -m benchmarks.report`: the tables and figures of the documentation, from the committed rows and nothing else.

In docs/benchmarks.md and README.md, what stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks -->` is
replaced by the block of that name (BLOCKS). Figures go to docs/figures/.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.figures import draw_growth, draw_memory, draw_search
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parents[1]
STAGES = ("search", "statistics", "quantize", "steps", "exactness", "growing", "memory")
MARKED = re.compile(r"(<!-- benchmarks:([\w-]+) -->\n).*?(<!-- /benchmarks -->)", re.DOTALL)
OURS = ("vqops", "vqops, prepared")
SHORT = {
    "addmm + argmin": "addmm",
    "cdist + argmin": "cdist",
    "torch.compile of addmm + argmin": "torch.compile of addmm",
    "vector-quantize-pytorch": "v-q-pytorch",
    "faiss IndexFlatL2": "faiss",
}
FIXED_COST_MS = 1.0  # a search below this is mostly the call itself
FIGURES = {"search": draw_search, "growth": draw_growth, "memory": draw_memory}


@dataclass
class Device:
    """The rows of one folder of results."""

    folder: Path

    def rows(self, stage: str, op: str | None = None) -> list[dict]:
        path = self.folder / f"{stage}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if op is None or row["op"] == op]

    @property
    def name(self) -> str:
        return self.rows("search")[0]["device"]


def devices(root: Path) -> list[Device]:
    return [Device(path.parent) for path in sorted((root / "benchmarks" / "results").glob("*/search.jsonl"))]


def by_case(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows that were measured together, by method; those without a time are left out."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "p50_ms" in row:
            key = row["op"], row["shape"], row["N"], row["D"], row["K"], row["dtype"], row["direction"]
            cases.setdefault(key, {})[row["method"]] = row
    return cases


def table(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *lines])


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


def machine(device: Device, figures: str) -> str:
    """What was measured, where, with what."""
    lines = []
    rows = {stage: device.rows(stage) for stage in STAGES}
    every = [row for found in rows.values() for row in found]
    first = rows["search"][0]
    threads = "thread" if first["threads"] == 1 else "threads"
    clock = next(row["clock"] for row in rows["search"] if "clock" in row)
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines.append(f"{device.name} ({first['instructions']}), {first['threads']} {threads}, {clock} time, {versions}.")
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
        lines.append(f"Refused before timing, since the result was wrong or there was no memory: {'; '.join(failed)}.")
    return "\n".join(lines)


def bounds(device: Device, figures: str) -> str:
    """What bounds the search at each shape, and what a user can do."""
    lines = []
    for key, found in by_case(device.rows("search", "nearest")).items():
        if key[5] == "float32" and "vqops" in found:
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


def shapes(device: Device, figures: str) -> str:
    found = {row["shape"]: row for row in device.rows("search") if row["shape"] in SHAPES}
    return table([*SIZE, "from"], [[*size(row), SHAPES[name].model] for name, row in found.items()])


def search(device: Device, figures: str) -> str:
    cases = {k: v for k, v in by_case(device.rows("search", "nearest")).items() if k[5] == "float32"}
    return peer_columns(cases, SIZE, size, "share of GEMM")


def dtypes(device: Device, figures: str) -> str:
    cases = {k: v for k, v in by_case(device.rows("search", "nearest")).items() if k[5] != "float32"}
    return peer_columns(cases, ["dtype", *SIZE], lambda row: [row["dtype"], *size(row)])


def statistics(device: Device, figures: str) -> str:
    cases = by_case(device.rows("statistics", "code_sums"))
    update = by_case(device.rows("statistics", "ema_update_"))
    parts = [peer_columns(cases, SIZE, size, "share of copy")]
    if update:
        codes = peer_columns(update, ["shape", "D", "K"], lambda row: [row["shape"], *size(row)[2:]], "share of copy")
        parts += ["`ema_update_`:", codes]
    return "\n\n".join(parts)


def quantize(device: Device, figures: str) -> str:
    cases = by_case(device.rows("quantize"))
    forward = {k: v for k, v in cases.items() if k[6] == "forward"}
    backward = {k: v for k, v in cases.items() if k[6] == "backward"}
    described = lambda row: [row["op"].rpartition(", ")[2], *size(row)]  # noqa: E731
    parts = [peer_columns(forward, SIZE, size, "share of GEMM")]
    parts += ["Backward:", peer_columns(backward, ["gradient", *SIZE], described, "share of copy")]
    return "\n\n".join(parts)


def step(device: Device, figures: str) -> str:
    return peer_columns(by_case(device.rows("steps", "training step")), SIZE, size)


def system(device: Device, figures: str) -> str:
    return peer_columns(by_case(device.rows("steps", "VQ-VAE-2 training step")), ["step", "vectors", "D", "K"], size)


def evaluation(device: Device, figures: str) -> str:
    return peer_columns(by_case(device.rows("steps", "evaluation")), SIZE, size)


def exactness(device: Device, figures: str) -> str:
    """Share of wrong indices, in percent."""
    rows = device.rows("exactness")
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


def growth(device: Device, figures: str) -> str:
    rows = device.rows("growing", "growth exponent")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    axes = dict.fromkeys((row["axis"], row["from"], row["to"]) for row in rows)
    exponents = {(row["axis"], row["method"]): row["exponent"] for row in rows}
    lines = [[f"{a} from {b} to {c}", *(f"{exponents[a, m]:.2f}" for m in methods)] for a, b, c in axes]
    picture = f"![time over N, K and D]({figures}/benchmarks_{device.folder.name}_growth.svg)"
    return f"{picture}\n\n" + table(["exponent of time over", *(SHORT.get(m, m) for m in methods)], lines)


def threads(device: Device, figures: str) -> str:
    rows = [row for row in device.rows("growing", "nearest") if row["axis"] == "threads"]
    lines = [[row["method"], str(row["threads"]), times(row), f"{number(row['times_one_thread'])} x"] for row in rows]
    return table(["method", "threads", "wall ms: p50 (p20-p80)", "as fast as one thread"], lines)


def memory(device: Device, figures: str) -> str:
    rows = device.rows("memory", "memory law")
    picture = f"![extra memory over K]({figures}/benchmarks_{device.folder.name}_memory.svg)"
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
    return f"{picture}\n\n" + table(heads, lines)


def losses(device: Device, figures: str) -> str:
    """Every peer that was faster, from all stages."""
    lines = []
    for stage in ("search", "statistics", "quantize", "steps", "growing"):
        for found in by_case(device.rows(stage)).values():
            for name, row in found.items():
                if name in OURS or name == "no quantizer" or row.get("times_vqops", 1) >= 1:
                    continue
                milliseconds = f"{number(row['p50_ms'])} against {number(found['vqops']['p50_ms'])} ms"
                op = f"{row['op']}, {row['dtype']}" if row["dtype"] != "float32" else row["op"]
                took = f"{name} took {number(row['times_vqops'])} x our time ({milliseconds})"
                where = f"{row['shape']}, {row['axis']} = {row[row['axis']]}" if "axis" in row else row["shape"]
                lines.append(f"- {op}, {where}: {took}{wrong(row)}.")
    for op in ("nearest", "training step"):
        rows = device.rows("memory", op)
        largest = [row for row in rows if (row["N"], row["K"]) == (rows[-1]["N"], rows[-1]["K"])]
        ours = next((row["extra_mb"] for row in largest if row["method"] == "vqops"), 0.0)
        for row in largest:
            if row["extra_mb"] < ours:
                took = f"{row['method']} took {number(row['extra_mb'])} against {number(ours)} MB"
                lines.append(f"- memory of {op}, N = {row['N']}, D = {row['D']}, K = {row['K']}: {took}.")
    return "\n".join(lines) or "- In none of these cases was a peer faster."


def claim(device: Device, figures: str) -> str:
    """One sentence for the README."""
    steps = [found for found in by_case(device.rows("steps", "training step")).values() if "vqops" in found]
    parts = []
    for peer in ("vector-quantize-pytorch", "PyTorch, index_add_"):
        ratios = [found[peer]["times_vqops"] for found in steps if peer in found]
        if ratios:
            parts.append(f"{number(min(ratios))} to {number(max(ratios))} times as long with {peer}")
    found = [row for row in device.rows("search", "nearest") if row["method"] == "vqops" and "wrong" in row]
    counted = f"{sum(row['wrong'] for row in found)} of {sum(row['checked'] for row in found)} indices wrong"
    shapes = f"{len(steps)} shapes of published models"
    return f"On {device.name}, a training step of {shapes} takes {' and '.join(parts)}; {counted}."


def picture(kind: str, text: str, device: Device, figures: str) -> str:
    return f"![{text}]({figures}/benchmarks_{device.folder.name}_{kind}.svg)"


BLOCKS: dict[str, Callable[[Device, str], str]] = {
    block.__name__: block
    for block in (
        *(machine, bounds, shapes, search, dtypes, statistics, quantize, step, system, evaluation),
        *(exactness, growth, threads, memory, losses, claim),
    )
} | {"search-figure": partial(picture, "search", "search time of the peers over that of vqops")}


def rendered(text: str, found: list[Device], figures: str) -> str:
    """The text with its blocks made anew. Raises KeyError for a marker that names no block."""

    def block(match: re.Match) -> str:
        parts = []
        for device in found:
            title = f"**{device.name}**\n\n" if len(found) > 1 else ""
            parts.append(title + BLOCKS[match[2]](device, figures))
        return f"{match[1]}{chr(10).join(parts)}\n{match[3]}"

    return MARKED.sub(block, text)


def main(root: Path = ROOT) -> None:
    found = devices(root)
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for device in found:
        for kind, draw in FIGURES.items():
            draw(device, folder / f"benchmarks_{device.folder.name}_{kind}.svg")
    for path, figures in ((root / "docs" / "benchmarks.md", "figures"), (root / "README.md", "docs/figures")):
        path.write_text(rendered(path.read_text(), found, figures))


if __name__ == "__main__":
    main()
