"""Threads and rounding of the tests: VQOPS_TEST_THREADS=2 and VQOPS_TEST_ROUNDING=other run them as another machine.

Processes that tests start import it as well, with what `environment` gives them.
"""

import os
from pathlib import Path

import torch

torch.set_num_threads(int(os.environ.get("VQOPS_TEST_THREADS", "1")))  # for inputs this small one is the fastest
if os.environ.get("VQOPS_TEST_ROUNDING") == "other":
    import other_rounding  # noqa: F401


def environment(**variables: str) -> dict[str, str]:
    """Of a child process that finds the modules of this folder."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))} | variables
