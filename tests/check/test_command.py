"""`vqops check` from its flags to its record, with a GPU that is made up."""

import json
import os
import threading

import pytest
import torch
from filelock import FileLock

from vqops.check import command, known
from vqops.check.cases import CASES
from vqops.check.runner import GAVE_UP, NO_TIME, Runner
from vqops.check.timing import DECIDES, SHAPES
from vqops.cli import main
from vqops.dispatch import records

GPU = {"device": "cuda:0", "name": "NVIDIA H200", "capability": "9.0", "free": 100 << 30, "left_out": {}}
FACTS = {"versions": {"torch": "2.13.0"}, "built": "13.0 for sm_90a", "processors": 16, "gpus": [GPU]}
KERNELS = {"triton": {"sources": "5eed", "version": "3.6.0"}, "compiled": {"sources": "c0de", "version": "13.0"}}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine.facts: what it has; machine.rows(task, name): the row of a name; machine.asked: all of them."""

    class Machine:
        facts, asked, record = FACTS, [], tmp_path / "folder" / "own.json"

        @staticmethod
        def row(task: dict, name: str) -> dict:
            return {"wrong": {}}

        def rows(self, task, names, **environment):
            for name in names:
                self.asked.append((task.get("implementation"), name))
                if name == "the machine":
                    yield {"name": name, **self.facts}
                elif name in SHAPES:
                    yield {"name": name, **SHAPES[name]._asdict(), "milliseconds": self.times(task["implementations"])}
                else:
                    yield {"name": name, **self.row(task, name)}

        def times(self, implementations):
            took = {"pytorch": 3.0, "compiled": 1.0, "triton": 2.0}
            return {op: {name: [took[name]] for name in implementations[op]} for op in DECIDES}

    made = Machine()
    made.asked = []
    monkeypatch.setattr(Runner, "rows", lambda runner, *given, **environment: made.rows(*given, **environment))
    monkeypatch.setattr(records, "kernels_here", lambda: KERNELS)
    monkeypatch.setenv("VQOPS_GPU_RECORD", str(made.record))
    return made


def checked(machine) -> dict:
    return json.loads(machine.record.read_text())


def test_a_check_writes_what_it_found(machine, capsys):
    assert main(["check"]) == 0
    found = checked(machine)
    assert {row["implementation"] for row in found["rows"]} == {"compiled"}
    assert found["versions"] == FACTS["versions"] and found["gpu"] == {"name": GPU["name"], "capability": "9.0"}
    said = capsys.readouterr().out
    of = len(names_of("triton"))
    assert f"triton: {of} of {of} cases right" in said and str(machine.record) in said
    for implementation in KERNELS:
        assert {name for who, name in machine.asked if who == implementation} == names_of(implementation)
    assert records.read(machine.record, records.Gpu(GPU["name"], "9.0")).rows


def names_of(implementation: str) -> set[str]:
    return {name for name, case in CASES.items() if case.concerns(implementation, "cuda")}


def test_without_a_gpu_there_is_nothing_to_check(machine, capsys):
    machine.facts = {**FACTS, "gpus": []}
    assert main(["check"]) == 0
    assert "There is no CUDA device that torch 2.13.0 can use here: nothing was checked." in capsys.readouterr().out
    assert not machine.record.exists()
    assert main(["check", "--show"]) == 0 and "There is no CUDA device here." in capsys.readouterr().out


def test_what_cannot_run_is_left_out_with_the_reason(machine, capsys):
    machine.facts = {**FACTS, "gpus": [{**GPU, "left_out": {"triton": "Triton needs a C compiler"}}]}
    assert main(["check"]) == 0
    assert "triton is left out: Triton needs a C compiler" in capsys.readouterr().out
    assert "triton" not in {who for who, _ in machine.asked} and "triton" not in checked(machine)["cases"]


def test_one_that_is_wrong_is_not_named(machine, capsys):
    failed = {"compiled": {"failed": "an illegal access"}}
    machine.row = lambda task, name: failed.get(task["implementation"], {"wrong": {}})
    assert main(["check"]) == 1
    assert {row["implementation"] for row in checked(machine)["rows"]} == {"triton"}
    said = capsys.readouterr().out
    assert "an illegal access" in said and "`vqops check --report` prints" in said


def test_if_nothing_is_left_to_fall_back_on_it_says_what_to_do(machine, capsys):
    wrong = {"pytorch": {"wrong": {"indices": {"differ": 1}}}}
    machine.row = lambda task, name: wrong.get(task["implementation"], {"wrong": {}})
    assert main(["check"]) == 1
    assert 'takes all other calls, did not pass: set VQOPS_IMPLEMENTATION=reference' in capsys.readouterr().out


@pytest.mark.parametrize(
    "failed, why",
    [
        (f"{GAVE_UP}: is the GPU still there?", "plain PyTorch brought no results either"),
        (NO_TIME, "there was too little time: --seconds"),
    ],
)
def test_a_gpu_that_vanishes_or_time_that_is_up(machine, capsys, failed, why):
    """What was found is said; a record of an earlier check stays."""
    assert main(["check"]) == 0
    before = machine.record.read_text()
    machine.row = lambda task, name: {"failed": failed}
    assert main(["check"]) == 2
    said = capsys.readouterr()
    assert f"vqops check: {why}. No record was written, and an earlier one stays" in said.err
    assert f"{next(iter(CASES))} and" in said.out and machine.record.read_text() == before


def test_a_kernel_that_ends_every_process_is_no_vanished_gpu(machine):
    failed = {"triton": {"failed": f"{GAVE_UP}: is the GPU still there?"}}
    machine.row = lambda task, name: failed.get(task["implementation"], {"wrong": {}})
    assert main(["check"]) == 1 and {row["implementation"] for row in checked(machine)["rows"]} == {"compiled"}


def test_a_gpu_that_is_in_use(machine, capsys):
    machine.facts = {**FACTS, "gpus": [{**GPU, "free": 1 << 30}]}
    assert main(["check"]) == 2
    said = capsys.readouterr().err
    assert "NVIDIA H200 is in use: 1024 MB of its memory are free, 3072 are needed" in said


def test_facts_that_cannot_be_had(machine, capsys):
    machine.facts = {"failed": "its process ended with status 1: CUDA driver version is insufficient"}
    assert main(["check"]) == 2
    assert "vqops check: the GPUs of this machine cannot be asked for" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:7", "mps", "gpu", ""])
def test_a_device_that_is_not_there(machine, capsys, device):
    assert main(["check", "--device", device]) == 2
    assert f"--device must be cuda or one of cpu, cuda:0, got {device}" in capsys.readouterr().err


def test_several_gpus(machine, capsys):
    second, other = {**GPU, "device": "cuda:1"}, {**GPU, "device": "cuda:2", "name": "NVIDIA L4", "capability": "8.9"}
    gpus = [GPU, second, other]
    assert [gpu["device"] for gpu in command.chosen("cuda", gpus)] == ["cuda:0", "cuda:2"]
    assert command.chosen("cuda:1", gpus) == [second]
    machine.facts = {**FACTS, "gpus": gpus}
    assert main(["check"]) == 2  # one file cannot be of both
    assert "--device must name one of cuda:0 (NVIDIA H200), cuda:2 (NVIDIA L4)" in capsys.readouterr().err
    assert main(["check", "--device", "cuda:2"]) == 0 and checked(machine)["gpu"]["name"] == "NVIDIA L4"


def test_two_checks_at_once(machine, capsys):
    machine.record.parent.mkdir()
    with FileLock(machine.record.with_suffix(".lock")):
        done = []
        thread = threading.Thread(target=lambda: done.append(main(["check"])))
        thread.start()
        thread.join()
    assert done == [2] and "another check of this GPU is running" in capsys.readouterr().err
    assert not machine.record.exists() and main(["check"]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(machine, capsys):
    machine.record.parent.mkdir(mode=0o500)
    printed_record(machine, capsys)


def test_a_folder_that_cannot_be(machine, capsys):
    machine.record.parent.write_text("a file")
    printed_record(machine, capsys)


def printed_record(machine, capsys):
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "No file could be written" in said and "VQOPS_GPU_RECORD" in said
    printed = json.loads(said[said.index("\n{\n") : said.index("\n}\n") + 3])
    assert printed["rows"] and printed["format"] == records.FORMAT


def test_what_is_known_and_what_to_report(machine, capsys):
    main(["check", "--report"])
    assert "NVIDIA H200: not checked yet, run `vqops check`" in capsys.readouterr().out
    main(["check"])
    capsys.readouterr()
    assert main(["check", "--show"]) == 0
    said = capsys.readouterr().out
    assert f"record {machine.record}" in said and "cases right" in said and "checked 20" in said
    assert main(["check", "--report"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("```\n") and torch.__version__ in said and "cases right" in said and '"versions"' in said


@pytest.mark.parametrize("content", ["{", "[]", "7", '{"cases": {}}', "\0"])
def test_a_broken_record_is_not_reported(tmp_path, content):
    (tmp_path / "own.json").write_text(content)
    assert known.stored(tmp_path / "own.json") is None


def test_an_interrupt_ends_the_children(machine, monkeypatch):
    stopped = []
    monkeypatch.setattr(Runner, "stop", lambda runner: stopped.append(True))

    def interrupted(task, name):
        raise KeyboardInterrupt

    machine.row = interrupted
    assert main(["check"]) == 130
    assert stopped and not machine.record.exists()


def test_the_progress_names_each_case_before_it_runs(monkeypatch, capsys):
    assert command.progress()("nothing to be seen") is None and capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    command.progress()("nearest heads")
    assert "nearest heads" in capsys.readouterr().err
