"""The logic of `python -m benchmarks.gpu` with a stand-in for the GPU: a clock for the CPU, small shapes."""

import importlib
import json
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


class Stub:
    """Times on the CPU what the real one times on a GPU."""

    device = torch.device("cpu")

    def ceilings(self):
        return {"copy_bytes_per_s": 1e10, "fp16_ops_per_s": 1e11, "tf32_ops_per_s": 5e10}

    def timings(self, methods, rounds):
        found = {}
        for name, method in methods.items():
            try:
                seconds = [self.time(method) for _ in range(rounds)]
                found[name] = {"seconds": seconds, "graph": False, "peak_bytes": 0}
            except Exception as error:
                found[name] = {"error": str(error)}
        return found

    def time(self, method):
        start = time.perf_counter()
        method()
        return time.perf_counter() - start


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


@pytest.fixture
def cases(gpu):
    return importlib.import_module("benchmarks.gpu_cases")


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_gpu_it_says_so_and_runs_nothing(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for stage in (*gpu.STAGES, "all"):
        assert gpu.main([stage, "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_every_case_gives_rows_with_right_results(gpu, cases, tmp_path):
    rows = gpu.Rows(tmp_path / "rows.jsonl", {"device": "stub", "commit": "1"})
    small = cases.cases(Stub.device, [(600, 8, 40)], [(600, 8, 40)])
    assert gpu.bench(rows, Stub(), small, skip_done=False, rounds=5)
    ceilings, *measured = rows_in(rows.path)
    assert ceilings["op"] == "ceilings"
    assert {row["op"] for row in measured} == {
        "nearest",
        "nearest_topk",
        "code_sums",
        "ema_update_",
        "quantize_backward",
        "training step",
    }
    assert not [row for row in measured if "error" in row]
    ours = [row for row in measured if row["method"].startswith("vqops")]
    assert {row["method"] for row in ours} >= {"vqops compiled", "vqops reference"}
    both = {row["op"] for row in ours if row["method"] == "vqops compiled, deterministic"}
    assert both == {"code_sums", "training step"}
    assert not [row for row in ours if row["wrong"]]
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["share_of_floor"] > 0 for row in ours)
    assert {row["indices"] for row in measured if row["op"] == "code_sums"} == {"uniform", "zipf", "one code"}


def test_deterministic_mode_is_that_of_one_call(cases):
    def modes():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    torch.use_deterministic_algorithms(False)
    assert cases.deterministic(modes) == (True, False) and modes() == (False, True)
    with pytest.raises(ZeroDivisionError):
        cases.deterministic(lambda: 1 / 0)
    assert modes() == (False, True)


def case_of(cases, **methods):
    return lambda: cases.Case("nearest", {"N": 1, "D": 1, "K": 1, "dtype": "float32"}, methods, operations=1)


def test_skip_done_measures_what_is_missing_of_this_commit(gpu, cases, tmp_path):
    called = []
    methods = {name: lambda name=name: called.append(name) for name in ("one", "two")}
    common = {"device": "stub", "commit": "1"}
    path = tmp_path / "rows.jsonl"
    gpu.bench(gpu.Rows(path, common), Stub(), [case_of(cases, one=methods["one"])], skip_done=True, rounds=3)
    called.clear()
    gpu.bench(gpu.Rows(path, common), Stub(), [case_of(cases, **methods)], skip_done=True, rounds=3)
    assert set(called) == {"two"}
    gpu.bench(gpu.Rows(path, {**common, "commit": "2"}), Stub(), [case_of(cases, **methods)], skip_done=True, rounds=3)
    assert set(called) == {"one", "two"}


def test_a_failing_peer_is_a_row_and_is_tried_again(gpu, cases, tmp_path):
    def fails():
        raise RuntimeError("no such kernel")

    rows = gpu.Rows(tmp_path / "rows.jsonl", {"device": "stub", "commit": "1"})
    gpu.bench(rows, Stub(), [case_of(cases, good=lambda: None, bad=fails)], skip_done=False, rounds=3)
    found = {row["method"]: row for row in rows_in(rows.path) if "method" in row}
    assert found["bad"]["error"] == "no such kernel" and "error" not in found["good"]
    assert len(rows.done()) == 2  # the ceilings and the good one


def test_time_that_is_up_ends_between_cases(gpu, cases, tmp_path, capsys):
    rows = gpu.Rows(tmp_path / "rows.jsonl", {"device": "stub", "commit": "1"})
    assert not gpu.bench(rows, Stub(), [case_of(cases, one=lambda: None)], skip_done=False, seconds=-1)
    assert "--skip-done" in capsys.readouterr().out


def test_check_without_a_sanitizer_says_so(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    rows = gpu.Rows(tmp_path / "rows.jsonl", {"device": "stub", "commit": "1"})
    assert gpu.check(rows)
    assert rows_in(rows.path)[0]["outcome"] == "not possible"


@pytest.mark.parametrize(
    "status, output, outcome, passed",
    [
        (0, "3 passed", "passed", True),
        (1, "1 failed", "failed", False),
        (None, "", "out of time", False),
        (9, "Error: Device not supported", "not possible", True),
    ],
)
def test_outcomes_of_a_check(gpu, monkeypatch, tmp_path, status, output, outcome, passed):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu, "run", lambda *_, **__: (status, output))
    rows = gpu.Rows(tmp_path / "rows.jsonl", {"device": "stub", "commit": "1"})
    assert gpu.check(rows) == passed
    assert {row["outcome"] for row in rows_in(rows.path)} == {outcome}


def test_a_stage_that_takes_too_long_is_stopped(gpu):
    status, said = gpu.run(["python3", "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
    assert status is None and "begun" in said


def test_requirements_name_every_peer(gpu):
    named = (ROOT / "benchmarks/gpu_requirements.txt").read_text()
    assert all(package in named for package in gpu.PACKAGES if package not in ("vqops", "triton"))
