"""Children that crash, hang, lie or take their children along: what each costs."""

import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vqops.check import runner as module
from vqops.check.child import MARK
from vqops.check.process import Command, OutOfTime, run_limited
from vqops.check.runner import GIVEN_UP, Runner, shared

# A child that does what its names say.
CHILD = f"""
import json, os, signal, sys, time
task = json.loads(sys.argv[-1])
say = lambda row: print({MARK!r} + json.dumps(row), flush=True)
for name in task["names"]:
    if name == "before a name":
        print("no module of that name"); sys.exit(3)
    say({{"begins": name}})
    print("what a library says")
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(60)
    if name == "exit":
        print("CUDA error: unspecified launch failure", file=sys.stderr); sys.exit(1)
    if name == "fail":
        say({{"name": name, "failed": "ValueError: x"}}); continue
    if name == "fail, and lose the GPU":
        say({{"name": name, "failed": "an illegal access"}}); sys.exit(1)
    say({{"name": name, "wrong": {{}}, "process": os.getpid()}})
"""


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """rows(*names): what comes of them; begun: the names in the order in which they were begun."""
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    monkeypatch.setattr(module, "CHILD", (sys.executable, str(file)))
    monkeypatch.setattr(module, "FIRST", 20.0)

    def run(*names, seconds=60.0, each=1.0):
        run.begun = []
        runner = Runner(time.monotonic() + seconds, run.begun.append, each=each)
        return {row["name"]: row for row in runner.rows({}, list(names))}

    return run


def test_one_process_has_all_the_names(rows):
    found = rows("a", "b", "c")
    assert list(found) == ["a", "b", "c"] and len({row["process"] for row in found.values()}) == 1
    assert rows.begun == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name, why",
    [
        ("crash", f"its process ended by signal {signal.SIGSEGV.value}"),
        ("exit", "what a library says\nCUDA error: unspecified launch failure"),
        ("hang", "it took more than 1 s"),
        ("fail", "ValueError: x"),
        ("fail, and lose the GPU", "an illegal access"),
    ],
)
def test_what_goes_wrong_costs_one_row(rows, name, why):
    found = rows("a", name, "b", "c")
    assert list(found) == ["a", name, "b", "c"] and rows.begun == ["a", name, "b", "c"]
    assert why in found[name]["failed"] and not any("failed" in found[other] for other in "abc")
    assert (found["a"]["process"] == found["b"]["process"]) == (name == "fail")
    assert found["b"]["process"] == found["c"]["process"]


def test_a_child_that_hangs_at_its_first_name(rows, monkeypatch):
    monkeypatch.setattr(module, "FIRST", 1.5)
    found = rows("hang", "a")
    assert "it took more than 2 s" in found["hang"]["failed"] and "failed" not in found["a"]


def test_a_child_that_does_not_begin(rows):
    """Each costs the name that it would have begun with, until it is clear that none will."""
    found = rows("before a name", "a")
    assert "with status 3: no module of that name" in found["before a name"]["failed"] and "failed" not in found["a"]
    names = ["crash", "exit", "fail, and lose the GPU", "a", "b"]
    found = rows(*names)
    assert list(found) == names
    assert all(f"{GIVEN_UP} processes before it" in found[name]["failed"] for name in "ab")
    assert found["a"]["failed"].endswith("is the GPU still there? The last: an illegal access")


def test_a_child_that_is_done_without_a_word(rows):
    """Its last names are not right because nothing was said of them."""
    found = rows("a", "before a name")
    assert "failed" not in found["a"] and "with status 3" in found["before a name"]["failed"]


def test_shares_are_of_neighbours_and_none_is_lost():
    assert shared(list("abcde"), 2) == [["a", "b"], ["c", "d", "e"]]
    assert shared(list("ab"), 6) == [["a"], ["b"]] and shared([], 3) == []


