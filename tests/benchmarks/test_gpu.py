"""What the benchmarks do on a GPU, on a CPU: every op by implementation, processes with limits, and `.ci/gpu`."""

import importlib.machinery
import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)
sys.path.append(str(ROOT))  # last, so that an installed vqops stays the one that is tested

from benchmarks import __main__ as program  # noqa: E402
from benchmarks import baselines, cases, measure, plan  # noqa: E402
from benchmarks.rows import PACKAGES, Writer, read  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402
from vqops.check.process import run_limited  # noqa: E402


@pytest.fixture
def gpu():
    """.ci/gpu as a module."""
    loader = importlib.machinery.SourceFileLoader("first_run", str(ROOT / ".ci/gpu"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("first_run", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def stages(gpu, tmp_path):
    return gpu.Stages(Writer(tmp_path / "first_run.jsonl", {"device": "stub", "commit": "1"}), 60.0)


# Measuring


@pytest.mark.parametrize("N", [33, pytest.param(600, marks=pytest.mark.slow)])  # without and with full blocks of rows
def test_every_case_of_a_gpu_gives_rows_with_right_results(monkeypatch, N):
    monkeypatch.setattr(measure, "FEWEST", 2)
    torch.use_deterministic_algorithms(False)
    shapes = [Shape.of(N, 8, 20)]
    tasks = list(plan.by_implementation(plan.Run(seconds=0.0), shapes, shapes))
    assert len({task.name for task in tasks}) == len(tasks)
    with baselines.threads(1):
        measured = [row for task in tasks for row in task.rows()]
    assert {row["op"] for row in measured} == {
        "nearest",
        "nearest_topk",
        "search_statistics",
        "code_sums",
        "ema_update_",
        "quantize_backward",
        "training step",
    }
    assert not [row for row in measured if "failed" in row]
    ours = [row for row in measured if row["method"].startswith("vqops")]
    assert {row["method"] for row in ours} >= {"vqops compiled", "vqops reference"}
    both = {row["op"] for row in ours if row["method"] == "vqops compiled, deterministic"}
    assert both == {"code_sums", "training step"}
    assert not [row for row in ours if row.get("wrong")]
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["share_of_ceiling"] > 0 for row in ours)
    assert {row["indices"] for row in measured if row["op"] == "code_sums"} == {"uniform", "zipf", "one code"}
    assert all(sum(row["tiers"]) == N for row in ours if row["op"] == "search_statistics")
    assert {row["times_vqops"] for row in ours if row["op"] == "ema_update_"} >= {1.0}  # of the fastest of ours


def test_deterministic_mode_is_that_of_one_call():
    def modes():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    torch.use_deterministic_algorithms(False)
    assert cases.deterministic(modes) == (True, False) and modes() == (False, True)
    with pytest.raises(ZeroDivisionError):
        cases.deterministic(lambda: 1 / 0)
    assert modes() == (False, True)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(*options, one=..., two=...): the program with a stage of these tasks; its answer, and the rows."""
    monkeypatch.setenv("VQOPS_COMMIT", "1")

    def run(*options: str, **tasks):
        monkeypatch.setitem(plan.STAGES, "search", lambda run: [plan.Task(name, rows) for name, rows in tasks.items()])
        given = ["--quick", "--stage", "search", "--out", str(tmp_path), *options]
        return program.main(given), read(tmp_path / "search.jsonl")

    return run


def rows_of(called: list[str], name: str, **facts):
    called.append(name)
    yield {"op": "nearest", "method": name, **facts}


def test_skip_done_measures_what_is_missing_of_this_commit(measured, monkeypatch):
    called = []
    one, two = (partial(rows_of, called, name) for name in ("one", "two"))
    measured(one=one)
    called.clear()
    assert len(measured("--skip-done", one=one, two=two)[1]) == 2
    assert called == ["two"]
    monkeypatch.setenv("VQOPS_COMMIT", "2")
    measured("--skip-done", one=one, two=two)
    assert called == ["two", "one", "two"]
    assert len(measured(one=one)[1]) == 1  # a run anew


def test_a_case_with_a_failing_peer_is_tried_again(measured):
    called = []

    def rows(**facts):
        yield from rows_of(called, "bad", **facts)
        yield from rows_of([], "good")

    for _ in range(2):
        measured("--skip-done", case=partial(rows, failed="no such kernel"))
    for _ in range(2):
        measured("--skip-done", case=rows)
    assert called == ["bad"] * 3


def test_time_that_is_up_ends_between_cases(measured, capsys):
    passed, rows = measured("--seconds", "-1", one=partial(rows_of, [], "one"))
    assert not passed and not rows
    assert "before one: go on with --skip-done" in capsys.readouterr().out


def test_a_case_in_a_process_of_its_own(tmp_path):
    options = ["--quick", "--stage", "search", "--shape", "RQ-VAE", "--method", "^vqops$"]
    assert program.main([*options, "--out", str(tmp_path), "--case-seconds", "300"])
    rows = read(tmp_path / "search.jsonl")
    assert {row["method"] for row in rows} == {"vqops", "ceiling: gemm"} and rows[0]["p50_ms"] > 0
    assert {row["case"] for row in rows} == {"nearest RQ-VAE 1024 32 256 float32 forward"}


@pytest.mark.parametrize("ending, said", [((None, "begun"), "out of time"), ((-11, "begun"), "ended with -11: begun")])
def test_a_case_that_crashes_or_hangs_is_a_row(measured, monkeypatch, ending, said):
    monkeypatch.setattr(program, "run_limited", lambda *_: ending)
    passed, rows = measured("--case-seconds", "5", one=None, two=None)
    assert passed and [row["failed"] for row in rows] == [said, said]


def test_what_takes_too_long_is_ended_with_its_children(tmp_path):
    child = "import time; time.sleep(3); open('survived', 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    status, said = run_limited([sys.executable, "-c", parent], 1.5, tmp_path)
    assert status is None and "begun" in said
    status, _ = run_limited([sys.executable, "-c", "import time; time.sleep(3)"], 60, tmp_path)
    assert status == 0 and not (tmp_path / "survived").exists()


# .ci/gpu


def test_without_a_gpu_it_says_so_and_runs_nothing(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for stage in (*gpu.STAGES, "all"):
        assert gpu.main([stage, "--out", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--quick", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_check_without_a_sanitizer_says_so(gpu, stages, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert stages.check()
    assert read(stages.writer.path)[0]["outcome"] == "not possible"


@pytest.mark.parametrize(
    "status, output, outcome, passed",
    [
        (0, "3 passed", "passed", True),
        (1, "1 failed", "failed", False),
        (None, "", "out of time", False),
        (9, "========= Error: Device not supported", "not possible", True),
        (9, "E   RuntimeError: this dtype is not supported", "failed", False),
    ],
)
def test_outcomes_of_a_check(gpu, stages, monkeypatch, status, output, outcome, passed):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu, "run_limited", lambda *_, **__: (status, output))
    assert stages.check() == passed
    assert {row["outcome"] for row in read(stages.writer.path)} == {outcome}
    assert {path.read_text() for path in stages.writer.path.parent.glob("check_*.log")} == {output}


@pytest.mark.parametrize("stage", ["facts", "test", "bench"])
def test_other_stages_pass_as_their_command_does(gpu, stages, monkeypatch, stage):
    ran = []
    monkeypatch.setattr(gpu, "run_limited", lambda command, *_, **__: ran.append(command) or (len(ran) - 1, "said"))
    assert getattr(stages, stage)() and not getattr(stages, stage)()
    assert [row["outcome"] for row in read(stages.writer.path)] == ["passed", "failed"]
    assert len(ran) == 2


def test_it_names_tests_that_exist(gpu):
    assert all((ROOT / path).exists() for path in (*gpu.TESTS, *gpu.CHECKS))


def test_requirements_name_every_peer():
    named = (ROOT / "benchmarks/gpu_requirements.txt").read_text()
    brought = set(PACKAGES) - {"vqops", "triton", "faiss-cpu", "scikit-learn"}  # the last two run on a CPU
    assert all(package in named for package in brought)
