"""The benchmark suite measures what it says, and the documentation says what it measured."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    baselines,
    cases,
    compare,
    correctness,
    growth,
    kinds,
    levels,
    memory,
    modules,
    processor,
    sets,
    soft,
    timing,
)
from benchmarks.__main__ import main
from benchmarks.measure import measure
from benchmarks.rows import environment, folder_of
from benchmarks.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[2]
TINY = Shape("tiny", "", 96, 6, 20, 1, 1)


@pytest.fixture(autouse=True)
def plain_memory(seeded_and_poisoned):
    """As users run: no filling of fresh memory."""
    torch.use_deterministic_algorithms(False)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def test_a_run_writes_whole_rows(tmp_path, capsys):
    threads = torch.get_num_threads()
    main(["--quick", "--stage", "search", "--shape", "RQ-VAE", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    rows = {row["method"]: row for row in rows_of(tmp_path)}
    for name in ("vqops", "addmm + argmin", "cdist + argmin"):
        row = rows[name]
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["checked"] == row["N"] == SHAPES["RQ-VAE"].N("cpu") and row["share_of_ceiling"] > 0
        assert {"device", "versions", "commit", "threads", "clock", "load", "extra_mb", "dtype", "shape"} <= row.keys()
    assert rows["vqops"]["wrong"] == 0 and rows["vqops"]["times_vqops"] == 1
    assert rows["ceiling: gemm"]["gflops"] > 0
    assert rows["flash-kmeans"]["left_out"] == "flash-kmeans needs a GPU"
    assert "flash-kmeans needs a GPU" in capsys.readouterr().out


def test_a_round_times_each_method_once_in_an_order_of_its_own():
    called, names, rounds = [], "abcd", 20
    timed = {name: timing.Timed("stub", partial(lambda name: called.append(name) or 0.0, name), 0.0) for name in names}
    assert timing.interleaved(timed, rounds) == {name: [0.0] * rounds for name in names}
    orders = {tuple(called[start : start + len(names)]) for start in range(0, len(called), len(names))}
    assert all(sorted(order) == list(names) for order in orders) and len(orders) > 5


@pytest.mark.parametrize(
    "make",
    [
        cases.nearest,
        cases.nearest_topk,
        cases.sample,
        cases.code_sums,
        cases.ema_update,
        cases.quantize_forward,
        cases.quantize_backward,
        lambda *given: cases.quantize_backward(*given, "rotation"),
        partial(levels.residual_quantize, levels=3, code_sums=True),
        partial(levels.training_step, levels=3),
        partial(levels.evaluation, levels=3),
        modules.training_step,
        modules.evaluation,
        *(partial(soft.assignments, op) for op in soft.OPS),
    ],
)
def test_every_method_of_a_case_passes_its_check(make):
    case = make(TINY, "cpu")
    done = []
    for name, prepare in case.methods.items():
        if name.startswith("torch.compile"):
            continue
        try:
            found = case.check(prepare()())
        except baselines.Unavailable:
            continue
        assert not found.get("wrong"), name
        done.append(name)
    assert done[0] == "vqops" and len(done) >= 2


def test_a_wrong_result_is_reported_and_not_timed():
    case = cases.nearest(TINY, "cpu")
    methods = {
        "vqops": case.methods["vqops"],
        "farthest": lambda: lambda: torch.cdist(*TINY.data("cpu")).argmax(1),
        "no index": lambda: lambda: torch.full((96,), 20),
        "halves": lambda: lambda: torch.zeros(48, dtype=torch.int64),
    }
    case.built = methods, case.check
    rows = {row["method"]: row for row in measure(case, 0.0, 64)}
    assert rows["vqops"]["p50_ms"] > 0
    for name in ("farthest", "no index", "halves"):
        assert "WrongResult" in rows[name]["failed"] and "p50_ms" not in rows[name]


@pytest.mark.parametrize("op", [cases.code_sums, cases.ema_update, cases.quantize_backward])
def test_wrong_sums_codes_and_gradients_are_refused(op):
    case = op(TINY, "cpu")
    found = case.methods["vqops"]()()
    last = found[-1] if isinstance(found, tuple) else found
    last.view(-1)[3] += 0.1
    with pytest.raises(correctness.WrongResult):
        case.check(found)


def test_equal_distances_are_right_and_near_misses_are_counted():
    codebook = torch.tensor([[0.0], [2.0], [5.0]])
    x = torch.tensor([[1.0], [3.25], [5.0]])
    exact = torch.tensor([0, 1, 2])
    assert correctness.wrong_indices(torch.tensor([1, 1, 2]), exact, x, codebook) == (0, 0.0)
    wrong, excess = correctness.wrong_indices(torch.tensor([0, 2, 2]), exact, x, codebook)
    assert wrong == 1 and excess == pytest.approx(1.75**2 / 1.25**2 - 1)


@pytest.mark.parametrize(
    "vendor, family, model, name",
    [
        ("AuthenticAMD", 25, 1, "Zen 3"),
        ("AuthenticAMD", 25, 17, "Zen 4"),
        ("AuthenticAMD", 25, 97, "Zen 4"),
        ("AuthenticAMD", 26, 2, "Zen 5"),
        ("AuthenticAMD", 26, 80, None),  # of a later one
        ("AuthenticAMD", 23, 49, None),
        ("GenuineIntel", 6, 85, "Skylake-SP or Cascade Lake"),
        ("GenuineIntel", 6, 106, "Ice Lake-SP"),
        ("GenuineIntel", 6, 143, "Sapphire Rapids"),
        ("GenuineIntel", 6, 207, "Emerald Rapids"),
        ("GenuineIntel", 6, 174, "Granite Rapids"),
        ("GenuineIntel", 19, 1, None),
    ],
)
def test_processors_of_one_name_are_told_apart(monkeypatch, tmp_path, vendor, family, model, name):
    facts = {"vendor": vendor, "family": family, "model": model, "stepping": 1}
    cpuinfo = {"processor": 0, "vendor_id": vendor, "cpu family": family, "model": model}
    cpuinfo |= {"model name": "AMD EPYC", "stepping": 1}
    core = "".join(f"{key}\t: {value}\n" for key, value in cpuinfo.items())
    (tmp_path / "cpuinfo").write_text(f"{core}\n{core}")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert environment()["processor"] == facts | ({"microarchitecture": name} if name else {})
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert environment()["processor"] == {}


def test_kinds_of_data_are_what_they_say():
    shape = Shape.of(4000, 32, 50)
    found = {kind: make(shape) for kind, make in kinds.KINDS.items()}
    for x, codebook in found.values():
        assert x.shape == (4000, 32) and codebook.shape == (50, 32) and x.dtype == codebook.dtype == torch.float32
    x, codebook = found["clustered"]
    assert torch.cdist(x, codebook).min(1)[0].max() < 2 * kinds.SPREAD * 32**0.5
    x, codebook = found["correlated"]
    following = torch.corrcoef(torch.stack([x[:, :-1].flatten(), x[:, 1:].flatten()]))[0, 1]
    assert float(following) == pytest.approx(kinds.CORRELATION, abs=0.02)
    assert float(x.std()) == pytest.approx(1, abs=0.05)
    assert torch.cdist(x, codebook).min(1)[0].mean() < 0.8 * x.norm(dim=1).mean()
    x, _ = found["patches"]
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    assert x.std(1).median() < 0.5 * x.mean(1).std()  # most are flat, and differ by their means


def test_sets_of_kernels_run_side_by_side_and_agree():
    chosen = sets.instructions("cpu")
    wanted = {f"vqops {chosen}", "vqops portable", "addmm + argmin"}.__contains__
    rows = list(sets.rows([TINY], 0.0, wanted))
    named = {chosen, "portable"}
    for kind in kinds.KINDS:
        found = {row["method"]: row for row in rows if row["data"] == kind}
        assert found.keys() >= {f"vqops {name}" for name in named} | {"addmm + argmin"}
        for name in named:
            row = found[f"vqops {name}"]
            assert row["instructions"] == name and row["wrong"] == 0 and row["checked"] == 96
            assert row["share_of_ceiling"] > 0 and row["times_vqops"] > 0 and f"ceiling: gemm {name}" in found
        assert found[f"vqops {chosen}"]["times_vqops"] == 1
        assert {row["rounds"] for row in found.values()} == {5}


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_sees_what_is_freed_before_the_call_ends():
    def call():
        return torch.ones(32, 2**18).sum()  # 32 MB

    call()
    extra = memory.peak_extra_mb(call)
    if extra is None:
        pytest.skip("this system lets no process reset its peak")
    assert 30 < extra < 48
    assert memory.peak_extra_mb(lambda: None) < 8


def test_exponents_and_laws_are_those_of_the_data():
    assert growth.exponent([(n, 3e-4 * n**1.5) for n in (64, 128, 512, 4096)]) == pytest.approx(1.5)
    law = growth.law([(N, K, 8.0 * N * K + 64 * N + 4e6 + K) for N, K in growth.GRID])
    assert law["bytes_per_NK"] == pytest.approx(8, rel=1e-3) and law["bytes_per_N"] == pytest.approx(64, rel=1e-2)
    assert law["bytes_per_K"] == 0  # a byte a code is noise
    n = law["largest_N_equal_K"]
    assert 8 * n**2 + 64 * n + 512 * n + 4e6 == pytest.approx(growth.LIMIT_GIB * 2**30, rel=0.02)


def test_changes_are_called_so_only_where_all_pairs_agree():
    runs = [({"a": 1.0, "b": 1.0, "c": 1.0, "gone": 1.0}, {"a": 2.0, "b": 0.5, "c": c}) for c in (1.1, 0.9, 1.2)]
    found = {change.row: change for change in compare.changes(runs)}
    assert {row: change.verdict for row, change in found.items()} == {"a": "slower", "b": "faster", "c": "="}
    assert (found["c"].ratio, found["c"].low, found["c"].high) == (1.1, 0.9, 1.2)
    assert "0.90-1.20" in compare.printed(list(found.values()))


@pytest.fixture
def repository(tmp_path) -> Path:
    """Two revisions: the tests of the first pass, those of the second fail."""
    folder = tmp_path / "repository"
    (folder / "tests").mkdir(parents=True)

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "-q")
    for tag, passes in (("good", True), ("bad", False)):
        (folder / "tests" / "test_it.py").write_text(f"def test_it():\n    assert {passes}\n")
        git("add", "-A")
        git("commit", "-qm", tag)
        git("tag", tag)
    return folder


def test_comparison_refuses_revisions_whose_tests_fail(repository, monkeypatch):
    monkeypatch.setattr(compare, "built", lambda folder, revision: sys.executable)
    with pytest.raises(SystemExit, match="the tests of bad fail"):
        compare.main(["good", "bad", "--repository", str(repository)])
    with pytest.raises(SystemExit, match="nowhere can't be checked out"):
        compare.main(["good", "nowhere", "--repository", str(repository)])
    left = subprocess.check_output(["git", "worktree", "list"], cwd=repository, text=True)
    assert len(left.splitlines()) == 1


def test_comparison_prints_each_row(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare, "built", lambda folder, revision: sys.executable)
    options = ["--quick", "--stage", "search", "--shape", "RQ-VAE", "--method", "^vqops$"]
    compare.main(["good", "good", "--repeats", "1", "--repository", str(repository), "--", *options])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].endswith("nearest RQ-VAE 1024 32 256 float32 forward vqops 1")


# The documentation


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib")
    from benchmarks import report

    tmp_path = tmp_path_factory.mktemp("drawn")
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        shutil.copy(ROOT / "docs" / page, tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    report.main(tmp_path)
    return tmp_path


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

    root = tmp_path_factory.mktemp("third")
    (root / "docs").mkdir()
    for page in report.PAGES:
        shutil.copy(ROOT / "docs" / page, root / "docs")
    shutil.copy(ROOT / "README.md", root)
    results = root / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    third = results / "intel-xeon_amx_bf16"
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
    assert step[row + 2].startswith("|  |  | Emerald Rapids (amx_bf16) |")
    assert "Emerald" not in (with_a_third / "README.md").read_text()  # its table is of one folder
    for kind in ("search", "growth", "memory", "sets"):
        assert (with_a_third / "docs" / "figures" / f"benchmarks_intel-xeon_amx_bf16_{kind}.svg").stat().st_size > 0


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

    stages = (*report.STAGES, "kernels", "sets", "plain")
    rows = [row for machine in report.machines(ROOT) for stage in stages for row in machine.rows(stage)]
    ours = [row for row in rows if report.is_ours(row) and row["op"] in ("nearest", "exactness") and "wrong" in row]
    assert len(ours) > 100 and [row for row in ours if row["wrong"]] == []


def test_every_loss_has_a_cause(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import report
    from benchmarks.causes import CAUSES, cause_of

    found = report.machines(ROOT)
    lost = {case for machine in found for (case, _), _ in report.lost_cases(machine)}
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


def test_processors_of_one_name_have_folders_by_their_instructions(monkeypatch):
    monkeypatch.setattr("benchmarks.rows.name_of", lambda device: "AMD EPYC")
    found = set()
    for instructions in ("avx2", "avx512"):
        monkeypatch.setattr("benchmarks.rows.instructions", lambda device, instructions=instructions: instructions)
        found.add(folder_of("cpu").name)
    assert found == {"amd-epyc_avx2", "amd-epyc_avx512"}
