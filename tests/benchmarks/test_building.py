"""The row of a build, of a build that is played."""

import subprocess

import pytest

from benchmarks import building

LOG = "# ninja log v7\n10\t2510\t1\t/tmp/b/csrc/cuda/sort.o\tabc\n20\t51020\t1\t/tmp/b/csrc/cuda/search/scan.o\tdef\n"
PLAYED = """
import os, sys, time
target = sys.argv[sys.argv.index("--build-temp") + 1]
open(target + "/.ninja_log", "w").write({log!r})
print("vqops: building for torch 2.13.0 in /a/folder; CUDA 13.0 for", os.environ["VQOPS_CUDA_ARCHS"], "(why)")
while time.process_time() < 0.2: pass
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    (tmp_path / "setup.py").write_text(PLAYED.format(log=LOG))
    monkeypatch.setattr(building, "ROOT", tmp_path)


def test_a_row(played):
    row = building.build("80 90a")
    assert row["built"] == "CUDA 13.0 for 80 90a (why)"  # and no folder of this machine
    assert row["files"] == {"cuda/search/scan.o": 51.0, "cuda/sort.o": 2.5}
    assert list(row["files"]) == ["cuda/search/scan.o", "cuda/sort.o"]  # the longest first
    assert min(row["processor_seconds"], row["seconds"]) >= 0.2 and row["cores"] >= 1  # what was played


def test_a_build_that_fails_gives_no_row(played):
    (building.ROOT / "setup.py").write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        building.build("all")
