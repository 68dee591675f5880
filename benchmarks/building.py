"""What it takes to build vqops with its CUDA kernels: `python -m benchmarks.building 90a all`, on an idle machine.

Each argument is a value of VQOPS_CUDA_ARCHS. Needs nvcc and ninja. A row for each build goes to building.jsonl in this
machine's folder of results: wall time, processor time, and the seconds of each file beside those compiled with it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from tempfile import TemporaryDirectory

from benchmarks.rows import Writer, environment, folder_of

ROOT = Path(__file__).parents[1]
BUILT = re.compile("^vqops: building .*; (CUDA .*)$", re.MULTILINE)


def build(architectures: str) -> dict:
    """Raises subprocess.CalledProcessError where it does not build."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-temp", folder, "--build-lib", folder]
        asked = {"VQOPS_CUDA": "1", "VQOPS_CUDA_ARCHS": architectures, "TORCH_CUDA_ARCH_LIST": ""}
        began, before = time.monotonic(), processor_seconds()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **asked}, check=True, stdout=subprocess.PIPE, text=True
        )
        return {
            "built": BUILT.search(done.stdout)[1],
            "cores": len(os.sched_getaffinity(0)),
            "seconds": round(time.monotonic() - began, 1),
            "processor_seconds": round(processor_seconds() - before, 1),
            "files": seconds_of_files(Path(folder, ".ninja_log").read_text()),
        }


def processor_seconds() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of_files(log: str) -> dict[str, float]:
    """From ninja's log: milliseconds at which a file began and ended, its modification time, the object, a hash."""
    lines = [line.split("\t") for line in log.splitlines() if not line.startswith("#")]
    seconds = {output.partition("/csrc/")[2]: (int(end) - int(begin)) / 1e3 for begin, end, _, output, _ in lines}
    return dict(sorted(seconds.items(), key=lambda file: -file[1]))


if __name__ == "__main__":
    writer = Writer(folder_of("cpu") / "building.jsonl", environment())
    for each in sys.argv[1:]:
        row = {"architectures": each, **build(each)}
        writer.write(row)
        print(each, *(row[name] for name in ("seconds", "processor_seconds", "built")))
