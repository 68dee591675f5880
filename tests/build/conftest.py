import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# It counts machine code as the benchmarks do, which a source distribution leaves out; see tests/benchmarks/conftest.py.
collect_ignore = [] if (ROOT / "benchmarks").is_dir() else ["test_cuda_build.py"]
sys.path.append(str(ROOT))


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
