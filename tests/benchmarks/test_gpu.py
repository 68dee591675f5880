"""What the benchmarks do on a GPU, on a CPU: every op by implementation, processes with limits, and the first run."""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import baselines, cases, measure, plan, report, timing
from benchmarks.gpu import machine_code, page, prepare, publish
from benchmarks.gpu import plan as plan_of_gpu
from benchmarks.rows import PACKAGES, Writer, read
from benchmarks.shapes import Shape
from benchmarks.tables import Machine
from vqops.check.cases import CASES
from vqops.check.child import MARK
from vqops.check.process import run_limited
from vqops.check.record import is_right

ROOT = Path(__file__).parents[2]

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
        "sample",
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


def test_a_call_that_takes_long_is_timed_once(monkeypatch):
    """By a clock that says so."""
    rounds = []

    class Clock:
        def prepare(self, call):
            took = call()
            return timing.Timed("stub", lambda: rounds.append(took) or took, took)

    case = cases.nearest(Shape.of(33, 8, 20), "cpu")
    methods = {"vqops": lambda: lambda: 0.5, "slow": lambda: lambda: 2.0}
    monkeypatch.setattr(cases.Case, "methods", methods)
    monkeypatch.setattr(cases.Case, "check", lambda case, found: {})
    monkeypatch.setattr(measure, "clock_of", lambda device: Clock())
    monkeypatch.setattr(measure, "ceilings", lambda case, size: {})
    monkeypatch.setattr(measure, "peak_extra_mb", lambda call, device: 0.0)
    rows = {row["method"]: row for row in measure.measure(case, seconds=0.0)}
    assert rows["slow"]["rounds"] == 1 and rows["slow"]["p50_ms"] == 2000 and rows["slow"]["times_vqops"] == 4
    assert rows["vqops"]["rounds"] == measure.FEWEST and rounds == [0.5] * measure.FEWEST


# The plan of a first run


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """planned(parts): what the rehearsal of them returned, and its rows."""

    def run(parts: str | None, seconds: float = 600.0):
        status = plan_of_gpu.run(tmp_path, parts, time.monotonic() + seconds, rehearsal=True, built={})
        return status, read(tmp_path / "first_run.jsonl")

    return run


@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "rehearse", "--out", tmp_path, "--seconds", "1500"]
    run_limited(command, 1600, ROOT)
    rows = read(tmp_path / "first_run.jsonl")
    assert [row["part"] for row in rows if "left" in row] == list(plan_of_gpu.PARTS)
    assert {row["outcome"] for row in rows if "left" in row} == {"passed"}
    judged = [row for row in rows if "case" in row]
    assert {row["part"] for row in judged} == {"cases", "mma", "loader", "triton"} and all(map(is_right, judged))
    assert {row["implementation"] for row in judged} == {"compiled", "pytorch", "triton"}
    assert all({"device", "versions", "commit"} <= row.keys() for row in rows)
    made = page.first_run(Machine(tmp_path), "figures")
    assert "| cases | passed |" in made and "| triton | triton |" in made and "| 100 x 512 x 100 |" in made


def test_parts_and_their_rows(planned):
    status, rows = planned("times,profile,sanitizer")
    assert status == 0
    assert [row["part"] for row in rows if "left" in row] == ["times", "profile", "sanitizer"]
    times = [row for row in rows if "kernels" in row]
    assert len(times) == 2 and all(row["p50_ms"] > 0 and not row["wrong"] for row in times)
    assert all(sum(row["tiers"]) == 100 for row in times)


def test_parts_that_there_are_not(planned):
    with pytest.raises(SystemExit, match="--parts: there is no cuda, only facts, cases"):
        planned("facts,cuda")


def test_a_part_without_time_is_a_row(planned):
    status, rows = planned("times,bench", seconds=5.0)
    assert status == 1 and [row["outcome"] for row in rows] == ["no time left"] * 2


def test_a_part_that_breaks_costs_itself(planned, monkeypatch):
    def broken(plan):
        raise ZeroDivisionError("x")

    monkeypatch.setitem(plan_of_gpu.PARTS, "times", broken)
    status, rows = planned("times,profile")
    assert status == 1 and [row["outcome"] for row in rows if "left" in row] == ["failed", "passed"]
    assert "ZeroDivisionError: x" in rows[0]["why"]


