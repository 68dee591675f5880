"""The benchmark suite measures what it says."""

import json
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


@pytest.mark.parametrize("took, timed, before", [(0.0003, 3, 1), (0.002, 1, 1), (0.02, 1, 0)])
def test_all_but_long_calls_are_timed_with_warm_caches(monkeypatch, took, timed, before):
    now, called = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += took
        called.append(took)

    prepared = timing.Cpu("wall").prepare(call)
    called.clear()
    assert prepared.seconds() == pytest.approx(took, rel=0.01)
    assert len(called) == timed + before



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


def test_processors_of_one_name_have_folders_by_their_instructions(monkeypatch):
    monkeypatch.setattr("benchmarks.rows.name_of", lambda device: "AMD EPYC")
    found = set()
    for instructions in ("avx2", "avx512"):
        monkeypatch.setattr("benchmarks.rows.instructions", lambda device, instructions=instructions: instructions)
        found.add(folder_of("cpu").name)
    assert found == {"amd-epyc_avx2", "amd-epyc_avx512"}
