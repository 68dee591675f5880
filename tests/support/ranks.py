"""Two processes of a `torch.distributed` job, which run a test file as a script."""

import subprocess
import sys
from pathlib import Path

import processor
import torch

WORLD = 2


def results_of(script: str, folder: Path) -> list[dict]:
    """What each rank saved as `folder/RANK.pt`; the script gets the folder and the rank as arguments."""
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank)],
            env=processor.environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