@pytest.mark.parametrize("ending", [(None, "begun"), (-11, "begun")])
def test_a_shape_that_hangs_or_crashes_is_a_row(planned, monkeypatch, ending):
    monkeypatch.setattr(plan_of_gpu, "run_limited", lambda *given, **environment: ending)
    status, rows = planned("times")
    assert status == 1
    assert [row["failed"] for row in rows[:2]] == ["out of time" if ending[0] is None else "ended with -11: begun"] * 2


def test_it_names_what_there_is():
    assert all((ROOT / path).exists() for path in plan_of_gpu.TESTS)
    assert set(plan_of_gpu.SANITIZED) <= set(CASES)
    depths = {name.split()[3] for name in plan_of_gpu.WGMMA}
    assert depths == {"64", "128", "200", "256", "400", "512"}


RIGHT = MARK + json.dumps({"name": "x", "wrong": {}})


@pytest.mark.parametrize(
    "status, output, outcome",
    [
        (0, RIGHT, "passed"),
        (9, RIGHT + "\n========= RACECHECK SUMMARY: 1 hazard displayed", "failed"),  # found after the result
        (9, "========= Invalid __global__ read of size 4", "failed"),
        (9, "========= Error: Device not supported", "not possible"),
        (0, "RuntimeError: this dtype is not supported", "failed"),  # no result
        (0, MARK + json.dumps({"name": "x", "wrong": {"indices": {"differ": 1}}}), "failed"),
        (None, RIGHT, "out of time"),
    ],
)
def test_outcomes_of_a_sanitizer(monkeypatch, tmp_path, status, output, outcome):
    given = []
    monkeypatch.setattr(plan_of_gpu, "run_limited", lambda *a, **env: given.append((a[0], env)) or (status, output))
    monkeypatch.setattr(plan_of_gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    made = plan_of_gpu.Plan(Writer(tmp_path / "first_run.jsonl", {}), time.monotonic() + 60, rehearsal=False)
    assert made.sanitizer() == (outcome != "failed")
    rows = read(tmp_path / "first_run.jsonl")
    assert {row["outcome"] for row in rows} == {outcome} and {row["tool"] for row in rows} == set(plan_of_gpu.TOOLS)
    assert all(is_right(row) == (outcome == "passed") for row in rows)
    assert {row["case"] for row in rows} == set(plan_of_gpu.SANITIZED)
    assert all(env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for _, env in given)
    assert all("no time left" not in json.dumps(row) for row in rows)


def test_the_gpu_run_asks_for_what_a_gpu_has(monkeypatch, tmp_path):
    """Without a GPU: the commands, and that each has a limit within the time that is left."""
    ran = []
    monkeypatch.setattr(plan_of_gpu, "run_limited", lambda *given, **env: ran.append((given, env)) or (0, "1 passed"))
    monkeypatch.setattr(plan_of_gpu.shutil, "which", lambda name, **_: name)
    made = plan_of_gpu.Plan(Writer(tmp_path / "first_run.jsonl", {}), time.monotonic() + 500, rehearsal=False)
    for part in ("facts", "profile", "suite", "bench", "check"):
        assert getattr(made, part)(), part
    commands = [" ".join(map(str, given[0])) for given, _ in ran]
    assert sum("ncu --clock-control none" in command for command in commands) == 3
    suite = next(i for i, command in enumerate(commands) if "-m pytest" in command)
    assert "tests/cuda tests/ops" in commands[suite] and ran[suite][1] == {"VQOPS_REQUIRE": "cuda"}
    assert any("vqops check --device cuda:0" in command for command in commands)
    assert all(given[1] <= 300 for given, _ in ran)


# What comes back


def test_rows_and_record_become_those_of_the_project(tmp_path):
    root, out, shipped = tmp_path / "root", tmp_path / "out", tmp_path / "shipped"
    for page_of in ("docs", "benchmarks/results"):
        (root / page_of).mkdir(parents=True)
    for name in report.PAGES:
        shutil.copy(ROOT / "docs" / name, root / "docs" / name)
    shutil.copy(ROOT / "README.md", root)
    out.mkdir()
    about = {"device": "NVIDIA H200", "instructions": "sm_90", "commit": "1", "versions": {"torch": "2.11"}}
    suite = {"part": "suite", "outcome": "passed", "last_lines": ["900 passed"]}
    lines = [suite, {"part": "suite", "outcome": "passed", "left": 100}]
    lines += [{"part": "times", "outcome": "failed", "left": 90}, {"part": "check", "outcome": "no time left"}]
    lines += [{"part": "profile 9x8x7", "outcome": "passed", "last_lines": ["counted"]}]
    lines += [{"part": "profile", "outcome": "passed", "left": 80}]
    lines += [{"part": "cases", "implementation": "compiled", "case": "nearest heads", "wrong": {}}]
    lines += [{"part": "times", "kernels": [9, 8, 7], "p50_ms": 1.5, "tflops": 9.0, "tiers": [8, 1, 0, 0], "wrong": 0}]
    lines += [{**lines[-1], "part": "loader", "p50_ms": 1.25}]
    (out / "first_run.jsonl").write_text("".join(json.dumps(about | line) + "\n" for line in lines))
    facts = {"D": [4, 1024], "K": None, "N": None, "dtypes": ["float32"]}
    named = [{"op": "nearest", "implementation": name, **facts} for name in ("compiled", "triton")]
    record = {"format": 1, "gpu": {"name": "NVIDIA H200", "capability": "9.0"}, "kernels": {}, "rows": named}
    (out / "record.json").write_text(json.dumps(record))
    publish.publish(out, root, shipped)
    assert len(read(root / "benchmarks/results/nvidia-h200/first_run.jsonl")) == len(lines)
    ships = json.loads((shipped / "nvidia-h200-sm-9-0.json").read_text())
    assert [row["implementation"] for row in ships["rows"]] == ["compiled"]  # Triton's tests have not been run there
    assert ships["results"] == "nvidia-h200"
    text = (root / "docs/gpu.md").read_text()
    assert "| suite | passed | 900 passed |" in text and "| cases | compiled | 1 of 1 |" in text
    assert "| 9 x 8 x 7 | 1.50 | 1.25 | 9.00 | 88.89 % |" in text and "| profile | passed | counted |" in text
    assert "| times | failed |" in text and "| check | no time left |" in text
    kept = root / "benchmarks/results/nvidia-h200"
    publish.publish(kept, root, shipped)  # from where they belong
    (out / "record.json").unlink()
    line = about | {"part": "triton_suite", "outcome": "passed", "last_lines": ["800 passed"]}
    (out / "first_run.jsonl").write_text(json.dumps(line) + "\n")  # of the second call
    publish.publish(out, root, shipped)
    assert len(read(kept / "first_run.jsonl")) == len(lines) + 1
    ships = json.loads((shipped / "nvidia-h200-sm-9-0.json").read_text())
    assert [row["implementation"] for row in ships["rows"]] == ["compiled", "triton"]
    with pytest.raises(SystemExit, match=r"has no first_run\.jsonl"):
        publish.publish(tmp_path, root, shipped)


def test_what_is_prepared_for_another_python():
    with pytest.raises(SystemExit, match=r"there is no python9\.9 here"):
        prepare.find("python9.9")
    assert prepare.find(sys.executable) == sys.executable


@pytest.mark.parametrize(
    "there, ending, row",
    [
        ([True], None, {"outcome": "passed", "why": "the kernels came along"}),
        ([False, True], (0, "linked"), {"outcome": "passed", "why": "built here", "last_lines": ["linked"]}),
        ([False, False], (0, "linked"), {"outcome": "failed", "why": "built here"}),  # for another GPU
        ([False], (1, "nvcc: no such file"), {"outcome": "failed", "last_lines": ["nvcc: no such file"]}),
        ([False], None, {"outcome": "failed", "last_lines": ["not built in 300 s"]}),
    ],
)
def test_the_binary_came_along_or_is_built_there(monkeypatch, there, ending, row):
    asked = iter(there)

    def build(command, env, timeout, **_):
        assert command[1:] == ["setup.py", "build_ext", "--inplace"] and env["TORCH_CUDA_ARCH_LIST"] == "9.0a"
        if ending is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, ending[0], ending[1], "")

    monkeypatch.setattr(prepare, "architecture_here", lambda: "9.0a")
    monkeypatch.setattr(prepare, "has_kernels", lambda architecture: next(asked))
    monkeypatch.setattr(prepare.subprocess, "run", build)
    assert row.items() <= prepare.ensure_built().items()


