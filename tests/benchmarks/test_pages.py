"""The documentation says what the benchmarks measured: numbers, figures, peers, causes."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import cases, growth, kinds, modules
from benchmarks.shapes import Shape

ROOT = Path(__file__).parents[2]
TINY = Shape("tiny", "", 96, 6, 20, 1, 1)


def copied(root: Path) -> Path:
    """The pages and the results that they are drawn from."""
    from benchmarks import report

    (root / "docs").mkdir()
    for page in report.PAGES:
        shutil.copy(ROOT / "docs" / page, root / "docs")
    shutil.copy(ROOT / "README.md", root)
    shutil.copytree(ROOT / "benchmarks" / "results", root / "benchmarks" / "results")
    return root


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib")
    from benchmarks import report

    root = copied(tmp_path_factory.mktemp("drawn"))
    report.main(root)
    return root


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "docs/cpu.md", "docs/gpu.md", "README.md"])
def test_every_number_is_in_the_results(regenerated, page):
    assert (regenerated / page).read_text() == (ROOT / page).read_text(), "run python -m benchmarks.report"


def test_every_peer_has_a_colour():
    pytest.importorskip("matplotlib")
    from benchmarks.figures import COLOURS

    drawn = {"vqops", *(m for case in (cases.nearest, modules.training_step) for m in case(TINY, "cpu").methods)}
    drawn = {method for method in drawn if not method.startswith(("torch.compile", "vqops, prepared"))}
    assert drawn | set(growth.METHODS) == COLOURS.keys()
    assert len(set(COLOURS.values())) == len(COLOURS)


GPU_ROW = {"op": "nearest", "shape": "", "N": 4096, "D": 64, "K": 512, "dtype": "float32", "method": "vqops triton"}
GPU_ROW |= {"clock": "graph", "p50_ms": 1.5, "times_vqops": 1.0, "ceiling": "copy", "share_of_ceiling": 0.5}
GPU_ROW |= {"gflops": 9.0, "device": "a GPU", "instructions": "sm_90", "threads": 1}
GPU_ROW |= {"versions": {}, "commit": "1", "committed": "1"}


def test_every_block_can_be_made(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import report

    found = report.machines(ROOT)
    on_gpu = json.dumps(GPU_ROW) + "\n" + json.dumps(GPU_ROW | {"method": "cdist + argmin", "times_vqops": 9.0})
    (tmp_path / "kernels.jsonl").write_text(on_gpu)
    found.append(report.Machine(tmp_path))
    for name, block in report.BLOCKS.items():
        assert name.startswith(("gpu-", "sets")) or block(found, "figures"), name
    assert "| nearest, triton | 4096, 64, 512 | 1.5 |" in report.BLOCKS["gpu-kernels"](found[-1:], "figures")
    with pytest.raises(KeyError):
        report.rendered("<!-- benchmarks:nothing -->\n<!-- /benchmarks -->", found, "figures")


def test_a_case_measured_twice_has_one_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import report

    row = GPU_ROW | {"method": "vqops", "instructions": "avx2", "ceiling": "gemm", "shape": "VQ-VAE-2 bottom"}
    for stage, facts in (
        ("kernels", {"p50_ms": 2.5, "commit": "old", "committed": "2026-01-01"}),
        ("growing", {"p50_ms": 1.75, "commit": "new", "committed": "2026-01-02", "axis": "N"}),
        ("search", {"p50_ms": 9.5, "commit": "older", "committed": "2025-12-31"}),
    ):
        (tmp_path / f"{stage}.jsonl").write_text(json.dumps(row | facts))
    made = report.BLOCKS["cpu-kernels"]([report.Machine(tmp_path)], "figures")
    assert [line.split(" | ")[2] for line in made.splitlines() if line.startswith("| nearest")] == ["1.75"]
    assert made.endswith(
        "Measured again since, and shown from there: nearest 4096, 64, 512: 9.50 ms (`older`); "
        "nearest 4096, 64, 512: 2.50 ms (`old`)."
    )


THIRD = {"device": "Intel(R) Xeon(R) Processor", "instructions": "amx_bf16"}
THIRD |= {"processor": {"vendor": "GenuineIntel", "family": 6, "model": 207, "microarchitecture": "Emerald Rapids"}}


def rows_of_sets() -> list[dict]:
    """On patches avx512 is the fastest; faiss is wrong there."""
    rows, shapes = [], ("65536 x 64 x 1024", "4096 x 256 x 8192")
    times = {"faiss IndexFlatL2": 20.0, "addmm + argmin": 30.0, "vqops amx_bf16": 2.0}  # as they are written
    times |= {"vqops avx512_bf16": 8.0, "vqops avx512": 5.0}
    for shape in shapes:
        for kind in kinds.KINDS:
            for method, ms in times.items():
                ms = 4 * ms if kind == "patches" and method == "vqops amx_bf16" else ms
                ours = 8.0 if kind == "patches" else 2.0
                wrong = 7 * (kind == "patches" and method == "faiss IndexFlatL2")
                row = THIRD | {"op": "nearest", "shape": shape, "data": kind, "method": method, "dtype": "float32"}
                row |= {"p50_ms": ms, "share_of_ceiling": 10 / ms, "times_vqops": ms / ours}
                row |= {"wrong": wrong, "checked": 1024, "threads": 1, "commit": "1", "versions": {}}
                row |= dict(zip("NDK", map(int, shape.split(" x ")), strict=True))
                rows.append(row | {"instructions": method.removeprefix("vqops ") if "vqops" in method else "amx_bf16"})
    return rows


@pytest.fixture(scope="module")
def with_a_third(tmp_path_factory) -> Path:
    """The pages with the folder of another processor, which has rows of every stage and of several sets."""
    pytest.importorskip("matplotlib")
    from benchmarks import report

    root = copied(tmp_path_factory.mktemp("third"))
    results = root / "benchmarks" / "results"
    third = results / "some-xeon_amx_bf16"
    third.mkdir()
    for path in sorted((results / "amd-epyc_avx512_bf16").glob("*.jsonl")):
        lines = [json.dumps(json.loads(line) | THIRD) for line in path.read_text().splitlines()]
        (third / path.name).write_text("\n".join(lines))
    for measured in results.glob("*/sets.jsonl"):  # of other sizes, which would be columns
        measured.unlink()
    (third / "sets.jsonl").write_text("\n".join(map(json.dumps, rows_of_sets())))
    report.main(root)
    return root


def block_of(page: Path, name: str) -> str:
    return re.search(rf"<!-- benchmarks:{name} -->\n(.*?)<!-- /benchmarks -->", page.read_text(), re.DOTALL)[1]


def test_a_third_processor_stands_beside_the_others(with_a_third):
    """In every table, after those that were there, and each line of a table has as many cells as its heads."""
    page = with_a_third / "docs" / "benchmarks.md"
    for name in re.findall(r"<!-- benchmarks:([\w-]+) -->", page.read_text()):
        made = block_of(page, name)
        assert name == "shapes" or "Emerald Rapids (amx_bf16)" in made, name
        assert name == "shapes" or "AMD EPYC (avx512_bf16)" in made, name
    for path in (page, with_a_third / "docs" / "cpu.md"):
        for lines in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
            assert len({line.count("|") for line in lines.splitlines()}) == 1, lines
    machine = "**Emerald Rapids (amx_bf16)**, Intel(R) Xeon(R) Processor, GenuineIntel family 6 model 207, 1 thread"
    assert machine in block_of(page, "machine")
    step = block_of(page, "step").splitlines()
    (row,) = (at for at, line in enumerate(step) if line.startswith("| VQGAN f16 |"))
    assert step[row + 1].startswith("|  |  | AMD EPYC (avx512_bf16) |")
    assert step[row + 2].startswith("|  |  | Intel Xeon (amx_bf16) |")
    assert step[row + 3].startswith("|  |  | Emerald Rapids (amx_bf16) |")
    assert "Emerald" not in (with_a_third / "README.md").read_text()  # its table is of one folder
    for kind in ("search", "growth", "memory", "sets"):
        assert (with_a_third / "docs" / "figures" / f"benchmarks_some-xeon_amx_bf16_{kind}.svg").stat().st_size > 0


def test_the_page_says_what_each_set_is_worth(with_a_third):
    made = block_of(with_a_third / "docs" / "cpu.md", "sets")
    assert "**Emerald Rapids** (Intel(R) Xeon(R) Processor), 1 thread, commit `1`: vqops chooses `amx_bf16`" in made
    assert "at 5.00 (1.25 to 5.00) times the rate of sgemm." in made
    assert "`avx512` 2.50 (0.625 to 2.50), `avx512_bf16` 4.00 (1.00 to 4.00), faiss 10.0 (2.50 to 10.0)" in made
    assert made.partition("Faster than it: ")[2].startswith("`avx512` on patches (2 of 2 sizes, down to 0.625).\n")
    lines = [line for line in made.splitlines() if line.startswith("|")]
    shares = "5.00 / 5.00 / 5.00 / 1.25"
    assert lines[2] == f"| Emerald Rapids | `amx_bf16` | {shares} | {shares} | 0 of 8 192 |"
    assert [line.split(" | ")[1] for line in lines[3:]] == ["`avx512`", "`avx512_bf16`", "faiss", "addmm"]
    assert lines[5].endswith("| 0.50 / 0.50 / 0.50 / 0.50 | 14 of 8 192 |")


def test_wrong_indices_stand_beside_the_times_of_a_search(regenerated):
    lines = block_of(regenerated / "docs" / "benchmarks.md", "search").splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")]
    rows = [dict(zip(heads, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines[2:]]
    assert {"normal", "all + 100", "all + 1000", "small codes"} < {row["data"] for row in rows}
    for row in rows:
        assert row["vqops ms: p50 (p20-p80), wrong"].endswith(", 0")
        for peer in ("addmm", "cdist", "faiss", "scikit-learn", "v-q-pytorch"):
            assert re.fullmatch(r"([\d.]+ x|-), \d+", row[f"{peer}: x, wrong"]), row
    assert any(int(row["faiss: x, wrong"].rpartition(", ")[2]) > 100 for row in rows if row["data"] == "all + 100")


def test_no_committed_search_of_ours_has_a_wrong_index():
    pytest.importorskip("matplotlib")
    from benchmarks import report
    from benchmarks.tables import STAGES, is_ours

    stages = (*STAGES, "kernels", "sets", "plain")
    rows = [row for machine in report.machines(ROOT) for stage in stages for row in machine.rows(stage)]
    ours = [row for row in rows if is_ours(row) and row["op"] in ("nearest", "exactness") and "wrong" in row]
    assert len(ours) > 100 and [row for row in ours if row["wrong"]] == []


def test_every_loss_has_a_cause(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import report
    from benchmarks.causes import CAUSES, cause_of
    from benchmarks.losses import lost_cases

    found = report.machines(ROOT)
    lost = {case for machine in found for (case, _), _ in lost_cases(machine)}
    assert [case for case in lost if cause_of(case) is None] == []
    named = [case for cases in CAUSES.values() for case in cases]
    assert len(named) == len(set(named))
    row = GPU_ROW | {"shape": "VQ-VAE-2 bottom", "method": "vqops", "instructions": "avx2"}
    faster = row | {"method": "scikit-learn", "p50_ms": 0.75, "times_vqops": 0.5, "wrong": 2, "checked": 9}
    (tmp_path / "search.jsonl").write_text("\n".join(map(json.dumps, (row, faster))))
    made = report.BLOCKS["losses"]([report.Machine(tmp_path)], "figures")
    assert made.startswith("**Cause unknown.**")
    assert "| nearest, VQ-VAE-2 bottom | scikit-learn | 0.500 x; 2 wrong of 9 | 0.750 against 1.50 ms |" in made


def test_a_changed_number_is_noticed(regenerated):
    from benchmarks import report

    page = regenerated / "docs" / "benchmarks.md"
    right = page.read_text()
    changed = re.sub(r"(\d\.\d\d) x", "9.99 x", right, count=1)
    assert changed != right
    page.write_text(changed)
    report.main(regenerated)
    assert page.read_text() == right


def test_figures_are_those_that_the_pages_show(regenerated):
    shown = re.findall(r"\]\((figures/benchmarks[^)]*)\)", (ROOT / "docs" / "benchmarks.md").read_text())
    assert shown
    for figure in shown:
        assert (ROOT / "docs" / figure).stat().st_size > 0 and (regenerated / "docs" / figure).stat().st_size > 0


def test_prose_holds_no_measured_number():
    from benchmarks.report import MARKED

    prose = MARKED.sub("", (ROOT / "docs" / "benchmarks.md").read_text())
    assert re.findall(r"\d[\d.]*\s*(?:x\b(?! \d)|%|ms\b|[KMG]i?B\b|GFLOP|times\b)", prose) == []
