"""The documented machine code of the Triton kernels is what they compile to. In a process of its own: Triton cannot
compile in one that interprets."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.gpu.machine_code import FOLDER
from benchmarks.rows import read

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if shutil.which(os.environ.get("CC", "cc")) is None:
    pytest.skip("no C compiler", allow_module_level=True)

ROWS = """
import json, sys
from pathlib import Path
from benchmarks.gpu import machine_code
rows = machine_code.rows_of_triton(Path(sys.argv[1]), machine_code.cuobjdump(), lambda said: None)
print("\\n".join(map(json.dumps, rows)))
"""


@pytest.mark.slow
def test_the_documented_machine_code_is_what_triton_makes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ROWS, tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    documented = read(FOLDER / "triton.jsonl")
    for row in (*found, *documented):
        del row["sources"]
    if found[0]["compiler"] != documented[0]["compiler"]:
        pytest.skip(f"{found[0]['compiler']}: the documented machine code is of {documented[0]['compiler']}")
    assert found == documented, "run python -m benchmarks.gpu.machine_code"