def test_requirements_name_every_peer():
    named = prepare.REQUIREMENTS.read_text()
    there_or_for_a_cpu = {"vqops", "triton", "numpy", "faiss-cpu", "scikit-learn", "transformers"}
    brought = set(PACKAGES) - there_or_for_a_cpu
    assert all(package in named for package in brought) and "platformdirs" in named


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "all", "--out", tmp_path / "rows"]
    status, said = run_limited(command, 120, ROOT, CUDA_VISIBLE_DEVICES="")
    assert status == 1 and "there is no CUDA device here" in said and not (tmp_path / "rows").exists()
    with pytest.raises(SystemExit):
        program.main(["--quick", "--device", "cuda"])


# Machine code, as cuobjdump prints it: a loop over tiles (10 to a0) and one over pieces in it (20 to 40); copies (14)
# and candidates (70, 80) are passed over.
SASS = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
                                                                             /* 0x000fe400078e00ff */
        /*0010*/                   UISETP.GE.AND UP0, UPT, UR4, UR5, UPT ;   /* 0x000000050400728c */
        /*0012*/               @P1 BRA 0x20 ;                                /* 0x0000000000007947 */
        /*0014*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64] ;       /* 0x0000000000007fae */
        /*0020*/                   HMMA.16816.F32 R4, R8, R10, R4 ;          /* 0x0000000a0804723c */
        /*0030*/                   LDL R3, [R1] ;                            /* 0x0000000001037983 */
        /*0040*/              @!P0 BRA P1, 0x20 ;                            /* 0x0000000000008947 */
        /*0050*/                   FMNMX3 R4, R4, R5, R6, PT ;               /* 0x0000000504047276 */
        /*0052*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;           /* 0x0000000000007992 */
        /*0060*/               @P0 BRA 0x90 ;                                /* 0x0000000000000947 */
        /*0070*/                   FFMA R4, R4, R5, R6 ;                     /* 0x0000000504047223 */
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;             /* 0x0000000000007b1d */
        /*0090*/                   LDSM.16.M88.4 R28, [R4] ;                 /* 0x00000000041c783b */
        /*00a0*/                   BRA 0x10 ;                                /* 0xffffff6000007947 */
        /*00b0*/                   EXIT ;                                    /* 0x000000000000794d */
