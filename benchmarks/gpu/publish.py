"""What came back from a GPU: rows to benchmarks/results/, a record that ships, and the pages of the documentation."""

import json
import shutil
from pathlib import Path

from benchmarks import report
from benchmarks.gpu.prepare import ROOT
from benchmarks.rows import RESULTS, folder_named, read
from vqops.check import record
from vqops.dispatch import records
from vqops.dispatch.records import Gpu

SUITES = {"compiled": "suite", "triton": "triton_suite"}  # that must have passed, by implementation


def publish(rows: Path, root: Path = ROOT, shipped: Path = records.SHIPPED) -> None:
    """Raises SystemExit with the reason where there is nothing to publish."""
    found = read(rows / "first_run.jsonl")
    if not found:
        raise SystemExit(f"publish: {rows} has no first_run.jsonl with rows")
    target = root / RESULTS.relative_to(ROOT) / folder_named(found[0]["device"])
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(rows.glob("*.jsonl")):
        added(file, target / file.name)
    if (rows / "record.json").exists() and rows.resolve() != target.resolve():
        shutil.copy(rows / "record.json", target)
    print(f"{target.name}: {', '.join(sorted(file.name for file in target.iterdir()))}")
    kept = target / "record.json"
    if kept.exists():
        print(ship(json.loads(kept.read_text()), read(target / "first_run.jsonl"), target.name, shipped))
    report.main(root)


def added(file: Path, target: Path) -> None:
    """The rows of a call go behind those of the calls before it."""
    there = target.read_text().splitlines() if target.exists() else []
    fresh = [line for line in file.read_text().splitlines() if line not in there]
    with target.open("a") as kept:
        kept.writelines(f"{line}\n" for line in fresh)


def ship(content: dict, rows: list[dict], results: str, folder: Path) -> str:
    """The record becomes that of all such GPUs, as far as the tests have passed there. What was done, in a line."""
    named = {row["implementation"] for row in content["rows"]}
    proven = {name for name in named if suite_passed(name, rows)}
    kept = [row for row in content["rows"] if row["implementation"] in proven]
    left_out = f"; left out, since their tests have not passed there: {', '.join(sorted(named - proven))}"
    left_out *= bool(named - proven)
    if not kept:
        return f"no record ships: it names no kernel{left_out}"
    of = Gpu(**content["gpu"])
    path = folder / records.file_name(of)
    record.write({**content, "rows": kept, "results": results}, path)
    return f"{path.name} ships with {len(kept)} rows{left_out}"


def suite_passed(implementation: str, rows: list[dict]) -> bool:
    """In its last run."""
    outcomes = [row["outcome"] for row in rows if row.get("part") == SUITES[implementation] and "left" not in row]
    return outcomes[-1:] == ["passed"]
