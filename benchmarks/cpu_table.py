"""`python -m benchmarks.cpu_table`: draw the tables of docs/cpu.md from benchmarks/results/*/cpu.jsonl."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cpu.md"
BEGIN, END = "<!-- drawn by benchmarks/cpu_table.py -->", "<!-- end -->"
PEERS = {
    "nearest": ("faiss IndexFlatL2", "addmm + argmin", "cdist + argmin"),
    "code_sums": ("bincount + index_add_",),
    "training step": ("vector-quantize-pytorch", "naive", "naive, cdist"),
}


def table(device: str, instructions: str, rows: list[dict]) -> str:
    versions = rows[0]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "faiss-cpu", "vector-quantize-pytorch"))
    lines = [
        f"**{device}, `{instructions}`**, one thread, {named}, commit {rows[0]['commit']}.",
        "",
        "| op | N, D, K | ms | GFLOP/s | of sgemm | of multiply-adds | times as long: |",
        "|---|---|---|---|---|---|---|",
    ]
    by_case = {(row["op"], row["N"], row["D"], row["K"], row["method"]): row for row in rows}
    for (op, N, D, K, method), row in by_case.items():
        if method != "vqops":
            continue
        peers = [
            f"{peer} {by_case[op, N, D, K, peer]['times_vqops']:.3g}"
            for peer in PEERS[op]
            if (op, N, D, K, peer) in by_case
        ]
        cells = [op, f"{N}, {D}, {K}", f"{row['p50_ms']:.3g}", "", "", "", ", ".join(peers)]
        if "of_sgemm" in row:
            of_ceiling = row["gflops"] / row["multiply_add_gflops"]
            cells[3:6] = f"{row['gflops']:.0f}", f"{row['of_sgemm']:.2f}", f"{of_ceiling:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/cpu.jsonl")):
        sets: dict[str, list[dict]] = {}
        for row in map(json.loads, path.read_text().splitlines()):
            sets.setdefault(row["instructions"], []).append(row)
        parts += [table(rows[0]["device"], instructions, rows) for instructions, rows in sets.items()]
    page = PAGE.read_text()
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text("\n\n".join([before + BEGIN, *parts, END]) + after)


if __name__ == "__main__":
    main()