"""


def test_machine_code_is_counted_by_the_shortest_way():
    assert machine_code.counts(SASS) == {
        "instructions": 15,
        "loop": 13,
        "spills": 1,
        "copies": 1,
        "barriers": 1,
        "waits": [1],
        "turn": 10,
        "piece": 3,
        "classes": {"products": 1, "FFMA": 0, "FMUL": 0, "FMNMX": 1, "LDS": 1, "other": 7},
    }
    with pytest.raises(ValueError, match="no loop has products"):
        machine_code.counts(SASS.replace("BRA 0x10", "NOP").replace("BRA P1, 0x20", "NOP"))


def test_registers_and_shared_memory_say_how_many_blocks_an_sm_holds():
    assert machine_code.blocks_of_sm("90a", 75 * 1024 - 1, 64, 128) == 3
    assert machine_code.blocks_of_sm("90a", 75 * 1024 + 1, 64, 128) == 2
    assert [machine_code.blocks_of_sm("80", 1024, registers, 128) for registers in (255, 168, 169, 128)] == [2, 3, 2, 4]


def test_the_rows_of_machine_code_are_of_one_compilation():
    rows = read(machine_code.FOLDER / "compiled.jsonl")
    assert len({(row["compiler"], row["sources"]) for row in rows}) == 1
    assert {row["architecture"] for row in rows} == {f"sm_{name}" for name in machine_code.ARCHITECTURES}
    for row in rows:
        assert row["turn"] == sum(row["classes"].values()) <= row["loop"] <= row["instructions"]
