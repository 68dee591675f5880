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

SUITES = {"compiled": "suite", "triton": "triton suite"}  # that must have passed, by implementation


def publish(rows: Path, root: Path = ROOT, shipped: Path = records.SHIPPED) -> None:
    """Raises SystemExit with the reason where there is nothing to publish."""
    found = read(rows / "first_run.jsonl")
    if not found:
        raise SystemExit(f"publish: {rows} has no first_run.jsonl with rows")
    target = root / RESULTS.relative_to(ROOT) / folder_named(found[0]["device"])
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(rows.glob("*.json*")):
        if file.resolve() != (target / file.name).resolve():
            shutil.copy(file, target / file.name)
        print(f"{target.name}/{file.name}")
    kept = target / "record.json"
    if kept.exists():
        print(ship(json.loads(kept.read_text()), found, target.name, shipped))
    report.main(root)


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
