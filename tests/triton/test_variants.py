"""How many kernels a set of calls needs: a user waits for each to compile. In a process of its own, as in
test_compile.py."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def test_other_numbers_of_rows_and_codes_need_no_other_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("variants.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) > 80
    later = defaultdict(Counter)
    for needed in kernels:
        later[str(needed["series"])][needed["kernel"]] += not needed["first"]
    for series, counts in later.items():
        assert not +counts, series