def test_time_that_is_up(rows):
    found = rows("a", "hang", "b", seconds=2.0, each=30.0)
    assert [row.get("failed") for row in found.values()] == [None, "no time was left", "no time was left"]
    assert all(row["failed"] == "no time was left" for row in rows("a", "b", seconds=-1.0).values())


def test_another_thread_can_stop_it(rows):
    begun = threading.Event()
    runner = Runner(time.monotonic() + 60, lambda name: begun.set(), each=30.0)
    found = []
    thread = threading.Thread(target=lambda: found.extend(runner.rows({}, ["hang", "a"])))
    thread.start()
    assert begun.wait(30)
    runner.stop()
    thread.join(20)
    assert not thread.is_alive() and all("failed" in row for row in found) and len(found) == 2


def test_children_check_nothing_by_themselves(monkeypatch, tmp_path):
    file = tmp_path / "child.py"
    code = f"import json, os\nprint({MARK!r} + json.dumps(dict(name='a', auto=os.environ['VQOPS_CHECK'])))"
    file.write_text(code)
    monkeypatch.setattr(module, "CHILD", (sys.executable, str(file)))
    monkeypatch.setenv("VQOPS_CHECK", "auto")
    assert list(Runner(time.monotonic() + 30).rows({}, ["a"])) == [{"name": "a", "auto": ""}]


def test_the_real_child():
    """Right, a case that there is not, and the facts of the machine."""
    task = {"device": "cpu", "implementation": "compiled", "small": True}
    names = ["code_sums float32 in order", "no such case", "the machine", "ema_update_ euclidean", "1024 x 64 x 512"]
    task["implementations"] = {"code_sums": ["pytorch", "compiled"]}
    found = {row["name"]: row for row in Runner(time.monotonic() + 120).rows(task, names)}
    assert found[names[0]]["wrong"] == found[names[3]]["wrong"] == {}
    assert found[names[1]]["failed"] == "KeyError: 'no such case'"
    assert found[names[2]]["processors"] >= 1
    assert set(found[names[4]]["milliseconds"]["code_sums"]) == {"pytorch", "compiled"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
def test_a_child_ends_with_its_parent(tmp_path):
    """Also one that hangs, when its parent is killed."""
    file = tmp_path / "parent.py"
    file.write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {HANGS!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with Command([sys.executable, str(file)]) as parent:
        pid = int(next(parent.lines(time.monotonic() + 30)))
        time.sleep(2)
        parent.process.kill()
    until = time.monotonic() + 30
    while time.monotonic() < until and Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid):
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid)


HANGS = "from vqops.check import child; import threading, time\n"
HANGS += "threading.Thread(target=child.end_with_parent, daemon=True).start(); time.sleep(60)"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# Processes


def test_what_takes_too_long_is_ended_with_its_children(tmp_path):
    child = "import time; time.sleep(3); open('survived', 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    status, said = run_limited([sys.executable, "-c", parent], 1.5, tmp_path)
    assert status is None and "begun" in said
    status, _ = run_limited([sys.executable, "-c", "import time; time.sleep(3)"], 60, tmp_path)
    assert status == 0 and not (tmp_path / "survived").exists()


def test_a_grandchild_that_keeps_the_output_open(tmp_path):
    """The command has ended; nobody waits for what it left behind."""
    left = "import time; time.sleep(30)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {left!r}]); print('done', flush=True)"
    began = time.monotonic()
    status, said = run_limited([sys.executable, "-c", parent], 3.0, tmp_path)
    assert said == "done\n" and status is None and time.monotonic() - began < 20


def test_output_that_is_no_text(tmp_path):
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\xfe ok\\n')"
    status, said = run_limited([sys.executable, "-c", code], 30, tmp_path)
    assert status == 0 and said.endswith("ok\n")


def test_lines_come_before_the_time_is_up():
    code = "import time; print('one', flush=True); time.sleep(30)"
    with Command([sys.executable, "-c", code]) as command, pytest.raises(OutOfTime):
        lines = command.lines(time.monotonic() + 5)
        assert next(lines) == "one\n"
        next(lines)

