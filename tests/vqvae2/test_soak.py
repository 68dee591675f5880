"""What befalls long runs: kills, a full disk, a folder that becomes read-only, clocks that jump, two on one folder.

Each time no checkpoint is lost, no half file left and at most a line said; the run goes on and ends bit for bit as one
that nothing befell. docs/vqvae2.md states the counts.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import processor
import pytest
import soak
from runs import TINY, check_same_run

pytest.importorskip("tyro")
pytest.importorskip("safetensors")

from vqops.vqvae2 import train
from vqops.vqvae2.files.config_file import written

pytestmark = pytest.mark.slow

COUNTS = {"kills": 50, "clock": 15, "two on one folder": 10, "full disk": 15, "read-only": 10}
OPTIONS = replace(TINY, steps=60, eval_every=7)
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]  # they end with the process


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing befalls, with its images beside it."""
    folder = tmp_path_factory.mktemp("whole")
    images = np.random.default_rng(0).integers(0, 256, (23, 20, 16), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    return train(replace(OPTIONS, data=str(folder / "images.npy"), out=folder / "run"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("scenario", COUNTS)
def test_no_checkpoint_is_lost(whole, tmp_path, scenario):
    (tmp_path / "options.toml").write_text(written(replace(OPTIONS, data=str(whole.parent / "images.npy"))))
    command = [sys.executable, soak.__file__, scenario, str(COUNTS[scenario])]
    if scenario in ("full disk", "read-only"):
        if not shutil.which("unshare") or subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount a disk of his own")
        command = OWN_MOUNTS + command
    environment = processor.environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    assert runs
    for run in runs:
        check_same_run(tmp_path / run, whole)
