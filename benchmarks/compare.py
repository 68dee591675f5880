"""`python -m benchmarks.compare BASE HEAD [-- OPTIONS]`: what changed in speed between two revisions, row by row.

Each revision is checked out in a worktree of its own and built there; its tests must pass. Then the suite of this
checkout measures them in turn, BASE, HEAD, BASE, HEAD, ..., so that what disturbs the machine disturbs both. OPTIONS
are those of `python -m benchmarks` (default: --quick).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.rows import label, read

SUITE = Path(__file__).parent
ROOT = SUITE.parent


class Refused(Exception):
    """There is nothing to compare; the text says why."""


@dataclass
class Change:
    row: str
    base_ms: float
    head_ms: float
    ratio: float  # median over the pairs of runs of head / base
    low: float  # and the smallest and largest of them
    high: float

    @property
    def verdict(self) -> str:
        """Only where all pairs of runs agree is it a change."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else "="


@contextmanager
def worktree(repository: Path, revision: str, folder: Path) -> Iterator[Path]:
    run(["git", "worktree", "add", "--detach", str(folder), revision], repository, f"{revision} can't be checked out")
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=repository, capture_output=True)


def run(command: list[str], folder: Path, why: str) -> None:
    """Raises Refused with the end of the output if the command fails."""
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    if done.returncode:
        raise Refused(f"{why}:\n{(done.stdout + done.stderr)[-3000:]}")


def built(folder: Path, revision: str) -> str:
    """Build the revision in an environment of its own, on top of the packages of this one; its Python."""
    environment = folder / ".venv"
    run([sys.executable, "-m", "venv", str(environment)], folder, "no virtual environment")
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    own = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(own.strip(), "packages.pth").write_text("\n".join(packages))
    run([python, "-m", "pip", "install", "-q", "-e", ".", "--no-deps"], folder, f"{revision} does not build")
    return python


def prepare(folder: Path, revision: str, tests: list[str]) -> str:
    """Build and test; the Python that has the revision."""
    python = built(folder, revision)
    run([python, "-m", "pytest", "-q", "-x", *tests], folder, f"the tests of {revision} fail")
    shutil.rmtree(folder / SUITE.name, ignore_errors=True)  # one suite measures both
    shutil.copytree(SUITE, folder / SUITE.name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    return python


def measured(python: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Medians in milliseconds by row."""
    with tempfile.TemporaryDirectory() as out:
        run([python, "-m", SUITE.name, *options, "--out", out], folder, "the suite fails")
        rows = [row for path in sorted(Path(out).glob("*.jsonl")) for row in read(path)]
    return {label(row): row["p50_ms"] for row in rows if "p50_ms" in row and row["method"].startswith("vqops")}


def changes(runs: list[tuple[dict[str, float], dict[str, float]]]) -> list[Change]:
    """Of the rows that all runs of both revisions have, largest slowdown first."""
    common = [row for row in runs[0][0] if all(row in half for pair in runs for half in pair)]
    found = []
    for row in common:
        ratios = [head[row] / base[row] for base, head in runs]
        base, head = (median(pair[side][row] for pair in runs) for side in (0, 1))
        found.append(Change(row, base, head, median(ratios), min(ratios), max(ratios)))
    return sorted(found, key=lambda change: -change.ratio)


def compare(repository: Path, base: str, head: str, repeats: int, tests: list[str], options: list[str]) -> list[Change]:
    with tempfile.TemporaryDirectory() as parent:
        folders = [Path(parent) / "base", Path(parent) / "head"]
        with worktree(repository, base, folders[0]), worktree(repository, head, folders[1]):
            pythons = [prepare(*given, tests) for given in zip(folders, (base, head), strict=True)]
            halves = list(zip(pythons, folders, strict=True))
            return changes([tuple(measured(*half, options) for half in halves) for _ in range(repeats)])


def printed(found: list[Change]) -> str:
    lines = [f"{'base ms':>10} {'head ms':>10} {'head/base':>9}   {'spread':<11} {'':6} row"]
    for change in found:
        spread = f"{change.low:.2f}-{change.high:.2f}"
        times = f"{change.base_ms:10.3f} {change.head_ms:10.3f} {change.ratio:9.3f}"
        lines.append(f"{times}   {spread:<11} {change.verdict:<6} {change.row}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each revision, in turn")
    parser.add_argument("--tests", nargs="*", default=[], help="what pytest gets; default all fast tests")
    parser.add_argument("--repository", type=Path, default=ROOT)
    given = parser.parse_args(arguments[:split])
    options = arguments[split + 1 :]
    if not {"--quick", "--full"} & set(options):
        options = ["--quick", *options]
    try:
        found = compare(given.repository, given.base, given.head, given.repeats, given.tests, options)
    except Refused as reason:
        raise SystemExit(f"not compared: {reason}") from None
    print(printed(found))


if __name__ == "__main__":
    main()
